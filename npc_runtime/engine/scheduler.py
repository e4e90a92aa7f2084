"""Who runs next: admission, priority, deadlines, chunked prefill. No torch, no clock.

Every step serves all running rows at once: a row that still has prompt to compute gets a chunk of it, a row
that is speaking gets one token. A new line is admitted when a row, its KV blocks and its adapter's pages are
free; the line at the head of the queue is never overtaken by a smaller one behind it, so nothing starves
within a priority.
"""

import heapq
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

from npc_runtime.engine.blocks import BlockAllocator
from npc_runtime.engine.core import EngineConfig, Request, Sequence
from npc_runtime.errors import ContextOverflow, OverloadError

__all__ = ["Admit", "PlannedRow", "Scheduler"]

Admit = Callable[[Sequence], bool]
"""Takes whatever else a sequence needs to run (its adapter's pages); False: not now."""


@dataclass(frozen=True, slots=True)
class PlannedRow:
    """One row of the next step: tokens `[start, stop)` of a sequence."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def samples(self) -> bool:
        """Whether this chunk reaches the last known token, so that the next one can be sampled."""
        return self.stop == self.sequence.num_tokens


class Scheduler:
    """The waiting queue and the running rows."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self.blocks = BlockAllocator(config.num_blocks, config.block_size)
        self.running: list[Sequence] = []
        self._waiting: list[tuple[int, int, Sequence]] = []  # heap by (-priority, request id)

    @property
    def num_waiting(self) -> int:
        """Lines that are queued."""
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.running or self._waiting)

    @property
    def groups(self) -> frozenset[Hashable]:
        """The groups of the running rows."""
        return frozenset(sequence.request.group for sequence in self.running)

    def add(self, request: Request) -> None:
        """Queue a request. Raises `OverloadError` or `ContextOverflow`; then nothing is queued."""
        if len(self._waiting) >= self._config.max_waiting:
            raise OverloadError(f"{self._config.max_waiting} lines are already waiting.", "Send fewer, or wait.")
        sequence = Sequence(request)
        if self.blocks.num_needed(sequence) > self.blocks.num_blocks:
            raise ContextOverflow(
                f"The prompt ({len(request.prompt_ids)} tokens) and {request.sampling.max_tokens} more do not fit "
                f"into the {self._config.kv_tokens} tokens of the KV cache.",
                "Shorten the text, or lower max_tokens.",
            )
        heapq.heappush(self._waiting, (-request.priority, request.id, sequence))

    def plan(self, admit: Admit) -> list[PlannedRow]:
        """Admit what fits, then choose the rows of the next step: all that speak, and prompt chunks in order."""
        self._admit_waiting(admit)
        budget = self._config.max_step_tokens
        rows = []
        by_need = sorted(self.running, key=lambda sequence: sequence.num_tokens - sequence.num_computed > 1)
        for sequence in by_need:
            size = min(sequence.num_tokens - sequence.num_computed, budget)
            if size > 0:
                rows.append(PlannedRow(sequence, sequence.num_computed, sequence.num_computed + size))
                budget -= size
        return rows

    def remove(self, ids: Iterable[int]) -> list[Sequence]:
        """Take these lines out, wherever they are, and free their blocks; unknown ids are ignored."""
        wanted = set(ids)
        removed = [sequence for sequence in self.running if sequence.request.id in wanted]
        removed += [sequence for _, _, sequence in self._waiting if sequence.request.id in wanted]
        self.running = [sequence for sequence in self.running if sequence.request.id not in wanted]
        self._waiting = [entry for entry in self._waiting if entry[2].request.id not in wanted]
        heapq.heapify(self._waiting)
        for sequence in removed:
            self.blocks.free(sequence)
        return removed

    def remove_expired(self, now: float) -> list[Sequence]:
        """Take out every line whose deadline has passed."""
        everyone = [*self.running, *(sequence for _, _, sequence in self._waiting)]
        return self.remove(
            sequence.request.id
            for sequence in everyone
            if sequence.request.deadline is not None and sequence.request.deadline <= now
        )

    def remove_all(self) -> list[Sequence]:
        """Take out every line."""
        waiting = [sequence.request.id for _, _, sequence in self._waiting]
        return self.remove([*(sequence.request.id for sequence in self.running), *waiting])

    def check_integrity(self) -> None:
        """Assert that blocks and queues agree; tests call it after every step."""
        self.blocks.check_integrity(self.running)
        assert len(self.running) <= self._config.max_rows
        assert not any(sequence.blocks for _, _, sequence in self._waiting)
        for sequence in self.running:
            assert sequence.num_computed <= sequence.num_tokens

    def _admit_waiting(self, admit: Admit) -> None:
        while self._waiting and len(self.running) < self._config.max_rows:
            sequence = self._waiting[0][2]
            if not self.blocks.can_allocate(sequence) or not admit(sequence):
                return
            self.blocks.allocate(sequence)
            self.running.append(sequence)
            heapq.heappop(self._waiting)
