"""One line of dialogue: what was asked, resolved against its persona, and what is said about it on the wire."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from npc_runtime import protocol as wire
from npc_runtime.errors import FormatUnsupported, InvalidError, WireError
from npc_runtime.persona import Persona
from npc_runtime.prompt import Message, Prompt
from npc_runtime.schema import Sampling

if TYPE_CHECKING:
    from npc_runtime.cast import Npc
    from npc_runtime.engine.core import Ended, Started

__all__ = [
    "Job",
    "Line",
    "Renderer",
    "error_info",
    "line_end",
    "line_prompt",
    "line_start",
    "resolve_sampling",
    "said_in",
]


class Renderer(Protocol):
    """Turns chat messages into the base's token ids."""

    def __call__(self, messages: Sequence[Message], /) -> tuple[int, ...]:
        """Render up to where the reply begins."""
        ...


@dataclass(frozen=True, slots=True)
class Job:
    """One line for the engine, everything resolved."""

    request_id: int
    batch: wire.Id | None  # None: a warmup, which is no line and belongs to no batch
    arrival: float  # seconds, when the frame came in
    adapter: str | None
    prompt_ids: tuple[int, ...]
    sampling: wire.LineSampling  # no None left but `stop` is a list
    soft_words: int
    priority: int
    deadline_ms: float | None
    asked: tuple[str, str] | None = None  # the persona, and the player's words: what a replay finds the line by


@dataclass(slots=True, eq=False)
class Line:
    """A live line of a session."""

    request: wire.LineRequest
    batch: wire.Id
    job: Job
    persona: Persona
    npc: "Npc | None" = None
    epoch: int = 0  # of the npc's history when the line was sent
    prompt_hash: str = ""
    said: str = ""  # the player's words, as they join the history
    note: str | None = None  # what the prompt had to leave out
    is_unheard: bool = False  # cancelled, since its client does not read
    seq: int = 0
    pending: str = ""
    has_spoken: bool = False


def line_prompt(
    request: wire.LineRequest, persona: Persona, *, earlier: Sequence[Message] = (), facts: Mapping[str, Any]
) -> Prompt:
    """What the model is to read for a line. `earlier` is the npc's history, unless the line has its own; `facts` are
    the game's. Raises `InvalidError` for a bad text.
    """
    if persona.format.kind != "text" and "format" not in request.model_fields_set:
        raise FormatUnsupported(
            f"The format '{persona.format.kind}' of {persona.id} is not served yet.",
            "Remove 'format' from the persona, or send format{kind: text}.",
        )
    if (request.input is None) == (request.messages is None):
        raise InvalidError("A line needs either 'input' or 'messages'.", "Send input{text}.")
    if request.input is not None:
        history, own = list(earlier), []
        text, speaker, field_name = request.input.text, request.input.speaker, "input.text"
    else:
        turns = request.messages or []
        if not turns or turns[-1].role != "user":
            raise InvalidError("'messages' must end with a user turn.", "The last one is what is answered.")
        history = own = [{"role": turn.role, "content": turn.content} for turn in turns[:-1]]
        text, speaker, field_name = turns[-1].content, None, "messages"
    if not text.strip():
        raise InvalidError(f"'{field_name}' is empty.", "Send what the player said.")
    num_chars = len(text) + sum(len(message["content"]) for message in own)
    if num_chars > wire.LIMITS["text_chars"]:
        raise InvalidError(
            f"'{field_name}' has {num_chars} characters.",
            f"The limit is {wire.LIMITS['text_chars']}; shorten it.",
        )
    return persona.prompt(history, text, speaker=speaker, context=request.context, facts=facts)


def said_in(request: wire.LineRequest) -> str:
    """The player's words, as they join a history."""
    if request.input is not None:
        return f"{request.input.speaker}: {request.input.text}" if request.input.speaker else request.input.text
    return request.messages[-1].content if request.messages else ""


def resolve_sampling(asked: wire.LineSampling, persona: Persona, new_seed: Callable[[], int]) -> wire.LineSampling:
    """Fill in the persona's settings. Under `trim` the persona's hard limit caps what was asked.

    A line that asks for temperature 0 gets plain greedy decoding: nothing authored bends the choice, so that
    it can be compared with any other program.
    """
    plain = Sampling(temperature=0.0, top_p=1.0, stop=persona.sampling.stop)
    authored = (plain if asked.temperature == 0 else persona.sampling).model_dump()
    given = {name: value for name, value in asked.model_dump().items() if value is not None}
    max_tokens = given.get("max_tokens", persona.limits.hard_tokens)
    if asked.trim == "sentence":
        max_tokens = min(max_tokens, persona.limits.hard_tokens)
    if asked.min_tokens > max_tokens:
        raise InvalidError(
            f"sampling.min_tokens {asked.min_tokens} is more than the line may have ({max_tokens}).",
            "Lower it, or raise max_tokens with trim 'none'.",
        )
    seed = {"seed": new_seed()} if asked.seed is None else {}
    return wire.LineSampling.model_validate({**authored, **given, **seed, "max_tokens": max_tokens})


def line_start(line: Line, started: "Started") -> wire.LineStart:
    """What is sent when the line gets its first forward pass."""
    return wire.LineStart(
        line=line.request.line,
        npc=line.request.npc,
        persona=line.persona.id,
        adapter=line.job.adapter,
        seed=line.job.sampling.seed or 0,
        queue_ms=round(started.queue_ms, 3),
        batch_size=started.batch_size,
    )


def line_end(line: Line, ended: "Ended") -> wire.LineEnd:
    """What is sent when the line is over, with an authored line in place of one that failed unheard."""
    spare = _fallback_text(line, ended)
    first = ended.first_text_ms
    return wire.LineEnd(
        line=line.request.line,
        reason=ended.reason.value,
        text=ended.text if spare is None else spare,
        fallback=spare is not None,
        error=error_info(ended.error),
        usage=wire.Usage(prompt=ended.num_prompt, cached=ended.num_cached, completion=ended.num_completion),
        timing=wire.Timing(
            queue_ms=round(ended.queue_ms, 3),
            ttft_ms=None if first is None else round(first, 3),
            total_ms=round(ended.total_ms, 3),
            tokens_per_s=round(ended.tokens_per_s, 3),
            batch_avg=round(ended.batch_avg, 3),
        ),
        seed=line.job.sampling.seed or 0,
        prompt_hash=line.prompt_hash,
    )


def error_info(error: WireError | None) -> wire.ErrorInfo | None:
    """An error as the wire has it."""
    if error is None:
        return None
    return wire.ErrorInfo(code=error.code, message=error.message, hint=error.hint, retryable=error.retryable)


def _fallback_text(line: Line, ended: "Ended") -> str | None:
    """An authored line in place of one that failed before a word was said, chosen by the line's seed."""
    lines = {
        "deadline": line.persona.fallback.timeout,
        "error": line.persona.fallback.timeout,
        "overload": line.persona.fallback.busy,
    }.get(ended.reason, ())
    if not lines or not line.request.fallback or line.has_spoken:
        return None
    return lines[(line.job.sampling.seed or 0) % len(lines)]
