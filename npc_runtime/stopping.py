"""How a process is asked to stop: by signals, and by what acts like one.

Until something better is in place, a request leaves through all `finally`s, so that what is half done is cleaned up.
"""

import signal
import sys
import threading
from types import TracebackType
from typing import Any, Self

__all__ = ["StopNote", "ask_to_stop", "leave_when_asked", "stop_signals", "was_asked_to_stop"]


def stop_signals() -> list[signal.Signals]:
    """Those that ask a process to end: of the system, of a terminal that is closed, of a spawner on Windows."""
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
    numbers = [signal.Signals[name] for name in names if name in signal.Signals.__members__]
    return [n for n in numbers if n.name != "SIGHUP" or signal.getsignal(n) is not signal.SIG_IGN]  # nohup ignores it


def leave_when_asked() -> None:
    """Make every such signal but Ctrl-C, which Python handles alike, a `SystemExit` in the main thread."""
    for number in stop_signals():
        if number is not signal.SIGINT:
            signal.signal(number, _leave)


def was_asked_to_stop() -> bool:
    """Whether that happened: native code (safetensors) may turn the `SystemExit` into an error of its own."""
    return signal.getsignal(signal.SIGTERM) is signal.SIG_IGN


def ask_to_stop() -> None:
    """Do as a SIGTERM would; from any thread."""
    if sys.platform == "win32":  # whose os.kill ends the process at once
        import _thread

        _thread.interrupt_main(signal.SIGTERM)
    else:
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGTERM)  # to the one that may be waiting in a system call


class StopNote:
    """Within `with`, in the main thread, a request to stop interrupts nothing any more; that it came is noted."""

    def __init__(self) -> None:
        self.was_asked = False
        self._before: list[tuple[signal.Signals, Any]] = []

    def __enter__(self) -> Self:
        self._before = [(number, signal.signal(number, self._note)) for number in stop_signals()]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before:
            signal.signal(number, handler)

    def _note(self, *_: object) -> None:
        self.was_asked = True


def _leave(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(0)
