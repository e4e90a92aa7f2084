"""What a session asks of the server, which performs it in order."""

from dataclasses import dataclass

from npc_runtime import protocol as wire
from npc_runtime.line import Job

__all__ = [
    "Close",
    "Configure",
    "Dropped",
    "Effect",
    "ManagePersona",
    "PersonaMessage",
    "Send",
    "SendStatus",
    "Shutdown",
    "Stop",
    "Submit",
    "Supersede",
    "Watch",
]


@dataclass(frozen=True, slots=True)
class Send:
    """Send a message; of a `line.end`, `persona` is whose line it was, if the daemon has that persona."""

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
    """Cancel these requests in the engine."""

    request_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Dropped:
    """Note that lines of these personas get no end, since their client is gone."""

    personas: tuple[str | None, ...]


@dataclass(frozen=True, slots=True)
class Configure:
    """Note what this connection wishes of the engine's pace, and hand what holds now to `Session.reply`."""

    re: wire.Id | None
    max_tokens_per_s: float | None
    paused: bool


PersonaMessage = wire.PersonaGet | wire.PersonaPut | wire.PersonaValidate | wire.PersonaDelete


@dataclass(frozen=True, slots=True)
class ManagePersona:
    """Read or write a persona's file, and hand what came of it to `Session.reply` or `Session.fail`."""

    message: PersonaMessage


@dataclass(frozen=True, slots=True)
class Watch:
    """Begin, or stop, to hand other connections' lines to `Session.on_watched`."""

    on: bool


@dataclass(frozen=True, slots=True)
class Supersede:
    """Take the connection away from this session: another one resumed its cast."""

    session: object


@dataclass(frozen=True, slots=True)
class Shutdown:
    """End the daemon."""


@dataclass(frozen=True, slots=True)
class Close:
    """Close the connection, after everything before it was sent."""

    code: int
    reason: str


Effect = Send | SendStatus | Submit | Stop | Dropped | Configure | ManagePersona | Watch | Supersede | Shutdown | Close
