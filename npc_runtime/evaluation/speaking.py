"""Many lines through the engine as one batch, as a daemon would speak them, and what came of each."""

import queue
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from npc_runtime.engine.adapters import AdapterStore
from npc_runtime.engine.core import Ended, EndReason, EngineConfig, Request, SamplingParams, StepOutput
from npc_runtime.engine.engine import Engine
from npc_runtime.errors import ContextOverflow, EngineDied, WireError
from npc_runtime.line import resolve_sampling
from npc_runtime.loading import LoadedBase
from npc_runtime.persona import Persona
from npc_runtime.prompt import Message
from npc_runtime.protocol import LineSampling

__all__ = ["Cue", "Reply", "seed_of", "speak"]

CLOSE_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Cue:
    """What a persona is to answer, and with which seed."""

    persona: Persona
    messages: list[Message]
    seed: int


@dataclass(frozen=True, slots=True)
class Reply:
    """What was said; with an error, as far as it came."""

    text: str
    is_cut: bool = False  # at the persona's `hard_tokens`
    error: str | None = None


def seed_of(*parts: object) -> int:
    """A seed that is the same in every run, and another one for other parts."""
    return zlib.crc32("/".join(str(part) for part in parts).encode())


def speak(
    base: LoadedBase,
    adapters: AdapterStore,
    config: EngineConfig,
    cues: Sequence[Cue],
    *,
    on_progress: Callable[[float], None] = lambda fraction: None,
) -> list[Reply]:
    """Speak all lines, submitted together; in the order of the cues. Raises `EngineDied` if the engine does."""
    replies: dict[int, Reply] = {}
    requests = []
    for number, cue in enumerate(cues):
        try:
            requests.append(_request(base, config, cue, number))
        except WireError as error:
            replies[number] = Reply("", error=str(error))
    news: queue.SimpleQueue[StepOutput | None] = queue.SimpleQueue()
    config = _roomy(config, len(requests))
    engine = Engine(base.decoder, base.tokenizer, adapters, config, on_step=news.put, on_death=lambda: news.put(None))
    engine.start()
    try:
        engine.submit(requests)
        while len(replies) < len(cues):
            step = news.get()
            if step is None:
                raise EngineDied("The engine died while it spoke.", "The log has the details; report it.")
            ends = [event for event in step.events if isinstance(event, Ended)]
            replies |= {end.request_id: _reply(end) for end in ends}
            on_progress(len(replies) / len(cues))
    finally:
        engine.close(CLOSE_TIMEOUT_S)
    return [replies[number] for number in range(len(cues))]


def _request(base: LoadedBase, config: EngineConfig, cue: Cue, number: int) -> Request:
    """A line as a daemon makes it of the same messages and seed."""
    persona = cue.persona
    prompt_ids = base.tokenizer.render(cue.messages).token_ids
    sampling = resolve_sampling(LineSampling(seed=cue.seed), persona, lambda: cue.seed)
    context = min(base.decoder.shape.context, config.kv_tokens)
    if len(prompt_ids) + (sampling.max_tokens or 0) > context:
        raise ContextOverflow(
            f"The prompt ({len(prompt_ids)} tokens) and {sampling.max_tokens} more do not fit into {context} tokens.",
            "Shorten what is said before.",
        )
    values = sampling.model_dump(exclude={"stop"})
    return Request(
        id=number,
        prompt_ids=prompt_ids,
        sampling=SamplingParams(**values, stop=tuple(sampling.stop or ()), soft_words=persona.limits.soft_words),
        arrival=time.monotonic(),
        adapter=persona.adapter_name,
        group="evaluation",
    )


def _reply(end: Ended) -> Reply:
    error = None if end.error is None else str(end.error)
    return Reply(end.text, is_cut=end.reason == EndReason.LENGTH, error=error)


def _roomy(config: EngineConfig, num_lines: int) -> EngineConfig:
    return replace(config, max_waiting=max(config.max_waiting, num_lines))
