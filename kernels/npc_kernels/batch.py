"""What the kernels must know about the rows of one step: positions, KV pages, adapter pages.

The runner builds one `BatchMetadata` per forward pass from the scheduler's plan and hands it to every kernel.
All tensors are on the device of the model.

A worked example. Two lines share a step, KV blocks hold 4 tokens. Row 0 decodes its 6th token, row 1 prefills
a prompt of 3 tokens; row 0 wears an adapter on page 5, row 1 one of rank 24 on pages 2 and 7:

    token                    0        1   2   3          rows with one token come first
    row                      0        1   1   1
    position                 5        0   1   2          positions
    blocks                   3, 1     2
    KV slot                  1*4+1=5  8   9   10         kv_slots
    decode rows              1 of them, its 8 slots 12 13 14 15 4 5 6 7 in decode_slots, the last 2 not to be seen
    prefill rows             tokens 1 to 3, their slots 8 9 10, token i seeing the first i + 1
    live adapter pages       [2, 5, 7]
    lora.mask                token 0: 0 1 0   tokens 1-3: 1 0 1
    last_tokens              [0, 3]                      the tokens whose logits are wanted
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["PAGE_RANK", "BatchMetadata", "LoraBatch", "LoraSpan", "PrefillRow"]

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
class PrefillRow:
    """A row with several tokens: the step's tokens `[start, stop)`, and what each may see."""

    start: int
    stop: int
    kv_slots: Tensor  # (num_seen,) int64: slots of all tokens of the row so far
    mask: Tensor  # (stop - start, num_seen) bool, True = may be seen


@dataclass(frozen=True, slots=True)
class BatchMetadata:
    """Everything about the step's rows that is not a hidden state; see the example above."""

    positions: Tensor  # (num_tokens,) int64
    kv_slots: Tensor  # (num_tokens,) int64, block * block_size + offset: where each token's key and value go
    num_decode: int  # rows with one token; their tokens are the step's first ones
    decode_slots: Tensor  # (num_decode, max_seen) int64, padded with slots that the bias hides
    decode_bias: Tensor  # (num_decode, max_seen), 0 where a slot may be seen, -inf elsewhere
    prefill: tuple[PrefillRow, ...]
    last_tokens: Tensor  # (num_sampled,) int64
    lora: LoraBatch | None  # None: no row of the step wears an adapter
