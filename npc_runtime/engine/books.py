"""Every line from its submission to its one end, and who may still say something about it. No torch, no clock.

The engine thread reports what each step brought. Whoever finds that thread dead, or stuck in a call to the device,
closes the books in its place: every open line ends there and then. What the thread says when it comes back after all
is refused, and it learns so (`BooksClosed`). So a line has exactly one end, whichever of the two is faster.
"""

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from npc_runtime.engine.core import Ended, EndReason, Event, Request, Spoken, StepOutput
from npc_runtime.errors import WireError

__all__ = ["Books", "BooksClosed"]


class BooksClosed(Exception):
    """Every line was ended by somebody else; nobody is to be told anything more."""


@dataclass(slots=True)
class _Line:
    """A line that has not ended, and what was reported of it."""

    request: Request
    queue_ms: float | None = None
    first_text_ms: float | None = None
    texts: list[str] = field(default_factory=list)

    def end(self, reason: EndReason, error: WireError | None, now: float) -> Ended:
        """Its end, as far as it can be told from outside: every text that was spoken counts as a token."""
        total_ms = 1000 * (now - self.request.arrival)
        return Ended(
            request_id=self.request.id,
            reason=reason,
            text="".join(self.texts),
            num_prompt=len(self.request.prompt_ids),
            num_completion=len(self.texts),
            queue_ms=total_ms if self.queue_ms is None else self.queue_ms,
            first_text_ms=self.first_text_ms,
            total_ms=total_ms,
            error=error,
        )


class Books:
    """May be used from any thread. Whoever is told (`on_step`) may submit lines, but must not wait for who does."""

    def __init__(self, on_step: Callable[[StepOutput], None]) -> None:
        self._on_step = on_step
        self._lines: dict[int, _Line] = {}
        self._closed: tuple[EndReason, WireError | None] | None = None
        self._lock = threading.Lock()  # of the two above
        self._reporting = threading.Lock()  # what is reported first is also told first

    @property
    def open_ids(self) -> list[int]:
        """The lines that have not ended, in the order they came."""
        with self._lock:
            return list(self._lines)

    def open(self, requests: Iterable[Request], now: float) -> None:
        """Take lines in, before the engine gets them; when the books are closed they end at once."""
        lines = [_Line(request) for request in requests]
        with self._lock:
            closed = self._closed
            if closed is None:
                self._lines.update((line.request.id, line) for line in lines)
        if closed is not None and lines:
            self._on_step(StepOutput(tuple(line.end(*closed, now) for line in lines)))

    def report(self, step: StepOutput, now: float) -> None:
        """Tell what a step brought. Raises `BooksClosed`: then nobody was told."""
        with self._reporting:
            with self._lock:
                if self._closed is not None:
                    raise BooksClosed
                self._note(step.events, now)
            self._on_step(step)

    def close(self, reason: EndReason, error: WireError | None, now: float) -> bool:
        """End every open line, and whatever line may still come. False: that was done before."""
        with self._reporting:
            with self._lock:
                if self._closed is not None:
                    return False
                self._closed = reason, error
                lines, self._lines = list(self._lines.values()), {}
            if lines:
                self._on_step(StepOutput(tuple(line.end(reason, error, now) for line in lines)))
        return True

    def _note(self, events: Iterable[Event], now: float) -> None:
        lines = self._lines
        for event in events:
            line = lines.get(event.request_id)
            if line is None:
                continue
            if isinstance(event, Spoken):
                line.texts.append(event.text)
                if line.first_text_ms is None:
                    line.first_text_ms = 1000 * (now - line.request.arrival)
            elif isinstance(event, Ended):
                del lines[event.request_id]
            else:
                line.queue_ms = event.queue_ms
