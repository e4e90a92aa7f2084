"""What the GPU kernels know about a step: which tokens share adapter pages, and which queries share keys.

A *segment* is up to 16 tokens whose lines wear the same adapter, the width of the tensor cores' smallest tile; one
without pages holds tokens of the base alone. A *tile* is a few consecutive tokens of one row, for attention.

The example of `batch.py`, row 0 with page 5 (1 token), row 1 with pages 2 and 7 (3 tokens):

    segment    tokens (-1: none)         pages (-1: none)        tile    row, first token, tokens
    0          1  2  3 -1 ... -1         2  7 -1 -1              0       0, 0, 1
    1          0 -1 -1 -1 ... -1         5 -1 -1 -1              1       1, 1, 3

Everything is one int32 tensor in main memory and one copy to the device. A step in which everybody speaks is a CUDA
graph's: its numbers go into buffers that are large enough for all such steps (`Room`), and rows without a line are left
over.

Nothing of this may make Triton compile a kernel anew: parts begin where pointers are aligned (`Step.of`), and numbers
that differ from step to step are not specialised (`VARYING`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from npc_kernels.batch import BatchMetadata, LoraBatch, copies_from_pinned

__all__ = [
    "BUCKETS",
    "CHUNK",
    "PLANES",
    "SEGMENT",
    "VARYING",
    "Plan",
    "Room",
    "Step",
    "plan",
    "plan_segments",
    "plan_tiles",
    "room",
]

SEGMENT = 16
"""Tokens of a segment."""

CHUNK = 256
"""Keys that one program of the attention sees; fixed, so that the sums of a row never depend on its neighbours."""

PLANES = 8
"""Chunks of a row that are seen side by side: chunk `c` by the programs of plane `c % 8`, however long a row is.

This bounds what the attention keeps until the planes are combined, and how many kinds of graphs there are.
"""

VARYING = ("num_tokens", "num_shrinks", "num_wanted", "max_blocks")
"""Arguments that differ from step to step: Triton would compile for 1, for multiples of 16 and for other numbers."""

ALIGNED = 4
"""Numbers after which a pointer is a multiple of 16 bytes, which Triton also compiles for."""

DECODE_QUERIES, PREFILL_QUERIES = 4, 8
"""Tokens that a tile has room for, in a step in which every row has one token, and else."""

PAGE_CLASSES = (0, 1, 4, 8)
"""Pages that a segment has room for; a kernel is compiled, and a graph captured, for each class."""

BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
"""Rows of a graph."""


class _Segment(NamedTuple):
    """Up to 16 tokens with the same adapter pages."""

    tokens: list[int]
    pages: tuple[int, ...]


class _Tile(NamedTuple):
    """Consecutive tokens of one row."""

    row: int
    first: int
    num_tokens: int


class Room(NamedTuple):
    """What the steps of one CUDA graph have in common: its buffers and grids are of these sizes."""

    num_rows: int
    max_pages: int
    num_planes: int


@dataclass(slots=True)
class _Shared:
    """What all CUDA graphs have together, since they never run at the same time."""

    pool: Any = None  # of their memory: torch's handle
    logits: Tensor | None = None  # (64, vocab) float32: where each leaves its result


class Step(NamedTuple):
    """A step's numbers, int32: views of one tensor, so that they are one copy."""

    token_ids: Tensor  # (num_tokens,)
    sampled: Tensor  # (num_sampled,)
    positions: Tensor  # (num_tokens,)
    kv_slots: Tensor  # (num_tokens,)
    tables: Tensor  # (num_rows, max_blocks)
    tokens: Tensor  # (num_segments, 16), -1 where there is none
    pages: Tensor  # (num_segments, max_pages), -1 where there is none
    tiles: Tensor  # (num_tiles, 3): row, first token, tokens; a tile without tokens is nobody's

    @classmethod
    def of(cls, packed: Tensor, shapes: list[tuple[int, ...]]) -> "Step":
        """Cut the tensor into parts of these shapes, each at an aligned place."""
        parts = torch.split(packed, [_aligned(shape) for shape in shapes])
        return cls(*(part[: math.prod(shape)].view(shape) for part, shape in zip(parts, shapes, strict=True)))

    @staticmethod
    def size_of(shapes: list[tuple[int, ...]]) -> int:
        """Numbers of a tensor for parts of these shapes."""
        return sum(map(_aligned, shapes))


