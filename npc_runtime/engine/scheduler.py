"""Who runs next: admission, priority with ageing, deadlines, chunked prefill, preemption. No torch, no clock.

Every step serves all running rows at once: a row that is speaking gets one token, a row that still reads its
prompt gets a chunk of it from what is left of the step's budget. So a long prompt never stalls a line that is
being spoken; it only takes more steps.

A new line is admitted when a row and KV blocks for its prompt are free and its adapter is on the device. A line
whose adapter is being loaded is passed by those behind it. A line that there is no room for, neither blocks nor
pages, is not: whatever is given back is kept for it. Only lines whose adapter was loaded for them, and so keeps the
pages it is in, may still go before one that waits for pages; no further load is begun until that one has its own.

Waiting raises a line by one priority every `ageing_s`, so nothing starves. By that every line has a place in the queue,
which no clock changes. Lines of one priority take their places in turns: first those whose client has no other line of
that priority running or waiting ahead, then those whose client has one, and so on; of equals, the one whose client had
its last turn first. So a client's own lines keep their order, and one that sends many does not keep the others waiting.
An example, where nothing runs yet, and A9 is a line of client A with priority 9:

    places, by priority and arrival       A9  A5  A5  A5  B5  C5  B0
    others of its client ahead             0   0   1   2   0   0   0
    order                                 A9  A5  B5  C5  A5  A5  B0

A running line takes blocks as it grows; when none are left, the one with the last place is preempted: its blocks go
back, and it waits to be computed again, its reply so far as part of its prompt.
"""

from bisect import insort
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from itertools import count

from npc_runtime.engine.blocks import BlockPool
from npc_runtime.engine.core import Admission, EngineConfig, Request, Sequence
from npc_runtime.errors import ContextOverflow, OverloadError

__all__ = ["Admit", "PlannedRow", "Scheduler", "Suspend"]

Admit = Callable[[Sequence], Admission]
"""Takes whatever else a sequence needs to run: its adapter. `LOADING` promises it, until the sequence leaves."""

Suspend = Callable[[Sequence], bool]
"""Gives back what `Admit` took from a line that is preempted; True: all the same it is kept for it, as a promise."""


_Queue = tuple[int, Hashable]
"""A priority and a client."""


