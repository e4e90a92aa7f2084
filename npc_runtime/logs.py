"""Where the log goes: to a file, and to stderr as far as nobody can be harmed by that.

One record is one line, `time LEVEL message`, whatever a client put into it; what a message is about stands at its end
as `key=value`, written by `pairs`. A line never holds the daemon's token, even if somebody logs it by mistake.

A spawner may close the pipe that it gave as stderr, or never read it. So a thread writes to it, which alone may have to
wait; as soon as the daemon's first line is out, the file takes its place for whatever else of this process writes to
stderr; and when nobody waits for an error any more, the pipe is left.
"""

import logging
import os
import queue
import stat
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path
from types import TracebackType

from npc_runtime.errors import StartupError

__all__ = ["Log", "fill_standard_files", "logged_progress", "pairs"]

logger = logging.getLogger(__name__)

STDERR = 2
FILE_BYTES, OLDER_FILES = 2_000_000, 2
MAX_QUEUED_LINES = 1_000
"""For stderr; the file has the others."""
STDERR_TIMEOUT_S = 0.5
MAX_MESSAGE_CHARS = 4_000
MAX_VALUE_CHARS = 200

OURS = ("npc_runtime", "npc_kernels")
QUIET = {"websockets": logging.ERROR, "watchfiles": logging.WARNING}
"""They report every handshake, and every file that changed; what that meant is logged by us."""

ESCAPES = {code: f"\\x{code:02x}" for code in [*range(32), *range(127, 160)]} | {
    ord("\n"): "\\n",
    ord("\r"): "\\r",
    ord("\t"): "\\t",
    0x2028: "\\u2028",
    0x2029: "\\u2029",
}


def pairs(**values: object) -> str:
    """`line=7 npc="old odo" ms=41.5`; what is None is left out.

    Use it as `logger.info("line %s", pairs(line=…, reason=…))`.
    """
    return " ".join(f"{key}={_value(value)}" for key, value in values.items() if value is not None)


