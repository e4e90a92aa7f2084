"""All device state: the KV cache, the batch metadata, and the one forward pass of a step."""

import itertools
from collections import OrderedDict
from collections.abc import Callable
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Any

import torch
from npc_kernels.batch import BatchMetadata, LoraBatch
from npc_kernels.reference import Settings
from torch import Tensor

from npc_runtime.engine.adapters import AdapterStore
from npc_runtime.engine.core import EngineConfig
from npc_runtime.engine.model import Decoder, KvCache
from npc_runtime.engine.rehearsal import rehearse_decode, rehearse_prefill
from npc_runtime.engine.scheduler import PlannedRow

__all__ = ["Runner"]


MAX_RECORDINGS = 192
"""Recordings that are kept; each has buffers for its rows. A rehearsal makes forty for each class of pages."""


@dataclass(frozen=True, slots=True)
class _Recording:
    """A step that can be run again, and the plan that says with which rows."""

    plan: Any
    replay: Callable[[], Tensor] | None  # None: steps like this cannot be recorded


class Runner:
    """Turns a plan into logits. Not thread-safe: the engine thread owns it."""

    def __init__(self, decoder: Decoder, adapters: AdapterStore, config: EngineConfig) -> None:
        self._decoder = decoder
        self._adapters = adapters
        self._config = config
        self._kv = KvCache.allocate(
            decoder.shape,
            num_blocks=config.num_blocks,
            block_size=config.block_size,
            dtype=decoder.dtype,
            device=decoder.device,
        )
        self._plan: Any = None  # of the last step that was not recorded; kernels keep what they prepared in it
        self._recordings: OrderedDict[Any, _Recording] = OrderedDict()  # the least recently used first
        self._newest: Any = None  # plan of the newest recording; all share some memory through it
        self.draw = decoder.kernels.draw
        self.num_forwards = 0

    @property
    def kv_bytes(self) -> int:
        """What the KV cache takes."""
        return self._kv.keys.nbytes + self._kv.values.nbytes

    def drop_recordings(self) -> None:
        """Forget all recordings and what they hold of the device's memory; steps are recorded anew."""
        self._recordings.clear()
        self._plan = self._newest = None

    @torch.inference_mode()
    def reset(self) -> None:
        """Begin with empty device state, after an error that the device survived; nobody has KV blocks any more."""
        self.drop_recordings()
        self._kv.keys.zero_()  # in place: its memory is ours as before, only what it holds is suspect
        self._kv.values.zero_()

    @torch.inference_mode()
    def forward(self, rows: Rows[PlannedRow]) -> Tensor:  # (num_sampling_rows, vocab) float32
        """Run all rows in one forward pass; return the logits of those rows that sample, in order."""
        order = sorted(range(len(rows)), key=lambda number: rows[number].num_tokens > 1)
        ordered = [rows[number] for number in order]
        stops = dict(zip(order, itertools.accumulate(row.num_tokens for row in ordered), strict=True))
        sampled = [stops[number] - 1 for number, row in enumerate(rows) if row.samples]
        batch = self._describe(ordered, sampled)
        self.num_forwards += 1
        room = self._decoder.kernels.room(batch)
        replay = None if room is None else self._find_recording(room, batch)
        if replay is not None:
            return replay()[: len(sampled)]
        self._plan = self._decoder.plan(batch, self._plan)
        return self._decoder.forward(self._plan, self._kv)

    @torch.inference_mode()
    def score(self, rows: Rows[PlannedRow], wanted: Rows[range]) -> Tensor:  # (num_wanted, vocab) float32
        """Run all rows in one forward pass; return the logits behind the wanted positions of each, in order.

        For known text, whose tokens are all there: a position lies in its row's chunk, and none need be wanted.
        """
        order = sorted(range(len(rows)), key=lambda number: rows[number].num_tokens > 1)
        ordered = [rows[number] for number in order]
        starts = dict(zip(order, itertools.accumulate((row.num_tokens for row in ordered), initial=0), strict=False))
        places = [
            starts[number] + position - row.start
            for number, (row, positions) in enumerate(zip(rows, wanted, strict=True))
            for position in positions
        ]
        self._plan = self._decoder.plan(self._describe(ordered, places), self._plan)
        self.num_forwards += 1
        return self._decoder.forward(self._plan, self._kv)

    @torch.inference_mode()
    def warm(self, on_progress: Callable[[float], None]) -> None:
        """Compile and record what lines will need, as far as it can be foreseen. Call it before the first line."""
        config, pool = self._config, self._adapters.pool
        adapters = LoraBatch(pool, (), self._adapters.multipliers)
        sizes = [size for size in set(self._adapters.host.sizes.values()) if size <= len(pool)]
        longest = min(self._decoder.shape.context, config.kv_tokens)
        prefill = list(rehearse_prefill(config.max_step_tokens, longest, sizes, adapters, config.block_size))
        decode = list(rehearse_decode(config.max_rows, longest, sizes, adapters, config.block_size))
        for done, batch in enumerate([*prefill, *decode]):
            on_progress(done / (len(prefill) + len(decode)))
            room = self._decoder.kernels.room(batch)
            if room is None:
                logits = self._decoder.forward(self._decoder.plan(batch), self._kv)
                self.draw(logits, Settings(*torch.ones(6, len(logits), dtype=torch.float64, device=logits.device)))
            elif room not in self._recordings:
                self._find_recording(room, batch)
        on_progress(1.0)

    def _find_recording(self, room: Any, batch: BatchMetadata) -> Callable[[], Tensor] | None:
        """What computes the step without Python between its kernels, recorded when a room is seen first."""
        recording = self._recordings.get(room)
        if recording is None:
            plan = self._decoder.plan(batch, self._newest, room=room)
            self._newest = plan
            recording = _Recording(plan, plan.record(lambda: self._decoder.forward(plan, self._kv)))
            self._recordings[room] = recording
            if len(self._recordings) > MAX_RECORDINGS:
                self._recordings.popitem(last=False)
        elif recording.replay is not None:
            recording.plan.refill(batch)
        self._recordings.move_to_end(room)
        return recording.replay

    def _describe(self, rows: Rows[PlannedRow], sampled: list[int]) -> BatchMetadata:
        """Build the metadata that `npc_kernels.batch` explains with an example; rows of one token come first."""
        size = self._config.block_size
        token_ids = [token for row in rows for token in row.sequence.tokens(row.start, row.stop)]
        num_blocks = max(-(-row.stop // size) for row in rows)
        tables = [[*row.sequence.blocks, *row.sequence.blocks[:1] * num_blocks][:num_blocks] for row in rows]
        places = [
            (position, table[position // size] * size + position % size)
            for row, table in zip(rows, tables, strict=True)
            for position in range(row.start, row.stop)
        ]
        return BatchMetadata(
            token_ids=torch.tensor(token_ids),
            sampled=torch.tensor(sampled, dtype=torch.long),
            positions=torch.tensor([position for position, _ in places]),
            kv_slots=torch.tensor([slot for _, slot in places]),
            num_decode=sum(row.num_tokens == 1 for row in rows),
            row_starts=(0, *itertools.accumulate(row.num_tokens for row in rows)),
            block_tables=torch.tensor(tables),
            block_size=size,
            max_seen=max(row.stop for row in rows),
            lora=self._describe_adapters(rows),
        )

    def _describe_adapters(self, rows: Rows[PlannedRow]) -> LoraBatch | None:
        """Name the pages of each row's adapter."""
        names = [row.sequence.request.adapter for row in rows]
        pages = tuple(() if name is None else tuple(self._adapters.pages_of(name)) for name in names)
        return LoraBatch(self._adapters.pool, pages, self._adapters.multipliers) if any(pages) else None
