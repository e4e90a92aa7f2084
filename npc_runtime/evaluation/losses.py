"""Held-out loss of every persona's replies under every adapter, by teacher forcing through the engine's own decoder.

All adapters share the forward passes, as lines of different personas do when they speak: the scheduler admits rows,
adapters take turns on their pages if there are more than fit, and what the prompts of one persona begin with is
computed once for each adapter. Numbers are nats per reply token, the end token included, as `train` measures them.
"""

import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice, takewhile
from typing import NamedTuple

import torch
from torch import Tensor

from npc_runtime.engine.adapters import AdapterStore
from npc_runtime.engine.core import EngineConfig, Request, SamplingParams
from npc_runtime.engine.model import Decoder
from npc_runtime.engine.runner import Runner
from npc_runtime.engine.scheduler import PlannedRow, Scheduler
from npc_runtime.errors import InvalidError

__all__ = ["LossMatrix", "Margin", "Passage", "Score", "measure_losses"]

MAX_WAIT_S = 0.5
"""Longest sleep while adapters are loaded. The loader wakes us; a wake-up that was lost would cost this much."""


class Passage(NamedTuple):
    """A reply as it is scored: what the model reads before it, and the reply with its end token."""

    prompt_ids: tuple[int, ...]
    reply_ids: tuple[int, ...]


class Score(NamedTuple):
    """What a reply cost."""

    nats: float
    num_tokens: int


class Margin(NamedTuple):
    """How much lower one adapter's loss is than another's, on the same replies."""

    over: str | None  # the other adapter; None: the base without one
    nats: float  # a token
    error: float  # standard error of `nats` over the replies; they differ far more than the adapters do


@dataclass(frozen=True, slots=True)
class LossMatrix:
    """Rows are adapters and None, the base without one; columns are personas, whose replies were scored."""

    rows: tuple[str | None, ...]
    columns: tuple[str, ...]
    scores: Mapping[tuple[str | None, str], tuple[Score, ...]]  # (row, column): of each reply, in the file's order

    def loss(self, row: str | None, column: str) -> float:
        """Nats per reply token."""
        scores = self.scores[row, column]
        return sum(score.nats for score in scores) / sum(score.num_tokens for score in scores)

    def best(self, column: str) -> str | None:
        """The row with the lowest loss."""
        return min(self.rows, key=lambda row: self.loss(row, column))

    def is_own_best(self, column: str) -> bool | None:
        """Whether the persona's own adapter has the lowest loss on its replies; None: it has no adapter."""
        return self.best(column) == column if column in self.rows else None

    def over_next(self, column: str) -> Margin | None:
        """The persona's own adapter against the best of all others; None without one."""
        others = [row for row in self.rows if row != column]
        if column not in self.rows or not others:
            return None
        return self._margin(column, min(others, key=lambda row: self.loss(row, column)))

    def over_base(self, column: str) -> Margin | None:
        """The persona's own adapter against its prompt alone; None without one."""
        return self._margin(column, None) if column in self.rows else None

    def _margin(self, column: str, other: str | None) -> Margin:
        pairs = list(zip(self.scores[other, column], self.scores[column, column], strict=True))
        differences = [(theirs.nats - own.nats, own.num_tokens) for theirs, own in pairs]
        num_tokens = sum(size for _, size in differences)
        mean = sum(nats for nats, _ in differences) / num_tokens
        # Of a ratio (Cochran 1977, eq. 2.46): replies are independent of one another, their tokens are not.
        spread = sum((nats - mean * size) ** 2 for nats, size in differences)
        num = len(differences)
        error = math.sqrt(spread * num / (num - 1)) / num_tokens if num > 1 else math.inf
        return Margin(other, mean, error)


def measure_losses(
    decoder: Decoder,
    adapters: AdapterStore,
    config: EngineConfig,
    passages: Mapping[str, Sequence[Passage]],  # of each persona
    rows: Iterable[str | None],  # names in the store, and None
    *,
    on_progress: Callable[[float], None] = lambda fraction: None,
) -> LossMatrix:
    """Score every passage under every row. Raises `InvalidError` for one that is longer than the base's context.

    Raises what loading an adapter raises. The store must not be in use by an engine.
    """
    rows = tuple(rows)
    for persona, entries in passages.items():
        _check_lengths(persona, entries, min(decoder.shape.context, config.kv_tokens))
    scorer = _Scorer(decoder, adapters, config)
    # Line by line, so that neighbours in a step wear different adapters.
    wanted = [
        (row, column, number)
        for number in range(max((len(entries) for entries in passages.values()), default=0))
        for column, entries in passages.items()
        if number < len(entries)
        for row in rows
    ]
    scorer.compute_prefixes(rows, passages.values())
    scores: dict[tuple[str | None, str], list[Score]] = {(row, column): [] for row in rows for column in passages}
    results = scorer.score([(row, passages[column][number]) for row, column, number in wanted], on_progress)
    for (row, column, _), score in zip(wanted, results, strict=True):
        scores[row, column].append(score)
    return LossMatrix(rows, tuple(passages), {cell: tuple(entries) for cell, entries in scores.items()})


