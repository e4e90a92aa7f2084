"""One result of a run, and the loop that takes a part's items one by one, so that none stops the rest."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

__all__ = ["Part", "Result", "Skip", "measure_all"]


class Skip(Exception):
    """What cannot be measured on this card, and why."""


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one item. `passed`: of a proof; None where there is nothing to pass, or where it was skipped."""

    kind: str  # proof, table, prefill, loading, peft
    item: str
    passed: bool | None = None
    skipped: str = ""  # why
    seconds: float = 0.0
    numbers: dict[str, Any] = field(default_factory=dict)


class Part(Protocol):
    """Items that share a model, and so a process."""

    kind: str

    @property
    def items(self) -> list[str]:
        """What is measured, the most important first."""
        ...

    def measure(self, item: str) -> dict[str, Any]:
        """The item's numbers; of a proof also `passed`. Raises `Skip`."""
        ...


def measure_all(part: Part) -> Iterator[Result]:
    """Every item of the part; what raises is reported and over."""
    for item in part.items:
        started = time.perf_counter()
        numbers: dict[str, Any] = {}
        skipped, passed = "", None
        try:
            numbers = part.measure(item)
            passed = numbers.pop("passed", None)
        except (Skip, torch.OutOfMemoryError) as error:
            skipped = str(error).splitlines()[0]
        except Exception as error:  # a crash is a result too
            skipped = f"{type(error).__name__}: {error}".splitlines()[0]
            passed = False if part.kind == "proof" else None
        yield Result(part.kind, item, passed, skipped, round(time.perf_counter() - started, 2), numbers)
