"""What the GPU kernels know about a step: which tokens share adapter pages, and which queries share keys.

A *segment* is up to 16 tokens whose lines wear the same adapter, the width of the tensor cores' smallest tile; one
without pages holds tokens of the base alone. A *tile* is a few consecutive tokens of one row, for attention.

The example of `batch.py`, row 0 with page 5 (1 token), row 1 with pages 2 and 7 (3 tokens):

    segment    tokens (-1: none)         pages (-1: none)        tile    row, first token, tokens
    0          1  2  3 -1 ... -1         2  7 -1 -1              0       0, 0, 1
    1          0 -1 -1 -1 ... -1         5 -1 -1 -1              1       1, 1, 3

Everything is one int32 tensor on the host and one copy to the device.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from npc_kernels.batch import BatchMetadata

__all__ = ["CHUNK", "SEGMENT", "Plan", "plan", "plan_segments", "plan_tiles"]

SEGMENT = 16
"""Tokens of a segment."""

CHUNK = 256
"""Keys that one program of the attention sees; fixed, so that the sums of a row never depend on its neighbours."""

DECODE_QUERIES, PREFILL_QUERIES = 4, 8
"""Tokens that a tile has room for, in a step in which every row has one token, and else."""

PAGE_CLASSES = (0, 1, 4, 8)
"""Pages that a segment has room for; a kernel is compiled, and later a graph captured, for each class."""


class _Segment(NamedTuple):
    """Up to 16 tokens with the same adapter pages."""

    tokens: list[int]
    pages: tuple[int, ...]


class _Tile(NamedTuple):
    """Consecutive tokens of one row."""

    row: int
    first: int
    num_tokens: int


class Plan(NamedTuple):
    """A step, described for the kernels; all tensors int32 on the device."""

    batch: BatchMetadata
    cos: Tensor  # (context, head_dim / 2) float32
    sin: Tensor  # (context, head_dim / 2) float32
    tokens: Tensor  # (num_segments, 16), -1 where there is none
    pages: Tensor  # (num_segments, max_pages), -1 where there is none
    tiles: Tensor  # (num_tiles, 3): row, first token, tokens
    tile_queries: int  # tokens that a tile has room for
    num_chunks: int  # of the longest row

    @property
    def num_tokens(self) -> int:
        """Tokens of the step."""
        return len(self.batch.positions)

    @property
    def max_pages(self) -> int:
        """Pages that a segment has room for."""
        return self.pages.shape[1]


def plan(batch: BatchMetadata, cos: Tensor, sin: Tensor, previous: Any = None) -> Plan:
    """Describe a step."""
    queries = DECODE_QUERIES if batch.num_decode == len(batch.row_starts) - 1 else PREFILL_QUERIES
    segments, tiles = plan_segments(batch), plan_tiles(batch, queries)
    most = max((len(segment.pages) for segment in segments), default=0)
    room = next(size for size in PAGE_CLASSES if size >= most)
    parts = [
        [token for segment in segments for token in _pad(segment.tokens, SEGMENT)],
        [page for segment in segments for page in _pad(segment.pages, room)],
        [number for tile in tiles for number in tile],
    ]
    packed = torch.tensor([number for part in parts for number in part], dtype=torch.int32)
    sizes = [len(part) for part in parts]
    tokens, pages, tile_numbers = torch.split(packed.to(batch.positions.device), sizes)
    return Plan(
        batch,
        cos,
        sin,
        tokens=tokens.view(len(segments), SEGMENT),
        pages=pages.view(len(segments), room),
        tiles=tile_numbers.view(len(tiles), 3),
        tile_queries=queries,
        num_chunks=-(-batch.max_seen // CHUNK),
    )


def plan_segments(batch: BatchMetadata) -> list[_Segment]:
    """Tokens grouped by their adapter, whatever row they are in."""
    owned = batch.lora.pages if batch.lora is not None else ((),) * (len(batch.row_starts) - 1)
    groups: dict[tuple[int, ...], list[int]] = {}
    for pages, (start, stop) in zip(owned, pairwise(batch.row_starts), strict=True):
        groups.setdefault(pages, []).extend(range(start, stop))
    return [
        _Segment(tokens[start : start + SEGMENT], pages)
        for pages, tokens in sorted(groups.items())
        for start in range(0, len(tokens), SEGMENT)
    ]


def plan_tiles(batch: BatchMetadata, queries: int) -> list[_Tile]:
    """Every row cut into tiles of at most so many tokens."""
    return [
        _Tile(row, first, min(queries, stop - first))
        for row, (start, stop) in enumerate(pairwise(batch.row_starts))
        for first in range(start, stop, queries)
    ]


def _pad(numbers: list[int] | tuple[int, ...], size: int) -> list[int]:
    return [*numbers, *[-1] * (size - len(numbers))]
