"""The wire protocol, version 1: every message as a model.

This module is the definition; PROTOCOL.md and tests/golden/ are generated from it. `codec` turns the models
into frames and back.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator

from npc_runtime.prompt import Context

__all__ = [
    "CAPS",
    "CLIENT_MESSAGES",
    "LIMITS",
    "MAX_CLIENT_FRAME",
    "MAX_SERVER_FRAME",
    "PROTOCOL_VERSION",
    "SERVER_MESSAGES",
    "SUBPROTOCOLS",
    "Accepted",
    "AcceptedItem",
    "BaseModelInfo",
    "BatchEnd",
    "Bye",
    "Cancel",
    "ChatTurn",
    "ClientInfo",
    "ClientMessage",
    "CloseCode",
    "Delta",
    "DeltaItem",
    "Error",
    "ErrorInfo",
    "Event",
    "Format",
    "Generate",
    "Hello",
    "Id",
    "Input",
    "LineEnd",
    "LineRequest",
    "LineSampling",
    "LineStart",
    "Message",
    "Options",
    "PersonaInfo",
    "PersonaList",
    "Reply",
    "Request",
    "ServerMessage",
    "Status",
    "Timing",
    "Usage",
    "Want",
    "Warmup",
    "WarmupItem",
    "Welcome",
    "is_id",
]

PROTOCOL_VERSION = 1
SUBPROTOCOLS = ("npc.v1.msgpack", "npc.v1.json")
MAX_CLIENT_FRAME = 1 << 20
MAX_SERVER_FRAME = 32 * 1024

CAPS = (
    "generate",
    "cancel",
    "persona.list",
    "persona.changed",
    "warmup",
    "status",
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
    "rank": 64,
    "frame": MAX_CLIENT_FRAME,
}
"""`welcome.limits`: code points of a text and of a reply, live lines of a connection, lines of a batch, personas of a
warmup, …"""


class CloseCode:
    """WebSocket close codes of this protocol; the reason text says more."""

    PROTOCOL = 4400
    AUTH = 4401
    ORIGIN = 4403
    HELLO_TIMEOUT = 4408
    TOO_MANY = 4429
    TOO_LARGE = 1009
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


class Request(Message):
    """A client's message; `id` comes back as `re`."""

    id: Id | None = None


class ClientInfo(Message):
    """Who is calling."""

    name: ShortText = ""
    version: ShortText = ""
    engine: ShortText | None = None


class Want(Message):
    """Wishes for this connection: ms between `delta` frames, bytes of the largest frame."""

    tick_ms: float = Field(default=33.0, ge=0.0, le=1_000.0)
    max_frame: int = Field(default=MAX_SERVER_FRAME, ge=MAX_SERVER_FRAME, le=MAX_CLIENT_FRAME)


class Hello(Request):
    """First message of a connection."""

    type: Literal["hello"] = "hello"
    protocol: int = Field(strict=True)
    token: str | None = Field(default=None, max_length=256)
    client: ClientInfo = ClientInfo()
    want: Want = Want()


class Input(Message):
    """What was said to the NPC; `speaker` is put in front of it."""

    speaker: ShortText | None = None
    text: str


class ChatTurn(Message):
    """An earlier turn (`user` is the player, `assistant` the NPC), or the one to answer."""

    role: Literal["user", "assistant"]
    content: str


class LineSampling(Options):
    """Options of one line; what is absent comes from the persona. `max_tokens` is capped by it under `trim`."""

    temperature: float | None = Field(default=None, ge=0.0, le=5.0)
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    top_k: int | None = Field(default=None, ge=0, le=1_000_000)
    min_p: float | None = Field(default=None, ge=0.0, le=1.0)
    repetition_penalty: float | None = Field(default=None, ge=0.1, le=5.0)
    seed: int | None = Field(default=None, ge=0, le=2**53 - 1)
    min_tokens: int = Field(default=0, ge=0, le=LIMITS["max_tokens"])
    max_tokens: int | None = Field(default=None, ge=1, le=LIMITS["max_tokens"])
    stop: list[Annotated[str, Field(min_length=1, max_length=64)]] | None = Field(default=None, max_length=8)
    trim: Literal["none", "sentence"] = "sentence"


class Format(Options):
    """Form of the reply; only free text for now."""

    kind: Literal["text", "choice", "regex", "json_schema"] = "text"
    value: Any = None


class LineRequest(Message):
    """One line to speak: the persona, what it answers, and how."""

    line: Id
    persona: str | None = Field(default=None, max_length=64)
    npc: str | None = Field(default=None, max_length=64)
    draft: dict[str, Any] | None = None
    input: Input | None = None
    messages: list[ChatTurn] | None = Field(default=None, max_length=256)
    context: Context | None = None
    sampling: LineSampling = LineSampling()
    format: Format = Format()
    emotions: list[str] | None = None
    actions: list[str] | None = None
    priority: int = Field(default=5, ge=0, le=9)
    deadline_ms: float | None = Field(default=None, gt=0.0, le=3_600_000.0)
    stream: bool = True
    history: Literal["append", "none"] = "append"
    fallback: bool = True


class Generate(Request):
    """A batch of lines. Each is checked on its own: what is wrong with one does not stop the others."""

    type: Literal["generate"] = "generate"
    batch: Id
    lines: list[Any] = Field(min_length=1, max_length=LIMITS["batch"], description="`LineRequest` maps")
    mode: Literal["independent", "turns"] = "independent"


