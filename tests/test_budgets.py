"""Memory budgets: what the user allows becomes sizes of the engine, and a daemon with little of it still serves all."""

import asyncio

import pytest
import torch
from game import line, play

from npc_runtime.engine.core import EngineConfig
from npc_runtime.engine.device import Device
from npc_runtime.engine.model import ModelShape
from npc_runtime.errors import StartupError
from npc_runtime.loading import Settings, make_config
from npc_runtime.persona import shipped_personas

SMALL = ModelShape(30, 576, 1536, 9, 3, 64, 49152, 8192, 1e-5)  # SmolLM2-135M
LARGE = ModelShape(28, 3072, 8192, 24, 8, 128, 128256, 131072, 1e-5)  # Llama-3.2-3B


def config_of(shape, dtype=torch.bfloat16, **budgets):
    settings = Settings("base", shipped_personas(), "127.0.0.1", 0, "auto", None, True, **budgets)
    return make_config(settings, shape, Device(torch.device("cpu"), dtype, "cpu"))


def kv_bytes(shape, config, size=2):
    return config.kv_tokens * 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * size


def test_defaults():
    assert config_of(SMALL) == config_of(SMALL, torch.float32) == EngineConfig()
    assert 0.99 * 2**30 < kv_bytes(LARGE, config_of(LARGE)) <= 2**30


@pytest.mark.parametrize("shape", [SMALL, LARGE])
@pytest.mark.parametrize("mib", [100, 5_000])
def test_the_kv_cache_is_as_large_as_was_asked_and_whole_blocks(shape, mib):
    config = config_of(shape, kv_mib=mib)
    assert config.kv_tokens % config.block_size == 0
    block_bytes = kv_bytes(shape, config) // config.num_blocks
    assert mib * 2**20 - block_bytes < kv_bytes(shape, config) <= mib * 2**20


def test_a_kv_cache_that_is_of_no_use_is_refused():
    with pytest.raises(StartupError, match="holds 91 tokens") as caught:
        config_of(SMALL, kv_mib=2)
    assert caught.value.hint == "Use 12 or more."
    assert config_of(SMALL, kv_mib=12).kv_tokens >= 512


def test_adapters_get_their_share_on_the_device_and_in_main_memory():
    config = config_of(SMALL, adapter_mib=300)
    assert (config.adapter_pool_bytes, config.adapter_host_bytes) == (300 * 2**20, 300 * 2**20)


def test_four_adapters_through_two_pages_in_a_daemon(make_daemon):
    """A page of the embedded base has 20 MB in float32."""
    options = ("--dtype", "float32", "--adapter-memory", "40", "--kv-memory", "100")
    daemon = make_daemon("--personas", str(shipped_personas()), *options)
    asyncio.run(speak_in_turns(daemon))


async def speak_in_turns(daemon):
    async with play(daemon) as game:
        names = ["brom", "marta", "odo", "thalindra", "vaskar", "brom", "odo"]
        lines = [line(number, name, sampling={"seed": 7, "max_tokens": 8}) for number, name in enumerate(names)]
        await game.send(type="generate", batch=1, lines=lines)
        messages = await game.until("batch.end")
        ends = {m["line"]: m for m in messages if m["type"] == "line.end"}
        assert messages[-1]["ok"] == 7
        assert (ends[0]["text"], ends[2]["text"]) == (ends[5]["text"], ends[6]["text"])
        await game.send(type="status", id=1)
        status = (await game.until("reply"))[-1]["body"]
        assert len(status["adapters"]) == 2


def test_adapters_that_can_never_fit_are_named(make_daemon):
    daemon = make_daemon("--personas", str(shipped_personas()), "--dtype", "float32", "--adapter-memory", "10")
    assert daemon.endpoint
    log = daemon.read_log()
    assert "The adapter of odo needs 1 pages, the pool has 0." in log
    assert "--adapter-memory" in log
