"""What clients send."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from npc_runtime.prompt import Context
from npc_runtime.wire_parts import (
    LIMITS,
    MAX_CLIENT_FRAME,
    MAX_SERVER_FRAME,
    ChatTurn,
    Id,
    Message,
    NpcId,
    Options,
    ShortText,
)

__all__ = [
    "Bye",
    "Cancel",
    "ClientInfo",
    "Config",
    "Format",
    "Generate",
    "Hello",
    "Input",
    "LineRequest",
    "LineSampling",
    "NpcClose",
    "NpcHistory",
    "NpcOpen",
    "NpcRestore",
    "NpcSnapshot",
    "PersonaDelete",
    "PersonaGet",
    "PersonaList",
    "PersonaPut",
    "PersonaValidate",
    "Request",
    "Shutdown",
    "Status",
    "Vars",
    "Want",
    "Warmup",
    "Watch",
]

LINGER_S = 120.0

Vars = Annotated[
    dict[
        Annotated[str, Field(min_length=1, max_length=64)], bool | int | float | Annotated[str, Field(max_length=1_000)]
    ],
    Field(max_length=LIMITS["vars"]),
]
History = Annotated[list[ChatTurn], Field(max_length=LIMITS["history_messages"])]
PersonaId = Annotated[str, Field(max_length=64)]


class Request(Message):
    """A client's message; `id` comes back as `re`."""

    id: Id | None = None


class ClientInfo(Message):
    """Who is calling."""

    name: ShortText = ""
    version: ShortText = ""
    engine: ShortText | None = None


class Want(Message):
    """Wishes for this connection: ms between `delta` frames, bytes of the largest frame, `stats` once a second, and how
    long NPCs wait for `resume` when the connection is gone.
    """

    tick_ms: float = Field(default=33.0, ge=0.0, le=1_000.0)
    max_frame: int = Field(default=MAX_SERVER_FRAME, ge=MAX_SERVER_FRAME, le=MAX_CLIENT_FRAME)
    stats: bool = False
    linger_s: float = Field(default=LINGER_S, ge=0.0, le=3_600.0)


class Hello(Request):
    """First message of a connection. `project` is refused if the daemon serves another one. `resume` is the `session`
    of a connection that was lost: its NPCs and their histories come back, its lines do not. `owner_pid` is the process
    that the daemon was started for, if this is it: only that may `shutdown`.
    """

    type: Literal["hello"] = "hello"
    protocol: int = Field(strict=True)
    token: str | None = Field(default=None, max_length=256)
    client: ClientInfo = ClientInfo()
    project: str | None = Field(default=None, max_length=256)
    owner_pid: int | None = Field(default=None, ge=1, le=2**31 - 1)
    resume: str | None = Field(default=None, max_length=64)
    want: Want = Want()


class Input(Message):
    """What was said to the NPC; `speaker` is put in front of it."""

    speaker: ShortText | None = None
    text: str


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
    """One line to speak: who (an `npc` that is open, a `persona`, or a `draft` of one that is not saved), what is
    answered, and how. A line of an npc follows its history (`messages` take its place for this line), and joins it when
    it was spoken, unless `history` is none.
    """

    line: Id
    persona: PersonaId | None = None
    npc: NpcId | None = None
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
    npc: NpcId | None = None
    all: bool = False


class NpcOpen(Request):
    """Bring an NPC to life under an id of the game's own. One that is open already gets this persona and these `vars`,
    and keeps its history unless there is one here. `vars` are facts for what its persona knows. The body of the `reply`
    is `npc`, `persona` and `num_messages`.
    """

    type: Literal["npc.open"] = "npc.open"
    npc: NpcId
    persona: PersonaId
    vars: Vars = Field(default={})
    history: History | None = None


class NpcClose(Request):
    """Forget an NPC and its history; its lines are cancelled. The body of the `reply` is `npc`."""

    type: Literal["npc.close"] = "npc.close"
    npc: NpcId


class NpcHistory(Request):
    """Read or change what an NPC remembers: `get`, `set` and `append` `messages`, `pop` the last exchange, `clear`.
    The body of the `reply` is `npc` and `messages`: all of them, or with `pop` those that went. After a change, lines
    that were sent before it leave no trace.
    """

    type: Literal["npc.history"] = "npc.history"
    npc: NpcId
    op: Literal["get", "set", "append", "pop", "clear"]
    messages: History | None = None


class NpcSnapshot(Request):
    """Ask for an NPC as a text for a save game; the body of the `reply` is `npc` and `state`."""

    type: Literal["npc.snapshot"] = "npc.snapshot"
    npc: NpcId


class NpcRestore(Request):
    """Bring back an NPC as `npc.snapshot` saw it, in place of one that is open under this id."""

    type: Literal["npc.restore"] = "npc.restore"
    npc: NpcId
    state: str = Field(max_length=MAX_CLIENT_FRAME)


class PersonaList(Request):
    """Ask for the personas that can be voiced, and the problems of those that cannot; the body of the `reply` is
    `personas`, a list of `PersonaInfo`.
    """

    type: Literal["persona.list"] = "persona.list"


class PersonaGet(Request):
    """Ask for a persona's document as its file has it; the body of the `reply` has `doc` and its `etag`."""

    type: Literal["persona.get"] = "persona.get"
    persona: PersonaId


class PersonaPut(Request):
    """Save a persona's document; comments of its file stay. With an `etag`, only if the file is still that one."""

    type: Literal["persona.put"] = "persona.put"
    persona: PersonaId
    doc: dict[str, Any]
    etag: ShortText | None = None


class PersonaValidate(Request):
    """Ask what is wrong with a document, without saving it; the body of the `reply` is `ok` and `problems`."""

    type: Literal["persona.validate"] = "persona.validate"
    persona: PersonaId | None = None
    doc: dict[str, Any]


class PersonaDelete(Request):
    """Move a persona's folder to the trash beside the personas; the `reply` says where it is now."""

    type: Literal["persona.delete"] = "persona.delete"
    persona: PersonaId


class Warmup(Request):
    """Make personas ready for their first line: the adapter on the device, the prompt computed as far as no player
    changes it. The body of the `reply` is `personas`, a list of `WarmupItem`, sent when all are ready or rejected.
    """

    type: Literal["warmup"] = "warmup"
    personas: list[PersonaId] = Field(min_length=1, max_length=LIMITS["warmup"])


class Watch(Request):
    """Also receive what the lines of other connections say, as `watched`; read-only, and left out if it is too much.
    The body of the `reply` is `on`.
    """

    type: Literal["watch"] = "watch"
    on: bool


class Config(Request):
    """Give the game more of the device: at most so many tokens a second for all lines together, or none for now. The
    wishes of a connection hold while it is open, and a new `config` replaces both; of several connections the
    strictest hold. The body of the `reply` is what holds now.
    """

    model_config = ConfigDict(extra="forbid")

    type: Literal["config"] = "config"
    max_tokens_per_s: float | None = Field(default=None, gt=0.0, le=1_000_000.0)
    paused: bool = False


class Status(Request):
    """Ask how the daemon is."""

    type: Literal["status"] = "status"


class Shutdown(Request):
    """End the daemon; only the process that it was started for may (`hello.owner_pid`). The `reply` is empty."""

    type: Literal["shutdown"] = "shutdown"


class Bye(Request):
    """Close politely; running lines are cancelled."""

    type: Literal["bye"] = "bye"
