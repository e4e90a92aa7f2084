"""Plays a recording in place of an engine: no model, the same lines at the same times, for a game's own tests.

Everything before and behind the engine is the daemon's own: requests are checked, NPCs remember, lines are cancelled,
texts coalesced as ever. A line is found by its persona and the player's words; the second time the same is asked, the
second answer of the recording is given.
"""

import asyncio
import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from npc_runtime import __version__
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
from npc_runtime.prompt import Message
from npc_runtime.recording import Recording, Take
from npc_runtime.stage import DaemonInfo, Voice

__all__ = ["ReplayEngine", "replay_voice"]


def replay_voice(recording: Recording, *, on_step: Callable[[StepOutput], None], speed: float) -> Voice:
    """What speaks as the recording has it."""
    info, backend = recording.info, f"replay of {recording.info.backend}"
    return Voice(
        ReplayEngine(recording, on_step=on_step, speed=speed),
        DaemonInfo(__version__, info.device, backend, info.base),
        _digest,
    )


def _digest(messages: Sequence[Message]) -> tuple[int, ...]:
    """Stands for the tokens of a prompt: the same for the same prompt, and within every context."""
    return tuple(hashlib.sha256(json.dumps(messages).encode()).digest()[:8])


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
        self._paused_at: float | None = None
        self._max_tokens_per_s: float | None = None
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
            playing = self._lines[request.id] = _Playing(request, take, self._speed)
            self._plan(playing)

    def cancel(self, ids: Iterable[int]) -> None:
        """End these lines."""
        for request_id in ids:
            playing = self._lines.get(request_id)
            if playing is not None:
                self._end(playing.request, playing.ended(EndReason.CANCELLED, playing.text))

    def configure(self, *, max_tokens_per_s: float | None, paused: bool) -> None:
        """Stop and go on; a recording has its own pace, and only says what it was told of another."""
        self._max_tokens_per_s = max_tokens_per_s
        if paused == (self._paused_at is not None):
            return
        now, paused_at = time.monotonic(), self._paused_at
        self._paused_at = now if paused else None
        for playing in self._lines.values():
            if paused_at is not None:
                playing.began_at += now - max(paused_at, playing.came_at)
            self._plan(playing)

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
            paused=self._paused_at is not None,
            max_tokens_per_s=self._max_tokens_per_s,
        )

    def _plan(self, playing: "_Playing") -> None:
        """Wake up when the line goes on, or its deadline has passed."""
        if playing.timer is not None:
            playing.timer.cancel()
            playing.timer = None
        times = [playing.next_at if self._paused_at is None else None, playing.request.deadline]
        at = min((time for time in times if time is not None), default=None)
        if at is not None:
            delay = max(at - time.monotonic(), 0.0)
            playing.timer = asyncio.get_running_loop().call_later(delay, self._go_on, playing)

    def _go_on(self, playing: "_Playing") -> None:
        """Say what is due, and plan what follows."""
        request, now = playing.request, time.monotonic()
        if request.deadline is not None and request.deadline <= now:
            self._end(request, playing.ended(EndReason.DEADLINE, playing.text))
            return
        if self._paused_at is None and playing.next_at <= now:
            event = playing.next_event()
            if isinstance(event, Ended):
                self._num_tokens += event.num_completion
                self._end(request, event)
                return
            self._on_step(StepOutput((event,), frozenset({request.group})))
        self._plan(playing)

    def _end(self, request: Request, ended: Ended) -> None:
        playing = self._lines.pop(request.id, None)
        if playing is not None and playing.timer is not None:
            playing.timer.cancel()
        self._on_step(StepOutput((ended,)))


class _Playing:
    """A line that is being played."""

    def __init__(self, request: Request, take: Take, speed: float) -> None:
        self.request = request
        self.timer: asyncio.TimerHandle | None = None
        self.text = ""
        self.came_at = time.monotonic()
        self._take = take
        self._speed = speed
        self._events = self._list_events()
        self._at = 0
        # Recorded times begin when the client sent the line; an NPC's second one has waited for the first until now.
        self.began_at = max(request.arrival, self.came_at - self._events[0][0] / speed)

    @property
    def next_at(self) -> float:
        """When the next event comes."""
        return self.began_at + self._events[self._at][0] / self._speed

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
            events.append((take.started_at, Started(request_id, end.timing.queue_ms, take.batch_size)))
        events += [(piece.at, Spoken(request_id, piece.text)) for piece in take.pieces]
        error = None if end.error is None else find_error(end.error.code)(end.error.message, end.error.hint)
        text = "" if end.fallback else end.text
        return [*events, (take.ended_at, self.ended(EndReason(end.reason), text, error))]
