"""What stands between two base GEMMs on the GPU, each a single launch; Triton.

Every kernel here first finishes what a linear began: it adds up the planes of the base, adds `B h` of the adapters,
applies the norm's factor, DoRA's multiplier and the bias (`_finish_tile`). Then comes what runs anyway: head norms,
RoPE and the KV write; the residual stream and the next norm; SwiGLU. Without adapters the same kernels run without
pages, so nothing is paid for what is not used.

A norm needs the sum of squares of a whole row, which no program sees: the sums of each tile of columns are written
beside the row, and whoever finishes the next linear applies the factor (`gemm.Activations`).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from npc_kernels.batch import LoraSpan
from npc_kernels.gemm import Activations, Planes, row_scale
from npc_kernels.gpu_plan import SEGMENT, VARYING, Plan
from npc_kernels.lora import Adapters, AdapterSizes, expand_tile, load_tokens
from npc_kernels.reference import HeadNorms

__all__ = ["begin", "embed", "finish_gate_up", "finish_qkv", "finish_residual"]

BLOCK = 128
"""Columns of one program; of the residual stream also the width of a tile of squares."""

WIDTH = tl.constexpr(SEGMENT)


def embed(
    table: Tensor,  # (vocab, size)
    plan: Plan,
) -> Tensor:  # (num_tokens, size) float32
    """The residual stream before the first layer."""
    return F.embedding(plan.step.token_ids, table).float()


class _Product(NamedTuple):
    """What kernels are told of what a linear began, beside its adapters: one argument."""

    planes: Tensor  # (split, num_tokens, N) float32
    bias: Tensor  # (N,)
    multipliers: Tensor  # (num_pages, outputs) float32
    squares: Tensor  # (num_tiles, num_tokens) float32
    eps: float
    first_output: int  # of the group, in a row of multipliers


class _ProductSizes(NamedTuple):
    """What is known of it when a kernel is compiled: nothing that differs from layer to layer."""

    N: int
    SPLIT: int
    TILES: int  # of squares, 0: the rows need no norm
    HAS_BIAS: bool
    OUTPUTS: int  # in a row of multipliers, 0: there are none


def _describe(product: Planes, plan: Plan, span: LoraSpan) -> tuple[_Product, Adapters, _ProductSizes, AdapterSizes]:
    """A product for the kernels that finish it; what it lacks is never read."""
    out, bias, squares = product.out, product.bias, product.squares
    multipliers = None if plan.lora is None else plan.lora.multipliers
    sizes = _ProductSizes(
        N=out.shape[2],
        SPLIT=len(out),
        TILES=0 if squares is None else len(squares),
        HAS_BIAS=bias is not None,
        OUTPUTS=0 if multipliers is None else multipliers.shape[1],
    )
    told = _Product(
        out,
        out if bias is None else bias,
        out if multipliers is None else multipliers,
        out if squares is None else squares,
        product.eps,
        span.first_output,
    )
    return told, product.adapters, sizes, product.sizes


@triton.jit
def _finish_tile(
    product,
    adapters,
    num_tokens,
    segment,
    tokens,  # of the segment
    columns,  # (SIZE,) of the slice
    first,  # output where the slice begins
    width,  # outputs of the slice
    part,  # number of the slice
    SIZE: tl.constexpr,
    P: tl.constexpr,
    A: tl.constexpr,
):
    """`((x @ weight.T + B A x) * factor) * multiplier + bias`: (outputs, 16 tokens) float32."""
    is_column = columns < width
    is_output = is_column[:, None] & (tokens >= 0)[None, :]
    acc = tl.zeros((SIZE, WIDTH), dtype=tl.float32)
    SPLIT: tl.constexpr = P.SPLIT
    for split in tl.static_range(SPLIT):
        place = (split * num_tokens + tokens)[None, :] * P.N + (first + columns)[:, None]
        acc += tl.load(product.planes + place, mask=is_output, other=0.0)
    if A.MAX_PAGES > 0:
        acc = expand_tile(acc, adapters, num_tokens, segment, tokens, columns, first, width, part, A)
    if P.TILES > 0:
        acc *= row_scale(product.squares, tokens, num_tokens, product.eps, A.K, P.TILES)[None, :]
    if P.OUTPUTS > 0 and A.MAX_PAGES > 0:
        page = tl.load(adapters.pages + segment * A.MAX_PAGES)
        place = page.to(tl.int64) * P.OUTPUTS + product.first_output + first + columns
        acc *= tl.load(product.multipliers + place, mask=is_column & (page >= 0), other=1.0)[:, None]
    if P.HAS_BIAS:
        acc += tl.load(product.bias + first + columns, mask=is_column, other=0.0).to(tl.float32)[:, None]
    return acc


@triton.jit(do_not_specialize=VARYING)
def _begin_kernel(hidden_ptr, weight_ptr, values_ptr, squares_ptr, num_tokens, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    token, tile = tl.program_id(0), tl.program_id(1)
    column = tile * BLOCK + tl.arange(0, BLOCK)
    hidden = tl.load(hidden_ptr + token * SIZE + column, mask=column < SIZE, other=0.0)
    weight = tl.load(weight_ptr + column, mask=column < SIZE, other=0.0).to(tl.float32)
    tl.store(values_ptr + token * SIZE + column, hidden * weight, mask=column < SIZE)
    tl.store(squares_ptr + tile * num_tokens + token, tl.sum(hidden * hidden, axis=0))


def begin(
    hidden: Tensor,  # (num_tokens, size) float32
    plan: Plan,
    weight: Tensor,  # (size,)
    eps: float,
) -> Activations:
    """The norm before the first linear."""
    assert hidden.is_contiguous()
    num_tokens, size = hidden.shape
    num_tiles = triton.cdiv(size, BLOCK)
    values = torch.empty(hidden.shape, dtype=weight.dtype, device=hidden.device)
    squares = torch.empty((num_tiles, num_tokens), dtype=torch.float32, device=hidden.device)
    if num_tokens:
        _begin_kernel[(num_tokens, num_tiles)](
            hidden, weight, values, squares, num_tokens, SIZE=size, BLOCK=BLOCK, num_warps=1
        )
    return Activations(values, squares, eps)


class _Heads(NamedTuple):
    """What the kernel is told of the heads: one argument."""

    q: Tensor  # (num_tokens, num_heads, head_dim), written
    k_cache: Tensor
    v_cache: Tensor
    q_norm: Tensor  # (head_dim,)
    k_norm: Tensor
    eps: float
    cos: Tensor  # (context, head_dim / 2) float32
    sin: Tensor
    positions: Tensor  # (num_tokens,)
    slots: Tensor  # (num_tokens,)


class _HeadSizes(NamedTuple):
    """What is known of them when the kernel is compiled."""

    Q: int  # heads
    KV: int  # heads
    HALF: int  # of a head
    SIZE: int  # HALF, rounded up to a power of two
    HAS_NORMS: bool
    ROTATES: bool


@triton.jit(do_not_specialize=VARYING)
def _qkv_kernel(product, adapters, num_tokens, heads, P: tl.constexpr, A: tl.constexpr, H: tl.constexpr):
    """A segment and a head. The two halves of a head, whose numbers RoPE pairs, are two tiles."""
    segment, head = tl.program_id(0), tl.program_id(1)
    tokens = load_tokens(adapters, segment)
    HEAD: tl.constexpr = 2 * H.HALF
    is_v = head >= H.Q + H.KV
    part = (head >= H.Q).to(tl.int32) + is_v.to(tl.int32)
    first_head = tl.where(part == 0, 0, H.Q + (part - 1) * H.KV)
    width = tl.where(part == 0, H.Q, H.KV) * HEAD
    dim = tl.arange(0, H.SIZE)
    # Beyond the half there is the other one, which is a tile of its own: such columns are sent out of all bounds.
    columns = tl.where(dim < H.HALF, (head - first_head) * HEAD + dim, P.N)
    first = first_head * HEAD
    low = _finish_tile(product, adapters, num_tokens, segment, tokens, columns, first, width, part, H.SIZE, P, A)
    high = _finish_tile(
        product, adapters, num_tokens, segment, tokens, columns + H.HALF, first, width, part, H.SIZE, P, A
    )
    is_dim = dim < H.HALF
    is_number = is_dim[:, None] & (tokens >= 0)[None, :]
    if not is_v:
        if H.HAS_NORMS:
            norm_ptr = heads.q_norm if head < H.Q else heads.k_norm
            mean = (tl.sum(low * low, axis=0) + tl.sum(high * high, axis=0)) / HEAD
            factor = tl.rsqrt(mean + heads.eps)[None, :]
            low *= factor * tl.load(norm_ptr + dim, mask=is_dim, other=0.0).to(tl.float32)[:, None]
            high *= factor * tl.load(norm_ptr + H.HALF + dim, mask=is_dim, other=0.0).to(tl.float32)[:, None]
        if H.ROTATES:
            positions = tl.load(heads.positions + tokens, mask=tokens >= 0, other=0)
            angle = positions[None, :] * H.HALF + dim[:, None]
            cos = tl.load(heads.cos + angle, mask=is_number, other=0.0)
            sin = tl.load(heads.sin + angle, mask=is_number, other=0.0)
            turned = low * cos - high * sin
            high = high * cos + low * sin
            low = turned
    if head < H.Q:
        place = heads.q + (tokens * H.Q + head)[None, :] * HEAD + dim[:, None]
        tl.store(place, low, mask=is_number)
        tl.store(place + H.HALF, high, mask=is_number)
    else:
        cache_ptr = heads.v_cache if is_v else heads.k_cache
        slots = tl.load(heads.slots + tokens, mask=tokens >= 0, other=0).to(tl.int64)
        place = cache_ptr + (slots * H.KV + head - first_head)[None, :] * HEAD + dim[:, None]
        tl.store(place, low, mask=is_number)
        tl.store(place + H.HALF, high, mask=is_number)


def finish_qkv(
    product: Planes,  # of (num_heads + 2 * num_kv_heads) * head_dim
    k_cache: Tensor,  # (num_blocks, block_size, num_kv_heads, head_dim), written
    v_cache: Tensor,  # like k_cache, written
    plan: Plan,
    span: LoraSpan,
    norms: HeadNorms,
    *,
    rotates: bool,
) -> Tensor:  # (num_tokens, num_heads, head_dim)
    """Adapters, head norms, RoPE; stores keys and values, returns the queries."""
    assert k_cache.is_contiguous()
    assert v_cache.is_contiguous()
    num_kv_heads, head_dim = k_cache.shape[-2:]
    num_heads = product.out.shape[2] // head_dim - 2 * num_kv_heads
    q = torch.empty((plan.num_tokens, num_heads, head_dim), dtype=k_cache.dtype, device=k_cache.device)
    told, adapters, product_sizes, adapter_sizes = _describe(product, plan, span)
    heads = _Heads(
        q,
        k_cache,
        v_cache,
        q if norms.q is None else norms.q,
        q if norms.k is None else norms.k,
        norms.eps,
        plan.cos,
        plan.sin,
        plan.step.positions,
        plan.step.kv_slots,
    )
    half = head_dim // 2
    sizes = _HeadSizes(
        num_heads, num_kv_heads, half, max(16, triton.next_power_of_2(half)), norms.q is not None, rotates
    )
    if plan.num_tokens:
        _qkv_kernel[(len(plan.step.tokens), num_heads + 2 * num_kv_heads)](
            told, adapters, plan.num_tokens, heads, P=product_sizes, A=adapter_sizes, H=sizes, num_warps=4
        )
    return q


@triton.jit(do_not_specialize=VARYING)
def _residual_kernel(
    product,
    adapters,
    num_tokens,
    hidden_ptr,
    weight_ptr,
    values_ptr,
    squares_ptr,
    P: tl.constexpr,
    A: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A segment and a tile of columns."""
    segment, tile = tl.program_id(0), tl.program_id(1)
    tokens = load_tokens(adapters, segment)
    columns = tile * BLOCK + tl.arange(0, BLOCK)
    out = _finish_tile(product, adapters, num_tokens, segment, tokens, columns, 0, P.N, 0, BLOCK, P, A)
    is_output = (columns < P.N)[:, None] & (tokens >= 0)[None, :]
    place = tokens[None, :] * P.N + columns[:, None]
    hidden = tl.load(hidden_ptr + place, mask=is_output, other=0.0) + out
    weight = tl.load(weight_ptr + columns, mask=columns < P.N, other=0.0).to(tl.float32)
    tl.store(hidden_ptr + place, hidden, mask=is_output)
    tl.store(values_ptr + place, hidden * weight[:, None], mask=is_output)
    squares = tl.sum(tl.where(is_output, hidden * hidden, 0.0), axis=0)
    tl.store(squares_ptr + tile * num_tokens + tokens, squares, mask=tokens >= 0)