@dataclass(frozen=True, slots=True)
class Plan:
    """A step, described for the kernels."""

    lora: LoraBatch | None
    cos: Tensor  # (context, head_dim / 2) float32
    sin: Tensor  # (context, head_dim / 2) float32
    step: Step  # on the device
    tile_queries: int  # tokens that a tile has room for
    num_planes: int  # of the longest row
    packed: Tensor  # what `step` has views of
    host: Tensor  # the same in main memory; pinned, where there is a GPU
    shared: _Shared | None  # with the other graphs; None: the step is none

    @property
    def num_tokens(self) -> int:
        """Tokens of the step."""
        return len(self.step.positions)

    @property
    def max_pages(self) -> int:
        """Pages that a segment has room for."""
        return self.step.pages.shape[1]

    def logits(self, num_rows: int, vocab: int) -> Tensor:  # (num_rows, vocab) float32
        """Memory for the step's logits; for graphs always the same, or each would keep its own."""
        shared = self.shared
        if shared is None:
            return torch.empty((num_rows, vocab), dtype=torch.float32, device=self.packed.device)
        if shared.logits is None:
            shared.logits = torch.empty((BUCKETS[-1], vocab), dtype=torch.float32, device=self.packed.device)
        return shared.logits[:num_rows]

    def refill(self, batch: BatchMetadata) -> None:
        """Take another step of the same room into the same memory: one copy, of which nobody waits for the end.

        The last copy has long ended: since then somebody has read the tokens of its step.
        """
        shapes = [tuple(part.shape) for part in self.step]
        _write(Step.of(self.host, shapes), batch, plan_segments(batch), plan_tiles(batch, self.tile_queries))
        self.packed.copy_(self.host, non_blocking=True)

    def record(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Capture the step as a CUDA graph and return what launches it; the interpreter computes it call by call."""
        if self.packed.device.type != "cuda":
            return compute
        assert self.shared is not None
        compute()  # compiles what is not compiled yet, and makes room for logits: neither can be captured
        graph = torch.cuda.CUDAGraph()
        if self.shared.pool is None:
            self.shared.pool = torch.cuda.graph_pool_handle()
        # A captured kernel keeps the priority of the stream it was captured on: the engine's own. The default stream,
        # which cannot be captured, stands for torch's choice.
        stream = torch.cuda.current_stream(self.packed.device)
        own = None if stream == torch.cuda.default_stream(self.packed.device) else stream
        # Of this thread alone: the adapter loader's copies on its own stream have nothing to do with it.
        with torch.cuda.graph(graph, pool=self.shared.pool, stream=own, capture_error_mode="thread_local"):
            result = compute()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


def room(batch: BatchMetadata) -> Room | None:
    """Steps in which everybody speaks are recorded, by the number of rows, of pages and of planes, each rounded up."""
    num_pages = max(map(len, batch.lora.pages)) if batch.lora is not None else 0
    if not batch.is_decode or not 0 < batch.num_rows <= BUCKETS[-1] or num_pages > PAGE_CLASSES[-1]:
        return None
    return Room(
        next(size for size in BUCKETS if size >= batch.num_rows),
        _page_class(num_pages),
        1 << (_num_planes(batch.max_seen) - 1).bit_length(),
    )


def plan(
    batch: BatchMetadata, cos: Tensor, sin: Tensor, previous: "Plan | None" = None, *, room: Room | None = None
) -> Plan:
    """Describe a step; with a room, in buffers that hold any step of that room."""
    queries = DECODE_QUERIES if batch.num_decode == batch.num_rows else PREFILL_QUERIES
    segments, tiles = plan_segments(batch), plan_tiles(batch, queries)
    shapes = _shapes_of(batch, segments, tiles) if room is None else _shapes_for(room, batch.block_size, len(cos))
    is_pinned = copies_from_pinned(cos.device)
    host = torch.empty(Step.size_of(shapes), dtype=torch.int32, pin_memory=is_pinned)
    _write(Step.of(host, shapes), batch, segments, tiles)
    packed = host.to(cos.device, non_blocking=is_pinned, copy=True)
    return Plan(
        lora=batch.lora,
        cos=cos,
        sin=sin,
        step=Step.of(packed, shapes),
        tile_queries=queries,
        num_planes=_num_planes(batch.max_seen) if room is None else room.num_planes,
        packed=packed,
        host=host,
        shared=None if room is None else (previous and previous.shared) or _Shared(),
    )


def _aligned(shape: tuple[int, ...]) -> int:
    return -(-math.prod(shape) // ALIGNED) * ALIGNED


def _num_planes(max_seen: int) -> int:
    return min(-(-max_seen // CHUNK), PLANES)


def _page_class(num_pages: int) -> int:
    return next((size for size in PAGE_CLASSES if size >= num_pages), num_pages)


def _shapes_of(batch: BatchMetadata, segments: list[_Segment], tiles: list[_Tile]) -> list[tuple[int, ...]]:
    """The parts of a step by what is in it."""
    most = _page_class(max((len(segment.pages) for segment in segments), default=0))
    tokens = (len(batch.positions),)
    tables: tuple[int, ...] = tuple(batch.block_tables.shape)
    return [
        *(tokens, (len(batch.sampled),), tokens, tokens, tables),
        *((len(segments), SEGMENT), (len(segments), most), (len(tiles), 3)),
    ]


def _shapes_for(room: Room, block_size: int, context: int) -> list[tuple[int, ...]]:
    """The parts of the largest step of a room: every row may be a segment of its own."""
    max_seen = room.num_planes * CHUNK if room.num_planes < PLANES else context
    rows, max_blocks = room.num_rows, -(-max_seen // block_size)
    return [(rows,), (rows,), (rows,), (rows,), (rows, max_blocks), (rows, SEGMENT), (rows, room.max_pages), (rows, 3)]


def _write(step: Step, batch: BatchMetadata, segments: list[_Segment], tiles: list[_Tile]) -> None:
    """Fill the parts of a step; the rows that are left over belong to no segment and no tile.

    What is left of a table is as it was: nobody reads behind a row's last key.
    """
    for part, given in zip(step[:4], (batch.token_ids, batch.sampled, batch.positions, batch.kv_slots), strict=True):
        part[: len(given)] = given
        part[len(given) :] = 0
    num_rows, num_blocks = batch.block_tables.shape
    step.tables[:num_rows, :num_blocks] = batch.block_tables
    tokens = [_pad(segment.tokens, SEGMENT) for segment in segments]
    pages = [_pad(segment.pages, step.pages.shape[1]) for segment in segments]
    for part, rows, nobody in ((step.tokens, tokens, -1), (step.pages, pages, -1), (step.tiles, tiles, 0)):
        part[: len(rows)] = torch.tensor(rows, dtype=torch.int32).view(len(rows), part.shape[1])
        part[len(rows) :] = nobody


def plan_segments(batch: BatchMetadata) -> list[_Segment]:
    """Tokens grouped by their adapter, whatever row they are in."""
    owned = batch.lora.pages if batch.lora is not None else ((),) * batch.num_rows
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
