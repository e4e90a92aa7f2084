"""All device state: the KV cache, the batch metadata, and the one forward pass of a step."""

from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Any

import torch
from npc_kernels.batch import BatchMetadata, LoraBatch
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
        token_ids = [token for row in rows for token in row.sequence.tokens(row.start, row.stop)]
        batch = self._describe(rows)
        self.num_forwards += 1
        return self._decoder.forward(self._tensor(token_ids), batch, self._kv)

    def _describe(self, rows: Rows[PlannedRow]) -> BatchMetadata:
        """Build the metadata that `npc_kernels.batch` explains with an example."""
        size = self._block_size
        max_query = max(row.stop - row.start for row in rows)
        max_blocks = max(-(-row.stop // size) for row in rows)
        positions: list[int] = []
        columns: list[int] = []
        kv_slots, token_rows = [], []
        tables, query_index, last_tokens = [], [], []
        for number, row in enumerate(rows):
            first = len(positions)
            blocks = row.sequence.blocks
            for position in range(row.start, row.stop):
                positions.append(position)
                kv_slots.append(blocks[position // size] * size + position % size)
            length = row.stop - row.start
            columns += range(length)
            token_rows += [number] * length
            query_index.append([*range(first, first + length), *[first] * (max_query - length)])
            tables.append([*blocks[:max_blocks], *[blocks[0]] * (max_blocks - len(blocks))])
            if row.samples:
                last_tokens.append(first + length - 1)
        where, queries, table = self._tensor(positions), self._tensor(query_index), self._tensor(tables)
        seen = torch.arange(max_blocks * size, device=self._decoder.device)
        mask = seen <= where[queries][:, :, None]  # (num_rows, max_query, max_blocks * size)
        num_kv_heads = self._decoder.shape.num_kv_heads
        slots = (table[:, :, None] * size + seen[:size]).flatten(1)
        heads = torch.arange(num_kv_heads, device=self._decoder.device)
        bias = torch.zeros(mask[:, -1:].shape, dtype=self._decoder.dtype, device=self._decoder.device)
        return BatchMetadata(
            positions=where,
            kv_slots=self._tensor(kv_slots),
            block_tables=table,
            token_rows=self._tensor(token_rows),
            token_columns=self._tensor(columns),
            query_index=queries,
            attention_mask=mask[:, None],
            kv_index=slots[:, None] * num_kv_heads + heads[:, None],
            decode_bias=bias.masked_fill_(~mask[:, -1:], -torch.inf).repeat_interleave(num_kv_heads, dim=0),
            last_tokens=self._tensor(last_tokens),
            lora=self._describe_adapters(rows),
        )

    def _describe_adapters(self, rows: Rows[PlannedRow]) -> LoraBatch | None:
        """Choose the pages this step needs, and mark for every token the ones its adapter owns."""
        names = [row.sequence.request.adapter for row in rows]
        owned = [set(self._adapters.pages_of(name)) if name is not None else set() for name in names]
        live = sorted(set().union(*owned))
        if not live:
            return None
        stack = self._stack_pages(live)
        mask = [[page in pages for page in stack.live] for pages in owned]
        lengths = self._tensor([row.stop - row.start for row in rows])
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
