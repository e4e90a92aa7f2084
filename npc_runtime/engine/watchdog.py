"""Notices what does not come back: a GPU that hangs lets a thread wait for ever, without an error.

Time is counted by waking up once a second, not by a clock: while a machine sleeps, or a debugger holds the process,
nobody wakes up and nothing counts.
"""

import sys
import threading
import traceback
from collections.abc import Callable, Mapping

__all__ = ["Patience", "Watchdog", "trace"]


Find = Callable[[], int | None]
"""Says the number of the step that is under way; None: there is none."""


class Patience:
    """Counts the wake-ups that find one and the same step under way."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._step: int | None = None
        self._num_seen = 0

    def wake(self, step: int | None) -> bool:
        """Look at the step that is under way, if any; True if it was found more often than the limit allows."""
        self._num_seen = self._num_seen + 1 if step is not None and step == self._step else 0
        self._step = step
        return self._num_seen > self._limit


class Watchdog:
    """A thread that asks every `tick_s` seconds what is under way, and calls `on_hang`, once, if something hangs."""

    def __init__(
        self, watched: Mapping[str, Find], on_hang: Callable[[str], None], *, limit: int, tick_s: float
    ) -> None:
        """`on_hang` is called on this thread, with the name of what hangs."""
        self._watched = [(name, find, Patience(limit)) for name, find in watched.items()]
        self._on_hang = on_hang
        self._tick_s = tick_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """Watch no more; may be called from any thread, and again."""
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(self._tick_s):
            for name, find, patience in self._watched:
                if patience.wake(find()):
                    self._on_hang(name)
                    return


def trace(thread: threading.Thread) -> str:
    """Where a thread is in its Python code."""
    frame = sys._current_frames().get(thread.ident or 0)
    return "".join(traceback.format_stack(frame)) if frame is not None else ""
