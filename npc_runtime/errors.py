"""Every error a user can meet, each with the code it has on the wire.

    NpcError
    ├── StartupError            before the daemon speaks; the CLI prints it as one line
    ├── EngineDied              the daemon's engine ended while it served, and no process takes its place
    ├── DisconnectedError       a client's own: the connection to the daemon is gone
    ├── CardInvalid             a character card that cannot be read; the message names file and place
    └── WireError               has a `code`; reaches the client in `error`, `accepted` or `line.end`
        ├── AuthError               auth
        ├── ProtocolError           protocol
        ├── InvalidError            invalid
        ├── UnsupportedError        unsupported
        ├── PersonaUnknown          persona_unknown
        ├── PersonaInvalid          persona_invalid
        ├── AdapterMissing          adapter_missing
        ├── AdapterIncompatible     adapter_incompatible
        ├── ContextOverflow         context_overflow
        ├── NpcUnknown              npc_unknown
        ├── OverloadError           overload            (retryable)
        ├── DeadlineError           deadline            (retryable)
        ├── FormatUnsupported       format_unsupported
        ├── OutOfMemory             out_of_memory       (retryable)
        └── InternalError           internal
            └── DeviceFailed            internal        (retryable)

`message` names the thing that is wrong; `hint` says what to do about it.
"""

from typing import ClassVar

__all__ = [
    "AdapterIncompatible",
    "AdapterMissing",
    "AuthError",
    "CardInvalid",
    "ContextOverflow",
    "DeadlineError",
    "DeviceFailed",
    "DisconnectedError",
    "EngineDied",
    "FormatUnsupported",
    "InternalError",
    "InvalidError",
    "NpcError",
    "NpcUnknown",
    "OutOfMemory",
    "OverloadError",
    "PersonaInvalid",
    "PersonaUnknown",
    "ProtocolError",
    "StartupError",
    "UnsupportedError",
    "WireError",
    "find_error",
]


class NpcError(Exception):
    """Base of all errors of this project; `str()` is the message and the hint in one line."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class StartupError(NpcError):
    """The daemon cannot start: no base model, a busy port, a folder that does not exist."""


class EngineDied(NpcError):
    """The engine ended while it served, and no other process takes the daemon's place."""


class DisconnectedError(NpcError):
    """The daemon closed the connection, cannot be reached, or did not answer in time."""


class CardInvalid(NpcError):
    """A file that is no character card, or one that is damaged or out of bounds."""


class WireError(NpcError):
    """An error with a code that clients may branch on."""

    code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False


class AuthError(WireError):
    """The token is missing or wrong."""

    code = "auth"


class ProtocolError(WireError):
    """A frame that is not a message of this protocol, or a message out of turn."""

    code = "protocol"


class InvalidError(WireError):
    """A field or option with a value that cannot be used; the message names it."""

    code = "invalid"


class UnsupportedError(WireError):
    """A message or feature that `welcome.caps` does not list."""

    code = "unsupported"


class PersonaUnknown(WireError):
    """No persona with this id is loaded."""

    code = "persona_unknown"


class PersonaInvalid(WireError):
    """A persona file that cannot be read or does not fit the schema."""

    code = "persona_invalid"


class AdapterMissing(WireError):
    """A persona names an adapter folder that is not there or not complete."""

    code = "adapter_missing"


class AdapterIncompatible(WireError):
    """An adapter that was made for another base, or with a method this engine does not apply."""

    code = "adapter_incompatible"


class ContextOverflow(WireError):
    """The prompt and the reply do not fit into the context."""

    code = "context_overflow"


class NpcUnknown(WireError):
    """No NPC with this id was opened."""

    code = "npc_unknown"


class OverloadError(WireError):
    """A bound was reached; nothing is wrong with the request itself."""

    code = "overload"
    retryable = True


class DeadlineError(WireError):
    """The line's deadline passed."""

    code = "deadline"
    retryable = True


class FormatUnsupported(WireError):
    """A constrained output format that this daemon cannot enforce."""

    code = "format_unsupported"


class OutOfMemory(WireError):
    """The device ran out of memory."""

    code = "out_of_memory"
    retryable = True


class InternalError(WireError):
    """A defect of ours; the daemon's log has the details."""

    code = "internal"


class DeviceFailed(InternalError):
    """The device failed, and every line of that moment with it; nothing is wrong with the request."""

    retryable = True


def find_error(code: str) -> type[WireError]:
    """The class of errors that has this code on the wire."""
    return next((kind for kind in WireError.__subclasses__() if kind.code == code), InternalError)
