"""The runtime file: where a project's daemon is, readable by its owner only.

`{port, pid, token, protocol, base}`; one file a project in the per-user runtime folder.
"""

import contextlib
import hashlib
import json
import os
import tempfile
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["Endpoint", "project_of", "read_endpoint", "remove_endpoint", "runtime_file", "write_endpoint"]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """How to reach a daemon; also its first line on stdout."""

    port: int
    pid: int
    token: str | None
    protocol: int
    base: str

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), separators=(",", ":"))


def project_of(personas: Path) -> str:
    """The default project name of a personas folder: a hash of its path."""
    return hashlib.sha256(str(personas.resolve()).encode()).hexdigest()[:12]


def runtime_file(project: str) -> Path:
    """Where the project's runtime file is."""
    import platformdirs

    with warnings.catch_warnings():  # platformdirs warns where XDG_RUNTIME_DIR is not set; its choice is fine
        warnings.simplefilter("ignore")
        folder = platformdirs.user_runtime_path("npc-runtime", appauthor=False)
    safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in project)[:64]
    return folder / f"{safe}.json"


def write_endpoint(project: str, endpoint: Endpoint) -> Path:
    """Write the runtime file by one rename; other users cannot read it at any moment."""
    path = runtime_file(project)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
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
    """Read the project's runtime file; None if there is none that can be read."""
    try:
        return Endpoint(**json.loads(runtime_file(project).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def remove_endpoint(project: str, pid: int) -> None:
    """Remove the runtime file if it is still this process's."""
    found = read_endpoint(project)
    if found is not None and found.pid == pid:
        with contextlib.suppress(OSError):
            runtime_file(project).unlink()
