"""The base GEMM on the GPU, with the adapters' shrink in the same launch; and the head. Triton.

Weights (bfloat16, float32, or the 4 and 8 bits of `quant.py`) are the rows of every product and tokens its columns; K
is walked in fixed steps and cut, by the shape of the weight alone, into planes that the consumer adds up in order. So
a token's numbers depend neither on how many others there are nor on which, and there are no atomics.

The rows of `x` may still lack the norm's factor, one number a token: it commutes with the product, so whoever
finishes the linear applies it (`Activations`).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from npc_kernels.batch import Codes, LoraSpan
from npc_kernels.gpu_plan import VARYING, Plan
from npc_kernels.lora import Adapters, AdapterSizes, adapters_of, num_shrinks, operand, shrink_tile
from npc_kernels.quant import BLOCK, Int4Weight, Int8Weight

__all__ = [
    "Activations",
    "Linear",
    "Planes",
    "Weight",
    "WeightSizes",
    "base_split",
    "head",
    "product_tile",
    "project",
    "row_scale",
]

BLOCK_OUT = 64
"""Outputs of one program."""

BLOCK_K = 64
"""Inputs of one step, for weights that are not in 4 bits."""

MAX_ROWS = {4: 32, 8: 64, 16: 64}
"""Tokens of one program, by the bits of the weight; more come in several, that read it from the L2 cache."""

MIN_INPUTS = 512
"""Inputs of a plane at least."""

BUSY = 128
"""Programs from which a launch fills a GPU; below, K is cut."""


class Activations(NamedTuple):
    """Rows that a linear takes, before their norm: `values * rsqrt(mean(squares) + eps)` of each token.

    `values` are the residual stream times the norm's weight; `squares` the sums of squares of the residual stream,
    (num_tiles, num_tokens), tile by tile.
    """

    values: Tensor
    squares: Tensor
    eps: float

    def normalised(self) -> Tensor:
        """The rows with their norm, in their dtype; for readers, the kernels never need it."""
        mean = self.squares.sum(0) / self.values.shape[1]
        return (self.values.float() * torch.rsqrt(mean + self.eps)[:, None]).to(self.values.dtype)


class Weight(NamedTuple):
    """What kernels are told of a linear: one argument."""

    data: Tensor  # (N, K), int32 words of 4 bits, or (N, K) int8
    scale: Tensor  # of the codes; anything for a dense weight
    zeros: Tensor  # int8, like the scale; anything if HAS_ZEROS is not set


class WeightSizes(NamedTuple):
    """What is known of it when a kernel is compiled."""

    N: int
    K: int
    BITS: int  # 4, 8, or 16 for a dense weight of any dtype
    GROUP: int  # inputs that share a scale, in 4 bits
    HAS_ZEROS: bool  # a zero for each group; else it is 8, in 4 bits
    BLOCK: int  # outputs of one program
    STEP: int  # inputs of one step
    SPLIT: int  # planes
    SPAN: int  # inputs of a plane
    BLOCKS: int  # of 128 inputs, in 4 bits
    OPERAND: tl.dtype  # what products are computed in


class Linear:
    """A base linear: dense, or in 4 or 8 bits. The codes of the embedded base are for few rows on a CPU."""

    def __init__(
        self, weight: Tensor | Int4Weight | Int8Weight, bias: Tensor | None = None, codes: Codes | None = None
    ) -> None:
        self.bias = bias
        self.scale: Tensor | None = None
        self.zeros: Tensor | None = None
        self.group = 0
        if isinstance(weight, Int4Weight):
            self.bits, self.values, self.scale, self.group = 4, weight.words, weight.scale, weight.group
            self.in_features, self.zeros = weight.in_features, weight.zeros
        elif isinstance(weight, Int8Weight):
            self.bits, self.values, self.scale = 8, weight.values, weight.scale
            self.in_features = weight.values.shape[1]
        else:
            self.bits, self.values = 16, weight.contiguous()
            self.in_features = weight.shape[1]

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.values.shape[0]

    def describe(self, x: Tensor, split: int) -> tuple[Weight, WeightSizes]:
        """The weight for a kernel that multiplies it with x in so many planes."""
        step = BLOCK if self.bits == 4 else BLOCK_K
        sizes = WeightSizes(
            N=self.out_features,
            K=self.in_features,
            BITS=self.bits,
            GROUP=self.group,
            HAS_ZEROS=self.zeros is not None,
            BLOCK=BLOCK_OUT,
            STEP=step,
            SPLIT=split,
            SPAN=triton.cdiv(triton.cdiv(self.in_features, split), step) * step,
            BLOCKS=triton.cdiv(self.in_features, BLOCK),
            OPERAND=operand(x.dtype),
        )
        scale = self.values if self.scale is None else self.scale
        return Weight(self.values, scale, scale if self.zeros is None else self.zeros), sizes


class Planes(NamedTuple):
    """What `project` made, on its way to what finishes the linear."""

    out: Tensor  # (split, num_tokens, out_features) float32
    adapters: Adapters  # with `A x`
    sizes: AdapterSizes
    bias: Tensor | None
    squares: Tensor | None  # of the rows' norm, if it is still to come
    eps: float
    dtype: torch.dtype  # of x


def base_split(out_features: int, in_features: int) -> int:
    """Planes of a base GEMM; by the shape alone, or a token's sums would depend on the batch."""
    tiles, split = triton.cdiv(out_features, BLOCK_OUT), 1
    while split < 8 and tiles * split < BUSY and in_features >= 2 * split * MIN_INPUTS:
        split *= 2
    return split


