"""The table: decode steps of Llama-3.2-3B's shapes beside what their bytes and launches must take.

A cell is a base, a length of prompt, the ranks of the adapters (all distinct), and a number of rows. Its systems take
turns, a burst of steps each, and medians are kept: the batch with adapters; the same rows without; those on an engine
that has no adapters at all; and single rows, of which one request at a time is made up. Keys and values are random,
not computed: what a step costs does not depend on them. A step is all that the engine thread does for a token of each
row but text: metadata, the graph's launch, sampling, and waiting for the tokens.
"""

import statistics
import time
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import torch

from gpu.models import make_base, make_sequence, make_store
from gpu.results import Skip
from gpu.setup import Setup
from gpu.timing import median_ms
from npc_runtime.engine.adapters import AdapterStore
from npc_runtime.engine.core import EngineConfig, Sequence
from npc_runtime.engine.runner import Runner
from npc_runtime.engine.sampler import sample
from npc_runtime.engine.scheduler import PlannedRow

__all__ = ["PROFILES", "Bed", "Cell", "Prefill", "Table", "cells_of"]

PROFILES = {"16": (16,), "64": (64,), "mixed": (8, 16, 32, 64)}
"""Ranks that adapters take in turn."""

SPOKEN = 50
"""Tokens that every line has said when it is measured, of 100."""

NUM_SINGLES = 4
"""Rows that are also measured alone; the mixed ranks are four."""

SPARE_BYTES = 2 << 30
"""Device memory that pages and KV leave free, for planes, graphs and logits."""

PROMPT_CHUNK = 512
"""Tokens of a prompt in one step, as the engine plans them."""


class Cell(NamedTuple):
    """A line of the table."""

    bits: int
    prompt: int
    ranks: str
    rows: int

    @property
    def title(self) -> str:
        """As it is named in results."""
        base = "int4" if self.bits == 4 else "bf16"
        return f"{base}, prompt {self.prompt}, rank {self.ranks}, B = {self.rows}"


def cells_of(setup: Setup, bits: int) -> tuple[list[Cell], list[Cell]]:
    """The cells that targets are about, and the others; the most important first."""
    everything = [
        Cell(bits, prompt, ranks, rows) for prompt in setup.prompts for ranks in PROFILES for rows in setup.rows
    ]
    first = [cell for cell in everything if cell.prompt == setup.prompts[0] and cell.rows in (1, 8, 32)]
    first.sort(key=lambda cell: (cell.ranks != "16", cell.ranks != "64", cell.rows != 8))
    return first, [cell for cell in everything if cell not in first]


