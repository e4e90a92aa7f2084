"""The parts of a run by name, and the one that a process computes: a line of JSON for each result."""

import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, TextIO

from gpu.independence import Independence
from gpu.loading import Loading
from gpu.machine import Machine
from gpu.parity import Parity
from gpu.peer import Peer
from gpu.replay import Replay
from gpu.results import Part, measure_all
from gpu.setup import Setup
from gpu.table import Prefill, Table
from gpu.timing import CompileClock
from gpu.twins import Twins

__all__ = ["PARTS", "Planned", "compute", "plain"]


@dataclass(frozen=True, slots=True)
class Planned:
    """A part, and the seconds after which the others are more important."""

    make: Callable[[Setup], Part]
    max_seconds: float


PARTS: dict[str, Planned] = {
    "machine": Planned(Machine, 60),
    "kernels": Planned(Twins, 120),
    "independence bf16": Planned(lambda setup: Independence(setup, 16), 150),
    "independence int4": Planned(lambda setup: Independence(setup, 4), 150),
    "parity": Planned(Parity, 150),
    "graphs": Planned(Replay, 90),
    "first cells int4": Planned(lambda setup: Table(setup, 4, first=True), 120),
    "first cells bf16": Planned(lambda setup: Table(setup, 16, first=True), 90),
    "peft": Planned(Peer, 60),
    "loading": Planned(Loading, 45),
    "prefill int4": Planned(lambda setup: Prefill(setup, 4), 45),
    "other cells int4": Planned(lambda setup: Table(setup, 4, first=False), 150),
    "other cells bf16": Planned(lambda setup: Table(setup, 16, first=False), 150),
    "prefill bf16": Planned(lambda setup: Prefill(setup, 16), 45),
}
"""The most important first."""


def compute(name: str, setup: Setup, out: TextIO | None = None) -> None:
    """Measure a part; what its process compiled comes last."""
    # Whatever libraries print goes to stderr, the results alone to stdout.
    out = out or os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    compiling = CompileClock()
    for result in measure_all(PARTS[name].make(setup)):
        print(json.dumps(plain(asdict(result)), allow_nan=False), file=out, flush=True)
    seconds = round(compiling.seconds, 1)
    print(json.dumps({"compiled": {"kernels": compiling.num_kernels, "seconds": seconds}}), file=out, flush=True)
    sys.stdout.flush()


def plain(value: Any) -> Any:
    """What JSON can say: a number that is not finite becomes a word."""
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
