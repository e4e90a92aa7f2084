"""Whose the GPU's memory is: as much KV cache as fits, and a clear word where it does not."""

from pathlib import Path

import pytest
import torch
from npc_kernels import gpu
from test_gpu import make_batch
from triton.runtime.interpreter import GridExecutor

from npc_runtime.engine.core import EngineConfig
from npc_runtime.engine.memory import MIN_KV_TOKENS, GpuMemory, fit_kv_tokens, step_bytes
from npc_runtime.engine.model import ModelShape
from npc_runtime.errors import StartupError
from npc_runtime.loading import Settings, limit_gpu

MIB = 1 << 20
LLAMA_3B = ModelShape(28, 3072, 8192, 24, 8, 128, 128_256, 4096, 1e-5)
TOKEN = 2 * 28 * 1024 * 2


def fit(free, budget=None, used=2_000 * MIB, pool=100 * MIB, wanted=16_384):
    memory = GpuMemory(used=used, free=free * MIB, total=8_192 * MIB)
    budget = None if budget is None else budget * MIB
    return fit_kv_tokens(memory, budget=budget, pool=pool, step=500 * MIB, token=TOKEN, wanted=wanted)


def test_what_is_wanted_is_the_most():
    assert fit(6_000) == 16_384
    assert fit(6_000, wanted=9_000) == 9_000


def test_the_cache_takes_what_is_left():
    """Of what is free, or of the budget; both count what is there already."""
    assert fit(1_600) == 1_000 * MIB // TOKEN
    assert fit(6_000, budget=3_600) == 1_000 * MIB // TOKEN
    assert fit(1_600, budget=8_000) == 1_000 * MIB // TOKEN


@pytest.mark.parametrize(("free", "budget"), [(620, None), (620, 8_000)])
def test_a_full_gpu_is_named(free, budget):
    with pytest.raises(StartupError, match=r"620 of 8192 MiB left beside the base.*adapters 100.*Close other programs"):
        fit(free, budget)


def test_a_budget_that_is_too_small_names_one_that_is_not():
    with pytest.raises(StartupError, match=r"--gpu-memory 2600 is too little: (\d+) MiB are needed") as caught:
        fit(6_000, budget=2_600)
    needed = int(str(caught.value).split("too little: ")[1].split()[0])
    assert fit(6_000, budget=needed) >= MIN_KV_TOKENS
    with pytest.raises(StartupError):
        fit(6_000, budget=needed - 1)


def test_the_largest_step_is_counted():
    """Llama-3.2-3B, and a quarter of a GiB for graphs."""
    found = step_bytes(LLAMA_3B, EngineConfig())
    logits = 4 * 64 * LLAMA_3B.vocab  # of all graphs; of a step that is none, and a copy
    planes = 2 * 4 * 512 * 2 * LLAMA_3B.intermediate
    attention = 4 * 8 * 512 * (3072 + 2 * 24)
    assert found == 256 * MIB + 3 * logits + planes + attention
    assert 400 * MIB < found < 700 * MIB


def settings(gpu_mib):
    return Settings("base", Path(), "127.0.0.1", 0, "auto", None, True, gpu_mib=gpu_mib)


def test_torch_is_held_to_the_budget_before_anything_is_loaded(monkeypatch):
    limits = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1_000 * MIB, 8_000 * MIB))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *given: limits.append(given))
    limit_gpu(settings(None))
    limit_gpu(settings(2_000))
    limit_gpu(settings(9_000))
    assert limits == [(0.25, 1), (1.0, 1)]


def test_a_budget_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    limit_gpu(settings(None))
    with pytest.raises(StartupError, match="computes on the CPU"):
        limit_gpu(settings(2_000))


def test_the_attention_is_counted(monkeypatch):
    """What a chunk of a prompt behind 37,000 tokens really takes between its two launches."""
    made, empty = [], torch.empty

    def note(*size, **options):
        made.append(empty(*size, **options))
        return made[-1]

    shape = LLAMA_3B
    cache = empty(4, 16, shape.num_kv_heads, shape.head_dim, dtype=torch.bfloat16, device="meta")
    batch = make_batch([(37_000 - 512, 37_000)])
    planned = gpu.plan(batch, *(empty(40_000, 64, device="meta") for _ in range(2)))
    monkeypatch.setattr(GridExecutor, "__call__", lambda self, *args, **options: None)
    monkeypatch.setattr(torch, "empty", note)
    gpu.paged_attention(empty(512, shape.num_heads, shape.head_dim, device="meta"), cache, cache, planned)
    assert sum(part.nbytes for part in made) == 4 * 8 * 512 * (3072 + 2 * 24)
