"""The engine thread: takes commands, plans a step, runs it, samples, and reports what was said.

`submit` and `cancel` may be called from any thread; the outcome of every step is handed to `on_step` on the
engine thread. Whatever happens, every submitted line gets exactly one `Ended`. The thread never waits for an adapter:
the store's loader wakes it by a command of its own.

A step that fails costs the lines that ran in it. If the device itself failed, it costs all lines, since their keys,
values and adapters are lost or suspect; then device state is made anew, and the next lines find nothing cached. If
that does not help, the thread ends, and whoever made the engine may replace the process.
"""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from npc_runtime.engine.adapters import AdapterStore, OnReplaced
from npc_runtime.engine.core import (
    Ended,
    EndReason,
    EngineConfig,
    EngineStats,
    Event,
    Request,
    Sequence,
    Spoken,
    Started,
    StepOutput,
)
from npc_runtime.engine.ending import LineText
from npc_runtime.engine.faults import Attempts, DeviceLost, is_device_error, is_out_of_memory, probe_device
from npc_runtime.engine.model import Decoder
from npc_runtime.engine.runner import Runner
from npc_runtime.engine.sampler import sample
from npc_runtime.engine.scheduler import PlannedRow, Scheduler
from npc_runtime.engine.tokenizer import ChatTokenizer
from npc_runtime.errors import DeviceFailed, InternalError, OutOfMemory, OverloadError, WireError

__all__ = ["Engine"]

logger = logging.getLogger(__name__)

MAX_IDLE_S = 0.5
"""Longest sleep while lines wait. What they wait for wakes the thread; a wake-up that was lost would cost this much."""

MAX_RECOVERIES, RECOVERIES_WITHIN_S = 3, 600.0
"""A device that fails more often is not trusted by this process any more."""

LOADER_TIMEOUT_S = 10.0
"""How long a recovery waits for a load to end: the read of a file and a copy."""


@dataclass(frozen=True, slots=True)
class _Submit:
    requests: tuple[Request, ...]


@dataclass(frozen=True, slots=True)
class _Cancel:
    ids: frozenset[int]


@dataclass(frozen=True, slots=True)
class _Replace:
    name: str
    parts: tuple[tuple[Path, float], ...]
    on_done: OnReplaced


@dataclass(frozen=True, slots=True)
class _Loaded:
    """The adapter store has news."""


