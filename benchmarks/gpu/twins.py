"""Proof: every kernel computes what its torch twin computes, at the shapes of the table; the cases of kernels/bench.py.

Two distances: the largest difference as a share of the largest number, and the norm of the difference as a share of
the norm. Both sides round to bfloat16 at the same places, so neither is the truth; one wrong tile is far outside.
"""

from dataclasses import replace
from typing import Any

import torch
from bench import TOLERANCE, Bench, Case

from gpu.setup import Setup

__all__ = ["Twins"]

NORM_TOLERANCE = 1.5e-2


class Twins:
    """A part: an item for each number of rows and rank."""

    kind = "proof"

    def __init__(self, setup: Setup) -> None:
        self._setup = setup

    @property
    def items(self) -> list[str]:
        """Rows and ranks."""
        return [_title(rows, rank) for rows, rank in self._setup.twins]

    def measure(self, item: str) -> dict[str, Any]:
        """The worst case and all that are wrong."""
        setup = self._setup
        rows, rank = next(size for size in setup.twins if _title(*size) == item)
        torch.manual_seed(rows + rank)
        # Kernels see one layer; pages of all would only take memory.
        model = replace(setup.model, shape=replace(setup.model.shape, num_layers=1))
        found = {case.name: _distances(case) for case in Bench(model, rows, rank, setup.device, setup.dtype).cases()}
        wrong = [
            name for name, (largest, norm) in found.items() if not (largest <= TOLERANCE and norm <= NORM_TOLERANCE)
        ]
        return {
            "passed": not wrong,
            "kernels": len(found),
            "largest": max(largest for largest, _ in found.values()),
            "norm": max(norm for _, norm in found.values()),
            "wrong": {name: found[name] for name in wrong},
        }


def _title(rows: int, rank: int) -> str:
    return f"kernels equal their twins, {rows} rows, rank {rank}"


def _distances(case: Case) -> tuple[float, float]:
    """Of the largest number, and of the norm; a NaN is passed on and never within a tolerance."""
    ours, twin = case.ours().double(), case.twin().double()
    gap = ours - twin
    largest = gap.abs().max() / twin.abs().max().clamp(min=1e-6)
    return float(f"{largest.item():.3g}"), float(f"{(gap.norm() / twin.norm().clamp(min=1e-6)).item():.3g}")
