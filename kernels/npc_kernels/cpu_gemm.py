"""Base linears of the CPU paths: a dense weight, packed once in the layout that oneDNN's GEMM reads.

oneDNN compiles a GEMM for every number of rows it has not met, and keeps it: 2.4 MB for one number and the four linears
of SmolLM2-135M. A step's number of tokens is any; so rows are padded to few sizes, and many are cut into parts.
"""

from bisect import bisect_left
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["SIZES", "Cut", "PackedLinear", "cut_rows", "join"]

PACK_ROWS = 8
"""Rows that oneDNN is told to expect when it chooses a layout; 8 was as good as the exact number at 1 and 32."""

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, *range(32, 129, 8), *range(144, 257, 16), 512)
"""All numbers of rows that a GEMM is ever asked for: up to four each, since few rows may go through codes instead, and
the largest step of one long prompt."""

MAX_PART, UNIT = 256, 16
"""Where rows are cut, parts have so many at most, and multiples of the unit."""


class Cut(NamedTuple):
    """How the rows of a step are taken: `num_padded` in all, in parts of `size`, the last of which may be smaller."""

    size: int
    num_padded: int


def cut_rows(num_rows: int) -> Cut:
    """In one of `SIZES` if there is one less than a unit larger, else in equal parts; a small rest costs as much."""
    if num_rows == 0:
        return Cut(1, 0)
    size = SIZES[min(bisect_left(SIZES, num_rows), len(SIZES) - 1)]
    if 0 <= size - num_rows < UNIT:
        return Cut(size, size)
    num_units = -(-num_rows // UNIT)
    num_parts = -(-num_rows // MAX_PART)
    return Cut(UNIT * -(-num_units // num_parts), UNIT * num_units)


class PackedLinear:
    """A base linear whose weight is stored once, packed where torch has the private operators for it."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._bias = bias
        self._packed = _pack(weight)
        self._weight = None if self._packed is not None else weight

    def multiply(
        self,
        x: Tensor,  # (num_rows, in_features)
        cut: Cut,  # of as many rows, or fewer: then x is padded
    ) -> tuple[Tensor, ...]:  # each (cut.size or fewer, out_features)
        """`x @ weight.T + bias`, part by part."""
        size, num_padded = cut
        if x.shape[0] != num_padded:
            x = F.pad(x, (0, 0, 0, num_padded - x.shape[0]))
        if num_padded <= size:
            return (self._multiply(x),)
        return tuple(self._multiply(part) for part in torch.split(x, size))

    def _multiply(self, x: Tensor) -> Tensor:
        if self._weight is not None:
            return F.linear(x, self._weight, self._bias)
        out: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, self._packed, self._bias, "none", [], "")
        return out


def _pack(weight: Tensor) -> Tensor | None:
    """The weight in oneDNN's layout, or None where this torch or this processor has no such GEMM."""
    pack: Callable[..., Tensor] | None = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
    if pack is None or (weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return None
    try:
        return pack(weight, PACK_ROWS)
    except RuntimeError:
        return None


def join(parts: tuple[Tensor, ...], num_rows: int, *, wide: bool) -> Tensor:
    """The rows of all parts, without those that pad them, in float32 if `wide`."""
    out = (parts[0] if len(parts) == 1 else torch.cat(parts))[:num_rows]
    return out.float() if wide else out
