"""Proof: a line's logits have the same bits alone and in company, through the real engine.

Every line is said alone first. Then crowds of lines with adapters of all kinds of ranks and with none are said
together, and the logits of every line and position are compared bit by bit.
"""

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gpu.models import make_base, make_store
from gpu.setup import RANKS, Setup
from npc_runtime.engine.core import Ended, EndReason, EngineConfig, Request, SamplingParams, StepOutput
from npc_runtime.engine.engine import Engine
from npc_runtime.engine.scheduler import PlannedRow

__all__ = ["Independence", "Letters", "Said", "Stage"]

ADAPTERS = (None, *RANKS)
LONG = 5
"""This line has a prompt of more than one chunk of the attention."""

NUM_CHUNKED = 17
"""Lines of the crowds with small chunks and with preemption."""

Said = dict[tuple[int, int], Tensor]
"""The logits behind every position of every line."""


class Letters:
    """In place of a tokenizer: a letter a token."""

    eos_ids = frozenset({2})

    def decode(self, ids: Iterable[int]) -> str:
        """Letters."""
        return "".join(chr(97 + number % 26) for number in ids)


class Stage:
    """An engine without its thread, and the logits of all that is said on it."""

    def __init__(self, decoder: Any, store: Any, config: EngineConfig) -> None:
        letters: Any = Letters()
        self.engine = Engine(decoder, letters, store, config, on_step=self._on_step)
        self.said: Said = {}
        self.tokens: dict[int, list[int]] = {}
        self.ends: dict[int, Ended] = {}
        self._rows: list[PlannedRow] = []
        self._draw = self.engine._runner.draw
        self.engine._runner.draw = self._record
        plan = self.engine._scheduler.plan

        def remember(*arguments: Any, **options: Any) -> list[PlannedRow]:
            self._rows = plan(*arguments, **options)
            return self._rows

        scheduler: Any = self.engine._scheduler
        scheduler.plan = remember

    def say(self, requests: list[Request]) -> Said:
        """Speak all lines together, to their ends."""
        self.said, self.ends = {}, {}
        self.engine.submit(requests)
        for _ in range(10_000):
            self.engine.step()
            errors = [end.error for end in self.ends.values() if end.reason is EndReason.ERROR]
            if errors:
                raise RuntimeError(f"a line ended by an error: {errors[0]}")
            if len(self.ends) == len(requests):
                return self.said
        raise RuntimeError("the engine did not finish")

    def _record(self, logits: Tensor, settings: Any) -> Tensor:
        drawn: Tensor = self._draw(logits, settings)
        sampling = [row for row in self._rows if row.samples]
        for row, values, token in zip(sampling, logits, drawn.tolist(), strict=True):
            self.said[row.sequence.request.id, row.stop] = values.clone()
            self.tokens.setdefault(row.sequence.request.id, []).append(token)
        return drawn

    def _on_step(self, step: StepOutput) -> None:
        self.ends |= {event.request_id: event for event in step.events if isinstance(event, Ended)}