def _value(value: object) -> str:
    text = f"{value:.1f}" if isinstance(value, float) else str(value)
    text = text if len(text) <= MAX_VALUE_CHARS else text[:MAX_VALUE_CHARS] + "…"
    if text and not any(c.isspace() or c in "=\"'\\" for c in text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def fill_standard_files() -> None:
    """Open what is closed of stdin, stdout and stderr: a socket that got such a number would be written to."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= STDERR:
        os.set_inheritable(fd, True)
    os.close(fd)


@contextmanager
def logged_progress() -> Iterator[Callable[[str, float], None]]:
    """Yield `report(label, fraction)`, which logs what begins."""
    begun: set[str] = set()

    def report(label: str, fraction: float) -> None:
        if label not in begun:
            begun.add(label)
            logger.info("%s …", label)

    yield report


class Log:
    """The log of this process, from here until `close`; stderr only until there is a file."""

    def __init__(self, level: int = logging.INFO) -> None:
        self.path: Path | None = None
        self._formatter = _Formatter("%(asctime)s %(levelname)s %(message)s")
        self._formatter.default_msec_format = "%s.%03d"
        self._stderr: _StderrHandler | None = _StderrHandler()
        self._file: _FileHandler | None = None
        self._hooks = (sys.excepthook, threading.excepthook, sys.unraisablehook)
        sys.excepthook, threading.excepthook, sys.unraisablehook = _on_error, _on_thread_error, _on_unraisable
        logging.raiseExceptions = False  # a full disk must not end what it was told of
        logging.captureWarnings(True)
        wanted = {"": max(level, logging.INFO), **dict.fromkeys(OURS, level), **QUIET}
        self._levels = {name: logging.getLogger(name).level for name in wanted}
        _set_levels(wanted)
        self._add(self._stderr)

    def open_file(self, path: Path, *, is_wanted: bool) -> None:
        """Log to this file too. If it cannot be written: `StartupError` if the user `is_wanted` it, else a warning."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._file = _FileHandler(path)
        except OSError as error:
            problem = f"The log file {path} cannot be written ({error.strerror or error})."
            if is_wanted:
                raise StartupError(problem, "Name another --log-file; - is stderr alone.") from error
            logger.warning("%s The log is on stderr only.", problem)
            return
        self.path = path
        self._add(self._file)
        if self._file.is_stderr and self._stderr is not None:  # of the process before, or the user's own doing
            self._drop_stderr(self._stderr)

    def shield_stderr(self) -> None:
        """The daemon's first line is out: whatever is not logged goes to the file instead of stderr, unless that is a
        terminal or a file itself. What is logged goes where it went.
        """
        if self._stderr is None or self._file is None or self._file.is_stderr or _is_kept():
            return
        if self._stderr.move() or os.name == "posix":  # Windows waits for who writes to it
            self._file.take_stderr()

    def settle(self) -> None:
        """The daemon is ready: log to the file alone, unless stderr is a terminal or a file itself."""
        self.shield_stderr()
        if self._stderr is not None and self._stderr.has_moved:
            self._drop_stderr(self._stderr)

    def hide(self, secret: str) -> None:
        """Never show this text."""
        self._formatter.secrets.append(secret)

    def note(self, level: int, message: str, *, error: BaseException | None = None) -> None:
        """Write to the file alone."""
        if self._file is not None:
            info = None if error is None else (type(error), error, error.__traceback__)
            self._file.handle(logger.makeRecord(__name__, level, "", 0, message, (), info))

    def say(self, text: str) -> None:
        """Write a line to stderr alone, for whoever started the process."""
        if self._stderr is not None:
            self._stderr.say(text)

    def flush(self) -> None:
        """Wait until everything is written, for a moment where somebody does not read."""
        for handler in (self._stderr, self._file):
            if handler is not None:
                handler.flush()

    def close(self) -> None:
        """Write what is left, and log no more."""
        sys.excepthook, threading.excepthook, sys.unraisablehook = self._hooks
        logging.captureWarnings(False)
        if self._stderr is not None:
            self._drop_stderr(self._stderr)
        if self._file is not None:
            logging.getLogger().removeHandler(self._file)
            self._file.close()
            self._file = None
        _set_levels(self._levels)

    def _add(self, handler: logging.Handler) -> None:
        handler.setFormatter(self._formatter)
        logging.getLogger().addHandler(handler)

    def _drop_stderr(self, handler: "_StderrHandler") -> None:
        logging.getLogger().removeHandler(handler)
        handler.close()
        self._stderr = None


def _set_levels(levels: Mapping[str, int]) -> None:
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


class _Formatter(logging.Formatter):
    """One line a record (and a traceback's lines, if it has one), without control characters and secrets."""

    secrets: list[str]

    def __init__(self, form: str) -> None:
        super().__init__(form)
        self.secrets = []

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = record.message[:MAX_MESSAGE_CHARS].translate(ESCAPES)
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        for secret in self.secrets:
            text = text.replace(secret, "[secret]")
        return "\n".join(line.translate(ESCAPES) for line in text.split("\n"))


class _FileHandler(RotatingFileHandler):
    """A bounded file that only its owner may read."""

    def __init__(self, path: Path) -> None:
        self.is_stderr = False  # stderr is this file
        super().__init__(path, maxBytes=FILE_BYTES, backupCount=OLDER_FILES)
        with suppress(OSError):
            self.is_stderr = os.path.samestat(os.fstat(STDERR), os.stat(path))

    def take_stderr(self) -> None:
        """Have everything that is written to stderr in the file, by whatever library."""
        self.is_stderr = True
        self._point_stderr(self.stream)

    def doRollover(self) -> None:
        if self.is_stderr:
            with open(os.devnull, "w") as null:
                self._point_stderr(null)  # Windows renames no file that is open
        try:
            super().doRollover()
        except OSError:  # Windows: somebody else has it open; it grows until they have not
            self.stream = self._open()
        if self.is_stderr:
            self._point_stderr(self.stream)

    def _open(self) -> TextIOWrapper:
        return open(self.baseFilename, "a", encoding="utf-8", errors="backslashreplace", opener=_open_private)

    def _point_stderr(self, stream: TextIOWrapper | None) -> None:
        with suppress(OSError):
            if stream is not None:
                os.dup2(stream.fileno(), STDERR)


class _StderrHandler(logging.Handler):
    """Lines for stderr, written by a thread: a full pipe, or a terminal that is held, stops nobody else."""

    def __init__(self) -> None:
        super().__init__()
        self._fd = STDERR
        self._lines: queue.Queue[str | None] = queue.Queue(MAX_QUEUED_LINES)
        self._thread = threading.Thread(target=self._write_all, name="stderr", daemon=True)
        self._thread.start()

    @property
    def has_moved(self) -> bool:
        """Whether the lines go to what stderr was, and not to what it is now."""
        return self._fd != STDERR

    def move(self) -> bool:
        """Let something else become stderr; returns whether nobody is writing to it."""
        with suppress(OSError):
            self._fd = os.dup(STDERR)
        self.flush()
        return not self._lines.unfinished_tasks

    def emit(self, record: logging.LogRecord) -> None:
        self.say(self.format(record))

    def say(self, text: str) -> None:
        """Write this line, if there is room for one more."""
        with suppress(queue.Full):
            self._lines.put_nowait(text)

    def flush(self) -> None:
        """Wait a moment until all is written."""
        with self._lines.all_tasks_done:
            self._lines.all_tasks_done.wait_for(lambda: not self._lines.unfinished_tasks, STDERR_TIMEOUT_S)

    def close(self) -> None:
        """End the thread once all is written, or after a moment leave it where it waits."""
        with suppress(queue.Full):
            self._lines.put_nowait(None)
            self._thread.join(STDERR_TIMEOUT_S)
        if self.has_moved and not self._thread.is_alive():
            os.close(self._fd)  # its reader hears of it
        super().close()

    def _write_all(self) -> None:
        line: str | None = ""
        while line is not None:
            line = self._lines.get()
            with suppress(Exception):  # it is closed, mostly; the file has all
                if line is not None:
                    _write(line + "\n", self._fd)
            self._lines.task_done()


def _write(text: str, fd: int) -> None:
    if sys.stderr is not None and os.isatty(fd):
        sys.stderr.write(text)  # above a progress bar, if there is one
        sys.stderr.flush()
    else:
        os.write(fd, text.encode(errors="backslashreplace"))


def _is_kept() -> bool:
    """Whether stderr is something that is not left: it is always read, or never has to be."""
    try:
        return os.isatty(STDERR) or stat.S_ISREG(os.fstat(STDERR).st_mode)
    except OSError:
        return False


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _on_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    logger.critical("an error that nobody expected", exc_info=(kind, error, trace))


def _on_thread_error(args: threading.ExceptHookArgs) -> None:
    if args.exc_type is not SystemExit and args.exc_value is not None:
        name = args.thread.name if args.thread else "?"
        logger.critical("thread %s ended by an error", name, exc_info=args.exc_value)


def _on_unraisable(args: "sys.UnraisableHookArgs") -> None:
    logger.error("%s %r", args.err_msg or "an error in", args.object, exc_info=args.exc_value)
