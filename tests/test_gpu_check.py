"""The check that a GPU's kernels pass before a daemon uses them, in the interpreter."""

import pytest
import torch
from npc_kernels import gpu, gpu_check

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_good_kernels_pass(dtype):
    assert gpu_check.check_gpu(CPU, dtype) is None


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        ("finish_qkv", "queries differs by"),
        ("paged_attention", "attention differs by"),
        ("finish_residual", "residual stream differs by"),
        ("head", "logits differs by"),
    ],
)
def test_a_wrong_kernel_is_named(function, problem, monkeypatch):
    right = getattr(gpu, function)

    def wrong(*args, **kwargs):
        result = right(*args, **kwargs)
        tensor = args[1] if function == "finish_residual" else result
        tensor.view(-1)[7] += 100
        return result

    monkeypatch.setattr(gpu, function, wrong)
    assert gpu_check.check_gpu(CPU, torch.float32).startswith(problem)


def test_a_kernel_that_does_not_compile_is_said(monkeypatch):
    def broken(*args):
        raise RuntimeError("ptxas: no")

    monkeypatch.setattr(gpu, "paged_attention", broken)
    assert gpu_check.check_gpu(CPU, torch.float32) == "RuntimeError: ptxas: no"