def finish_residual(
    product: Planes,  # of hidden
    hidden: Tensor,  # (num_tokens, hidden) float32, added to
    plan: Plan,
    span: LoraSpan,
    weight: Tensor,  # (hidden,)
    eps: float,
) -> Activations:
    """Adapters, the residual stream, and the norm before the next linear."""
    assert hidden.is_contiguous()
    num_tokens, size = hidden.shape
    num_tiles = triton.cdiv(size, BLOCK)
    values = torch.empty(hidden.shape, dtype=weight.dtype, device=hidden.device)
    squares = torch.empty((num_tiles, num_tokens), dtype=torch.float32, device=hidden.device)
    told, adapters, product_sizes, adapter_sizes = _describe(product, plan, span)
    if num_tokens:
        _residual_kernel[(len(plan.step.tokens), num_tiles)](
            told,
            adapters,
            num_tokens,
            hidden,
            weight,
            values,
            squares,
            P=product_sizes,
            A=adapter_sizes,
            BLOCK=BLOCK,
            num_warps=4,
        )
    return Activations(values, squares, eps)


@triton.jit(do_not_specialize=VARYING)
def _gate_up_kernel(product, adapters, num_tokens, result_ptr, P: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr):
    """A segment and a tile of columns, of the gate and of the way up."""
    segment = tl.program_id(0)
    tokens = load_tokens(adapters, segment)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    WIDE: tl.constexpr = P.N // 2
    gate = _finish_tile(product, adapters, num_tokens, segment, tokens, columns, 0, WIDE, 0, BLOCK, P, A)
    up = _finish_tile(product, adapters, num_tokens, segment, tokens, columns, WIDE, WIDE, 1, BLOCK, P, A)
    place = result_ptr + tokens[None, :] * WIDE + columns[:, None]
    is_output = (columns < WIDE)[:, None] & (tokens >= 0)[None, :]
    tl.store(place, gate / (1.0 + tl.exp(-gate)) * up, mask=is_output)


def finish_gate_up(
    product: Planes,  # of 2 * intermediate
    plan: Plan,
    span: LoraSpan,
) -> Tensor:  # (num_tokens, intermediate)
    """Adapters, then SwiGLU."""
    size = product.out.shape[2] // 2
    result = torch.empty((plan.num_tokens, size), dtype=product.dtype, device=product.out.device)
    told, adapters, product_sizes, adapter_sizes = _describe(product, plan, span)
    if plan.num_tokens:
        _gate_up_kernel[(len(plan.step.tokens), triton.cdiv(size, BLOCK))](
            told, adapters, plan.num_tokens, result, P=product_sizes, A=adapter_sizes, BLOCK=BLOCK, num_warps=4
        )
    return result