class Engine:
    """Owns the scheduler, the runner and the thread that drives them."""

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: ChatTokenizer,
        adapters: AdapterStore,
        config: EngineConfig,
        *,
        on_step: Callable[[StepOutput], None],
        on_death: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`on_death` is called, on the engine thread, if the thread ends by a defect or the loss of the device.

        The store serves one engine at a time: its loader wakes the one that was made last.
        """
        self._tokenizer = tokenizer
        self._adapters = adapters
        self._device = decoder.device
        self._recoveries = Attempts(MAX_RECOVERIES, RECOVERIES_WITHIN_S)
        self._scheduler = Scheduler(config)
        adapters.open()
        self._runner = Runner(decoder, adapters, config)
        self._texts: dict[int, LineText] = {}
        self._on_step = on_step
        self._on_death = on_death
        self.has_died = False  # the thread ended otherwise than by `close`; nothing is generated any more
        self._clock = clock
        self._commands: queue.SimpleQueue[_Submit | _Cancel | _Replace | _Loaded | None] = queue.SimpleQueue()
        adapters.on_loaded = lambda: self._commands.put(_Loaded())
        self._block_size = config.block_size
        self._is_idle = True  # the last step had no rows
        self._recent: deque[tuple[float, float, int]] = deque(maxlen=64)  # start, end, tokens of a step
        self._num_generated = 0
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def warm(self, on_progress: Callable[[float], None]) -> None:
        """Let no line wait for what could have been prepared; before `start`. Worth its seconds on a GPU only."""
        self._runner.warm(on_progress)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, requests: Iterable[Request]) -> None:
        """Queue lines that belong together; they are admitted by the same step as far as there is room."""
        self._commands.put(_Submit(tuple(requests)))

    def cancel(self, ids: Iterable[int]) -> None:
        """End these lines before the next step; ids that are over already are ignored."""
        self._commands.put(_Cancel(frozenset(ids)))

    def replace_adapter(self, name: str, parts: Iterable[tuple[Path, float]], on_done: OnReplaced) -> None:
        """Put new files of an adapter in use, or those of a new one; `on_done` is called on the engine thread.

        Lines that have spoken keep what they began with. If the files cannot be used nothing changes.
        """
        self._commands.put(_Replace(name, tuple(parts), on_done))

    def close(self, timeout_s: float) -> None:
        """End every line as cancelled and stop the thread and the loader; what they are in is finished, if soon."""
        until = time.monotonic() + timeout_s
        self._commands.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        self._adapters.close(max(until - time.monotonic(), 0.0))

    def stats(self) -> EngineStats:
        """A snapshot, from any thread and without stopping the engine: only sizes and atomic copies are read."""
        recent = list(self._recent)
        seconds = sum(end - start for start, end, _ in recent)
        return EngineStats(
            num_running=len(self._scheduler.running),
            num_waiting=len(self._scheduler.waiting),
            num_forwards=self._runner.num_forwards,
            num_tokens=self._num_generated,
            tokens_per_s=sum(count for _, _, count in recent) / seconds if seconds else 0.0,
            kv_blocks_used=self._scheduler.blocks.num_used,
            kv_blocks_total=self._scheduler.blocks.num_blocks,
            kv_blocks_cached=self._scheduler.blocks.num_known,
            num_preempted=self._scheduler.num_preempted,
            adapters_resident=self._adapters.resident,
        )

    def step(self, *, wait: bool = False) -> None:
        """Take commands (with `wait`, sleep while there is nothing to do), run one step and report it.

        Only the engine thread, or a test without one, calls this. Raises `DeviceLost`, after everything was reported.
        """
        events: list[Event] = []
        groups: frozenset[Hashable] = frozenset()
        has_device_failed = False
        try:
            self._take_commands(wait and self._is_idle, events)
            self._end_unloadable(events)
            events += [self._ended(s, EndReason.DEADLINE) for s in self._scheduler.remove_expired(self._clock())]
            rows = self._scheduler.plan(self._clock(), self._adapters.admit, self._adapters.suspend)
            self._is_idle = not rows
            if rows:
                self._run_rows(rows, events)
                requests = [row.sequence.request for row in rows]
                groups = frozenset(request.group for request in requests if not request.is_warmup)
        except Exception as error:  # a defect or a full device must not take the daemon along
            logger.exception("a step failed")
            events += self._fail(error)
            has_device_failed = is_device_error(error)
        if events or groups:
            self._on_step(StepOutput(tuple(events), groups))
        if has_device_failed:
            self._recover()

    def check_integrity(self) -> None:
        """Assert that nothing leaked; tests call it between steps."""
        self._scheduler.check_integrity()
        self._adapters.check_integrity(self._scheduler.running, self._scheduler.waiting)
        live = [sequence.request.id for sequence in [*self._scheduler.running, *self._scheduler.waiting]]
        assert sorted(self._texts) == sorted(live), "a line's text is lost or left over"

    def _run(self) -> None:
        try:
            while not self._closing:
                self.step(wait=True)
            ended = [self._ended(sequence, EndReason.CANCELLED) for sequence in self._scheduler.remove_all()]
            self._on_step(StepOutput(tuple(ended)))
        except BaseException as error:
            logger.critical("the engine thread died", exc_info=True)
            self.has_died = True
            with suppress(Exception):  # what is broken may be needed for this too
                self._end_all(error)
            self._on_death()

    def _end_all(self, error: BaseException) -> None:
        """End every line that is left, those too that no step has seen yet."""
        events: list[Event] = []
        self._take_commands(False, events)
        events += [self._ended(s, EndReason.ERROR, _as_wire(error)) for s in self._scheduler.remove_all()]
        self._on_step(StepOutput(tuple(events)))

    def _recover(self) -> None:
        """Make all device state anew; there are no lines. Raises `DeviceLost` if the device does not allow it."""
        if not self._recoveries.take(self._clock()):
            raise DeviceLost(f"The device failed more than {MAX_RECOVERIES} times in {RECOVERIES_WITHIN_S:.0f} s.")
        probe_device(self._device)
        try:
            self._runner.reset()
            self._adapters.reset(LOADER_TIMEOUT_S)
        except Exception as error:
            raise DeviceLost("The device state could not be made anew.") from error
        logger.warning("the device answers again: KV cache, recordings and adapters were made anew")

    def _take_commands(self, wait: bool, events: list[Event]) -> None:
        while wait or not self._commands.empty():
            try:
                command = self._commands.get(timeout=self._max_sleep() if wait else None)
            except queue.Empty:
                return
            wait = False
            if command is None:
                self._closing = True
            elif isinstance(command, _Cancel):
                removed = self._scheduler.remove(command.ids)
                events += [self._ended(sequence, EndReason.CANCELLED) for sequence in removed]
            elif isinstance(command, _Replace):
                self._adapters.replace(command.name, command.parts, command.on_done)
            elif isinstance(command, _Submit):
                for request in command.requests:
                    events += self._add(request)

    def _max_sleep(self) -> float | None:
        """How long the thread may wait for a command: for ever without lines, else until the next deadline."""
        if not self._scheduler.has_work:
            return None
        deadline = self._scheduler.next_deadline
        return MAX_IDLE_S if deadline is None else min(max(deadline - self._clock(), 0.0), MAX_IDLE_S)

    def _end_unloadable(self, events: list[Event]) -> None:
        """End the lines whose adapter could not be loaded; a later one has it tried again."""
        for load in self._adapters.collect(self._scheduler.waiting):
            removed = self._scheduler.remove(load.wanted_by)
            events += [self._ended(sequence, EndReason.ERROR, load.error) for sequence in removed]

    def _add(self, request: Request) -> list[Event]:
        if request.adapter is not None:
            version = self._adapters.version_of(request.adapter)
            request = replace(request, adapter=version, cache_key=self._adapters.digest_of(version))
        try:
            self._scheduler.add(request)
        except WireError as error:
            reason = EndReason.OVERLOAD if isinstance(error, OverloadError) else EndReason.ERROR
            return [Ended(request.id, reason, num_prompt=len(request.prompt_ids), error=error)]
        self._texts[request.id] = LineText(self._tokenizer, request.sampling)
        return []

    def _run_rows(self, rows: list[PlannedRow], events: list[Event]) -> None:
        started_at = self._clock()
        new = [row.sequence for row in rows if row.sequence.started_at is None]
        events += [self._started(sequence, started_at, len(rows)) for sequence in new]
        logits = self._runner.forward(rows)
        sampling = [row.sequence for row in rows if row.samples]
        tokens = sample(logits, sampling, self._tokenizer.eos_ids, self._runner.draw)
        now = self._clock()
        self._scheduler.computed(rows)
        for row in rows:
            row.sequence.num_steps += 1
            row.sequence.sum_rows += len(rows)
        if not all(row.sequence.request.is_warmup for row in rows):
            self._recent.append((started_at, now, len(tokens)))
        self._num_generated += len(tokens)
        events += [self._end_warmup(row.sequence) for row in rows if row.ends_warmup]
        for sequence, token in zip(sampling, tokens, strict=True):
            try:
                if token < 0:
                    raise _overflow(sequence)
                events += self._say(sequence, token, now)
            except Exception as error:  # of this line's text alone; its neighbours go on
                logger.exception("a line's text failed")
                self._scheduler.remove([sequence.request.id])
                events.append(self._ended(sequence, EndReason.ERROR, _as_wire(error)))

    def _started(self, sequence: Sequence, now: float, num_rows: int) -> Event:
        sequence.started_at = now
        return Started(sequence.request.id, 1000 * (now - sequence.request.arrival), num_rows)

    def _say(self, sequence: Sequence, token: int, now: float) -> list[Event]:
        """Add a sampled token to its line; the end token itself is counted but not said."""
        text = self._texts[sequence.request.id]
        sequence.output_ids.append(token)
        delta = text.finish(EndReason.STOP) if token in self._tokenizer.eos_ids else text.push(token)
        if delta and sequence.first_text_at is None:
            sequence.first_text_at = now
        events: list[Event] = [Spoken(sequence.request.id, delta)] if delta else []
        if text.end is not None:
            self._scheduler.remove([sequence.request.id])
            events.append(self._ended(sequence, text.end))
        return events

    def _end_warmup(self, sequence: Sequence) -> Event:
        """The prompt is computed and its full blocks are known; the adapter is there, and is to stay if it can."""
        if sequence.request.adapter is not None:
            self._adapters.pin(sequence.request.adapter)
        sequence.num_cached = sequence.num_computed // self._block_size * self._block_size
        self._scheduler.remove([sequence.request.id])
        return self._ended(sequence, EndReason.STOP)

    def _ended(self, sequence: Sequence, reason: EndReason, error: WireError | None = None) -> Event:
        """Close the books of a line that the scheduler has let go."""
        request, now = sequence.request, self._clock()
        text = self._texts.pop(request.id)
        if text.end is None:
            text.finish(reason)
        started, first = sequence.started_at, sequence.first_text_at
        self._adapters.leave(sequence)
        seconds = now - started if started is not None else 0.0
        return Ended(
            request_id=request.id,
            reason=reason,
            text=text.text,
            num_prompt=len(request.prompt_ids),
            num_cached=sequence.num_cached,
            num_completion=len(sequence.output_ids),
            queue_ms=1000 * ((started if started is not None else now) - request.arrival),
            first_text_ms=None if first is None else 1000 * (first - request.arrival),
            total_ms=1000 * (now - request.arrival),
            tokens_per_s=len(sequence.output_ids) / seconds if seconds > 0 else 0.0,
            batch_avg=sequence.sum_rows / sequence.num_steps if sequence.num_steps else 0.0,
            error=error,
        )

    def _fail(self, error: Exception) -> list[Event]:
        """End what ran in the failed step; if nothing did, what waits is the trouble, and all of it ends.

        If the device failed, nothing that anybody has there can be trusted, and everybody's line ends.
        """
        self._scheduler.blocks.forget_all()
        if is_out_of_memory(error):
            self._runner.drop_recordings()
        running, waiting = self._scheduler.running, self._scheduler.waiting
        failed = [*running, *waiting] if is_device_error(error) else running or waiting
        removed = self._scheduler.remove([sequence.request.id for sequence in failed])
        return [self._ended(sequence, EndReason.ERROR, _as_wire(error)) for sequence in removed]


def _overflow(sequence: Sequence) -> WireError:
    adapter = sequence.request.adapter
    what = f"the adapter of {adapter}" if adapter else "the base"
    return InternalError(f"The numbers of {what} overflowed.", "It is damaged or diverged in training; replace it.")


def _as_wire(error: BaseException) -> WireError:
    """What a client is told of an unexpected error; the log has the rest."""
    if isinstance(error, WireError):
        return error
    if is_device_error(error):
        return DeviceFailed("The device failed, and all lines with it.", "The daemon recovers; send the line again.")
    if is_out_of_memory(error):
        return OutOfMemory("The device ran out of memory in a step.", "Send fewer lines at once.")
    return InternalError("A step of the engine failed.", "The daemon's log has the details; report it.")
