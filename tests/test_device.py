"""What is computed with: the dtype follows what the processor and oneDNN multiply fast."""

import os
import subprocess
import sys

import pytest
import torch
from fake_cuda import LOWEST, FakeCuda

from npc_runtime.engine.device import choose_device, make_stream


def choose(**environment):
    code = "from npc_runtime.engine.device import choose_device; print(choose_device('auto').dtype)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("isa", ["SSE41", "AVX2"])
def test_without_fast_bfloat16_products_float32_is_chosen(isa):
    """bfloat16 would be converted for every product: four times slower than float32."""
    assert choose(ONEDNN_MAX_CPU_ISA=isa) == "torch.float32"


def test_the_gpu_is_named_by_its_number(monkeypatch):
    """Some functions of torch take no device that is just "cuda"."""
    cuda = {"is_available": True, "current_device": 1, "get_device_name": "a card", "get_device_capability": (8, 6)}
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    device = choose_device("auto")
    assert (device.torch_device, device.dtype, device.name) == (torch.device("cuda:1"), torch.bfloat16, "a card")


def test_a_stream_has_the_lowest_priority_and_begins_behind_what_was_asked_before(monkeypatch):
    """The weights, which are still being copied."""
    cuda = FakeCuda(monkeypatch)
    stream = make_stream(torch.device("cuda:0"))
    assert stream.priority == LOWEST
    assert cuda.waits == [(stream, cuda.default)]
    assert make_stream(torch.device("cpu")) is None
