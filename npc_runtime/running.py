"""Finds the daemon that runs for a project, and asks whether it answers."""

import json
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple
from urllib.parse import urlsplit

from npc_runtime.discovery import project_of, read_endpoint
from npc_runtime.errors import StartupError

__all__ = ["Health", "Target", "ask_health", "find_daemon"]

HEALTH_TIMEOUT_S = 2.0
MAX_HEALTH_BYTES = 1 << 20


class Target(NamedTuple):
    """Where a daemon listens."""

    url: str
    token: str | None


@dataclass(frozen=True, slots=True)
class Health:
    """What `/healthz` said. `gone`: nobody listens there; `silent`: somebody does who does not answer as we do."""

    state: Literal["well", "loading", "ill", "silent", "gone"]
    body: dict[str, Any] = field(default_factory=dict)


def find_daemon(project: str | None, personas: Path, *, url: str | None = None, token: str | None = None) -> Target:
    """Where the daemon is: as told, or from the project's runtime file. Raises `StartupError` if there is none."""
    if url is not None:
        return Target(url, token)
    endpoint = read_endpoint(project or project_of(personas))
    if endpoint is None:
        named = f"project '{project}'" if project else f"personas {personas}"
        raise StartupError(f"No daemon is running for {named}.", "Start one: npc-runtime serve; or name it with --url.")
    return Target(f"ws://127.0.0.1:{endpoint.port}/v1", token or endpoint.token)


def ask_health(target: Target, timeout_s: float = HEALTH_TIMEOUT_S) -> Health:
    """Ask a daemon's `/healthz`. Never raises."""
    request = f"http://{urlsplit(target.url).netloc}/healthz"
    # Loopback is not reached through a proxy, whatever the environment says.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        try:
            with opener.open(request, timeout=timeout_s) as answer:
                return _read_health(answer, "well")
        except urllib.error.HTTPError as error:
            with error:
                return _read_health(error, "ill") if error.code == 503 else Health("silent")
    except urllib.error.URLError as error:
        return Health("gone" if isinstance(error.reason, ConnectionRefusedError) else "silent")
    except (OSError, ValueError):
        return Health("silent")


def _read_health(answer: IO[bytes], state: Literal["well", "ill"]) -> Health:
    """Read what came with that status. Raises `OSError`, `ValueError`."""
    body = json.loads(answer.read(MAX_HEALTH_BYTES))
    if not isinstance(body, dict):
        return Health("silent")
    return Health("loading" if body.get("status") == "loading" else state, body)