@dataclass(frozen=True, slots=True)
class PlannedRow:
    """One row of the next step: tokens `[start, stop)` of a sequence."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def num_tokens(self) -> int:
        """Tokens of the chunk."""
        return self.stop - self.start

    @property
    def samples(self) -> bool:
        """Whether this chunk reaches the last known token, so that the next one can be sampled."""
        return self.stop == self.sequence.num_tokens and not self.sequence.request.is_warmup

    @property
    def ends_warmup(self) -> bool:
        """Whether this chunk is the last of a prompt that is computed for the prefix cache only."""
        return self.stop == self.sequence.num_tokens and self.sequence.request.is_warmup


class Scheduler:
    """The waiting queue and the running rows."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self.blocks = BlockPool(config.num_blocks, config.block_size)
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []  # by place
        self.num_preempted = 0
        self._ticks = count(1)  # of lines that come and lines that are admitted
        self._turns: dict[_Queue, int] = {}  # when each had its last one, of those that have lines

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.running or self.waiting)

    @property
    def next_deadline(self) -> float | None:
        """When `remove_expired` will next find a line; None if no line has a deadline."""
        deadlines = [sequence.request.deadline for sequence in [*self.running, *self.waiting]]
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    def add(self, request: Request) -> None:
        """Queue a request. Raises `OverloadError` or `ContextOverflow`; then nothing is queued."""
        if len(self.waiting) >= self._config.max_waiting:
            raise OverloadError(f"{self._config.max_waiting} lines are already waiting.", "Send fewer, or wait.")
        sequence = Sequence(request, came_at=next(self._ticks))
        if self.blocks.num_needed(sequence.max_tokens) > self.blocks.num_blocks:
            raise ContextOverflow(
                f"The prompt ({len(request.prompt_ids)} tokens) and {request.sampling.max_tokens} more do not fit "
                f"into the {self._config.kv_tokens} tokens of the KV cache.",
                "Shorten the text, or lower max_tokens.",
            )
        insort(self.waiting, sequence, key=self._place)

    def plan(self, admit: Admit, suspend: Suspend, *, max_prompt_tokens: int | None = None) -> list[PlannedRow]:
        """Admit what fits, then choose the rows of the next step: all that speak, and prompt chunks in turns.

        `max_prompt_tokens` bounds all chunks together, besides `max_step_tokens`, which bounds the whole step.
        """
        self._admit_waiting(admit)
        budget = self._config.max_step_tokens
        rows: list[PlannedRow] = []
        speaking: list[Sequence] = []
        reading: list[Sequence] = []
        for sequence in sorted(self.running, key=self._place):
            (speaking if sequence.speaks else reading).append(sequence)
        for number, sequence in enumerate([*speaking, *_in_turn(reading, Counter(), {})]):
            if number == len(speaking) and max_prompt_tokens is not None:
                budget = min(budget, max_prompt_tokens)
            size = min(sequence.num_tokens - sequence.num_computed, budget)
            if sequence not in self.running or size == 0:
                continue  # preempted for one before it, or no budget left
            if self._make_room(sequence, sequence.num_computed + size, suspend, rows):
                rows.append(PlannedRow(sequence, sequence.num_computed, sequence.num_computed + size))
                budget -= size
        return rows

    def computed(self, rows: Iterable[PlannedRow]) -> None:
        """The step ran: note what is in the cache now, and make its full blocks known."""
        for row in rows:
            row.sequence.num_computed = row.stop
            self.blocks.remember(row.sequence)

    def remove(self, ids: Iterable[int]) -> list[Sequence]:
        """Take these lines out, wherever they are, and free their blocks; unknown ids are ignored."""
        wanted = set(ids)
        removed = [sequence for sequence in [*self.running, *self.waiting] if sequence.request.id in wanted]
        self.running = [sequence for sequence in self.running if sequence.request.id not in wanted]
        self.waiting = [sequence for sequence in self.waiting if sequence.request.id not in wanted]
        for sequence in removed:
            self.blocks.release(sequence)
        return removed

    def remove_expired(self, now: float) -> list[Sequence]:
        """Take out every line whose deadline has passed."""
        deadlines = [(sequence.request.deadline, sequence) for sequence in [*self.running, *self.waiting]]
        return self.remove(s.request.id for deadline, s in deadlines if deadline is not None and deadline <= now)

    def remove_all(self) -> list[Sequence]:
        """Take out every line."""
        return self.remove([sequence.request.id for sequence in [*self.running, *self.waiting]])

    def check_integrity(self) -> None:
        """Assert that blocks and queues agree; tests call it after every step."""
        self.blocks.check_integrity(self.running)
        assert len(self.running) <= self._config.max_rows
        assert self.waiting == sorted(self.waiting, key=self._place)
        assert not any(sequence.blocks for sequence in self.waiting)
        assert not any(sequence.is_promised for sequence in self.running)
        for sequence in self.running:
            assert sequence.num_computed < sequence.num_tokens
            assert self.blocks.num_needed(sequence.num_computed) <= len(sequence.blocks)

    def _place(self, sequence: Sequence) -> tuple[float, int]:
        """Lower goes first: the line with the higher priority, raised by waiting, then the earlier one."""
        request = sequence.request
        return request.arrival / self._config.ageing_s - request.priority, request.id

    def _admit_waiting(self, admit: Admit) -> None:
        if not self.waiting or len(self.running) == self._config.max_rows:
            return
        num_before = Counter(map(_queue_of, self.running))
        order = _in_turn(self.waiting, num_before, self._turns)
        self._turns = {queue: at for queue, at in self._turns.items() if queue in num_before}
        waits_for_pages = False
        for sequence in order:
            if len(self.running) == self._config.max_rows:
                return
            if waits_for_pages and not sequence.is_promised:
                continue
            if not self._has_blocks(sequence):
                return
            outcome = admit(sequence)
            sequence.is_promised = outcome is Admission.LOADING
            waits_for_pages |= outcome is Admission.NO_ROOM
            if outcome is Admission.ADMITTED:
                self._start(sequence)

    def _has_blocks(self, sequence: Sequence) -> bool:
        """Whether the whole prompt finds blocks; none are held when this returns."""
        self.blocks.take_prefix(sequence)
        # One block is left for each running row to grow into, or the newcomer would soon push one out.
        spare = self.blocks.num_free - len(self.running)
        has_blocks = self.blocks.num_missing(sequence, sequence.num_tokens) <= spare
        self.blocks.release(sequence)
        return has_blocks

    def _start(self, sequence: Sequence) -> None:
        sequence.num_computed = self.blocks.take_prefix(sequence)
        self.blocks.extend(sequence, sequence.num_tokens)
        if not sequence.output_ids:
            sequence.num_cached = sequence.num_computed
        self.waiting.remove(sequence)
        self.running.append(sequence)
        self._turns[_queue_of(sequence)] = next(self._ticks)

    def _make_room(self, sequence: Sequence, num_tokens: int, suspend: Suspend, planned: list[PlannedRow]) -> bool:
        """Give the sequence blocks for so many tokens, preempting others, the last first; False: it must wait."""
        while self.blocks.num_missing(sequence, num_tokens) > self.blocks.num_free:
            chosen = {row.sequence.request.id for row in planned}
            others = [other for other in self.running if other.request.id not in chosen]
            victim = max(others, key=self._place)
            self._preempt(victim, suspend)
            if victim is sequence:
                return False
        self.blocks.extend(sequence, num_tokens)
        return True

    def _preempt(self, sequence: Sequence, suspend: Suspend) -> None:
        sequence.is_promised = suspend(sequence)
        self.blocks.release(sequence)
        sequence.num_computed = 0
        self.running = [other for other in self.running if other is not sequence]
        insort(self.waiting, sequence, key=self._place)
        self.num_preempted += 1


def _queue_of(sequence: Sequence) -> _Queue:
    return sequence.request.priority, sequence.request.client


def _in_turn(by_place: Iterable[Sequence], num_before: Counter[_Queue], turns: Mapping[_Queue, int]) -> list[Sequence]:
    """The lines in the order in which they go: those of each priority share out their places.

    `num_before` counts what each queue has running, and afterwards these lines too.
    """
    classes: defaultdict[int, list[tuple[int, int, int, Sequence]]] = defaultdict(list)
    order = list(by_place)
    for place, sequence in enumerate(order):
        queue = _queue_of(sequence)
        since = max(turns.get(queue, 0), sequence.came_at)
        classes[queue[0]].append((num_before[queue], since, place, sequence))
        num_before[queue] += 1
    for lines in classes.values():
        for (_, _, place, _), (_, _, _, sequence) in zip(lines, sorted(lines), strict=True):
            order[place] = sequence
    return order
