"""Which device and dtype to compute with, and whether torch can use the GPU that is in the machine."""

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

__all__ = ["DTypeName", "Device", "UnusedGpu", "choose_device", "choose_threads", "explain_unused_gpu", "make_stream"]

DTypeName = Literal["float32", "bfloat16", "auto"]

CUDA_WHEELS = "https://download.pytorch.org/whl/cu130"


@dataclass(frozen=True, slots=True)
class Device:
    """Where the engine computes, as `welcome` reports it."""

    torch_device: torch.device
    dtype: torch.dtype
    name: str


@dataclass(frozen=True, slots=True)
class UnusedGpu:
    """Why a GPU that is there is of no use, and what to do about it; `str()` is both."""

    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what} {self.remedy}"


def choose_device(dtype: DTypeName) -> Device:
    """Take the GPU if torch can use one. `auto` is bfloat16 where the hardware multiplies it, else float32."""
    if torch.cuda.is_available():
        device, name = torch.device("cuda", torch.cuda.current_device()), torch.cuda.get_device_name()
        has_bfloat16 = torch.cuda.get_device_capability() >= (8, 0)
    else:
        device, name = torch.device("cpu"), f"cpu, {torch.get_num_threads()} threads"
        has_bfloat16 = _cpu_multiplies_bfloat16()
    chosen = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(
        dtype, torch.bfloat16 if has_bfloat16 else torch.float32
    )
    return Device(device, chosen, name)


def choose_threads() -> int:
    """One thread a physical core, which is torch's default, and of more than four cores one for the game."""
    num_cores = torch.get_num_threads()
    is_chosen = "OMP_NUM_THREADS" in os.environ
    return num_cores - 1 if num_cores > 4 and not is_chosen else num_cores


def make_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A stream of the lowest priority, behind what its maker has asked of the GPU so far; None where there is none.

    A priority is a hint among the streams of one process; what a driver does about other processes is its own affair.
    """
    if device.type != "cuda":
        return None
    lowest, _ = torch.cuda.Stream.priority_range()  # type: ignore[call-arg] # it is a static method
    stream = torch.cuda.Stream(device, priority=lowest)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    return stream


def explain_unused_gpu() -> UnusedGpu | None:
    """Say what to install if there is an NVIDIA GPU but torch was built without CUDA; None if all is well."""
    if torch.cuda.is_available() or not _has_nvidia_driver():
        return None
    version, number = torch.__version__, torch.__version__.split("+")[0]
    if torch.version.cuda is not None:
        return UnusedGpu(
            f"This machine has an NVIDIA GPU, but torch {version} cannot use it; everything runs on the CPU.",
            f"Update its driver, which is probably older than CUDA {torch.version.cuda} needs.",
        )
    return UnusedGpu(
        f"This machine has an NVIDIA GPU, but torch {version} is built for the CPU only.",
        f"pip install --force-reinstall --no-deps torch=={number} --index-url {CUDA_WHEELS} "
        "(cards older than the RTX 20 series: cu126).",
    )


def _cpu_multiplies_bfloat16() -> bool:
    """Ask torch's private probes; a build for another processor may not have them.

    The processor must have the instructions and oneDNN, which may be told to do without (ONEDNN_MAX_CPU_ISA), use them.
    """
    try:
        has_them = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return bool(has_them and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return False


def _has_nvidia_driver() -> bool:
    if sys.platform == "win32":
        return (Path(os.environ.get("SYSTEMROOT", r"C:\Windows")) / "System32" / "nvcuda.dll").is_file()
    return Path("/proc/driver/nvidia/version").is_file() or shutil.which("nvidia-smi") is not None
