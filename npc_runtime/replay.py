"""Plays a recording in place of an engine: no model, the same lines at the same times, for a game's own tests.

Everything before and behind the engine is the daemon's own: requests are checked, NPCs remember, lines are cancelled,
texts coalesced as ever. A line is found by its persona and the player's words; the second time the same is asked, the
second answer of the recording is given.
"""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from npc_runtime.engine.core import (
    Ended,
    EndReason,
    EngineStats,
    Event,
    Request,
    Spoken,
    Started,
    StepOutput,
)
from npc_runtime.errors import InvalidError, WireError, find_error
from npc_runtime.recording import Recording, Take

__all__ = ["ReplayEngine"]

PAUSE_S = 0.05


class ReplayEngine:
    """Answers as a recording did. All of it happens on the event loop."""

    has_died = False

    def __init__(self, recording: Recording, *, on_step: Callable[[StepOutput], None], speed: float = 1.0) -> None:
        """`speed` 2 is twice as fast, infinity is at once."""
        self._recording = recording
        self._on_step = on_step
        self._speed = speed
        self._numbers: Counter[tuple[str, str]] = Counter()  # how often each was asked
        self._lines: dict[int, _Playing] = {}
        self._is_paused = False
        self._num_tokens = 0
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Begin; on the event loop on which everything is to happen."""
        self._loop = asyncio.get_running_loop()

    def submit(self, requests: Iterable[Request]) -> None:
        """Begin to play these lines."""
        for request in requests:
            if request.is_warmup:
                self._end(request, Ended(request.id, EndReason.STOP, num_prompt=1, num_cached=1))
                continue
            key = request.asked
            assert key is not None
            take = self._recording.find(*key, self._numbers[key])
            if take is None:
                persona, said = key
                error = InvalidError(
                    f"The recording has no line of {persona} that answers '{said[:100]}'.", "Record the session again."
                )
                self._end(request, Ended(request.id, EndReason.ERROR, error=error))
                continue
            self._numbers[key] += 1
            playing = self._lines[request.id] = _Playing(request, take, time.monotonic())
            self._plan(playing)

    def cancel(self, ids: Iterable[int]) -> None:
        """End these lines."""
        for request_id in ids:
            playing = self._lines.get(request_id)
            if playing is not None:
                self._end(playing.request, playing.ended(EndReason.CANCELLED, playing.text))

    def configure(self, *, max_tokens_per_s: float | None, paused: bool) -> None:
        """Stop and go on; a recording has its own pace."""
        self._is_paused = paused

    def replace_adapter(
        self, name: str, parts: Iterable[tuple[Path, float]], on_done: Callable[[WireError | None], None]
    ) -> None:
        """There is nothing that an adapter would change."""
        on_done(None)

    def close(self, timeout_s: float) -> None:
        """End all lines, and return when that was reported; called from a thread, while the loop runs."""
        loop, is_done = self._loop, threading.Event()
        assert loop is not None

        def end_all() -> None:
            for playing in list(self._lines.values()):
                self._end(playing.request, playing.ended(EndReason.CANCELLED, playing.text))
            loop.call_soon(is_done.set)

        loop.call_soon_threadsafe(end_all)
        is_done.wait(timeout_s)

    def stats(self) -> EngineStats:
        """What there is to say without an engine."""
        return EngineStats(
            num_running=len(self._lines),
            num_waiting=0,
            num_forwards=0,
            num_tokens=self._num_tokens,
            tokens_per_s=0.0,
            kv_blocks_used=0,
            kv_blocks_total=1,
            kv_blocks_cached=0,
            num_preempted=0,
            adapters_resident=(),
        )

    def _plan(self, playing: "_Playing") -> None:
        delay = max(playing.began_at + playing.next_at / self._speed - time.monotonic(), 0.0)
        playing.timer = asyncio.get_running_loop().call_later(delay, self._go_on, playing)

    def _go_on(self, playing: "_Playing") -> None:
        """Say what is due, and plan what follows."""
        request = playing.request
        if self._is_paused:
            playing.began_at += PAUSE_S
        deadline = request.deadline
        if deadline is not None and deadline <= time.monotonic():
            self._end(request, playing.ended(EndReason.DEADLINE, playing.text))
        elif self._is_paused:
            playing.timer = asyncio.get_running_loop().call_later(PAUSE_S, self._go_on, playing)
        else:
            event = playing.next_event()
            if isinstance(event, Ended):
                self._num_tokens += event.num_completion
                self._end(request, event)
            else:
                self._on_step(StepOutput((event,), frozenset({request.group})))
                self._plan(playing)

    def _end(self, request: Request, ended: Ended) -> None:
        playing = self._lines.pop(request.id, None)
        if playing is not None and playing.timer is not None:
            playing.timer.cancel()
        self._on_step(StepOutput((ended,)))


class _Playing:
    """A line that is being played."""

    def __init__(self, request: Request, take: Take, began_at: float) -> None:
        self.request = request
        self.began_at = began_at
        self.timer: asyncio.TimerHandle | None = None
        self.text = ""
        self._take = take
        self._events = self._list_events()
        self._at = 0

    @property
    def next_at(self) -> float:
        """When the next event comes, in seconds after the line was sent."""
        return self._events[self._at][0]

    def next_event(self) -> Event:
        """Take the next event."""
        _, event = self._events[self._at]
        self._at += 1
        if isinstance(event, Spoken):
            self.text += event.text
        return event

    def ended(self, reason: EndReason, text: str, error: WireError | None = None) -> Ended:
        """The end of the line, with the recorded figures."""
        end = self._take.end
        assert end is not None
        return Ended(
            self.request.id,
            reason,
            text=text,
            num_prompt=end.usage.prompt,
            num_cached=end.usage.cached,
            num_completion=end.usage.completion,
            queue_ms=end.timing.queue_ms,
            first_text_ms=end.timing.ttft_ms,
            total_ms=end.timing.total_ms,
            tokens_per_s=end.timing.tokens_per_s,
            batch_avg=end.timing.batch_avg,
            error=error,
        )

    def _list_events(self) -> list[tuple[float, Event]]:
        take, request_id = self._take, self.request.id
        end = take.end
        assert end is not None
        events: list[tuple[float, Event]] = []
        if take.started_at is not None:
            events.append((take.started_at, Started(request_id, end.timing.queue_ms, round(end.timing.batch_avg) or 1)))
        events += [(piece.at, Spoken(request_id, piece.text)) for piece in take.pieces]
        error = None if end.error is None else find_error(end.error.code)(end.error.message, end.error.hint)
        text = "" if end.fallback else end.text
        return [*events, (take.ended_at, self.ended(EndReason(end.reason), text, error))]
