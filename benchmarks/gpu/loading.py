"""Loading an adapter into pages while others decode: how long it takes, and how long a step is meanwhile."""

import statistics
import time
from typing import Any

from gpu.models import make_sequence, make_store
from gpu.setup import Setup
from gpu.table import Bed, step
from npc_runtime.engine.adapters import AdapterStore
from npc_runtime.engine.core import Admission, Sequence
from npc_runtime.engine.runner import Runner

__all__ = ["Loading"]

MAX_STEPS = 10_000


class Loading:
    """A part: rank 16 beside rows that speak with rank 16, from pinned main memory, as the store has it, and others."""

    kind = "loading"

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._bed: Bed | None = None

    @property
    def items(self) -> list[str]:
        """Where the adapter comes from."""
        pageable = ["a rank-16 adapter, from pageable memory"] if self._setup.on_gpu else []
        return ["a rank-16 adapter as the store has it", *pageable]

    def measure(self, item: str) -> dict[str, Any]:
        """Medians and the longest, over some loads."""
        self._bed = self._bed or Bed(self._setup, 4)
        rows = min(8, max(self._setup.rows))
        names = [f"a{number}" for number in range(rows)]
        ranks = {name: 16 for name in [*names, "x", "y"]}
        # One page more than the rows need: x and y push each other out.
        pinned = self._setup.on_gpu and "pageable" not in item
        store = make_store(self._bed.base.decoder, ranks, shared=True, pinned=pinned, max_pages=rows + 1)
        runner, lines = self._bed.runner(store), self._bed.lines(rows, self._setup.prompts[0], names)
        for line in lines:
            assert store.admit(line) is Admission.ADMITTED
        calm = [step(runner, lines) for _ in range(2 * self._setup.loads)][2:]
        for line in lines:
            del line.output_ids[-2 * self._setup.loads :]
        # The pool begins with x; each load pushes the other one out.
        loads = [_load(store, runner, lines, "yx"[number % 2]) for number in range(2 + self._setup.loads)][2:]
        store.close(10)
        during = [taken for _, steps in loads for taken in steps]
        return {
            "rows": rows,
            "load_ms": round(statistics.median(taken for taken, _ in loads), 3),
            "longest_load_ms": round(max(taken for taken, _ in loads), 3),
            "step_ms": round(statistics.median(calm), 3),
            "longest_step_ms": round(max(calm), 3),
            "step_while_loading_ms": round(statistics.median(during), 3),
            "longest_step_while_loading_ms": round(max(during), 3),
        }


def _load(store: AdapterStore, runner: Runner, lines: list[Sequence], name: str) -> tuple[float, list[float]]:
    """Ask for an adapter and speak until it is there; how long that took, and every step."""
    done: list[float] = []
    store.on_loaded = lambda: done.append(time.perf_counter())
    wanted = make_sequence(-1, (3,), name, [])
    started, steps = time.perf_counter(), []
    outcome = store.admit(wanted)
    while outcome is not Admission.ADMITTED:
        steps.append(step(runner, lines))
        for failure in store.collect():
            raise failure.error
        if done:
            outcome = store.admit(wanted)
        if len(steps) > MAX_STEPS:
            raise RuntimeError(f"the adapter was not loaded: {outcome}")
    store.leave(wanted)
    for line in lines:
        del line.output_ids[len(line.output_ids) - len(steps) :]
    return 1000 * (done[0] - started), steps
