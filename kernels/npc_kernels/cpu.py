"""The CPU path: oneDNN's GEMMs, and between two of them one compiled call for all rows.

The same functions as `reference.py`. Adapter pages are read where they lie in the pool, row by row, so that nothing
is regrouped when lines come and go.

What a linear takes may have more rows than the step has tokens (`cut_rows`); those behind the tokens are zeros, and
nothing but GEMMs looks at them.
"""

import ctypes
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from npc_kernels import cpu_rows
from npc_kernels.batch import PAGE_RANK, BatchMetadata, Codes, LoraSpan
from npc_kernels.cpu_attend import CHUNK, attend
from npc_kernels.cpu_codes import PackedCodes, multiply_bytes, multiply_codes
from npc_kernels.cpu_draw import draw, draw_rows
from npc_kernels.cpu_gemm import Cut, PackedLinear, cut_rows, join
from npc_kernels.cpu_jit import Work, compiled, run
from npc_kernels.cpu_rows import TILE
from npc_kernels.cpu_tape import Tape, prepare_tapes
from npc_kernels.reference import HeadNorms, PlannedRow, attend_row, plan_rows

__all__ = [
    "Linear",
    "Plan",
    "Product",
    "Room",
    "begin",
    "draw",
    "embed",
    "finish_gate_up",
    "finish_qkv",
    "finish_residual",
    "head",
    "join",
    "paged_attention",
    "plan",
    "prepare",
    "project",
    "room",
]

MAX_CODE_ROWS = {torch.bfloat16: 1, torch.float32: 4}
"""Rows up to which a linear is faster from its 4- or 8-bit codes than from its dense weight (kernels/README.md)."""

SEEN_STEP = 1024
"""Positions by which the room of a recording grows."""

MAX_ATTENDED = 64
"""Tokens whose attention is computed by one call; what they need beside is in proportion."""


class Linear:
    """A base linear; few rows go through its codes, if it has any, many through oneDNN."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, codes: Codes | None = None) -> None:
        self._dense = PackedLinear(weight, bias)
        self.bias = bias
        fits = codes is not None and bias is None and PackedCodes.fits(codes)
        self._codes = PackedCodes(codes) if codes is not None and fits else None
        self._max_rows = MAX_CODE_ROWS[weight.dtype] if self._codes is not None else 0

    def __call__(
        self,
        x: Tensor,  # (num_tokens, in_features)
        tape: Tape | None = None,
        *,
        wide: bool = False,
    ) -> Tensor:  # (num_tokens, out_features), of x's dtype, or float32 if `wide`
        """`x @ weight.T + bias`."""
        return join(self.multiply(x, cut_rows(len(x)), tape, wide=wide), len(x), wide=wide)

    def multiply(self, x: Tensor, cut: Cut, tape: Tape | None = None, *, wide: bool = False) -> tuple[Tensor, ...]:
        """The same part by part, padded; from codes in float32 if `wide`."""
        if self._codes is not None and len(x) <= self._max_rows:
            return (self._codes.multiply(x, tape, wide=wide),)
        if tape is not None:
            tape.is_whole = False
        return self._dense.multiply(x, cut)


class Product(NamedTuple):
    """What a linear made of x, on its way to what finishes it: adapters are still to come."""

    parts: tuple[Tensor, ...]  # rows of out_features, see `Cut`
    x: Tensor  # (num_tokens or more, in_features)
    bias: Tensor | None  # (out_features,), in the parts already; DoRA does not scale it


def prepare(dtype: torch.dtype, on_progress: Callable[[float], None]) -> None:
    """Compile everything, which takes seconds the first time; later it is read from numba's cache."""
    rows = [cpu_rows.embed, cpu_rows.norm, cpu_rows.residual, cpu_rows.gate_up, cpu_rows.qkv]
    kernels = [*rows, attend, multiply_codes, multiply_bytes]
    wanted = [*((kernel, dtype) for kernel in kernels), (draw_rows, torch.float32)]
    prepare_tapes()
    for done, (kernel, of) in enumerate(wanted):
        on_progress(done / len(wanted))
        compiled(kernel, of)
    on_progress(1.0)


class Room(NamedTuple):
    """What the steps of a recording have in common."""

    num_rows: int
    num_live: int  # adapter pages
    max_seen: int  # rounded up


