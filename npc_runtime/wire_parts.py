"""What the messages of both sides are made of: versions and limits, ids, and the small maps inside them."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator

from npc_runtime.cast import MAX_NPCS, MAX_VARS
from npc_runtime.history import MAX_HISTORY_CHARS, MAX_HISTORY_MESSAGES

__all__ = [
    "CAPS",
    "LIMITS",
    "MAX_CLIENT_FRAME",
    "MAX_SERVER_FRAME",
    "PROTOCOL_VERSION",
    "SUBPROTOCOLS",
    "BaseModelInfo",
    "ChatTurn",
    "CloseCode",
    "ErrorInfo",
    "Id",
    "Message",
    "NpcId",
    "Options",
    "PersonaInfo",
    "ShortText",
    "is_id",
]

PROTOCOL_VERSION = 1
SUBPROTOCOLS = ("npc.v1.msgpack", "npc.v1.json")
MAX_CLIENT_FRAME = 1 << 20
MAX_SERVER_FRAME = 32 * 1024

CAPS = (
    "generate",
    "cancel",
    "npc.open",
    "npc.close",
    "npc.history",
    "npc.snapshot",
    "npc.restore",
    "persona.list",
    "persona.get",
    "persona.put",
    "persona.validate",
    "persona.delete",
    "persona.changed",
    "warmup",
    "watch",
    "config",
    "status",
    "stats",
    "shutdown",
    "resume",
    "draft",
    "fallback",
    "trim",
    "deadline",
    "context",
)
"""Features that a client may rely on; a message or feature that is not listed is refused `unsupported`."""

LIMITS = {
    "text_chars": 8_000,
    "reply_chars": 4_000,
    "lines": 256,
    "batch": 64,
    "warmup": 64,
    "max_tokens": 1_024,
    "npcs": MAX_NPCS,
    "history_messages": MAX_HISTORY_MESSAGES,
    "history_chars": MAX_HISTORY_CHARS,
    "vars": MAX_VARS,
    "rank": 64,
    "frame": MAX_CLIENT_FRAME,
}
"""`welcome.limits`: code points of a text and of a reply, live lines of a connection, lines of a batch, personas of a
warmup, tokens of a reply; open NPCs of a connection, and what each keeps: messages and code points of its history, and
variables; …"""


class CloseCode:
    """WebSocket close codes of this protocol; the reason text says more."""

    PROTOCOL = 4400
    AUTH = 4401
    ORIGIN = 4403
    HELLO_TIMEOUT = 4408
    TOO_MANY = 4429
    TOO_LARGE = 1009
    FAILED = 1011
    RESTART = 1012


class Message(BaseModel):
    """A map on the wire; fields it does not know are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class Options(BaseModel):
    """A map of options; one that it does not know is refused by name."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


ShortText = Annotated[str, Field(max_length=64)]


def is_id(value: Any) -> bool:
    """Whether a value may be an id: an integer that every language holds exactly, or a short text."""
    if isinstance(value, str):
        return 0 < len(value) <= 64
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53


def _check_id(value: Any) -> Any:
    if not is_id(value):
        raise ValueError("an id is an integer up to ±(2^53-1) or a text of 1 to 64 characters")
    return value


Id = Annotated[int | str, PlainValidator(_check_id)]
NpcId = Annotated[str, Field(min_length=1, max_length=64)]


class ChatTurn(Message):
    """An earlier turn (`user` is the player, `assistant` the NPC), or the one to answer."""

    role: Literal["user", "assistant"]
    content: str


class ErrorInfo(Message):
    """An error of one line."""

    code: str
    message: str
    hint: str = ""
    retryable: bool = False


class PersonaInfo(Message):
    """A persona in a list; `error` says why it cannot speak, `stale` why its newest files are not in use."""

    id: str
    display_name: str
    adapter: str | None = None
    error: ErrorInfo | None = None
    stale: ErrorInfo | None = None


class BaseModelInfo(Message):
    """The base model; `context` in tokens."""

    name: str
    sha256: str
    context: int