class Independence:
    """A part: one base, in 16 or 4 bits."""

    kind = "proof"

    def __init__(self, setup: Setup, bits: int) -> None:
        self._setup = setup
        self._bits = bits
        self._cases: dict[str, Callable[[], tuple[Said, dict[str, Any]]]] = {
            **{f"B = {size}": lambda size=size: (self._crowd(size), {}) for size in setup.crowds},
            "small chunks": self._in_chunks,
            "cached prefix": self._from_cache,
            "preempted": self._preempted,
        }

    @property
    def items(self) -> list[str]:
        """The crowds."""
        return [f"rows are independent, {self._name}, {case}" for case in self._cases]

    def measure(self, item: str) -> dict[str, Any]:
        """How many logits were compared, and how many differ."""
        said, more = self._cases[item.split(", ", 2)[2]]()
        if not more.get("is_meant", True):
            return {"passed": False, **more}
        return {**compare(said, self._alone), **more}

    @property
    def _name(self) -> str:
        return "int4" if self._bits == 4 else "bf16"

    @cached_property
    def _base(self) -> Any:
        decoder = make_base(self._setup, self._setup.proof_model, self._bits).decoder
        return decoder, make_store(decoder, RANKS)

    @cached_property
    def _alone(self) -> Said:
        """Every line in steps of its own; they share an engine but no prefix."""
        stage, said = self._stage(), {}
        for number in range(max(*self._setup.crowds, self._num_chunked)):
            said |= stage.say([self._line(number)])
        return said

    @property
    def _num_chunked(self) -> int:
        return min(NUM_CHUNKED, 1 + max(self._setup.crowds))

    def _stage(self, **sizes: int) -> Stage:
        return Stage(*self._base, EngineConfig(**{"kv_tokens": 16_384, **self._setup.engine, **sizes}))

    def _line(self, number: int) -> Request:
        setup, size = self._setup, self._setup.shortest + self._setup.growth * (number % 11)
        if number == LONG and setup.on_gpu:
            size = 300
        sampling = SamplingParams(
            seed=number, max_tokens=setup.new_tokens, min_tokens=setup.new_tokens, temperature=0.9
        )
        vocab = setup.proof_model.shape.vocab - 3
        prompt = tuple(3 + (31 * number + 17 * position) % vocab for position in range(size))
        return Request(
            id=number, prompt_ids=prompt, sampling=sampling, arrival=0.0, adapter=ADAPTERS[number % len(ADAPTERS)]
        )

    def _crowd(self, size: int) -> Said:
        return self._stage().say([self._line(number) for number in range(size)])

    def _in_chunks(self) -> tuple[Said, dict[str, Any]]:
        lines = [self._line(number) for number in range(self._num_chunked)]
        return self._stage(max_step_tokens=self._setup.chunk).say(lines), {"step_tokens": self._setup.chunk}

    def _from_cache(self) -> tuple[Said, dict[str, Any]]:
        """A line once more, in company: its prompt is in the cache now."""
        stage, again = self._stage(block_size=self._setup.block_size), self._num_chunked - 1
        stage.say([self._line(again)])
        said = stage.say([self._line(number) for number in range(again + 1)])
        cached = stage.ends[again].num_cached
        return said, {"cached": cached, "is_meant": cached > 0}

    def _preempted(self) -> tuple[Said, dict[str, Any]]:
        """A cache that is too small for the lines that want to grow in it."""
        numbers = [number for number in range(self._num_chunked) if number != LONG or not self._setup.on_gpu]
        needed = max(len(self._line(number).prompt_ids) for number in numbers) + self._setup.new_tokens
        stage = self._stage(kv_tokens=4 * -(-needed // 4) + 8, block_size=4)
        said = stage.say([self._line(number) for number in numbers])
        times = stage.engine.stats().num_preempted
        return said, {"preempted": times, "is_meant": times > 0}


def compare(said: Said, alone: Said) -> dict[str, Any]:
    """Bit by bit; where something differs, where first and by how much."""
    places = sorted(said, key=lambda place: (place[1], place[0]))
    different = [place for place in places if place not in alone or not torch.equal(said[place], alone[place])]
    numbers = {"passed": bool(said) and not different, "compared": len(said), "different": len(different)}
    if different:
        known = [place for place in different if place in alone]
        gaps = [_gap(said[place], alone[place]) for place in known]
        lines = {line for line, _ in different}
        numbers |= {"lines": sorted(lines)[:10], "first": list(different[0]), "largest": max(gaps, default=None)}
    return numbers


def _gap(said: Tensor, alone: Tensor) -> float:
    """The largest difference; the end token, which is held back, is -inf on both sides."""
    return float((said - alone)[said != alone].abs().nan_to_num(nan=torch.inf).max())
