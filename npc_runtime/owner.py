"""The process that a daemon runs for: when it is gone, the daemon ends, since nobody else would end it.

A thread of its own looks once a second from the very start, because a large base takes minutes to load. It knows
nothing of the daemon: it asks for a stop, and ends a process that does not follow.
"""

import threading
from collections.abc import Callable
from contextlib import suppress

from npc_runtime.errors import StartupError

__all__ = ["OwnerWatch", "find_owner"]

LOOK_EVERY_S = 1.0
GRACE_S = 3.0
"""From the request to the end by force; with the second above and a slow system, less than five."""


def find_owner(pid: int) -> Callable[[], bool]:
    """Return a probe that says whether this process still runs; a later one with the same id is another one.

    Raises `StartupError` if there is no such process now, or none that may be watched.
    """
    import psutil

    try:
        process = psutil.Process(pid)  # remembers when it was created, which a change of the clock does not move
    except (psutil.NoSuchProcess, ValueError, OverflowError) as error:
        raise _gone(pid) from error
    except psutil.AccessDenied as error:
        raise StartupError(f"The owner, process {pid}, may not be watched.", "Is it another user's?") from error

    def is_alive() -> bool:
        with suppress(psutil.AccessDenied):  # what cannot be told is no reason to end a game's voices
            try:
                return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
            except psutil.NoSuchProcess:  # a zombie's, on some systems
                return False
        return True

    if not is_alive():
        raise _gone(pid)
    return is_alive


class OwnerWatch:
    """Calls `on_gone` once the owner is gone, and `on_late` if the watch was not stopped within the grace time."""

    def __init__(
        self,
        is_alive: Callable[[], bool],
        *,
        on_gone: Callable[[], None],
        on_late: Callable[[], None],
        look_every_s: float = LOOK_EVERY_S,
        grace_s: float = GRACE_S,
    ) -> None:
        self.has_ended = False  # the owner is gone; nothing will bring it back
        self._is_alive = is_alive
        self._on_gone = on_gone
        self._on_late = on_late
        self._look_every_s = look_every_s
        self._grace_s = grace_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="owner watch", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """Look no longer; the process ends by itself."""
        self._stopped.set()

    def _watch(self) -> None:
        while self._is_alive():
            if self._stopped.wait(self._look_every_s):
                return
        self.has_ended = True
        self._on_gone()
        if not self._stopped.wait(self._grace_s):
            self._on_late()


def _gone(pid: int) -> StartupError:
    return StartupError(
        f"The owner, process {pid}, is not running.", "--owner-pid takes the id of the process that needs the daemon."
    )
