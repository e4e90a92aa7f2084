"""The CPU path: oneDNN's GEMMs, and between two of them one compiled call for all rows.

The same functions as `reference.py`. Adapter pages are read where they lie in the pool, row by row, so that nothing
is regrouped when lines come and go.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from npc_kernels import cpu_rows
from npc_kernels.batch import PAGE_RANK, BatchMetadata, Codes, LoraSpan
from npc_kernels.cpu_attend import CHUNK, attend
from npc_kernels.cpu_codes import PackedCodes, multiply_bytes, multiply_codes
from npc_kernels.cpu_draw import draw, draw_rows
from npc_kernels.cpu_gemm import PackedLinear
from npc_kernels.cpu_jit import Work, compiled, run
from npc_kernels.cpu_rows import TILE
from npc_kernels.reference import HeadNorms, PlannedRow, Product, attend_row, plan_rows

__all__ = [
    "Linear",
    "Plan",
    "begin",
    "draw",
    "finish_gate_up",
    "finish_qkv",
    "finish_residual",
    "head",
    "paged_attention",
    "plan",
    "prepare",
    "project",
]

MAX_CODE_ROWS = {torch.bfloat16: 1, torch.float32: 4}
"""Rows up to which a linear is faster from its 4- or 8-bit codes than from its dense weight (kernels/README.md)."""

MAX_ATTENDED = 64
"""Tokens whose attention is computed by one call; what they need beside is in proportion."""


class Linear:
    """A base linear; few rows go through its codes, if it has any, many through oneDNN."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, codes: Codes | None = None) -> None:
        self._dense = PackedLinear(weight, bias)
        fits = codes is not None and bias is None and PackedCodes.fits(codes)
        self._codes = PackedCodes(codes) if codes is not None and fits else None
        self._max_rows = MAX_CODE_ROWS[weight.dtype] if self._codes is not None else 0

    def __call__(
        self,
        x: Tensor,  # (num_tokens, in_features)
    ) -> Tensor:  # (num_tokens, out_features)
        """`x @ weight.T + bias`."""
        if self._codes is not None and len(x) <= self._max_rows:
            return self._codes.multiply(x)
        return self._dense(x)


def prepare(dtype: torch.dtype, on_progress: Callable[[float], None]) -> None:
    """Compile everything, which takes seconds the first time; later it is read from numba's cache."""
    kernels = [cpu_rows.norm, cpu_rows.residual, cpu_rows.gate_up, cpu_rows.qkv, attend, multiply_codes, multiply_bytes]
    wanted = [*((kernel, dtype) for kernel in kernels), (draw_rows, torch.float32)]
    for done, (kernel, of) in enumerate(wanted):
        on_progress(done / len(wanted))
        compiled(kernel, of)
    on_progress(1.0)


