"""What a daemon's process needs before it loads anything: its owner, its project's lock, its log; and how it ends.

It knows nothing of models and sockets. Whatever is wrong here is said at once, since what comes next takes long.
"""

import faulthandler
import logging
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from npc_runtime import __version__
from npc_runtime.discovery import file_name, hold_project, lock_file
from npc_runtime.errors import NpcError
from npc_runtime.handover import Handover
from npc_runtime.logs import STDERR, Log, fill_standard_files, pairs
from npc_runtime.owner import OwnerWatch, find_owner
from npc_runtime.project_lock import ProjectLock
from npc_runtime.stopping import ask_to_stop, was_asked_to_stop

__all__ = ["DaemonProcess", "LogOptions", "run_process"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LogOptions:
    """Where to log; `file` None is the user's log folder, `-` stderr alone."""

    file: str | None = None
    level: int = logging.INFO


@dataclass(frozen=True, slots=True)
class DaemonProcess:
    """This process, the only one that serves `project`."""

    project: str
    log: Log
    lock: ProjectLock | None = None
    owner: OwnerWatch | None = None
    owner_pid: int | None = None
    taken: Handover | None = None  # from the process before this one

    @property
    def why_it_stops(self) -> str:
        """For clients, after it was asked to."""
        is_orphan = self.owner is not None and self.owner.has_ended
        return "the process that owned the daemon is gone" if is_orphan else "the daemon was stopped"


def run_process(
    body: Callable[[DaemonProcess], None], *, project: str, owner_pid: int | None = None, log: LogOptions
) -> int:
    """Run `body` as the project's only daemon; returns the exit status. Errors are in the log, and a line on stderr.

    The caller ends the process with `os._exit`: taking torch apart would cost another second of the two that a stop
    may take, and may never end with a device that does not answer.
    """
    fill_standard_files()
    faulthandler.enable(STDERR)
    own_log = Log(log.level)
    try:
        with _prepare(project, owner_pid, own_log, log.file) as process:
            return _run(body, process)
    except NpcError as error:
        _report(own_log, error)
        return 1
    finally:
        own_log.close()


def _run(body: Callable[[DaemonProcess], None], process: DaemonProcess) -> int:
    try:
        body(process)
    except (SystemExit, KeyboardInterrupt):
        logger.info("stopped: %s", process.why_it_stops)
    except Exception as error:
        if was_asked_to_stop():
            return 0
        _report(process.log, error)
        return 1
    return 0


def _report(log: Log, error: Exception) -> None:
    if isinstance(error, NpcError):
        log.note(logging.ERROR, str(error))
        log.say(f"npc-runtime: {error}")
    else:
        logger.critical("the daemon ends by a defect", exc_info=error)


@contextmanager
def _prepare(project: str, owner_pid: int | None, log: Log, file: str | None) -> Iterator[DaemonProcess]:
    taken = Handover.take()
    with ExitStack() as stack:
        owner = None
        if owner_pid is not None:
            owner = _watch_owner(owner_pid)
            stack.callback(owner.stop)
        lock = _hold(project, taken)
        if lock is not None:
            stack.callback(lock.release)
        if file != "-":
            log.open_file(Path(file) if file else _default_file(project), is_wanted=file is not None)
        about = pairs(pid=os.getpid(), project=project, owner=owner_pid, python=platform.python_version())
        log.note(logging.INFO, f"npc-runtime {__version__} starts {about}")
        yield DaemonProcess(project, log, lock, owner, owner_pid, taken)


def _hold(project: str, taken: Handover | None) -> ProjectLock | None:
    if taken is not None and taken.lock_fd is not None:
        return ProjectLock(lock_file(project), taken.lock_fd)
    return hold_project(project)


def _watch_owner(pid: int) -> OwnerWatch:
    def on_gone() -> None:
        logger.warning("the owner is gone %s", pairs(pid=pid))
        ask_to_stop()

    def on_late() -> None:
        logger.error("it takes too long to stop, and nobody is left to wait")
        os._exit(1)

    watch = OwnerWatch(find_owner(pid), on_gone=on_gone, on_late=on_late)
    watch.start()
    return watch


def _default_file(project: str) -> Path:
    import platformdirs

    return platformdirs.user_log_path("npc-runtime", appauthor=False) / file_name(project, ".log")
