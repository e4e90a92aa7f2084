"""What a session asks of the server, which performs it in order."""

from dataclasses import dataclass

from npc_runtime import protocol as wire
from npc_runtime.line import Job

__all__ = ["Close", "Effect", "Send", "SendStatus", "Stop", "Submit"]


@dataclass(frozen=True, slots=True)
class Send:
    """Send a message; of a `line.end`, `persona` is whose line it was."""

    message: wire.ServerMessage
    persona: str | None = None


@dataclass(frozen=True, slots=True)
class SendStatus:
    """Ask the server for the daemon's state and hand it to `Session.reply`."""

    re: wire.Id | None


@dataclass(frozen=True, slots=True)
class Submit:
    """Give these lines to the engine, together."""

    jobs: tuple[Job, ...]


@dataclass(frozen=True, slots=True)
class Stop:
    """Cancel these requests in the engine. `dropped`: the personas of those that get no end; their client is gone."""

    request_ids: tuple[int, ...]
    dropped: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Close:
    """Close the connection, after everything before it was sent."""

    code: int
    reason: str


Effect = Send | SendStatus | Submit | Stop | Close
