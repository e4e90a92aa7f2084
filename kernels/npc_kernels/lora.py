"""Adapters on the GPU: `h = A x` over rank-16 pages (shrink), `out += B h` (expand); Triton.

Tokens come in segments of 16 that share their pages (`gpu_plan.py`). Weights are the rows of every product and tokens
its columns, so that the number of tokens never changes how one of them is computed. The shrink is cut along K into
planes that whoever reads `h` adds up in order: no atomics. Only pages that a segment owns are read.

`shrink_tile` and `expand_tile` are what the other kernels build upon: the base GEMM runs the shrink in its own launch
(`gemm.py`), and what finishes a linear runs the expand (`fused.py`). `shrink` and `expand` are the same as kernels of
their own, which is how they are tested and measured.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from npc_kernels.batch import PAGE_RANK, LoraSpan
from npc_kernels.gpu_plan import SEGMENT, VARYING, Plan

__all__ = [
    "AdapterSizes",
    "Adapters",
    "adapters_of",
    "expand",
    "expand_tile",
    "load_tokens",
    "num_shrinks",
    "operand",
    "shrink",
    "shrink_tile",
]

MIN_INPUTS = 768
"""Inputs of a plane at least."""

MAX_SPLIT = 8

BLOCK_OUT = 128
"""Outputs of one program of `expand`."""

RANK = tl.constexpr(PAGE_RANK)
WIDTH = tl.constexpr(SEGMENT)
BLOCK_K = tl.constexpr(128)  # inputs that a shrink reads at a time


class Adapters(NamedTuple):
    """What kernels are told of a linear group's adapters: one argument.

    Triton compiles a kernel anew for numbers in a tuple that are 1 or no multiple of 16 (`gpu_plan.VARYING`), so that
    nothing may stand here that differs from step to step.
    """

    pool: Tensor  # (num_pages, page_elements)
    tokens: Tensor  # (num_segments, 16) int32
    pages: Tensor  # (num_segments, max_pages) int32
    planes: Tensor  # (split, num_tokens, max_pages, num_slices, 16) float32: `h`, undefined without a page
    a_start: int  # where the group begins in a page, and its first slice's B
    b_start: int


class AdapterSizes(NamedTuple):
    """What is known of them when a kernel is compiled: nothing that differs from layer to layer."""

    PAGE: int  # elements
    K: int  # in_features
    SLICES: int
    MAX_PAGES: int
    SPLIT: int
    PLANE: int  # inputs of a plane
    OPERAND: tl.dtype  # what products are computed in


def operand(dtype: torch.dtype) -> tl.dtype:
    """What products are computed in: the stored dtype, but float32 in the interpreter, whose bfloat16 is bare bits."""
    return tl.bfloat16 if dtype == torch.bfloat16 and not triton.knobs.runtime.interpret else tl.float32


def adapters_of(plan: Plan, span: LoraSpan, x: Tensor) -> tuple[Adapters, AdapterSizes]:
    """The adapters of a group, with room for what the shrink makes; without any, no kernel will look.

    The number of planes follows from the shape alone, or a token's sums would depend on the batch.
    """
    split = 1
    while split < MAX_SPLIT and span.in_features >= 2 * split * MIN_INPUTS:
        split *= 2
    planes = torch.empty(
        (split, plan.num_tokens, plan.max_pages, span.num_slices, PAGE_RANK), dtype=torch.float32, device=x.device
    )
    pool = x if plan.lora is None else plan.lora.pool
    sizes = AdapterSizes(
        PAGE=pool.shape[1],
        K=span.in_features,
        SLICES=span.num_slices,
        MAX_PAGES=plan.max_pages,
        SPLIT=split,
        PLANE=triton.cdiv(triton.cdiv(span.in_features, split), BLOCK_K.value) * BLOCK_K.value,
        OPERAND=operand(x.dtype),
    )
    return Adapters(pool, plan.step.tokens, plan.step.pages, planes, span.start, span.b_start), sizes


@triton.jit
def load_tokens(adapters, segment):
    """The tokens of a segment, -1 where there is none."""
    return tl.load(adapters.tokens + segment * WIDTH + tl.arange(0, WIDTH))


@triton.jit
def shrink_tile(x_ptr, adapters, num_tokens, pid, SIZES: tl.constexpr):
    """One plane of `A x` for a segment, a page and a slice: 16 ranks by 16 tokens."""
    K: tl.constexpr = SIZES.K
    split = pid % SIZES.SPLIT
    part = (pid // SIZES.SPLIT) % SIZES.SLICES
    index = (pid // (SIZES.SPLIT * SIZES.SLICES)) % SIZES.MAX_PAGES
    segment = pid // (SIZES.SPLIT * SIZES.SLICES * SIZES.MAX_PAGES)
    page = tl.load(adapters.pages + segment * SIZES.MAX_PAGES + index)
    if page >= 0:
        rank = tl.arange(0, RANK)
        tokens = load_tokens(adapters, segment)
        a_ptr = adapters.pool + page.to(tl.int64) * SIZES.PAGE + adapters.a_start + part * RANK * K
        acc = tl.zeros((RANK, WIDTH), dtype=tl.float32)
        for step in range(0, SIZES.PLANE, BLOCK_K):
            k = split * SIZES.PLANE + step + tl.arange(0, BLOCK_K)
            a = tl.load(a_ptr + rank[:, None] * K + k[None, :], mask=k[None, :] < K, other=0.0)
            is_input = (tokens >= 0)[None, :] & (k < K)[:, None]
            x = tl.load(x_ptr + tokens[None, :] * K + k[:, None], mask=is_input, other=0.0)
            acc = tl.dot(a.to(SIZES.OPERAND), x.to(SIZES.OPERAND), acc, input_precision="ieee")
        place = _place_of(adapters, num_tokens, split, tokens, index, part, SIZES)
        tl.store(place[None, :] + rank[:, None], acc, mask=(tokens >= 0)[None, :])


@triton.jit
def _place_of(adapters, num_tokens, split, tokens, index, part, SIZES: tl.constexpr):
    """Where the ranks of some tokens begin in a plane."""
    token = (split * num_tokens + tokens) * SIZES.MAX_PAGES + index
    return adapters.planes + (token * SIZES.SLICES + part) * RANK


@triton.jit
def expand_tile(acc, adapters, num_tokens, segment, tokens, columns, first, width, part, SIZES: tl.constexpr):
    """`acc + B h` of every page that the segment owns, in order: (outputs, 16 tokens) float32.

    `columns` are those of slice number `part`, which has `width` and begins at output `first` of its group.
    """
    rank = tl.arange(0, RANK)
    SPLIT: tl.constexpr = SIZES.SPLIT
    for index in range(SIZES.MAX_PAGES):
        page = tl.load(adapters.pages + segment * SIZES.MAX_PAGES + index)
        if page >= 0:
            h = tl.zeros((RANK, WIDTH), dtype=tl.float32)
            for split in tl.static_range(SPLIT):
                place = _place_of(adapters, num_tokens, split, tokens, index, part, SIZES)
                h += tl.load(place[None, :] + rank[:, None], mask=(tokens >= 0)[None, :], other=0.0)
            b_ptr = adapters.pool + page.to(tl.int64) * SIZES.PAGE + adapters.b_start + RANK * first
            b = tl.load(b_ptr + rank[None, :] * width + columns[:, None], mask=(columns < width)[:, None], other=0.0)
            # `h` in the adapter's dtype: as float32 the product would be slower, and on Hopper miscompiled.
            acc = tl.dot(b.to(SIZES.OPERAND), h.to(b.dtype).to(SIZES.OPERAND), acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=VARYING)
def _shrink_kernel(x_ptr, adapters, num_tokens, SIZES: tl.constexpr):
    shrink_tile(x_ptr, adapters, num_tokens, tl.program_id(0), SIZES)


def shrink(
    x: Tensor,  # (num_tokens, in_features)
    plan: Plan,
    span: LoraSpan,
) -> tuple[Adapters, AdapterSizes]:
    """`A x` of every page that each token owns, in planes."""
    assert x.is_contiguous()
    assert x.shape == (plan.num_tokens, span.in_features)
    adapters, sizes = adapters_of(plan, span, x)
    if num_shrinks(adapters):
        _shrink_kernel[(num_shrinks(adapters),)](x, adapters, plan.num_tokens, SIZES=sizes, num_warps=4, num_stages=3)
    return adapters, sizes


def num_shrinks(adapters: Adapters) -> int:
    """Programs that a shrink takes."""
    split, num_tokens, max_pages, num_slices, _ = adapters.planes.shape
    return len(adapters.tokens) * split * max_pages * num_slices if num_tokens else 0


@triton.jit(do_not_specialize=VARYING)
def _expand_kernel(out_ptr, adapters, num_tokens, N, first, width, part, SIZES: tl.constexpr, BLOCK: tl.constexpr):
    segment = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tokens = load_tokens(adapters, segment)
    place = out_ptr + tokens[None, :] * N + first + columns[:, None]
    is_output = (tokens >= 0)[None, :] & (columns < width)[:, None]
    acc = tl.load(place, mask=is_output, other=0.0).to(tl.float32)
    acc = expand_tile(acc, adapters, num_tokens, segment, tokens, columns, first, width, part, SIZES)
    tl.store(place, acc, mask=is_output)


def expand(
    shrunk: tuple[Adapters, AdapterSizes],
    span: LoraSpan,
    out: Tensor,  # (num_tokens, sum(out_features)), added to
) -> None:
    """Add `B h`, slice by slice; `B` carries the adapter's scaling."""
    assert out.is_contiguous()
    adapters, sizes = shrunk
    first = 0
    for part, width in enumerate(span.out_features):
        grid: Any = (len(adapters.tokens), triton.cdiv(width, BLOCK_OUT))
        if adapters.planes.numel():
            _expand_kernel[grid](
                out, adapters, len(out), out.shape[1], first, width, part, SIZES=sizes, BLOCK=BLOCK_OUT, num_warps=4
            )
        first += width
