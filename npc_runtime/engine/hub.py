"""Bases of the Hugging Face hub: `org/name` or `org/name@revision`, found in its cache or fetched into it.

Our own process stays offline, whatever a library would like to look up: what was asked for by name is fetched by a
process of its own (`hub_process`). Once a snapshot is complete, nothing is asked of the hub again.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from npc_runtime.engine.base_folder import is_complete
from npc_runtime.engine.embedded import OnProgress
from npc_runtime.errors import StartupError

__all__ = ["HubId", "fetch_snapshot", "find_snapshot", "parse_hub_id", "stay_offline"]

SWITCH = "HF_HUB_OFFLINE"
OURS = "On"
"""How we switch the hub off for a process, told from a user who does (with 1) by its spelling alone."""

STALL_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 5.0

HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*)(?:@(?P<revision>[\w./-]+))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class HubId:
    """A model of the hub; without a revision its main branch."""

    repo: str
    revision: str = "main"

    def __str__(self) -> str:
        return self.repo if self.revision == "main" else f"{self.repo}@{self.revision}"


def parse_hub_id(text: str) -> HubId | None:
    """Read `org/name[@revision]`; None for anything else, such as a path."""
    match = HUB_ID.fullmatch(text)
    return HubId(match["repo"], match["revision"] or "main") if match else None


def stay_offline() -> None:
    """Keep this process, and every one that it starts, from looking anything up at the hub; before it is imported."""
    os.environ.setdefault(SWITCH, OURS)


def find_snapshot(hub_id: HubId) -> Path | None:
    """The model's folder in the hub's cache, if it is complete. Asks nobody."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(hub_id.repo, "config.json", revision=hub_id.revision)
    except HFValidationError:
        return None
    folder = Path(config).parent if isinstance(config, str) else None
    return folder if folder is not None and is_complete(folder) else None


def fetch_snapshot(hub_id: HubId, on_progress: OnProgress) -> Path:
    """Fetch a model that `find_snapshot` did not find, and return its folder. Files that are there stay as they are.

    Raises `StartupError` if it cannot be had: no such model, no access, no network, no room, or none that can be run.
    """
    forbidden = _find_ban()
    if forbidden:
        raise StartupError(
            f"{hub_id} is not in the cache of the hub, and {forbidden} forbids to fetch it.",
            "Unset that once, or name the folder of a model.",
        )
    label = f"downloading {hub_id}"
    on_progress(label, 0.0)
    folder = _run(hub_id, lambda fraction: on_progress(label, fraction))
    on_progress(label, 1.0)
    return folder


def _find_ban() -> str | None:
    """The user's own setting, if there is one, that keeps everything off the network."""
    for name in (SWITCH, "TRANSFORMERS_OFFLINE"):
        value = os.environ.get(name, "")
        if value != OURS and value.upper() in ("1", "ON", "YES", "TRUE"):
            return f"{name}={value}"
    return None


def _run(hub_id: HubId, on_fraction: Callable[[float], None]) -> Path:
    """Let the other process fetch, and pass on what it says; it is gone when this returns."""
    # -P keeps the current folder off sys.path: a checkout's kernels/ would shadow the package of that name.
    command = [sys.executable, "-P", "-m", "npc_runtime.engine.hub_process", hub_id.repo, hub_id.revision]
    environment = {**os.environ, SWITCH: "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            encoding="utf-8",
            env=environment,
        )
        try:
            folder = _listen(process, on_fraction)
        finally:
            _stop(process)
        if folder is not None:
            return folder
        log.seek(0)
        said = [line for line in log.read().splitlines() if line.strip()]
    reason = said[-1] if said else f"exit status {process.returncode}"
    raise StartupError(f"{hub_id} could not be fetched ({reason}).", "Try again: what is complete is kept.")


def _listen(process: subprocess.Popen[str], on_fraction: Callable[[float], None]) -> Path | None:
    """Take one JSON map a line until there is a folder or an error; None if the process ends, or stalls, before."""
    for line in _lines(process):
        said = json.loads(line)
        if "error" in said:
            raise StartupError(said["error"], said["hint"])
        if "folder" in said:
            return Path(said["folder"])
        on_fraction(float(said["fraction"]))
    return None


def _lines(process: subprocess.Popen[str]) -> Iterator[str]:
    """Yield what the process prints; one that says nothing for too long is ended."""
    assert process.stdout is not None
    while True:
        timer = threading.Timer(STALL_TIMEOUT_S, process.kill)
        timer.start()
        try:
            line = process.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            return
        yield line


def _stop(process: subprocess.Popen[str]) -> None:
    """End the process; asked first, so that it takes its unfinished file away."""
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout:
        process.stdout.close()