class _Scorer:
    """Runs known tokens through the decoder; nothing is sampled."""

    def __init__(self, decoder: Decoder, adapters: AdapterStore, config: EngineConfig) -> None:
        self._adapters = adapters
        self._scheduler = Scheduler(config)
        self._max_waiting = config.max_waiting
        adapters.open()
        self._news = threading.Event()
        adapters.on_loaded = self._news.set
        self._runner = Runner(decoder, adapters, config)
        self._ids = count(1)

    def compute_prefixes(self, rows: Iterable[str | None], columns: Iterable[Sequence[Passage]]) -> None:
        """Compute what the prompts of each column begin with, under every adapter, for the prefix cache."""
        prefixes = [_common_prefix([entry.prompt_ids for entry in entries]) for entries in columns if entries]
        requests = [self._request(row, prefix) for row in rows for prefix in prefixes if prefix]
        for step in self._steps(requests):
            self._runner.score(step, [range(0)] * len(step))
            self._scheduler.computed(step)
            self._let_go(step)

    def score(self, wanted: Sequence[tuple[str | None, Passage]], on_progress: Callable[[float], None]) -> list[Score]:
        """Score passages, each under its adapter.

        Their own blocks never become known: a reply that begins like another one is computed all the same.
        """
        requests = [self._request(row, (*passage.prompt_ids, *passage.reply_ids)) for row, passage in wanted]
        num_prompt = {
            request.id: len(passage.prompt_ids) for request, (_, passage) in zip(requests, wanted, strict=True)
        }
        nats = dict.fromkeys(num_prompt, 0.0)
        num_done = 0
        for step in self._steps(requests):
            ranges = [_scored(row, num_prompt[row.sequence.request.id]) for row in step]
            logits = self._runner.score(step, ranges)
            losses = iter(_losses(logits, step, ranges))
            for row, positions in zip(step, ranges, strict=True):
                nats[row.sequence.request.id] += sum(islice(losses, len(positions)))
                row.sequence.num_computed = row.stop
            num_done += self._let_go(step)
            on_progress(num_done / len(requests))
        return [
            Score(nats[request.id], len(passage.reply_ids))
            for request, (_, passage) in zip(requests, wanted, strict=True)
        ]

    def _steps(self, requests: Sequence[Request]) -> Iterable[list[PlannedRow]]:
        """Plan steps until all requests are gone; the caller computes each and lets go of what is done."""
        waiting = list(reversed(requests))
        while waiting or self._scheduler.has_work:
            while waiting and len(self._scheduler.waiting) < self._max_waiting:
                self._scheduler.add(waiting.pop())
            self._news.clear()
            for failed in self._adapters.collect():
                raise failed.error
            rows = self._scheduler.plan(self._adapters.admit, self._adapters.suspend)
            if rows:
                yield rows
            else:
                self._news.wait(MAX_WAIT_S)

    def _request(self, adapter: str | None, token_ids: Sequence[int]) -> Request:
        """Known tokens, none to be sampled."""
        return Request(
            id=next(self._ids),
            prompt_ids=tuple(token_ids),
            sampling=SamplingParams(seed=0, max_tokens=1),
            arrival=0.0,
            adapter=adapter,
            cache_key="" if adapter is None else self._adapters.digest_of(adapter),
            is_warmup=True,
        )

    def _let_go(self, step: Sequence[PlannedRow]) -> int:
        """Take out the rows that are computed to their end; returns how many."""
        done = self._scheduler.remove([row.sequence.request.id for row in step if row.ends_warmup])
        for sequence in done:
            self._adapters.leave(sequence)
        return len(done)


def _scored(row: PlannedRow, num_prompt: int) -> range:
    """The positions of this chunk behind which a reply token stands."""
    return range(max(row.start, num_prompt - 1), min(row.stop, row.sequence.num_tokens - 1))


def _losses(
    logits: Tensor,  # (num_scored, vocab) float32
    step: Sequence[PlannedRow],
    ranges: Sequence[range],
) -> list[float]:
    """Nats of the tokens behind the scored positions."""
    pairs = [(row.sequence.request.prompt_ids, positions) for row, positions in zip(step, ranges, strict=True)]
    targets = [token_ids[position + 1] for token_ids, positions in pairs for position in positions]
    wanted = torch.tensor(targets, dtype=torch.long, device=logits.device)
    nats: list[float] = torch.nn.functional.cross_entropy(logits, wanted, reduction="none").tolist()
    return nats


def _common_prefix(prompts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """What all prompts begin with, short of any one's last token, whose logits are wanted."""
    same = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*prompts, strict=False))
    return tuple(tokens[0] for tokens in same)[: min(map(len, prompts)) - 1]


def _check_lengths(persona: str, entries: Sequence[Passage], context: int) -> None:
    for number, entry in enumerate(entries, 1):
        size = len(entry.prompt_ids) + len(entry.reply_ids)
        if size > context:
            raise InvalidError(
                f"Exchange {number} of {persona}'s heldout.jsonl has {size} tokens with its prompt, and the base "
                f"takes {context}.",
                "Shorten it.",
            )