class Cancel(Request):
    """End lines early, by exactly one of these; unknown ids are ignored."""

    type: Literal["cancel"] = "cancel"
    lines: list[Id] | None = Field(default=None, max_length=1_024)
    batch: Id | None = None
    npc: str | None = Field(default=None, max_length=64)
    all: bool = False


class PersonaList(Request):
    """Ask for the personas that can be voiced, and the problems of those that cannot."""

    type: Literal["persona.list"] = "persona.list"


class Warmup(Request):
    """Make personas ready for their first line: the adapter on the device, the prompt computed as far as no player
    changes it. The body of the `reply` is `personas`, a list of `WarmupItem`, sent when all are ready or rejected.
    """

    type: Literal["warmup"] = "warmup"
    personas: list[Annotated[str, Field(max_length=64)]] = Field(min_length=1, max_length=LIMITS["warmup"])


class Status(Request):
    """Ask how the daemon is."""

    type: Literal["status"] = "status"


class Bye(Request):
    """Close politely; running lines are cancelled."""

    type: Literal["bye"] = "bye"


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


class Welcome(Message):
    """The answer to `hello`. `personas` is cut to what fits the frame; `persona.list` has them all."""

    type: Literal["welcome"] = "welcome"
    session: str
    protocol: int
    version: str
    device: str
    backend: str
    base: BaseModelInfo
    caps: list[str]
    limits: dict[str, int]
    personas: list[PersonaInfo]
    resumed: bool = False


class AcceptedItem(Message):
    """Whether one line was taken. `message` of a queued one says what its prompt had no room for."""

    line: Any = None
    status: Literal["queued", "rejected"]
    code: str | None = None
    message: str | None = None
    hint: str | None = None


class Accepted(Message):
    """The answer to `generate`: every line of the batch, queued or rejected."""

    type: Literal["accepted"] = "accepted"
    batch: Id
    re: Id | None = None
    items: list[AcceptedItem]


class LineStart(Message):
    """A line got its first forward pass, shared with `batch_size` rows in all."""

    type: Literal["line.start"] = "line.start"
    line: Id
    npc: str | None = None
    persona: str
    adapter: str | None = None
    seed: int
    queue_ms: float
    batch_size: int


class DeltaItem(Message):
    """More text of a line; `seq` counts its deltas from 0."""

    line: Id
    seq: int
    text: str


class Delta(Message):
    """New text of any number of lines."""

    type: Literal["delta"] = "delta"
    items: list[DeltaItem]


class Usage(Message):
    """Tokens; `cached` of the prompt's came from the prefix cache."""

    prompt: int
    cached: int = 0
    completion: int


class Timing(Message):
    """`ttft_ms`: from arrival to the first text. `batch_avg`: rows that shared its steps, on average."""

    queue_ms: float
    ttft_ms: float | None = None
    total_ms: float
    tokens_per_s: float
    batch_avg: float


class LineEnd(Message):
    """The one end of an accepted line. `text` replaces what the deltas brought."""

    type: Literal["line.end"] = "line.end"
    line: Id
    reason: Literal["stop", "length", "cancelled", "deadline", "filtered", "overload", "error"]
    text: str
    fallback: bool = False
    emotion: str | None = None
    actions: list[str] = []
    error: ErrorInfo | None = None
    usage: Usage
    timing: Timing
    seed: int
    prompt_hash: str


class BatchEnd(Message):
    """All lines of the batch are over; `forwards` base forward passes served it."""

    type: Literal["batch.end"] = "batch.end"
    batch: Id
    ok: int
    failed: int
    wall_ms: float
    forwards: int


class WarmupItem(Message):
    """One persona of a `warmup`. Of the `prompt_tokens` that its lines have in common, `cached_tokens` are in the
    prefix cache now; they and the adapter stay while there is room.
    """

    persona: str
    status: Literal["ready", "rejected"]
    prompt_tokens: int = 0
    cached_tokens: int = 0
    code: str | None = None
    message: str | None = None
    hint: str | None = None


class Reply(Message):
    """The answer to a question; one that is larger than a frame comes as `part` of `parts`, `data` being JSON text."""

    type: Literal["reply"] = "reply"
    re: Id | None = None
    body: dict[str, Any] | None = None
    part: int | None = None
    parts: int | None = None
    data: str | None = None


class Event(Message):
    """Something that concerns every connection. `persona.changed`: the files of a persona were saved. They are in use
    from the next line on, or `stale` says why not; a persona that is gone has the error `persona_unknown`.
    """

    type: Literal["event"] = "event"
    kind: Literal["persona.changed"]
    persona: PersonaInfo


class Error(Message):
    """Something was wrong with message `re`, or with a frame that could not be read."""

    type: Literal["error"] = "error"
    re: Id | None = None
    code: str
    message: str
    hint: str = ""


CLIENT_MESSAGES = (Hello, Generate, Cancel, PersonaList, Warmup, Status, Bye)
SERVER_MESSAGES = (Welcome, Accepted, LineStart, Delta, LineEnd, BatchEnd, Reply, Event, Error)

ClientMessage = Hello | Generate | Cancel | PersonaList | Warmup | Status | Bye
ServerMessage = Welcome | Accepted | LineStart | Delta | LineEnd | BatchEnd | Reply | Event | Error
