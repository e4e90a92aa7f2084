"""The engine thread: takes commands, plans a step, runs it, samples, and reports what was said.

`submit` and `cancel` may be called from any thread; the outcome of every step is handed to `on_step` on the
engine thread. Whatever happens, every submitted line gets exactly one `Ended`. The thread never waits for an adapter:
the store's loader wakes it by a command of its own.

A step that fails costs the lines that ran in it. If the device itself failed, it costs all lines, since their keys,
values and adapters are lost or suspect; then device state is made anew, and the next lines find nothing cached. If
that does not help, the thread ends, and whoever made the engine may replace the process. A step that does not come
back is the same, but for the thread, which is left where it is.
"""

import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Hashable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from npc_runtime.engine.adapters import AdapterStore, OnReplaced
from npc_runtime.engine.books import Books, BooksClosed
from npc_runtime.engine.commands import Cancel, Command, Configure, Loaded, Replace, Submit
from npc_runtime.engine.core import (
    Degraded,
    Ended,
    EndReason,
    EngineConfig,
    EngineStats,
    Event,
    MemoryBytes,
    News,
    Request,
    Sequence,
    StepOutput,
)
from npc_runtime.engine.device import make_stream
from npc_runtime.engine.faults import Attempts, DeviceLost, as_wire, is_device_error, is_out_of_memory, probe_device
from npc_runtime.engine.meter import Meter
from npc_runtime.engine.model import Decoder
from npc_runtime.engine.pace import Pace
from npc_runtime.engine.runner import Runner
from npc_runtime.engine.sampler import sample
from npc_runtime.engine.scheduler import PlannedRow, Scheduler
from npc_runtime.engine.speech import Speech, overflow_of
from npc_runtime.engine.tokenizer import ChatTokenizer
from npc_runtime.engine.watchdog import Watchdog, trace
from npc_runtime.errors import OverloadError, WireError

__all__ = ["Engine"]

logger = logging.getLogger(__name__)

MAX_IDLE_S = 0.5
"""Longest sleep while lines wait. What they wait for wakes the thread; a wake-up that was lost would cost this much."""

MAX_RECOVERIES, RECOVERIES_WITHIN_S = 3, 600.0
"""A device that fails more often is not trusted by this process any more."""

LOADER_TIMEOUT_S = 10.0
"""How long a recovery waits for a load to end: the read of a file and a copy."""