@triton.jit
def product_tile(x_ptr, weight, rows, is_row, columns, split, ROWS: tl.constexpr, W: tl.constexpr):
    """One plane of `weight @ x.T`: (outputs, rows) float32."""
    first = split * W.SPAN
    OUTPUTS: tl.constexpr = W.BLOCK
    acc = tl.zeros((OUTPUTS, ROWS), dtype=tl.float32)
    if W.BITS == 4:
        for start in range(0, W.SPAN, W.STEP):
            acc = _add_block_of_codes(acc, x_ptr, weight, rows, is_row, columns, (first + start) // W.STEP, W)
    else:
        for start in range(0, W.SPAN, W.STEP):
            k = first + start + tl.arange(0, W.STEP)
            is_weight = (columns < W.N)[:, None] & (k < W.K)[None, :]
            place = weight.data + columns.to(tl.int64)[:, None] * W.K + k[None, :]
            w = tl.load(place, mask=is_weight, other=0)
            if W.BITS == 8:
                w = w.to(tl.float32)
            is_input = is_row[None, :] & (k < W.K)[:, None]
            x = tl.load(x_ptr + rows[None, :] * W.K + k[:, None], mask=is_input, other=0.0)
            acc = tl.dot(w.to(W.OPERAND), x.to(W.OPERAND), acc, input_precision="ieee")
    if W.BITS == 8:
        acc *= tl.load(weight.scale + columns, mask=columns < W.N, other=0.0)[:, None]
    return acc


@triton.jit
def _add_block_of_codes(acc, x_ptr, weight, rows, is_row, columns, block, W: tl.constexpr):
    """128 inputs in 4 bits: one tile of words, eight products; the scales of a group multiply its sums."""
    GROUPS: tl.constexpr = 128 // W.GROUP
    NIBBLES: tl.constexpr = W.GROUP // 16
    word = tl.arange(0, 16)
    is_weight = (columns < W.N) & (block < W.BLOCKS)
    of_words = (columns * W.BLOCKS + block)[:, None] * 16 + word[None, :]
    words = tl.load(weight.data + of_words, mask=is_weight[:, None], other=0)
    for group in tl.static_range(GROUPS):
        part = tl.zeros_like(acc)
        place = (columns * W.BLOCKS + block) * GROUPS + group
        zero = tl.full((W.BLOCK,), 8, dtype=tl.int32)
        if W.HAS_ZEROS:
            zero = tl.load(weight.zeros + place, mask=is_weight, other=0).to(tl.int32)
        for nibble in tl.static_range(group * NIBBLES, (group + 1) * NIBBLES):
            k = block * 128 + nibble * 16 + word
            is_input = is_row[None, :] & (k < W.K)[:, None]
            x = tl.load(x_ptr + rows[None, :] * W.K + k[:, None], mask=is_input, other=0.0)
            codes = (((words >> (4 * nibble)) & 15) - zero[:, None]).to(tl.float32).to(W.OPERAND)
            part = tl.dot(codes, x.to(W.OPERAND), part, input_precision="ieee")
        scale = tl.load(weight.scale + place, mask=is_weight, other=0.0)
        acc += part * scale[:, None]
    return acc


@triton.jit
def row_scale(squares_ptr, tokens, num_tokens, eps, SIZE: tl.constexpr, TILES: tl.constexpr):
    """The norm's factor of some tokens, from the sums of squares of their tiles, added up in order."""
    total = tl.zeros_like(tokens).to(tl.float32)
    for tile in tl.static_range(TILES):  # a tree of sums would depend on the number of tokens
        total += tl.load(squares_ptr + tile * num_tokens + tokens, mask=tokens >= 0, other=0.0)
    return tl.rsqrt(total / SIZE + eps)


@triton.jit(do_not_specialize=VARYING)
def _project_kernel(
    x_ptr,
    weight,
    adapters,
    out_ptr,
    num_tokens,
    num_shrinks,
    W: tl.constexpr,
    A: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The first programs shrink, the others multiply; without adapters there are only the others."""
    pid = tl.program_id(0)
    if pid < num_shrinks:
        if A.MAX_PAGES > 0:
            shrink_tile(x_ptr, adapters, num_tokens, pid, A)
    else:
        # Programs with the same weights side by side: the second one finds them in the L2 cache.
        number = pid - num_shrinks
        row_tiles = tl.cdiv(num_tokens, ROWS)
        rows = (number % row_tiles) * ROWS + tl.arange(0, ROWS)
        split = (number // row_tiles) % W.SPLIT
        columns = (number // (row_tiles * W.SPLIT)) * W.BLOCK + tl.arange(0, W.BLOCK)
        acc = product_tile(x_ptr, weight, rows, rows < num_tokens, columns, split, ROWS, W)
        place = out_ptr + (split * num_tokens + rows)[None, :] * W.N + columns[:, None]
        tl.store(place, acc, mask=(rows < num_tokens)[None, :] & (columns < W.N)[:, None])


def project(
    linear: Linear,
    x: Tensor | Activations,  # (num_tokens, in_features)
    plan: Plan,
    span: LoraSpan,
) -> Planes:
    """`x @ weight.T`, and beside it `A x` of every page that each token owns; one launch."""
    values = x.values if isinstance(x, Activations) else x
    assert values.is_contiguous()
    assert values.shape == (plan.num_tokens, linear.in_features)
    num_tokens, split = plan.num_tokens, base_split(linear.out_features, linear.in_features)
    out = torch.empty((split, num_tokens, linear.out_features), dtype=torch.float32, device=values.device)
    weight, weight_sizes = linear.describe(values, split)
    adapters, sizes = adapters_of(plan, span, values)
    rows = _rows_of(num_tokens, linear.bits)
    if num_tokens:
        num_products = triton.cdiv(num_tokens, rows) * split * triton.cdiv(linear.out_features, BLOCK_OUT)
        _project_kernel[(num_shrinks(adapters) + num_products,)](
            values,
            weight,
            adapters,
            out,
            num_tokens,
            num_shrinks(adapters),
            W=weight_sizes,
            A=sizes,
            ROWS=rows,
            **_shape_of_launch(linear.bits),
        )
    squares, eps = (x.squares, x.eps) if isinstance(x, Activations) else (None, 0.0)
    return Planes(out, adapters, sizes, linear.bias, squares, eps, values.dtype)


def _rows_of(num_tokens: int, bits: int) -> int:
    """Tokens of one program: as few as hold the step, in powers of two."""
    return min(MAX_ROWS[bits], max(16, triton.next_power_of_2(num_tokens)))


def _shape_of_launch(bits: int) -> dict[str, int]:
    """Warps and stages.

    Codes are widened in registers, and two warps keep Triton from Hopper's warp-group products, which ptxas before
    13.3 miscompiles with an operand in registers (triton#11781).
    """
    return {"num_warps": 4, "num_stages": 4} if bits == 16 else {"num_warps": 2, "num_stages": 3}


@triton.jit(do_not_specialize=VARYING)
def _head_kernel(
    x_ptr,
    weight,
    bias_ptr,
    wanted_ptr,
    squares_ptr,
    out_ptr,
    num_tokens,
    num_wanted,
    eps,
    W: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TILES: tl.constexpr,
):
    row_tiles = tl.cdiv(num_wanted, ROWS)
    row = (tl.program_id(0) % row_tiles) * ROWS + tl.arange(0, ROWS)
    columns = (tl.program_id(0) // row_tiles) * W.BLOCK + tl.arange(0, W.BLOCK)
    is_row = row < num_wanted
    tokens = tl.load(wanted_ptr + row, mask=is_row, other=-1)
    acc = product_tile(x_ptr, weight, tokens, is_row, columns, 0, ROWS, W)
    if TILES > 0:
        acc *= row_scale(squares_ptr, tokens, num_tokens, eps, W.K, TILES)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + columns, mask=columns < W.N, other=0.0).to(tl.float32)[:, None]
    place = out_ptr + row.to(tl.int64)[None, :] * W.N + columns[:, None]
    tl.store(place, acc, mask=is_row[None, :] & (columns < W.N)[:, None])


def head(
    linear: Linear,
    x: Tensor | Activations,  # (num_tokens, in_features)
    plan: Plan,
) -> Tensor:  # (num_sampled, out_features) float32
    """`norm(x) @ weight.T + bias` of the sampled tokens."""
    tokens = plan.step.sampled
    values = x.values if isinstance(x, Activations) else x
    assert values.is_contiguous()
    result = plan.logits(len(tokens), linear.out_features)
    weight, weight_sizes = linear.describe(values, 1)
    rows = _rows_of(len(tokens), linear.bits)
    if len(tokens):
        _head_kernel[(triton.cdiv(len(tokens), rows) * triton.cdiv(linear.out_features, BLOCK_OUT),)](
            values,
            weight,
            values if linear.bias is None else linear.bias,
            tokens,
            x.squares if isinstance(x, Activations) else values,
            result,
            len(values),
            len(tokens),
            x.eps if isinstance(x, Activations) else 0.0,
            W=weight_sizes,
            ROWS=rows,
            HAS_BIAS=linear.bias is not None,
            TILES=len(x.squares) if isinstance(x, Activations) else 0,
            **_shape_of_launch(linear.bits),
        )
    return result
