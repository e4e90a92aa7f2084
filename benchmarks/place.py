"""Where everything lies, and the machine it runs on."""

import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from processes import physical_cores

__all__ = ["AVX2", "ROOT", "Place", "describe_machine"]

ROOT = Path(__file__).resolve().parent.parent
AVX2 = {
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "NUMBA_CPU_NAME": "haswell",
    "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+popcnt,+sse4.2",
}
"""Makes torch and numba compute as on a processor without AVX-512, which is what most laptops have."""

MODEL_NAME = "model name"
NOTED_FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")


@dataclass(slots=True)
class Place:
    """The bench folder, the base, and what the systems share."""

    root: Path
    base: Path
    threads: int
    llama_binaries: str = ""

    @classmethod
    def at(cls, root: Path, base: Path) -> "Place":
        """A bench folder, made if need be."""
        root.mkdir(parents=True, exist_ok=True)
        return cls(root=root.resolve(), base=base.resolve(), threads=physical_cores())

    @property
    def torch_index(self) -> list[str]:
        """pip's options for the wheel index of torch that TORCH_INDEX names, as in the Makefile."""
        index = os.environ.get("TORCH_INDEX")
        return ["--index-url", index] if index else []

    @property
    def config(self) -> dict[str, Any]:
        """The base's config.json."""
        document: dict[str, Any] = json.loads((self.base / "config.json").read_text(encoding="utf-8"))
        return document

    def log(self, name: str) -> Path:
        """Where a system's process writes what it has to say."""
        return self.root / "logs" / f"{name}.log"


def describe_machine(threads: int) -> dict[str, Any]:
    """What a reader of the numbers must know."""
    name, flags = platform.processor() or platform.machine(), []
    info = Path("/proc/cpuinfo")
    if info.exists():
        rows = dict(row.split(":", 1) for row in info.read_text().split("\n\n")[0].splitlines() if ":" in row)
        fields = {key.strip(): value.strip() for key, value in rows.items()}
        name = fields.get(MODEL_NAME, name)
        flags = [flag for flag in NOTED_FLAGS if flag in fields.get("flags", "").split()]
    return {
        "cpu": name,
        "physical_cores": threads,
        "isa": flags,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": f"{platform.system()} {platform.machine()}",
        "load_before": round(os.getloadavg()[0], 2),
    }
