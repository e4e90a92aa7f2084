"""A warmup: personas made ready before their first line, each on its own, and one answer when all are done.

For a persona the engine gets a job without a reply: it brings the adapter to the device and computes the part of the
prompt that is the same whatever the player says.
"""

from collections.abc import Iterable
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from npc_runtime import protocol as wire
from npc_runtime.errors import OverloadError, WireError
from npc_runtime.line import Job, Renderer, resolve_sampling
from npc_runtime.persona import Persona

if TYPE_CHECKING:
    from npc_runtime.engine.core import Ended

__all__ = ["Warmup", "warmup_job"]

PRIORITY = 0
"""Below every line: what is spoken now comes before what may be spoken later."""

TEXTS = ("Who are you?", "42")
"""Two things a player might say that begin with nothing in common."""


class Warmup:
    """The state of one `warmup` message."""

    def __init__(self, re: wire.Id | None, personas: Iterable[str]) -> None:
        self.re = re
        self._items: dict[str, wire.WarmupItem | None] = dict.fromkeys(personas)

    @property
    def personas(self) -> list[str]:
        """The personas that were asked for, each once."""
        return list(self._items)

    @property
    def is_over(self) -> bool:
        """Whether every persona is ready or rejected."""
        return None not in self._items.values()

    @property
    def body(self) -> dict[str, Any]:
        """What is answered, in the order of the question."""
        items = [item for item in self._items.values() if item is not None]
        return {"personas": [item.model_dump(mode="json", exclude_none=True) for item in items]}

    def reject(self, persona: str, error: WireError) -> None:
        """This persona cannot be made ready."""
        self._items[persona] = wire.WarmupItem(
            persona=persona, status="rejected", code=error.code, message=error.message, hint=error.hint
        )

    def finish(self, persona: str, ended: "Ended") -> None:
        """The engine is done with this persona."""
        if ended.reason == "stop":
            self._items[persona] = wire.WarmupItem(
                persona=persona, status="ready", prompt_tokens=ended.num_prompt, cached_tokens=ended.num_cached
            )
        else:
            self.reject(persona, ended.error or OverloadError("The daemon is stopping.", "Ask again."))


def warmup_job(persona: Persona, render: "Renderer", *, request_id: int, now: float) -> Job:
    """What the engine is to do for a persona. Raises whatever rendering its prompt raises."""
    first, second = (render(persona.messages([], text)) for text in TEXTS)
    same = [pair[0] for pair in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))]
    settings = wire.LineSampling(temperature=0.0, seed=0, max_tokens=1, trim="none")
    return Job(
        request_id=request_id,
        batch=None,
        arrival=now,
        adapter=persona.adapter_name,
        prompt_ids=tuple(same) or first[:1],
        sampling=resolve_sampling(settings, persona, lambda: 0),
        soft_words=persona.limits.soft_words,
        priority=PRIORITY,
        deadline_ms=None,
    )
