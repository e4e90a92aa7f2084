"""The machine: its name and versions, and the two speeds that floors are made of."""

import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from gpu.setup import Setup
from gpu.timing import median_ms

__all__ = ["Machine"]

NODES = 400
"""Kernels of the graph that measures an empty node."""

CLOCKS = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit")


class Machine:
    """A part with one item."""

    kind = "machine"

    def __init__(self, setup: Setup) -> None:
        self._setup = setup

    @property
    def items(self) -> list[str]:
        """The machine."""
        return ["machine"]

    def measure(self, item: str) -> dict[str, Any]:
        """Name, versions, copy bandwidth, and the time of a graph node that does next to nothing."""
        return {
            **self._card(),
            "torch": torch.__version__,
            **{name: _version(name) for name in ("triton", "transformers", "peft", "numpy")},
            "cuda": torch.version.cuda,
            "copy_gb_s": round(self._copy_bandwidth() / 1e9, 1),
            "node_us": round(1000 * self._node_ms(), 3),
            **self._clocks(),
        }

    def _card(self) -> dict[str, Any]:
        if not self._setup.on_gpu:
            return {"name": "Triton's interpreter on a CPU, which shows nothing about any GPU"}
        card = torch.cuda.get_device_properties(self._setup.device)
        return {
            "name": card.name,
            "capability": f"{card.major}.{card.minor}",
            "multiprocessors": card.multi_processor_count,
            "memory_gb": round(card.total_memory / 1e9, 1),
            "l2_mb": round(card.L2_cache_size / 1e6, 1),
        }

    def _copy_bandwidth(self) -> float:
        """Bytes a second that a large copy on the device reads and writes."""
        source = torch.randint(0, 255, (self._setup.copy_bytes,), dtype=torch.uint8, device=self._setup.device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / (median_ms(lambda: target.copy_(source), self._setup.device, repeats=25) / 1e3)

    def _node_ms(self) -> float:
        """What a launch costs inside a graph, each waiting for the one before, as in a step."""
        number = torch.zeros(1, device=self._setup.device)

        def compute() -> None:
            for _ in range(NODES):
                number.add_(1)

        if not self._setup.on_gpu:
            return median_ms(compute, self._setup.device, repeats=3) / NODES
        graph = torch.cuda.CUDAGraph()
        compute()
        with torch.cuda.graph(graph):
            compute()
        return median_ms(graph.replay, self._setup.device, repeats=25) / NODES

    def _clocks(self) -> dict[str, str]:
        """As nvidia-smi has them, read only; nothing where it does not answer."""
        if not self._setup.on_gpu or shutil.which("nvidia-smi") is None:
            return {}
        command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError):
            return {}
        return dict(zip(CLOCKS, (word.strip() for word in done.stdout.splitlines()[0].split(",")), strict=False))


def _version(name: str) -> str | None:
    """Without importing it, which takes seconds."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