class Bed:
    """A base with a KV cache full of numbers, and a runner with adapters or without on it."""

    def __init__(self, setup: Setup, bits: int) -> None:
        self.setup = setup
        self.base = make_base(setup, setup.model, bits)
        self.blocks_per_row = -(-(max(setup.prompts) + 100) // 16)
        self.config = EngineConfig(kv_tokens=16 * self.blocks_per_row * self._max_rows())
        self.plain = Runner(self.base.decoder, make_store(self.base.decoder, {}), self.config)
        kv = self.plain._kv
        kv.keys.normal_()
        kv.values.normal_()

    def runner(self, store: AdapterStore) -> Runner:
        """A runner on the same KV cache."""
        few = EngineConfig(kv_tokens=16)
        runner = Runner(self.base.decoder, store, few)
        runner._kv = self.plain._kv
        return runner

    def lines(self, count: int, prompt: int, names: list[str] | None) -> list[Sequence]:
        """Lines that have said half of what they say."""
        vocab, room = self.base.decoder.shape.vocab - 3, self.blocks_per_row
        if room * count > self.config.num_blocks:
            raise Skip(f"the KV cache of {count} rows does not fit on this card")
        lines = []
        for number in range(count):
            ids = tuple(3 + (31 * number + 17 * position) % vocab for position in range(prompt))
            blocks = list(range(room * number, room * (number + 1)))
            lines.append(make_sequence(number, ids, names[number] if names else None, blocks))
            lines[-1].output_ids = list(ids[: min(SPOKEN, prompt)])
        return lines

    def free_bytes(self) -> int:
        """What may still be given to pages or KV."""
        if not self.setup.on_gpu:
            return 1 << 30
        torch.cuda.empty_cache()
        return max(torch.cuda.mem_get_info()[0] - SPARE_BYTES, 0)

    def _max_rows(self) -> int:
        """Rows whose KV takes no more than half of what is free."""
        shape = self.base.decoder.shape
        per_row = 2 * shape.num_layers * shape.kv_size * self.setup.dtype.itemsize * 16 * self.blocks_per_row
        most = self.free_bytes() // 2 // per_row
        if most < 1:
            raise Skip("the base leaves no room for a KV cache on this card")
        return min(int(most), max(self.setup.rows))


def step(runner: Runner, lines: list[Sequence]) -> float:
    """One token of each line; milliseconds until it is known."""
    started = time.perf_counter()
    logits = runner.forward([PlannedRow(line, line.num_tokens - 1, line.num_tokens) for line in lines])
    tokens = sample(logits, lines, frozenset({2}), runner.draw)
    elapsed = 1000 * (time.perf_counter() - started)
    for line, token in zip(lines, tokens, strict=True):
        if token < 0:
            raise RuntimeError("logits are not finite")
        line.output_ids.append(token)
    return elapsed


class Table:
    """A part: some cells of one base."""

    kind = "table"

    def __init__(self, setup: Setup, bits: int, *, first: bool) -> None:
        self._setup = setup
        self._bits = bits
        self._cells = {cell.title: cell for cell in cells_of(setup, bits)[0 if first else 1]}
        self._opened: tuple[str, AdapterStore, Runner] | None = None

    @property
    def items(self) -> list[str]:
        """The cells."""
        return list(self._cells)

    def measure(self, item: str) -> dict[str, Any]:
        """A line of the table, without what the machine's speeds make of it."""
        cell = self._cells[item]
        names, runner = self._adapters(cell)
        lines = self._bed.lines(cell.rows, cell.prompt, names)
        bare = self._bed.lines(cell.rows, cell.prompt, None)
        systems: dict[str, Callable[[], list[float]]] = {
            "step": lambda: self._burst(runner, lines),
            "base": lambda: self._burst(runner, bare),
            "pool off": lambda: self._burst(self._bed.plain, bare),
        }
        singles = lines[: min(NUM_SINGLES, cell.rows)] if cell.rows > 1 else []
        for number in range(len(singles)):
            systems[f"single {number}"] = lambda number=number: self._burst(runner, singles[number : number + 1])
        times = take_turns(systems, self._setup.rounds)
        numbers = self._numbers(cell, times, singles)
        self._burst(runner, lines)  # so that its graph is the last one
        return {**cell._asdict(), **numbers, **self._floors(cell, lines, names), "graph_ms": self._graph_ms(runner)}

    @cached_property
    def _bed(self) -> Bed:
        return Bed(self._setup, self._bits)

    def _adapters(self, cell: Cell) -> tuple[list[str], Runner]:
        """As many adapters as the largest batch wants, or as there is memory for."""
        if self._opened is None or self._opened[0] != cell.ranks:
            self._opened = None
            bed, cycle = self._bed, PROFILES[cell.ranks]
            page_bytes = bed.base.decoder.layout.num_elements * self._setup.dtype.itemsize
            ranks: dict[str, int] = {}
            free = bed.free_bytes()
            for number in range(max(self._setup.rows)):
                rank = cycle[number % len(cycle)]
                free -= -(-rank // 16) * page_bytes
                if free < 0:
                    break
                ranks[f"a{number}"] = rank
            store = make_store(bed.base.decoder, ranks, shared=True)
            self._opened = cell.ranks, store, bed.runner(store)
        _, store, runner = self._opened
        if cell.rows > len(store.resident):
            raise Skip(f"{cell.rows} adapters do not fit on this card beside the base, {len(store.resident)} do")
        return [f"a{number}" for number in range(cell.rows)], runner

    def _burst(self, runner: Runner, lines: list[Sequence]) -> list[float]:
        """Some steps in a row; lines are as long afterwards as before. The first one is for the caches."""
        sizes = [len(line.output_ids) for line in lines]
        times = [step(runner, lines) for _ in range(self._setup.burst)]
        for line, size in zip(lines, sizes, strict=True):
            del line.output_ids[size:]
        return times[1:]

    def _graph_ms(self, runner: Runner) -> float:
        """The last step's graph alone, launched again and again: the device's share of a step, without sampling."""
        replay = next(reversed(runner._recordings.values())).replay
        assert replay is not None
        with torch.inference_mode():
            return round(median_ms(replay, self._setup.device, repeats=5, inner=10 if self._setup.on_gpu else 1), 4)

    def _numbers(self, cell: Cell, times: dict[str, list[float]], singles: list[Sequence]) -> dict[str, Any]:
        medians = {name: statistics.median(found) for name, found in times.items()}
        own = medians["step"]
        alone = [medians[f"single {number}"] for number in range(len(singles))] or [own]
        return {
            "step_ms": round(own, 4),
            "tokens_per_s": round(1000 * cell.rows / own, 1),
            "base_ms": round(medians["base"], 4),
            "over_base": round(own / medians["base"] - 1, 4),
            "base_to_pool_off": round(medians["base"] / medians["pool off"], 4),
            "single_ms": round(statistics.mean(alone), 4),
            "times_one_at_a_time": round(cell.rows * statistics.mean(alone) / own, 3),
            "steps": len(times["step"]),
        }

    def _floors(self, cell: Cell, lines: list[Sequence], names: list[str]) -> dict[str, int]:
        """Bytes that a step must read, and kernels that it launches."""
        decoder, cycle = self._bed.base.decoder, PROFILES[cell.ranks]
        shape, item = decoder.shape, self._setup.dtype.itemsize
        per_rank = decoder.layout.num_elements * item // 16
        adapters = per_rank * sum(cycle[number % len(cycle)] for number in range(len(names)))
        kv = 2 * shape.num_layers * shape.kv_size * item * sum(line.num_tokens for line in lines)
        is_long = max(line.num_tokens for line in lines) > 256
        return {
            "base_bytes": self._bed.base.num_bytes,
            "adapter_bytes": adapters,
            "kv_bytes": kv,
            "launches": shape.num_layers * (10 if is_long else 9) + 3,  # embedding, first norm, head
        }


def take_turns(systems: dict[str, Callable[[], list[float]]], rounds: int) -> dict[str, list[float]]:
    """Every system in every round; one round before them compiles and captures."""
    times: dict[str, list[float]] = {name: [] for name in systems}
    for number in range(rounds + 1):
        for name, burst in systems.items():
            found = burst()
            if number:
                times[name] += found
    return times


class Prefill:
    """A part: prompts of one base, alone and eight at once with adapters of their own, in steps of 512 tokens."""

    kind = "prefill"

    def __init__(self, setup: Setup, bits: int) -> None:
        self._setup = setup
        self._bits = bits

    @property
    def items(self) -> list[str]:
        """Lengths and rows."""
        base = "int4" if self._bits == 4 else "bf16"
        rows = [rows for rows in (1, 8) if rows <= max(self._setup.rows)]
        return [f"{base}, prompt {prompt}, B = {count}" for prompt in self._setup.prompts for count in rows]

    def measure(self, item: str) -> dict[str, Any]:
        """Until the first token of every line is known."""
        prompt, rows = (int(word.split()[-1]) for word in item.split(", ")[1:])
        lines = self._bed.lines(rows, prompt, [f"a{number}" for number in range(rows)])
        for line in lines:
            line.output_ids = []
        runner = self._runner
        times = [self._read(runner, lines) for _ in range(1 + min(3, self._setup.rounds))]
        found = statistics.median(times[1:])
        return {
            "prompt": prompt,
            "rows": rows,
            "prefill_ms": round(found, 3),
            "tokens_per_s": round(1e3 * rows * prompt / found),
        }

    @cached_property
    def _bed(self) -> Bed:
        return Bed(self._setup, self._bits)

    @cached_property
    def _runner(self) -> Runner:
        ranks = {f"a{number}": 16 for number in range(min(8, max(self._setup.rows)))}
        return self._bed.runner(make_store(self._bed.base.decoder, ranks, shared=True))

    def _read(self, runner: Runner, lines: list[Sequence]) -> float:
        started = time.perf_counter()
        budget: list[PlannedRow] = []
        for line in lines:
            done = 0
            while done < line.num_tokens:
                taken = min(line.num_tokens - done, PROMPT_CHUNK - sum(row.num_tokens for row in budget))
                budget.append(PlannedRow(line, done, done + taken))
                done += taken
                if sum(row.num_tokens for row in budget) == PROMPT_CHUNK:
                    self._run(runner, budget)
                    budget = []
        if budget:
            self._run(runner, budget)
        return 1000 * (time.perf_counter() - started)

    def _run(self, runner: Runner, rows: list[PlannedRow]) -> None:
        logits = runner.forward(rows)
        ready = [row.sequence for row in rows if row.samples]
        if ready:
            sample(logits, ready, frozenset({2}), runner.draw)
        else:
            self._setup.synchronize()
