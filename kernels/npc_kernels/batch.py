"""What the kernels must know about the rows of one step: positions, KV pages, adapter pages.

The runner builds one `BatchMetadata` per forward pass from the scheduler's plan, in main memory; a kernel module makes
of it whatever it needs on its device (`plan`), once a step.

A worked example. Two lines share a step, KV blocks hold 4 tokens. Row 0 decodes its 6th token, row 1 prefills
a prompt of 3 tokens; row 0 wears an adapter on page 5, row 1 one of rank 24 on pages 2 and 7:

    token                    0        1   2   3          rows with one token come first
    token id                 17       4   8   15         token_ids
    row                      0        1   1   1          row_starts [0, 1, 4]
    position                 5        0   1   2          positions
    blocks                   3, 1     2                  block_tables [[3, 1], [2, 2]], short rows repeat their first
    KV slot                  1*4+1=5  8   9   10         kv_slots
    adapter pages            5        2, 7               lora.pages [(5,), (2, 7)]
    next token wanted        yes      no  no  yes        sampled [0, 3]
    live adapter pages       2, 5, 7                     lora.live
    lora.mask                token 0: 0 1 0   tokens 1-3: 1 0 1
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["PAGE_RANK", "BatchMetadata", "Codes", "LoraBatch", "LoraSpan", "copies_from_pinned"]

PAGE_RANK = 16
"""Ranks in one adapter page."""


def copies_from_pinned(device: torch.device) -> bool:
    """Whether a step's copies to a device come from pinned memory, so that nobody waits for their end."""
    return device.type == "cuda"


@dataclass(frozen=True, slots=True)
class LoraSpan:
    """Where one group of linears with a shared input (qkv, o, gate_up, down) lies inside an adapter page.

    `A` of all slices comes first, `[num_slices, 16, in_features]`; then `B` slice by slice, `[16, out_features[i]]`.
    Offsets count elements from the start of the page.
    """

    start: int
    in_features: int
    out_features: tuple[int, ...]
    first_output: int = 0  # of the group, among the outputs of all groups

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
class Codes:
    """A linear's weight as it was published, in groups of 32 inputs: 4 or 8 bits (GGUF's Q4_1 and Q8_0).

    4 bits: `scale * code + minimum`; the low half of byte `i` of a group is the code of input `i`, the high half that
    of input `i + 16`. 8 bits: `scale * code`, and no minimum.
    """

    values: Tensor  # (out_features, in_features / 32, 16) uint8, or (out_features, in_features / 32, 32) int8
    scale: Tensor  # (out_features, in_features / 32) float32
    minimum: Tensor | None  # like scale


@dataclass(frozen=True, slots=True)
class LoraBatch:
    """The adapter pages that this step uses, and which tokens use them."""

    pool: Tensor  # (num_pages, page_elements): all pages of the adapter store
    pages: tuple[tuple[int, ...], ...]  # of each row's adapter, in rank order; () for a row without one
    multipliers: Tensor | None = None
    """(num_pages, num_outputs) float32: DoRA's factor of every output (Liu et al. 2024, eq. 5), `m / |W + B A|`.

    In the row of the adapter's first page; 1 for what has none. None: no adapter of the pool has any.
    """

    @property
    def live(self) -> tuple[int, ...]:
        """The pages that some row of the step uses, ascending."""
        return tuple(sorted(set().union(*self.pages)))

    def mask(self, row_starts: tuple[int, ...]) -> Tensor:  # (num_tokens, num_live) bool
        """Which of the live pages each token's adapter owns."""
        live = self.live
        owned = torch.tensor([[page in pages for page in live] for pages in self.pages])
        sizes = torch.tensor(row_starts).diff()
        return owned.repeat_interleave(sizes, dim=0)


@dataclass(frozen=True, slots=True)
class BatchMetadata:
    """Everything about the step's rows that is not a hidden state; see the example above. In main memory."""

    token_ids: Tensor  # (num_tokens,) int64
    sampled: Tensor  # (num_sampled,) int64: the tokens behind which the next one is wanted
    positions: Tensor  # (num_tokens,) int64
    kv_slots: Tensor  # (num_tokens,) int64, block * block_size + offset: where each token's key and value go
    num_decode: int  # rows with one token; their tokens are the step's first ones
    row_starts: tuple[int, ...]  # first token of each row, and the number of tokens
    block_tables: Tensor  # (num_rows, max_blocks) int64
    block_size: int
    max_seen: int  # the largest position of the step, and one
    lora: LoraBatch | None  # None: no row of the step wears an adapter; its pool is on the device

    @property
    def num_rows(self) -> int:
        """Rows of the step."""
        return len(self.row_starts) - 1

    @property
    def is_decode(self) -> bool:
        """Whether every row has one token, and wants the next one."""
        return self.num_decode == self.num_rows and torch.equal(self.sampled, torch.arange(self.num_rows))

    def to(self, device: torch.device) -> "BatchMetadata":
        """The same with its tensors on a device."""
        names = ("token_ids", "sampled", "positions", "kv_slots", "block_tables")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})
