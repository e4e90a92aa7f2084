"""Proof: a CUDA graph is right for every step of its kind, not only for the one it was captured with.

Two runners share a KV cache. One records its steps, the other computes every step call by call; both must give the same
bits when a graph is replayed with more segments, other pages, other lengths and fewer rows than at its capture.
"""

import copy
import types
from typing import Any

import torch

from gpu.models import make_base, make_sequence, make_store
from gpu.setup import RANKS, Setup
from npc_runtime.engine.core import EngineConfig, Sequence
from npc_runtime.engine.runner import Runner
from npc_runtime.engine.scheduler import PlannedRow

__all__ = ["Replay"]

BLOCKS = 20
"""KV blocks of a line, of 16 tokens."""

LINES: tuple[tuple[str | None, int], ...] = (
    *(("r16", 3), ("r16", 90), ("other", 2), ("r8", 4), ("r24", 17), ("r64", 200), (None, 33), (None, 250)),
)
"""Adapters and lengths."""

STEPS: tuple[tuple[str, tuple[int, ...]], ...] = (
    ("captured: one adapter", (0, 1)),
    ("more segments, other pages", (0, 3)),
    ("other lengths", (1, 2)),
    ("captured: a bucket of four", (0, 1, 0)),
    ("as many segments as rows", (1, 2, 3, 6)),
    ("captured: the base alone", (6, 7)),
    ("other lengths, the base alone", (7, 6)),
    ("captured: wide adapters", (5, 4, 6, 0)),
    ("wide adapters change places", (0, 5, 2)),
    ("one adapter again", (2, 3)),
)
"""What changes, and the lines that speak; a line that is named twice speaks once."""


class Replay:
    """A part: a base in 16 and in 4 bits."""

    kind = "proof"

    def __init__(self, setup: Setup) -> None:
        self._setup = setup

    @property
    def items(self) -> list[str]:
        """The bases."""
        return [f"graphs serve more than they were captured with, {name}" for name in ("bf16", "int4")]

    def measure(self, item: str) -> dict[str, Any]:
        """The steps that differ."""
        decoder = make_base(self._setup, self._setup.proof_model, 4 if item.endswith("int4") else 16).decoder
        pair = Pair(decoder, make_store(decoder, {**RANKS, "other": 16}), self._setup.longest)
        wrong = [name for name, numbers in STEPS if not pair.speak(sorted(set(numbers)))]
        count = pair.num_recorded
        return {"passed": not wrong and count > 0, "steps": len(STEPS), "graphs": count, "wrong": wrong}


class Pair:
    """A runner that records, and one that never does."""

    def __init__(self, decoder: Any, store: Any, longest: int) -> None:
        config = EngineConfig(kv_tokens=BLOCKS * len(LINES) * 16)
        self._recording = Runner(decoder, store, config)
        plain = copy.copy(decoder)
        plain.kernels = types.SimpleNamespace(**{**vars(decoder.kernels), "room": lambda batch: None})
        self._plain = Runner(plain, store, config)
        self._plain._kv = self._recording._kv
        self._vocab = decoder.shape.vocab - 3
        self._lines = [self._line(store, number, longest) for number in range(len(LINES))]
        for line in self._lines:
            self._recording.forward([PlannedRow(line, 0, line.num_tokens)])

    @property
    def num_recorded(self) -> int:
        """Graphs."""
        return sum(found.replay is not None for found in self._recording._recordings.values())

    def speak(self, numbers: list[int]) -> bool:
        """One token of each of these lines; whether both runners agree, twice."""
        lines = [self._lines[number] for number in numbers]
        for line in lines:
            line.output_ids.append(3 + (7 * line.num_tokens + line.request.id) % self._vocab)
        rows = [PlannedRow(line, line.num_tokens - 1, line.num_tokens) for line in lines]
        expected = self._plain.forward(rows).clone()
        # The first forward of a room captures and replays; the second one only replays.
        return all(torch.equal(self._recording.forward(rows), expected) for _ in range(2))

    def _line(self, store: Any, number: int, longest: int) -> Sequence:
        adapter, size = LINES[number]
        prompt = tuple(3 + (5 * number + 11 * position) % self._vocab for position in range(min(size, longest)))
        line = make_sequence(number, prompt, adapter, list(range(BLOCKS * number, BLOCKS * (number + 1))))
        if adapter is not None:
            store.admit(line)
        return line
