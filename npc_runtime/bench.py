"""Measures the daemon that is running, as a game would see it: batches through the normal client, times at its end.

Every line has exactly `max_tokens` tokens. One unmeasured round comes first, so that adapters are loaded and the
personas' prompts cached, as they are in a game after its first seconds.
"""

import asyncio
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

from npc_runtime.client import Client
from npc_runtime.errors import DisconnectedError, InvalidError, NpcError, StartupError
from npc_runtime.protocol import DeltaItem, LineEnd, Want, Welcome
from npc_runtime.running import Target

__all__ = ["Report", "Trace", "measure", "summarize"]

ROUND_LIMIT_S = 300.0
WARM_TOKENS = 4
TEXTS = (
    "The king is dead!",
    "Have you seen a stranger pass by?",
    "What would you ask for that lantern?",
    "There is smoke above the mill.",
    "Tell me what you know about the old road.",
)


@dataclass(slots=True)
class Trace:
    """One line as the client saw it; times in seconds since its batch was sent."""

    text_times: list[float] = field(default_factory=list)
    end: LineEnd | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """What was measured, and where. Times in milliseconds; None where there was nothing to measure."""

    bench: str
    version: str
    device: str
    backend: str
    base: str
    npcs: int
    personas: int
    adapters: int
    rounds: int
    max_tokens: int
    tokens: int
    tokens_per_s: float
    ttft_p50_ms: float | None
    ttft_p95_ms: float | None
    inter_token_p50_ms: float | None
    inter_token_p99_ms: float | None
    cached_share: float

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False)

    def to_text(self) -> str:
        """A few lines for people."""
        return "\n".join(
            [
                f"npc-runtime {self.version}, {self.base} on {self.device} ({self.backend})",
                f"{self.npcs} NPCs at once of {self.personas} personas ({self.adapters} with an adapter), "
                f"{self.max_tokens} tokens each, {self.rounds} rounds",
                "",
                f"  throughput      {self.tokens_per_s:.1f} tokens/s, all NPCs together",
                f"  first text      p50 {_ms(self.ttft_p50_ms)}   p95 {_ms(self.ttft_p95_ms)}",
                f"  between texts   p50 {_ms(self.inter_token_p50_ms)}   p99 {_ms(self.inter_token_p99_ms)}",
                f"  prompt tokens   {self.cached_share:.0%} from the prefix cache",
            ]
        )


async def measure(
    target: Target, *, npcs: int, rounds: int, max_tokens: int, on_round: Callable[[int], None]
) -> Report:
    """Let the daemon's own personas speak, each in turn, and report. `on_round` is told how many rounds are over.

    Raises `NpcError` if it cannot be reached, has no persona that can speak, or drops a line.
    """
    async with await Client.connect(
        target.url, token=target.token, name="npc-runtime-bench", want=Want(tick_ms=0)
    ) as client:
        _check(client.welcome, npcs, max_tokens)
        usable = [persona for persona in await client.personas() if persona.error is None]
        if not usable:
            raise StartupError("No persona can speak.", "npc-runtime persona check says why.")
        cast = [usable[number % len(usable)] for number in range(npcs)]
        names = [persona.id for persona in cast]
        await _play(client, names, WARM_TOKENS if max_tokens > WARM_TOKENS else max_tokens, salt=0)
        played = []
        for number in range(1, rounds + 1):
            on_round(number - 1)
            played.append(await _play(client, names, max_tokens, salt=number))
        on_round(rounds)
        adapters = {persona.adapter for persona in cast} - {None}
        counts = {"personas": len(set(names)), "adapters": len(adapters), "max_tokens": max_tokens}
        return summarize(client.welcome, played, **counts)


def summarize(welcome: Welcome, played: Sequence[tuple[list[Trace], float]], **counts: int) -> Report:
    """The report of rounds: each the traces of its lines and its seconds."""
    traces = [trace for lines, _ in played for trace in lines]
    ends = [trace.end for trace in traces if trace.end is not None]
    speeds = [
        sum(trace.end.usage.completion for trace in lines if trace.end is not None) / seconds
        for lines, seconds in played
    ]
    firsts = [trace.text_times[0] for trace in traces if trace.text_times]
    gaps = [late - early for trace in traces for early, late in pairwise(trace.text_times)]
    return Report(
        bench="daemon",
        version=welcome.version,
        device=welcome.device,
        backend=welcome.backend,
        base=welcome.base.name,
        npcs=len(played[0][0]),
        rounds=len(played),
        tokens=sum(end.usage.completion for end in ends),
        tokens_per_s=round(statistics.median(speeds), 1),
        ttft_p50_ms=_percentile(firsts, 0.50),
        ttft_p95_ms=_percentile(firsts, 0.95),
        inter_token_p50_ms=_percentile(gaps, 0.50),
        inter_token_p99_ms=_percentile(gaps, 0.99),
        cached_share=round(sum(end.usage.cached for end in ends) / max(1, sum(end.usage.prompt for end in ends)), 3),
        **counts,
    )


def _check(welcome: Welcome, npcs: int, max_tokens: int) -> None:
    for option, value, limit in (("--npcs", npcs, "batch"), ("--max-tokens", max_tokens, "max_tokens")):
        if value > welcome.limits.get(limit, value):
            raise InvalidError(f"{option} {value} is more than this daemon takes.", f"At most {welcome.limits[limit]}.")


async def _play(client: Client, personas: list[str], max_tokens: int, *, salt: int) -> tuple[list[Trace], float]:
    """Speak one batch to its end. Raises `NpcError` if a line is rejected, fails or is short."""
    sampling = {"min_tokens": max_tokens, "max_tokens": max_tokens, "trim": "none", "stop": []}
    lines: list[dict[str, Any]] = [
        {"line": number, "persona": persona, "sampling": sampling, "input": {"text": _text(number + salt)}}
        for number, persona in enumerate(personas)
    ]
    traces = [Trace() for _ in lines]
    try:
        async with asyncio.timeout(ROUND_LIMIT_S):
            began = time.perf_counter()
            batch = await client.generate(lines)
            for item in batch.rejected:
                raise NpcError(item.message or "A line was rejected.", item.hint or "")
            async for event in batch:
                if isinstance(event, DeltaItem):
                    traces[int(event.line)].text_times.append(time.perf_counter() - began)
                elif isinstance(event, LineEnd):
                    traces[int(event.line)].end = event
            seconds = time.perf_counter() - began
    except TimeoutError as error:
        raise DisconnectedError(f"A round was not over within {ROUND_LIMIT_S:.0f} s.", "Ask for less.") from error
    for trace in traces:
        _check_end(trace.end, max_tokens)
    return traces, seconds


def _check_end(end: LineEnd | None, max_tokens: int) -> None:
    if end is None or end.error is not None or end.usage.completion != max_tokens:
        why = end.error.message if end and end.error else f"it ended with {end.reason}" if end else "it has no end"
        raise NpcError(f"A line was not spoken in full: {why}.", "The daemon's log has the details.")


def _text(number: int) -> str:
    return TEXTS[number % len(TEXTS)]


def _percentile(seconds: Sequence[float], share: float) -> float | None:
    """The smallest value that at least this share of all values does not exceed, in milliseconds."""
    if not seconds:
        return None
    ranked = sorted(seconds)
    return round(1000 * ranked[max(0, math.ceil(share * len(ranked)) - 1)], 1)


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f} ms"
