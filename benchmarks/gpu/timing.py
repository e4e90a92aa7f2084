"""Clocks: medians of runs on the device, and how long Triton compiles."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import triton

__all__ = ["CompileClock", "median_ms"]


def median_ms(run: Callable[[], Any], device: torch.device, *, repeats: int, inner: int = 1) -> float:
    """The median time of a run on the device; `inner` runs are timed together and share the time."""
    run()
    return statistics.median(_time_once(run, device, inner) for _ in range(repeats)) / inner


def _time_once(run: Callable[[], Any], device: torch.device, inner: int) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(inner):
            run()
        return 1000 * (time.perf_counter() - started)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(inner):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


class CompileClock:
    """Counts what Triton compiles in this process; what it finds in its cache on disk is not counted."""

    def __init__(self) -> None:
        self.num_kernels = 0
        self.seconds = 0.0
        triton.knobs.compilation.listener = self._heard

    def _heard(self, *, times: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            self.num_kernels += 1
            self.seconds += times.total / 1e6
