"""The lock that makes a process the only daemon of its project.

The system holds it for as long as the process lives and not a moment longer, so it is never stale. It belongs to the
open file, and therefore goes on in the process that takes this one's place by `exec`.
"""

import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Self

__all__ = ["ProjectLock", "holder_of", "is_held"]

ATTEMPTS, ATTEMPT_EVERY_S = 4, 0.05
"""Whoever asks whether it is held has it for a moment."""

LOCKED_BYTE = 1_024
"""Windows locks bytes, and nobody can read locked ones: this one lies behind the text."""


class ProjectLock:
    """A lock that this process holds until `release`."""

    def __init__(self, path: Path, fd: int) -> None:
        """`fd` is an open file of this path that is locked already, for instance by the process before this one."""
        self.path = path
        self.fd = fd

    @classmethod
    def take(cls, path: Path) -> Self | None:
        """Take it, or return None if another process has it. Raises `OSError` where there can be no lock."""
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(ATTEMPT_EVERY_S)
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                if _lock(fd, shared=False) and _is_at(fd, path):
                    os.truncate(fd, 0)
                    os.write(fd, str(os.getpid()).encode())
                    return cls(path, fd)
            except OSError:
                os.close(fd)
                raise
            os.close(fd)
        return None

    def release(self) -> None:
        """Give it up and remove the file; whoever opened that in the meantime finds out and tries again."""
        is_ours = _is_at(self.fd, self.path)
        if sys.platform == "win32":
            os.close(self.fd)  # an open file cannot be removed there
        if is_ours:
            with suppress(OSError):  # Windows: another process has opened it, and so it stays
                self.path.unlink()
        if sys.platform != "win32":
            os.close(self.fd)


def is_held(path: Path) -> bool | None:
    """Whether a process holds it; None if that cannot be told, for instance because there is no such file."""
    try:
        fd = os.open(path, os.O_RDWR)
        try:
            return not _lock(fd, shared=True)
        finally:
            os.close(fd)
    except OSError:
        return None


def holder_of(path: Path) -> int | None:
    """The id of the process that holds it, or held it last."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _lock(fd: int, *, shared: bool) -> bool:
    if sys.platform == "win32":
        import msvcrt

        os.lseek(fd, LOCKED_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        except PermissionError:
            return False
        os.lseek(fd, 0, os.SEEK_SET)
    else:
        import fcntl

        try:
            fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def _is_at(fd: int, path: Path) -> bool:
    """Whether the locked file is still the one that others would open."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False
