"""All device state: the KV cache, the batch metadata, and the one forward pass of a step."""

import itertools
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Any

import torch
from npc_kernels.batch import BatchMetadata, LoraBatch, PrefillRow
from torch import Tensor

from npc_runtime.engine.adapters import AdapterStore
from npc_runtime.engine.core import EngineConfig
from npc_runtime.engine.model import Decoder, KvCache
from npc_runtime.engine.scheduler import PlannedRow

__all__ = ["Runner"]


@dataclass(frozen=True, slots=True)
class _Stack:
    """Pages of the pool as they were at `version`, prepared for the kernels."""

    version: int
    live: list[int]
    pages: Any


class Runner:
    """Turns a plan into logits. Not thread-safe: the engine thread owns it."""

    def __init__(self, decoder: Decoder, adapters: AdapterStore, config: EngineConfig) -> None:
        self._decoder = decoder
        self._adapters = adapters
        self._block_size = config.block_size
        self._kv = KvCache.allocate(
            decoder.shape,
            num_blocks=config.num_blocks,
            block_size=config.block_size,
            dtype=decoder.dtype,
            device=decoder.device,
        )
        self._stack = _Stack(-1, [], None)
        self.num_forwards = 0

    @torch.inference_mode()
    def forward(self, rows: Rows[PlannedRow]) -> Tensor:  # (num_sampling_rows, vocab) float32
        """Run all rows in one forward pass; return the logits of those rows that sample, in order."""
        order = sorted(range(len(rows)), key=lambda number: rows[number].num_tokens > 1)
        ordered = [rows[number] for number in order]
        token_ids = [token for row in ordered for token in row.sequence.tokens(row.start, row.stop)]
        stops = dict(zip(order, itertools.accumulate(row.num_tokens for row in ordered), strict=True))
        last_tokens = [stops[number] - 1 for number, row in enumerate(rows) if row.samples]
        self.num_forwards += 1
        return self._decoder.forward(self._tensor(token_ids), self._describe(ordered, last_tokens), self._kv)

    def _describe(self, rows: Rows[PlannedRow], last_tokens: list[int]) -> BatchMetadata:
        """Build the metadata that `npc_kernels.batch` explains with an example; rows of one token come first."""
        decode = [row for row in rows if row.num_tokens == 1]
        hidden, decode_slots = self._describe_decode(decode)
        bias = torch.zeros(hidden.shape, dtype=self._decoder.dtype, device=self._decoder.device)
        prefill, start = [], len(decode)
        for row in rows[len(decode) :]:
            positions = torch.arange(row.start, row.stop, device=self._decoder.device)
            mask = torch.arange(row.stop, device=self._decoder.device) <= positions[:, None]
            slots = self._tensor(self._slots(row, 0))
            prefill.append(PrefillRow(start, start + row.num_tokens, slots, mask))
            start += row.num_tokens
        return BatchMetadata(
            positions=self._tensor([position for row in rows for position in range(row.start, row.stop)]),
            kv_slots=self._tensor([slot for row in rows for slot in self._slots(row, row.start)]),
            num_decode=len(decode),
            decode_slots=decode_slots,
            decode_bias=bias.masked_fill_(hidden, -torch.inf),
            prefill=tuple(prefill),
            last_tokens=self._tensor(last_tokens),
            lora=self._describe_adapters(rows),
        )

    def _describe_decode(self, rows: Rows[PlannedRow]) -> tuple[Tensor, Tensor]:
        """Which places of the longest decode row each row must not see, and the slots, `(num_rows, longest)` both.

        A hidden place repeats the row's first slot: a slot that was never written may hold another line's NaN,
        which no mask would keep out of a sum.
        """
        longest = max((row.stop for row in rows), default=0)
        num_blocks = -(-longest // self._block_size)
        tables = [[*row.sequence.blocks, *row.sequence.blocks[:1] * num_blocks][:num_blocks] for row in rows]
        stops = self._tensor([[row.stop] for row in rows]).view(-1, 1)
        hidden = torch.arange(longest, device=self._decoder.device) >= stops
        offsets = torch.arange(self._block_size, device=self._decoder.device)
        blocks = self._tensor(tables).view(len(rows), num_blocks, 1)
        slots = (blocks * self._block_size + offsets).flatten(1)[:, :longest]
        return hidden, torch.where(hidden, slots[:, :1], slots) if longest else slots

    def _slots(self, row: PlannedRow, start: int) -> list[int]:
        """KV slots of the row's tokens `[start, row.stop)`."""
        size, blocks = self._block_size, row.sequence.blocks
        return [blocks[position // size] * size + position % size for position in range(start, row.stop)]

    def _describe_adapters(self, rows: Rows[PlannedRow]) -> LoraBatch | None:
        """Choose the pages this step needs, and mark for every token the ones its adapter owns."""
        names = [row.sequence.request.adapter for row in rows]
        owned = [set(self._adapters.pages_of(name)) if name is not None else set() for name in names]
        live = sorted(set().union(*owned))
        if not live:
            return None
        stack = self._stack_pages(live)
        mask = [[page in pages for page in stack.live] for pages in owned]
        lengths = self._tensor([row.num_tokens for row in rows])
        return LoraBatch(
            pages=stack.pages,
            mask=torch.tensor(mask, device=self._decoder.device).repeat_interleave(lengths, dim=0),
        )

    def _stack_pages(self, live: list[int]) -> "_Stack":
        """The live pages as the kernels want them; kept, with pages of lines that are over, while half is in use."""
        kept = self._stack
        fits = kept.version == self._adapters.version and set(live) <= set(kept.live)
        if not fits or len(kept.live) > 2 * len(live):
            pages = self._adapters.pool[live]
            prepared = self._decoder.kernels.stack_pages(pages, self._decoder.layout.spans)
            self._stack = _Stack(self._adapters.version, live, prepared)
        return self._stack

    def _tensor(self, values: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self._decoder.device)
