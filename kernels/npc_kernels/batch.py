"""What the kernels must know about the rows of one step: positions, KV pages, adapter pages.

The runner builds one `BatchMetadata` per forward pass from the scheduler's plan and hands it to every kernel.
All tensors are on the device of the model.

A worked example. Two lines share a step, KV blocks hold 4 tokens. Row 0 decodes its 6th token, row 1 prefills
a prompt of 3 tokens; row 0 wears an adapter on page 5, row 1 one of rank 24 on pages 2 and 7:

    token                    0        1   2   3
    row                      0        1   1   1          token_rows
    column within its row    0        0   1   2          token_columns
    position                 5        0   1   2          positions
    block table of row 0     [3, 1]   row 1  [2, 2]      block_tables (padded by repeating a valid block)
    KV slot                  1*4+1=5  8   9   10         kv_slots
    tokens in the KV         6        3                  the mask lets row 0 see 6 slots, row 1 up to 3
    query_index              [[0, 0, 0], [1, 2, 3]]      padded by repeating the row's first token
    live adapter pages       [2, 5, 7]
    lora.mask                token 0: 0 1 0   tokens 1-3: 1 0 1
    last_tokens              [0, 3]                      the tokens whose logits are wanted
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["PAGE_RANK", "BatchMetadata", "LoraBatch", "LoraSpan"]

PAGE_RANK = 16
"""Ranks in one adapter page."""


@dataclass(frozen=True, slots=True)
class LoraSpan:
    """Where one group of linears with a shared input (qkv, o, gate_up, down) lies inside an adapter page.

    `A` of all slices comes first, `[num_slices, 16, in_features]`; then `B` slice by slice, `[16, out_features[i]]`.
    Offsets count elements from the start of the page.
    """

    start: int
    in_features: int
    out_features: tuple[int, ...]

    @property
    def num_slices(self) -> int:
        """Linears in the group."""
        return len(self.out_features)

    @property
    def b_start(self) -> int:
        """Offset of the first slice's `B`."""
        return self.start + self.num_slices * PAGE_RANK * self.in_features

    @property
    def stop(self) -> int:
        """Offset just behind the group."""
        return self.b_start + PAGE_RANK * sum(self.out_features)


@dataclass(frozen=True, slots=True)
class LoraBatch:
    """The adapter pages that this step uses, and which tokens use them."""

    pages: Any  # (num_live, page_elements), as `stack_pages` prepared them
    mask: Tensor  # (num_tokens, num_live), bool: the token's adapter owns the page


@dataclass(frozen=True, slots=True)
class BatchMetadata:
    """Everything about the step's rows that is not a hidden state; see the example above."""

    positions: Tensor  # (num_tokens,) int64
    kv_slots: Tensor  # (num_tokens,) int64, block * block_size + offset
    block_tables: Tensor  # (num_rows, max_blocks) int64
    token_rows: Tensor  # (num_tokens,) int64
    token_columns: Tensor  # (num_tokens,) int64
    query_index: Tensor  # (num_rows, max_query) int64
    attention_mask: Tensor  # (num_rows, 1, max_query, max_blocks * block_size) bool, True = may be seen
    kv_index: Tensor  # (num_rows, num_kv_heads, max_blocks * block_size) int64, kv slot * num_kv_heads + head
    decode_bias: Tensor  # (num_rows * num_kv_heads, 1, max_blocks * block_size), 0 or -inf: the last query's mask
    last_tokens: Tensor  # (num_sampled,) int64
    lora: LoraBatch | None  # None: no row of the step wears an adapter