class _Step(NamedTuple):
    """The tensors of a step whose addresses the kernels are told."""

    token_ids: Tensor  # (num_tokens,) int64
    positions: Tensor  # (num_tokens,) int64
    kv_slots: Tensor  # (num_tokens,) int64
    tables: Tensor  # (num_rows, max_blocks) int64
    live: Tensor  # (num_live,) int64
    mask: Tensor  # (num_tokens, num_live) bool
    first_pages: Tensor  # (num_tokens,) int64, -1 without an adapter

    @classmethod
    def of(cls, batch: BatchMetadata, room: Room | None) -> "_Step":
        tables, lora = batch.block_tables, batch.lora
        if room is not None:
            tables = F.pad(tables, (0, -(-room.max_seen // batch.block_size) - tables.shape[1]))
        live = torch.tensor([] if lora is None else lora.live, dtype=torch.long)
        mask = torch.zeros(0, dtype=torch.bool) if lora is None else lora.mask(batch.row_starts)
        pages = [(*owned, -1)[0] for owned in lora.pages] if lora is not None else []
        first_pages = torch.tensor(pages, dtype=torch.long)
        if lora is not None:
            first_pages = first_pages.repeat_interleave(torch.tensor(batch.row_starts).diff())
        return cls(batch.token_ids, batch.positions, batch.kv_slots, tables, live, mask, first_pages)


class Plan:
    """A step, described for the compiled kernels: one struct, of which every call changes a few fields.

    `exact`: tokens are never computed together, so that a row's numbers do not depend on how it is cut into chunks.
    `cut`: how GEMMs take the step's tokens.
    """

    def __init__(
        self,
        batch: BatchMetadata,
        cos: Tensor,
        sin: Tensor,
        previous: "Plan | None" = None,
        *,
        cut: Cut,
        exact: bool = False,
        room: Room | None = None,
    ) -> None:
        self.work = Work()
        self.cut = cut
        self.tape: Tape | None = None  # while the step is recorded
        self.num_sampled = len(batch.sampled)
        self.sampled = None if batch.is_decode else _pad_sampled(batch.sampled)
        self.num_attended = len(batch.positions) if exact else batch.num_decode  # tokens that the kernel attends
        self.rows: tuple[PlannedRow, ...] = () if exact else tuple(plan_rows(batch, first=batch.num_decode))
        # A recording keeps the addresses of its scratch, which must not grow with other steps.
        self._scratch: dict[str, Tensor] = previous._scratch if previous is not None and room is None else {}
        self._kept: list[Tensor] = [cos, sin]
        self._room = room
        self._step = _Step.of(batch, room)
        self._describe_tiles(batch, tile=1 if exact else TILE)
        self._describe_rows(batch, cos, sin)
        self._describe_adapters(batch)

    def refill(self, batch: BatchMetadata) -> None:
        """Take another step of the same room into the same memory."""
        for mine, given in zip(self._step, _Step.of(batch, self._room), strict=True):
            mine.copy_(given)

    def record(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor] | None:
        """Compute the step, and return what computes it again; None if torch multiplied, which no tape holds."""
        self.tape = tape = Tape()
        result = compute()
        self.tape = None
        if not tape.is_whole:
            return None
        tape.close()

        def replay() -> Tensor:
            tape.play()
            return result

        return replay

    def empty(self, *size: int, dtype: torch.dtype) -> Tensor:
        """Memory for a result; while the step is recorded it stays where it is."""
        result = torch.empty(size, dtype=dtype)
        return result if self.tape is None else self.tape.keep(result)

    def empty_rows(self, num_rows: int, *size: int, dtype: torch.dtype) -> Tensor:
        """The same for rows that a linear takes: those behind the step's tokens are zeros."""
        result = self.empty(num_rows, *size, dtype=dtype)
        if num_rows > (num_tokens := self.work.num_tokens):
            row_bytes = result.stride(0) * result.element_size()
            ctypes.memset(result.data_ptr() + num_tokens * row_bytes, 0, (num_rows - num_tokens) * row_bytes)
        return result

    def run(self, kernel: Any, num_items: int, dtype: torch.dtype) -> None:
        """Run a kernel on the plan's struct over so many items."""
        run(kernel, self.work, num_items, dtype, self.tape)

    def finish(self, kernel: Any, product: Product, span: LoraSpan, result: Tensor) -> Tensor:
        """Run a kernel that takes what a linear made of x, over all tiles."""
        parts, x = product.parts, product.x
        out = parts[0]
        assert out.is_contiguous()
        assert x.is_contiguous()
        work = self.work
        work.out_rows, work.width = out.shape
        work.out = out.data_ptr()
        if len(parts) > 1:
            assert self.tape is None
            outs = (ctypes.c_int64 * len(parts))(*(part.data_ptr() for part in parts))
            work.outs = ctypes.addressof(outs)
        work.x, work.in_features = x.data_ptr(), x.shape[1]
        work.span_start, work.num_slices, work.first_output = span.start, span.num_slices, span.first_output
        work.bias = 0 if product.bias is None else product.bias.data_ptr()
        work.slice0, work.slice1, work.slice2 = (*span.out_features, 0, 0)[:3]
        work.wide_out = self.scratch("wide_out", work.num_tokens * work.width)
        work.wide_x = self.scratch("wide_x", work.num_tokens * work.in_features)
        work.result = result.data_ptr()
        self.run(kernel, self.num_tiles, x.dtype)
        return result

    def scratch(self, name: str, size: int) -> int:
        """Address of at least so many float32, kept from step to step."""
        if name not in self._scratch or self._scratch[name].numel() < size:
            self._scratch[name] = torch.empty(size, dtype=torch.float32)
            if self.tape is not None:
                self.tape.keep(self._scratch[name])
        return self._scratch[name].data_ptr()

    def _describe_tiles(self, batch: BatchMetadata, tile: int) -> None:
        """Prompts in tiles of so many tokens and the rest one by one."""
        tiles: list[int] = []
        for start, stop in pairwise(batch.row_starts):
            whole = stop - (stop - start) % tile
            tiles += [*range(start, whole, tile), *range(whole, stop)]
        self.num_tiles = len(tiles)
        self.work.tiles = self._keep(torch.tensor([*tiles, len(batch.positions)]))

    def _describe_rows(self, batch: BatchMetadata, cos: Tensor, sin: Tensor) -> None:
        work, step = self.work, self._step
        sizes = torch.tensor([stop - start for start, stop in pairwise(batch.row_starts)])
        work.token_rows = self._keep(torch.arange(len(sizes)).repeat_interleave(sizes))
        work.num_tokens = len(batch.positions)
        work.token_ids = step.token_ids.data_ptr()
        work.cos, work.sin = cos.data_ptr(), sin.data_ptr()
        work.positions, work.kv_slots = step.positions.data_ptr(), step.kv_slots.data_ptr()
        work.tables, work.max_blocks = step.tables.data_ptr(), step.tables.shape[1]
        work.block_size = batch.block_size
        seen = batch.positions[: self.num_attended]
        work.max_seen = self._room.max_seen if self._room else int(seen.max()) + 1 if len(seen) else 0
        work.shrunk = self.scratch("shrunk", 3 * PAGE_RANK * work.num_tokens)

    def _describe_adapters(self, batch: BatchMetadata) -> None:
        lora, work, step = batch.lora, self.work, self._step
        work.num_live = len(step.live)
        if lora is not None:
            work.pool, work.page_size = lora.pool.data_ptr(), lora.pool.shape[1]
            work.live, work.mask = step.live.data_ptr(), step.mask.data_ptr()
            if lora.multipliers is not None:
                work.multipliers, work.num_outputs = lora.multipliers.data_ptr(), lora.multipliers.shape[1]
                work.first_pages = step.first_pages.data_ptr()

    def _keep(self, tensor: Tensor) -> int:
        """Address of a tensor that lives as long as the plan."""
        self._kept.append(tensor)
        return tensor.data_ptr()


def room(batch: BatchMetadata) -> Room | None:
    """Steps of few tokens may have all their products from codes, and can then be recorded."""
    if not batch.is_decode or not 0 < batch.num_rows <= max(MAX_CODE_ROWS.values()):
        return None
    num_live = 0 if batch.lora is None else len(batch.lora.live)
    return Room(batch.num_rows, num_live, -(-batch.max_seen // SEEN_STEP) * SEEN_STEP)


def plan(batch: BatchMetadata, cos: Tensor, sin: Tensor, previous: Any = None, *, room: Room | None = None) -> Plan:
    """Prepare a step."""
    return Plan(batch, cos, sin, previous, cut=cut_rows(len(batch.positions)), room=room)


def embed(
    table: Tensor,  # (vocab, hidden)
    plan: Plan,
) -> Tensor:  # (num_tokens, hidden) float32
    """The residual stream before the first layer."""
    work = plan.work
    hidden = plan.empty(work.num_tokens, table.shape[1], dtype=torch.float32)
    work.x, work.hidden, work.width = table.data_ptr(), hidden.data_ptr(), table.shape[1]
    plan.run(cpu_rows.embed, work.num_tokens, table.dtype)
    return hidden


def begin(
    hidden: Tensor,  # (num_tokens, size) float32, contiguous
    plan: Plan,
    weight: Tensor,  # (size,)
    eps: float,
) -> Tensor:  # (num_padded, size), of the weight's dtype
    """The norm before the first linear."""
    result = plan.empty_rows(plan.cut.num_padded, hidden.shape[1], dtype=weight.dtype)
    work = plan.work
    work.hidden, work.width = hidden.data_ptr(), hidden.shape[1]
    work.weight, work.eps, work.result = weight.data_ptr(), eps, result.data_ptr()
    plan.run(cpu_rows.norm, len(hidden), weight.dtype)
    return result


def project(linear: Linear, x: Tensor, plan: Plan, span: LoraSpan) -> Product:
    """As the twin, the bias included."""
    return Product(linear.multiply(x, plan.cut, plan.tape), x, linear.bias)


def head(linear: Linear, x: Tensor, plan: Plan) -> Tensor:
    """As the twin."""
    rows = x if plan.sampled is None else x[plan.sampled]
    return linear(rows, plan.tape, wide=True)[: plan.num_sampled]


def _pad_sampled(sampled: Tensor) -> Tensor:
    """The first token again and again, so that the rows taken by these numbers need no padding."""
    num_padded = cut_rows(len(sampled)).num_padded
    return torch.cat([sampled, sampled[:1].expand(num_padded - len(sampled))])


def finish_qkv(
    product: Product,  # of (num_heads + 2 * num_kv_heads) * head_dim
    k_cache: Tensor,  # (num_blocks, block_size, num_kv_heads, head_dim), written
    v_cache: Tensor,  # like k_cache, written
    plan: Plan,
    span: LoraSpan,
    norms: HeadNorms,
    *,
    rotates: bool,
) -> Tensor:  # (num_tokens, num_heads, head_dim)
    """As the twin."""
    work = plan.work
    work.num_kv_heads, work.head_dim = k_cache.shape[-2:]
    work.num_heads = product.parts[0].shape[1] // work.head_dim - 2 * work.num_kv_heads
    work.keys, work.values = k_cache.data_ptr(), v_cache.data_ptr()
    work.q_norm = 0 if norms.q is None else norms.q.data_ptr()
    work.k_norm = 0 if norms.k is None else norms.k.data_ptr()
    work.eps, work.rotates = norms.eps, rotates
    result = plan.empty(len(product.x), work.num_heads, work.head_dim, dtype=product.x.dtype)
    return plan.finish(cpu_rows.qkv, product, span, result)


def paged_attention(
    q: Tensor,  # (num_tokens, num_heads, head_dim)
    k_cache: Tensor,  # (num_blocks, block_size, num_kv_heads, head_dim)
    v_cache: Tensor,  # like k_cache
    plan: Plan,
) -> Tensor:  # (num_tokens, num_heads * head_dim)
    """As the twin: rows with one token by the compiled kernel, prompts by torch."""
    result = plan.empty_rows(*q.shape, dtype=q.dtype)
    work = plan.work
    work.num_kv_heads, work.head_dim, work.num_heads = *k_cache.shape[-2:], q.shape[1]
    work.x, work.result = q.data_ptr(), result.data_ptr()
    work.keys, work.values = k_cache.data_ptr(), v_cache.data_ptr()
    for first in range(0, plan.num_attended, MAX_ATTENDED):
        num_tokens = min(plan.num_attended - first, MAX_ATTENDED)
        # Whole tokens read the cache in one stream; few tokens are shared out by their heads.
        work.first_token = first
        work.num_parts = 1 if num_tokens >= torch.get_num_threads() else work.num_kv_heads
        work.scores = plan.scratch("scores", num_tokens * work.num_heads * work.max_seen)
        work.wide_out = plan.scratch("wide_out", 2 * num_tokens * work.num_heads * work.head_dim)
        work.wide_x = plan.scratch("wide_x", num_tokens * work.num_kv_heads * CHUNK * work.head_dim)
        plan.run(attend, num_tokens * work.num_parts, q.dtype)
    for row in plan.rows:
        result[row.start : row.stop] = attend_row(q[row.start : row.stop], k_cache, v_cache, row)
    return result.flatten(1)


def finish_residual(
    product: Product,  # of hidden
    hidden: Tensor,  # (num_tokens, hidden) float32, added to
    plan: Plan,
    span: LoraSpan,
    weight: Tensor,  # (hidden,)
    eps: float,
) -> Tensor:  # (num_tokens, hidden)
    """As the twin."""
    work = plan.work
    work.hidden, work.weight, work.eps = hidden.data_ptr(), weight.data_ptr(), eps
    result = plan.empty_rows(len(product.x), hidden.shape[1], dtype=weight.dtype)
    return plan.finish(cpu_rows.residual, product, span, result)


def finish_gate_up(
    product: Product,  # of 2 * intermediate
    plan: Plan,
    span: LoraSpan,
) -> Tensor:  # (num_tokens, intermediate)
    """As the twin."""
    x = product.x
    result = plan.empty_rows(len(x), product.parts[0].shape[1] // 2, dtype=x.dtype)
    return plan.finish(cpu_rows.gate_up, product, span, result)