TICK_S = 1.0
MAX_STEP_TICKS = {"cuda": 30, "cpu": 600}
"""How long a step may take. On a GPU none takes a second; a large base may read a prompt for minutes on a slow CPU."""


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
        """`on_death` is called if the thread ends by a defect or the loss of the device, or hangs; on that thread or on
        the watchdog's. `on_step` must not wait for anybody who submits lines.

        The store serves one engine at a time: its loader wakes the one that was made last.
        """
        self._speech = Speech(tokenizer)
        self._adapters = adapters
        self._device = decoder.device
        self._recoveries = Attempts(MAX_RECOVERIES, RECOVERIES_WITHIN_S)
        self._scheduler = Scheduler(config)
        self._stream = make_stream(self._device)  # of everything that this engine asks of a GPU
        with torch.cuda.stream(self._stream):
            adapters.open()
            self._runner = Runner(decoder, adapters, config)
        self._books = Books(on_step)
        self._pace = Pace()
        self._on_death = on_death
        self.has_died = False  # the thread ended otherwise than by `close`, or hangs; nothing is generated any more
        self._clock = clock
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        adapters.on_loaded = lambda: self._commands.put(Loaded())
        self._block_size = config.block_size
        self._is_idle = True  # the last step that could run had no rows
        self._meter = Meter(self._device)
        self._closing = False
        self._num_steps = 0
        self._step_under_way: int | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        limit = MAX_STEP_TICKS.get(self._device.type, MAX_STEP_TICKS["cpu"])
        watched = {"a step": lambda: self._step_under_way, "a copy to the device": lambda: adapters.copy_under_way}
        self._watchdog = Watchdog(watched, self._give_up, limit=limit, tick_s=TICK_S)

    def warm(self, on_progress: Callable[[float], None]) -> None:
        """Let no line wait for what could have been prepared; before `start`. Worth its seconds on a GPU only."""
        with torch.cuda.stream(self._stream):
            self._runner.warm(on_progress)

    def start(self) -> None:
        """Start the thread, and the one that watches it."""
        self._thread.start()
        self._watchdog.start()

    def submit(self, requests: Iterable[Request]) -> None:
        """Queue lines that belong together; they are admitted by the same step as far as there is room."""
        lines = tuple(requests)
        self._books.open(lines, self._clock())
        self._commands.put(Submit(lines))

    def cancel(self, ids: Iterable[int]) -> None:
        """End these lines before the next step; ids that are over already are ignored."""
        self._commands.put(Cancel(frozenset(ids)))

    def configure(self, *, max_tokens_per_s: float | None, paused: bool) -> None:
        """Leave more of the device to others, from the next step on.

        `max_tokens_per_s` bounds what all lines together speak (None: as fast as it goes); see `pace`. While it is
        paused no step runs: lines keep their rows and what was computed for them, new ones queue up, and only cancels
        and deadlines end any.
        """
        assert max_tokens_per_s is None or 0.0 < max_tokens_per_s < math.inf
        self._commands.put(Configure(max_tokens_per_s, paused))

    def replace_adapter(self, name: str, parts: Iterable[tuple[Path, float]], on_done: OnReplaced) -> None:
        """Put new files of an adapter in use, or those of a new one; `on_done` is called on the engine thread.

        Lines that have spoken keep what they began with. If the files cannot be used nothing changes.
        """
        self._commands.put(Replace(name, tuple(parts), on_done))

    def close(self, timeout_s: float) -> None:
        """End every line as cancelled and stop the threads; what they are in is finished, if soon, else left behind."""
        until = time.monotonic() + timeout_s
        self._commands.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        self._watchdog.stop()
        self._books.close(EndReason.CANCELLED, None, self._clock())
        self._adapters.close(max(until - time.monotonic(), 0.0))

    def stats(self) -> EngineStats:
        """A snapshot, from any thread and without stopping the engine: only sizes and atomic copies are read."""
        return EngineStats(
            num_running=len(self._scheduler.running),
            num_waiting=len(self._scheduler.waiting),
            num_forwards=self._runner.num_forwards,
            num_tokens=self._meter.num_tokens,
            tokens_per_s=self._meter.tokens_per_s,
            kv_blocks_used=self._scheduler.blocks.num_used,
            kv_blocks_total=self._scheduler.blocks.num_blocks,
            kv_blocks_cached=self._scheduler.blocks.num_known,
            num_preempted=self._scheduler.num_preempted,
            adapters_resident=self._adapters.resident,
            paused=self._pace.paused,
            max_tokens_per_s=self._pace.max_tokens_per_s,
            memory=MemoryBytes(
                kv_cache=self._runner.kv_bytes,
                adapter_pool=self._adapters.num_bytes,
                adapter_copies=self._adapters.host.num_bytes,
                gpu=self._meter.gpu_bytes,
            ),
        )

    def step(self, *, wait: bool = False) -> None:
        """Take commands (with `wait`, sleep while there is nothing to do), run one step and report it.

        Only who drives the engine without its thread calls this. Raises `DeviceLost`, after everything was reported.
        """
        with torch.cuda.stream(self._stream):
            self._step(wait)

    def check_integrity(self) -> None:
        """Assert that nothing leaked; tests call it between steps."""
        self._scheduler.check_integrity()
        self._adapters.check_integrity(self._scheduler.running, self._scheduler.waiting)
        live = sorted(sequence.request.id for sequence in [*self._scheduler.running, *self._scheduler.waiting])
        assert sorted(self._speech.ids) == live, "a line's text is lost or left over"
        assert sorted(self._books.open_ids) == live or not self._commands.empty(), "a line is lost or ended twice"

    def _run(self) -> None:
        try:
            with torch.cuda.stream(self._stream):
                while not self._closing:
                    self._step(wait=True)
            ended = [self._ended(sequence, EndReason.CANCELLED) for sequence in self._scheduler.remove_all()]
            self._report(ended, frozenset(), [])
            self._books.close(EndReason.CANCELLED, None, self._clock())  # those that no step has seen yet
        except BooksClosed:
            logger.warning("the engine thread came back, when nobody waited for it any more")
        except BaseException as error:
            logger.critical("the engine thread died", exc_info=True)
            self._die(error)
        finally:
            self._step_under_way = None

    def _give_up(self, what: str) -> None:
        """The device hangs, and with it the thread or the loader: on the watchdog's thread."""
        where = trace(self._thread)
        logger.critical("%s does not come back, the device hangs; the engine thread is in\n%s", what, where)
        self._die(DeviceLost(f"{what} does not come back."))

    def _die(self, error: BaseException) -> None:
        """End every line, in place of the thread; the first who finds that it has to be done says so."""
        self.has_died = self._closing = True
        with suppress(Exception):  # whoever is told may be what is broken
            if not self._books.close(EndReason.ERROR, as_wire(error), self._clock()):
                return
        self._on_death()

    def _step(self, wait: bool) -> None:
        events: list[Event] = []
        groups: frozenset[Hashable] = frozenset()
        has_device_failed = False
        self._begin_step()
        try:
            self._take_commands(self._rest_s() if wait else 0.0, events)
            self._end_unloadable(events)
            events += [self._ended(s, EndReason.DEADLINE) for s in self._scheduler.remove_expired(self._clock())]
            rows = self._plan()
            if rows:
                self._run_rows(rows, events)
                requests = [row.sequence.request for row in rows]
                groups = frozenset(request.group for request in requests if not request.is_warmup)
        except Exception as error:  # a defect or a full device must not take the daemon along
            logger.exception("a step failed")
            events += self._fail(error)
            has_device_failed = is_device_error(error)
        self._report(events, groups, self._adapters.news())
        if has_device_failed:
            self._recover()

    def _begin_step(self) -> None:
        """Let the watchdog count anew."""
        self._num_steps += 1
        self._step_under_way = self._num_steps

    def _report(self, events: Iterable[Event], groups: frozenset[Hashable], news: Iterable[News]) -> None:
        step = StepOutput(tuple(events), groups, tuple(news))
        if step.events or step.groups or step.news:
            self._books.report(step, self._clock())

    def _recover(self) -> None:
        """Make all device state anew; there are no lines. Raises `DeviceLost` if the device does not allow it."""
        self._begin_step()
        if not self._recoveries.take(self._clock()):
            raise DeviceLost(f"The device failed more than {MAX_RECOVERIES} times in {RECOVERIES_WITHIN_S:.0f} s.")
        probe_device(self._device)
        try:
            self._runner.reset()
            self._adapters.reset(LOADER_TIMEOUT_S)
        except Exception as error:
            raise DeviceLost("The device state could not be made anew.") from error
        logger.warning("the device answers again: KV cache, recordings and adapters were made anew")
        problem = Degraded("The device failed and every line with it. It answers again; nothing is cached any more.")
        self._report((), frozenset(), [problem, *self._adapters.news()])

    def _take_commands(self, rest_s: float | None, events: list[Event]) -> None:
        """Do what was asked for; the first command may be so long in coming (None: for ever)."""
        with suppress(queue.Empty):
            self._obey(self._sleep(rest_s), events)
            while True:
                self._obey(self._commands.get_nowait(), events)

    def _sleep(self, rest_s: float | None) -> Command:
        """Wait for a command. Raises `queue.Empty` if none comes."""
        if rest_s == 0.0:
            return self._commands.get_nowait()
        self._step_under_way = None
        try:
            return self._commands.get(timeout=rest_s)
        finally:
            self._begin_step()

    def _obey(self, command: Command, events: list[Event]) -> None:
        match command:
            case None:
                self._closing = True
            case Cancel(ids):
                events += [self._ended(sequence, EndReason.CANCELLED) for sequence in self._scheduler.remove(ids)]
            case Replace(name, parts, on_done):
                self._adapters.replace(name, parts, on_done)
            case Configure(max_tokens_per_s, paused):
                self._pace.configure(self._clock(), max_tokens_per_s=max_tokens_per_s, paused=paused)
            case Submit(requests):
                for request in requests:
                    events += self._add(request)

    def _rest_s(self) -> float | None:
        """How long the thread may sleep if nobody asks for anything: 0 not at all, None for ever."""
        if not self._scheduler.has_work:
            return None
        rest = max(self._pace.rest_s(self._clock()), MAX_IDLE_S if self._is_idle else 0.0)
        deadline = self._scheduler.next_deadline if rest > 0.0 else None
        if deadline is not None:
            rest = min(rest, max(deadline - self._clock(), 0.0))
        return None if rest == math.inf else rest

    def _plan(self) -> list[PlannedRow]:
        """The rows of this step; none while there is a pause, or the last step is still paid for."""
        if self._pace.rest_s(self._clock()) > 0.0:
            return []
        adapters, max_prompt_tokens = self._adapters, self._pace.max_prompt_tokens
        rows = self._scheduler.plan(adapters.admit, adapters.suspend, max_prompt_tokens=max_prompt_tokens)
        self._is_idle = not rows
        return rows

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
        self._speech.take(request)
        return []

    def _run_rows(self, rows: list[PlannedRow], events: list[Event]) -> None:
        started_at = self._clock()
        sampling = [row.sequence for row in rows if row.samples]
        num_read = sum(row.stop - row.start for row in rows) - len(sampling)
        self._pace.began(started_at, num_spoken=len(sampling), num_read=num_read)
        new = [row.sequence for row in rows if row.sequence.started_at is None]
        events += [self._speech.start(sequence, started_at, len(rows)) for sequence in new]
        logits = self._runner.forward(rows)
        tokens = sample(logits, sampling, self._speech.eos_ids, self._runner.draw)
        now = self._clock()
        self._scheduler.computed(rows)
        for row in rows:
            row.sequence.num_steps += 1
            row.sequence.sum_rows += len(rows)
        is_warmup = all(row.sequence.request.is_warmup for row in rows)
        took_s = now - started_at + self._pace.owed_s(now)
        self._meter.ran(now, took_s=took_s, num_tokens=len(tokens), is_warmup=is_warmup)
        events += [self._end_warmup(row.sequence) for row in rows if row.ends_warmup]
        for sequence, token in zip(sampling, tokens, strict=True):
            try:
                if token < 0:
                    raise overflow_of(sequence)
                events += self._speech.say(sequence, token, now)
                reason, error = self._speech.why_over(sequence), None
            except Exception as problem:  # of this line's text alone; its neighbours go on
                logger.exception("a line's text failed")
                reason, error = EndReason.ERROR, as_wire(problem)
            if reason is not None:
                self._scheduler.remove([sequence.request.id])
                events.append(self._ended(sequence, reason, error))

    def _end_warmup(self, sequence: Sequence) -> Event:
        """The prompt is computed and its full blocks are known; the adapter is there, and is to stay if it can."""
        if sequence.request.adapter is not None:
            self._adapters.pin(sequence.request.adapter)
        sequence.num_cached = sequence.num_computed // self._block_size * self._block_size
        self._scheduler.remove([sequence.request.id])
        return self._ended(sequence, EndReason.STOP)

    def _ended(self, sequence: Sequence, reason: EndReason, error: WireError | None = None) -> Event:
        """Close the books of a line that the scheduler has let go."""
        self._adapters.leave(sequence)
        return self._speech.end(sequence, reason, error, self._clock())

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
        return [self._ended(sequence, EndReason.ERROR, as_wire(error)) for sequence in removed]
