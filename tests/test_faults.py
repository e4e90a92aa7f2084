"""Errors of the device: which they are, and whether it still answers."""

import threading

import pytest
import torch

from npc_runtime.engine import faults
from npc_runtime.engine.faults import Attempts, DeviceLost, is_device_error, is_out_of_memory, probe_device

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("error", "of_device", "of_memory"),
    [
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), True, False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"), True, False),
        (RuntimeError("Triton Error [CUDA]: unspecified launch failure"), True, False),
        (DeviceLost("gone"), True, False),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), False, True),
        (torch.AcceleratorError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA"), False, True),
        (MemoryError(), False, True),
        (RuntimeError("The size of tensor a must match"), False, False),
        (ValueError("CUDA error: quoted by somebody"), False, False),
        (KeyboardInterrupt(), False, False),
    ],
)
def test_what_is_whose(error, of_device, of_memory):
    assert (is_device_error(error), is_out_of_memory(error)) == (of_device, of_memory)


def test_a_sound_device_answers():
    probe_device(CPU)


def test_a_device_that_fails_is_lost(monkeypatch):
    def fail(device):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(faults, "_compute", fail)
    with pytest.raises(DeviceLost) as caught:
        probe_device(CPU)
    assert isinstance(caught.value.__cause__, torch.AcceleratorError)


def test_a_device_that_hangs_is_lost(monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(faults, "_compute", lambda device: release.wait(30))
    try:
        with pytest.raises(DeviceLost, match="did not answer"):
            probe_device(CPU, timeout_s=0.02)
    finally:
        release.set()


def test_attempts_are_counted_within_a_window():
    attempts = Attempts(2, 10.0, [0.0])
    assert [attempts.take(now) for now in (5.0, 9.0, 10.0, 14.0, 15.0)] == [True, False, True, False, True]
    assert attempts.times == (10.0, 15.0)
    assert not Attempts(2, 10.0, attempts.times).take(19.0)
