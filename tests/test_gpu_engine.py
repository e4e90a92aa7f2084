"""The whole engine on the GPU's kernels, in Triton's interpreter: the tokens of the torch path."""

import pytest
from driving import TinyBase, greedy, make_engine, make_store, speak
from npc_kernels import gpu, reference
from test_model import load
from tiny import make_adapter, make_model

from npc_runtime.engine.core import EngineConfig

RANKS = {"small": 8, "one": 16, "two": 24, "large": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base with head norms and adapters of every kind of rank."""
    folder = tmp_path_factory.mktemp("gpu")
    model = make_model("qwen3", folder / "model")
    for seed, (name, rank) in enumerate(RANKS.items()):
        make_adapter(model, folder / name, rank=rank, seed=seed, std=0.2)
    return folder


def requests():
    """Greedy and drawn lines of every adapter and of none; two that share a prompt."""
    lines = [*RANKS, None, "one"]
    return [
        greedy(
            number,
            [3 + (5 * number + position) % 90 for position in range(5 + 9 * number)] if number < 5 else range(30, 52),
            name,
            max_tokens=4,
            **({"temperature": 0.9, "top_p": 0.9, "seed": number} if number % 2 else {}),
        )
        for number, name in enumerate([*lines, "one"])
    ]


def tokens_of(folder, kernels, config):
    base = TinyBase(load(folder / "model", kernels))
    store = make_store(base.decoder)
    for name in RANKS:
        store.add(name, [(folder / name, 1.0)])
    engine, run = make_engine(base, store, config)
    return speak(engine, run, requests()).tokens


def test_the_engine_speaks_the_torch_paths_tokens(folder):
    """Prompts in chunks, beside lines that speak."""
    config = EngineConfig(kv_tokens=512, max_step_tokens=23)
    expected = tokens_of(folder, reference, config)
    assert len({tuple(tokens) for tokens in expected.values()}) >= 6
    assert tokens_of(folder, gpu, config) == expected
