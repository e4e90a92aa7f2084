"""The runtime file: where a project's daemon is, readable by its owner only; and that there is one such daemon.

`{port, pid, token, protocol, base, log}`; one file a project in the per-user runtime folder, its lock beside it.
"""

import contextlib
import hashlib
import json
import logging
import os
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Self

from npc_runtime.errors import StartupError
from npc_runtime.project_lock import ProjectLock, holder_of, is_held

__all__ = [
    "Endpoint",
    "file_name",
    "hold_project",
    "lock_file",
    "project_of",
    "read_endpoint",
    "remove_endpoint",
    "runtime_file",
    "write_endpoint",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """How to reach a daemon; also its first line on stdout."""

    port: int
    pid: int
    token: str | None
    protocol: int
    base: str  # as `--base` named it: the file is there before the base is
    log: str | None = None  # the file; None: stderr only

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote, a newer daemon's too. Raises `ValueError`."""
        found = json.loads(text)
        if not isinstance(found, dict):
            raise ValueError("not an endpoint")
        try:
            return cls(**{field.name: found[field.name] for field in fields(cls) if field.name in found})
        except TypeError as error:
            raise ValueError("not an endpoint") from error

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), separators=(",", ":"))


def project_of(personas: Path) -> str:
    """The default project name of a personas folder: a hash of its path."""
    return hashlib.sha256(str(personas.resolve()).encode()).hexdigest()[:12]


def file_name(project: str, suffix: str) -> str:
    """The name of a project's file, in whatever folder."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in project)[:64] + suffix


def runtime_file(project: str, *, make_folder: bool = False) -> Path:
    """Where the project's runtime file is. Raises `OSError` if the folder is not this user's own."""
    import platformdirs

    with warnings.catch_warnings():  # platformdirs warns where XDG_RUNTIME_DIR is not set; its choice is fine
        warnings.simplefilter("ignore")
        folder = platformdirs.user_runtime_path("npc-runtime", appauthor=False, ensure_exists=make_folder)
    return folder / file_name(project, ".json")


def lock_file(project: str) -> Path:
    """Where the project's lock is, in a folder that is there."""
    return runtime_file(project, make_folder=True).with_suffix(".lock")


def hold_project(project: str) -> ProjectLock | None:
    """Make this process the project's only daemon, and remove what one that was killed has left behind.

    None, with a warning, where there can be no lock. Raises `StartupError` that says who has it.
    """
    try:
        path = lock_file(project)
        lock = ProjectLock.take(path)
    except OSError as error:
        logger.warning("no lock for project %s (%s): a second daemon would not be noticed", project, error)
        return None
    if lock is None:
        raise StartupError(
            f"A daemon for project '{project}' runs already: {_describe_holder(project, holder_of(path))}.",
            "Use that one (npc-runtime top shows it), stop it, or name another --project for this one.",
        )
    with contextlib.suppress(OSError):
        runtime_file(project).unlink()
    return lock


def write_endpoint(project: str, endpoint: Endpoint) -> Path:
    """Write the runtime file by one rename; other users cannot read it at any moment."""
    path = runtime_file(project, make_folder=True)
    handle, name = tempfile.mkstemp(dir=path.parent)  # mode 0600; on Windows the folder is the user's own
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(endpoint.to_json())
    try:
        os.replace(name, path)
    except OSError:  # Windows: somebody reads the old one
        os.unlink(name)
        raise
    return path


def read_endpoint(project: str) -> Endpoint | None:
    """Where the project's daemon is; None if there is none, also if one that is gone has left its file."""
    try:
        path = runtime_file(project)
        endpoint = Endpoint.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    held = is_held(path.with_suffix(".lock"))
    return endpoint if held or (held is None and _is_running(endpoint.pid)) else None


def remove_endpoint(project: str, pid: int) -> None:
    """Remove the runtime file if it is still this process's."""
    with contextlib.suppress(OSError, ValueError):
        path = runtime_file(project)
        if Endpoint.from_json(path.read_text(encoding="utf-8")).pid == pid:
            path.unlink()


def _is_running(pid: int) -> bool:
    import psutil

    return isinstance(pid, int) and bool(psutil.pid_exists(pid))


def _describe_holder(project: str, pid: int | None) -> str:
    """`process 4711, port 4780, since 2026-11-02 14:03`, as far as it is known."""
    import psutil

    endpoint = read_endpoint(project)
    parts = ["a process that does not say who it is" if pid is None else f"process {pid}"]
    parts.append("still loading" if endpoint is None else f"port {endpoint.port}")
    with contextlib.suppress(psutil.Error):
        if pid is not None:
            started = time.localtime(psutil.Process(pid).create_time())
            parts.append(f"since {time.strftime('%Y-%m-%d %H:%M', started)}")
    return ", ".join(parts)