class Plan:
    """A step, described for the compiled kernels: one struct, of which every call changes a few fields.

    `exact`: tokens are never computed together, so that a row's numbers do not depend on how it is cut into chunks.
    """

    def __init__(
        self, batch: BatchMetadata, cos: Tensor, sin: Tensor, previous: "Plan | None", *, exact: bool = False
    ) -> None:
        self.work = Work()
        self.num_attended = len(batch.positions) if exact else batch.num_decode  # tokens that the kernel attends
        self.rows: tuple[PlannedRow, ...] = () if exact else tuple(plan_rows(batch, first=batch.num_decode))
        self._scratch: dict[str, Tensor] = previous._scratch if previous is not None else {}
        self._kept: list[Tensor] = [cos, sin, batch.positions, batch.kv_slots, batch.block_tables]
        self._describe_tiles(batch, tile=1 if exact else TILE)
        self._describe_rows(batch, cos, sin)
        self._describe_adapters(batch)

    def finish(self, kernel: Any, product: Product, span: LoraSpan, result: Tensor) -> Tensor:
        """Run a kernel that takes what a linear made of x, over all tiles."""
        out, x = product.out, product.x
        assert out.is_contiguous()
        assert x.is_contiguous()
        work = self.work
        work.out, work.width = out.data_ptr(), out.shape[1]
        work.x, work.in_features = x.data_ptr(), x.shape[1]
        work.span_start, work.num_slices = span.start, span.num_slices
        work.slice0, work.slice1, work.slice2 = (*span.out_features, 0, 0)[:3]
        work.wide_out = self.scratch("wide_out", work.num_tokens * work.width)
        work.wide_x = self.scratch("wide_x", work.num_tokens * work.in_features)
        work.result = result.data_ptr()
        run(kernel, work, self.num_tiles, x.dtype)
        return result

    def scratch(self, name: str, size: int) -> int:
        """Address of at least so many float32, kept from step to step."""
        if name not in self._scratch or self._scratch[name].numel() < size:
            self._scratch[name] = torch.empty(size, dtype=torch.float32)
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
        work = self.work
        sizes = torch.tensor([stop - start for start, stop in pairwise(batch.row_starts)])
        work.token_rows = self._keep(torch.arange(len(sizes)).repeat_interleave(sizes))
        work.num_tokens = len(batch.positions)
        work.cos, work.sin = cos.data_ptr(), sin.data_ptr()
        work.positions, work.kv_slots = batch.positions.data_ptr(), batch.kv_slots.data_ptr()
        work.tables, work.max_blocks = batch.block_tables.data_ptr(), batch.block_tables.shape[1]
        work.block_size = batch.block_size
        work.max_seen = int(batch.positions[: self.num_attended].max()) + 1 if self.num_attended else 0
        work.shrunk = self.scratch("shrunk", 3 * PAGE_RANK * work.num_tokens)

    def _describe_adapters(self, batch: BatchMetadata) -> None:
        lora, work = batch.lora, self.work
        if lora is None:
            work.num_live = 0
            return
        assert lora.multipliers is None, "no loader makes them yet"
        work.pool, work.page_size = lora.pool.data_ptr(), lora.pool.shape[1]
        work.live, work.num_live = self._keep(torch.tensor(lora.live)), len(lora.live)
        work.mask = self._keep(lora.mask(batch.row_starts))

    def _keep(self, tensor: Tensor) -> int:
        """Address of a tensor that lives as long as the plan."""
        self._kept.append(tensor)
        return tensor.data_ptr()


def plan(batch: BatchMetadata, cos: Tensor, sin: Tensor, previous: Any = None) -> Plan:
    """Prepare a step."""
    return Plan(batch, cos, sin, previous)


def begin(
    hidden: Tensor,  # (num_tokens, size) float32, contiguous
    plan: Plan,
    weight: Tensor,  # (size,)
    eps: float,
) -> Tensor:  # (num_tokens, size), of the weight's dtype
    """The norm before the first linear."""
    result = torch.empty(hidden.shape, dtype=weight.dtype)
    work = plan.work
    work.hidden, work.width = hidden.data_ptr(), hidden.shape[1]
    work.weight, work.eps, work.result = weight.data_ptr(), eps, result.data_ptr()
    run(cpu_rows.norm, work, len(hidden), weight.dtype)
    return result


def project(linear: Linear, x: Tensor, plan: Plan, span: LoraSpan) -> Product:
    """As the twin, the bias included."""
    return Product(linear(x), x, None)


def head(linear: Linear, x: Tensor, tokens: Tensor, plan: Plan) -> Tensor:
    """As the twin."""
    return linear(x[tokens]).float()


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
    work.num_heads = product.out.shape[1] // work.head_dim - 2 * work.num_kv_heads
    work.keys, work.values = k_cache.data_ptr(), v_cache.data_ptr()
    work.q_norm = 0 if norms.q is None else norms.q.data_ptr()
    work.k_norm = 0 if norms.k is None else norms.k.data_ptr()
    work.eps, work.rotates = norms.eps, rotates
    result = torch.empty(len(product.x), work.num_heads, work.head_dim, dtype=product.x.dtype)
    return plan.finish(cpu_rows.qkv, product, span, result)


def paged_attention(
    q: Tensor,  # (num_tokens, num_heads, head_dim)
    k_cache: Tensor,  # (num_blocks, block_size, num_kv_heads, head_dim)
    v_cache: Tensor,  # like k_cache
    plan: Plan,
) -> Tensor:  # (num_tokens, num_heads * head_dim)
    """As the twin: rows with one token by the compiled kernel, prompts by torch."""
    result = torch.empty_like(q)
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
        run(attend, work, num_tokens * work.num_parts, q.dtype)
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
    return plan.finish(cpu_rows.residual, product, span, torch.empty(hidden.shape, dtype=weight.dtype))


def finish_gate_up(
    product: Product,  # of 2 * intermediate
    plan: Plan,
    span: LoraSpan,
) -> Tensor:  # (num_tokens, intermediate)
    """As the twin."""
    out = product.out
    result = torch.empty(len(out), out.shape[1] // 2, dtype=out.dtype)
    return plan.finish(cpu_rows.gate_up, product, span, result)
