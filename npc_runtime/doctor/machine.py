"""What the machine has: processor, GPU, memory, room on its disk, folders that can be written."""

import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from npc_runtime.doctor.finding import Finding, Level

__all__ = ["Cpu", "Gpu", "check_cpu", "check_disk", "check_folder", "check_gpu", "check_memory", "free_bytes"]

MIB, GIB = 1 << 20, 1 << 30
MIN_FREE_DISK = GIB
FIRST_BFLOAT16_GPU = (8, 0)
LIMITING = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
"""Settings that keep torch from a processor's best instructions; left over from a test, as a rule."""


@dataclass(frozen=True, slots=True)
class Cpu:
    """A processor as the daemon would use it."""

    name: str
    instructions: str  # torch's word: AVX512, AVX2, DEFAULT, …
    has_bfloat16: bool  # products in it
    num_cores: int  # physical
    num_threads: int
    settings: Mapping[str, str] = field(default_factory=dict)  # of the environment, that bear on it

    @classmethod
    def look(cls) -> "Cpu":
        """Ask torch and the system."""
        import psutil
        import torch

        from npc_runtime.engine.device import choose_device, choose_threads

        names = (*LIMITING, "OMP_NUM_THREADS")
        return cls(
            name=_cpu_name(),
            instructions=torch.backends.cpu.get_cpu_capability(),
            has_bfloat16=choose_device("auto").dtype == torch.bfloat16,
            num_cores=psutil.cpu_count(logical=False) or os.cpu_count() or 1,
            num_threads=choose_threads(),
            settings={name: os.environ[name] for name in names if name in os.environ},
        )


@dataclass(frozen=True, slots=True)
class Gpu:
    """The GPU that the daemon would use; the first of several that it sees."""

    name: str
    capability: tuple[int, int]
    free: int  # bytes
    total: int
    num_others: int = 0

    @classmethod
    def look(cls) -> "Gpu | None":
        """Ask torch; None if it can use none."""
        import torch

        if not torch.cuda.is_available():
            return None
        free, total = torch.cuda.mem_get_info()
        name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
        return cls(name, capability, free, total, torch.cuda.device_count() - 1)


def check_cpu(cpu: Cpu, *, is_used: bool) -> Iterator[Finding]:
    """What the processor is good for; where a GPU computes, that is of no matter."""
    dtype = "bfloat16" if cpu.has_bfloat16 else "float32"
    about = f"{cpu.name}, {cpu.num_cores} cores"
    if not is_used:
        yield Finding("cpu", "ok", f"{about}; the GPU computes")
        return
    about += f", {cpu.num_threads} threads, {cpu.instructions}, {dtype}"
    limits = [f"{name}={value}" for name, value in cpu.settings.items() if name in LIMITING]
    if limits and not cpu.has_bfloat16:
        yield Finding("cpu", "slow", f"{about}; {' '.join(limits)} keeps torch from more", "Unset it.")
    elif not cpu.has_bfloat16:
        what = f"{about}: it multiplies no bfloat16, and eight NPCs at once speak about half as fast as where one does"
        yield Finding("cpu", "slow", what, "Nothing is to be installed; AVX-512 BF16 or AMX, or an NVIDIA GPU, has it.")
    else:
        yield Finding("cpu", "ok", about)
    wanted = cpu.num_cores - 1 if cpu.num_cores > 4 else cpu.num_cores  # one for the game
    if cpu.num_threads < wanted:
        chosen = cpu.settings.get("OMP_NUM_THREADS")
        remedy = "Unset OMP_NUM_THREADS." if chosen else f"npc-runtime serve --threads {wanted}"
        yield Finding("cpu", "slow", f"only {cpu.num_threads} of {cpu.num_cores} cores would be used", remedy)


def check_gpu(gpu: Gpu | None, unused: tuple[str, str] | None, needed: tuple[int, int] | None) -> Iterator[Finding]:
    """Whether there is a GPU that computes fast and has room for the base.

    `unused` says what keeps torch from one that is there, and the remedy. `needed` are the bytes of the base alone, and
    with what a daemon has besides; None if that is not known.
    """
    if gpu is None:
        what, remedy = unused or ("none from NVIDIA; the CPU computes", "")
        yield Finding("gpu", "slow" if unused else "ok", what, remedy)
        return
    others = f", {gpu.num_others} more (CUDA_VISIBLE_DEVICES chooses)" if gpu.num_others else ""
    about = f"{gpu.name}, {_gb(gpu.free)} of {_gb(gpu.total)} free{others}"
    if gpu.capability < FIRST_BFLOAT16_GPU:
        what = f"{about}: it has no bfloat16 products, and torch computes instead of our kernels, far slower"
        yield Finding("gpu", "slow", what, "They came with the RTX 30 series; CUDA_VISIBLE_DEVICES=-1 hides this one.")
    else:
        yield Finding("gpu", "ok", about)
    alone, wanted = needed or (0, 0)
    if gpu.free < wanted:
        level: Level = "wrong" if gpu.free < alone else "slow"
        what = f"the base takes about {_gb(alone)} of its memory, a daemon at its ease {_gb(wanted)}"
        yield Finding("gpu", level, what, "Close programs that use it, or take a smaller base or --quantize int4.")


def check_memory(total: int, available: int, needed: int | None) -> Iterator[Finding]:
    """Whether the base and what it computes with fit into main memory; sizes are bytes, and estimates."""
    about = f"{_gb(available)} of {_gb(total)} free"
    if needed is None:
        yield Finding("memory", "ok", about)
    elif total < needed:
        yield Finding("memory", "wrong", f"{about}; about {_gb(needed)} are needed", "Take a smaller base.")
    elif available < needed:
        remedy = "Close other programs, take a smaller base, or lower --kv-memory."
        yield Finding("memory", "slow", f"{about}; about {_gb(needed)} are needed: the system would swap", remedy)
    else:
        yield Finding("memory", "ok", f"{about}; about {_gb(needed)} are needed")


def check_disk(folder: Path, free: int, needed: int) -> Iterator[Finding]:
    """Whether what is still to be fetched or made has room in the cache."""
    about = f"{_gb(free)} free in {folder}"
    remedy = "Make room, or set NPC_RUNTIME_CACHE to a folder that has it."
    if free < needed:
        yield Finding("disk", "wrong", f"{about}, {_gb(needed)} are needed for the base", remedy)
    elif free < MIN_FREE_DISK:
        yield Finding("disk", "slow", f"{about}: little for converted and quantized bases", remedy)
    else:
        yield Finding("disk", "ok", about)


def check_folder(label: str, folder: Path, remedy: str, *, is_vital: bool) -> Iterator[Finding]:
    """Whether a folder can be written, or made; leaves nothing behind."""
    existing = _nearest(folder)
    try:
        if not existing.is_dir():
            raise NotADirectoryError(20, "it is no folder")
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        what = f"{label}: {existing} cannot be written ({error.strerror or error})"
        yield Finding("folders", "wrong" if is_vital else "slow", what, remedy)
    else:
        yield Finding("folders", "ok", f"{label}: {folder}")


def _nearest(folder: Path) -> Path:
    """The folder, or what there is of the path to it."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def free_bytes(folder: Path) -> int:
    """The room where the folder is, or would be."""
    return shutil.disk_usage(_nearest(folder)).free


def _cpu_name() -> str:
    """What the maker calls it, where the system says so."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
