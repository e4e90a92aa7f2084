"""What the daemon sends."""

from typing import Any, Literal

from pydantic import Field

from npc_runtime.wire_parts import BaseModelInfo, ErrorInfo, Id, Message, PersonaInfo

__all__ = [
    "Accepted",
    "AcceptedItem",
    "BatchEnd",
    "Delta",
    "DeltaItem",
    "Error",
    "Event",
    "LineEnd",
    "LineStart",
    "Reply",
    "Stats",
    "Timing",
    "Usage",
    "WarmupItem",
    "Watched",
    "Welcome",
]


class Welcome(Message):
    """The answer to `hello`. `session` is what `hello.resume` asks for when the connection was lost. `personas` is cut
    to what fits the frame; `persona.list` has them all.
    """

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
    retryable: bool | None = None


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
    actions: list[str] = Field(default=[])
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
    """Something that nobody asked for. `model.loading` comes, with a `progress` from 0 to 1 and what is done in
    `message`, until `model.ready`; `welcome` follows. `persona.changed`: the files of `persona` were saved. They are in
    use from the next line on, or `stale` says why not; a persona that is gone has the error `persona_unknown`.
    `adapter.loaded` and `adapter.evicted` name an `adapter`. `overload`, `degraded` and `shutdown` have a `message`.
    """

    type: Literal["event"] = "event"
    kind: Literal[
        "model.loading",
        "model.ready",
        "adapter.loaded",
        "adapter.evicted",
        "persona.changed",
        "overload",
        "degraded",
        "shutdown",
    ]
    progress: float | None = None
    message: str | None = None
    adapter: str | None = None
    persona: PersonaInfo | None = None


class Watched(Message):
    """What a line of another connection did, as that connection was told."""

    type: Literal["watched"] = "watched"
    session: str
    client: str
    message: LineStart | Delta | LineEnd


class Stats(Message):
    """How the daemon is, once a second, to who asked for it; the body of the `reply` to `status` is the same map."""

    type: Literal["stats"] = "stats"
    active: int
    queued: int
    tokens_per_s: float
    tokens: int
    forwards: int
    kv_used: float
    kv_cached: float
    preempted: int
    adapters: list[str]
    personas: int
    connections: int
    memory: dict[str, float] = Field(default={})
    paused: bool = False
    max_tokens_per_s: float | None = None
    uptime_s: float = 0.0


class Error(Message):
    """Something was wrong with message `re`, or with a frame that could not be read."""

    type: Literal["error"] = "error"
    re: Id | None = None
    code: str
    message: str
    hint: str = ""
    retryable: bool = False
