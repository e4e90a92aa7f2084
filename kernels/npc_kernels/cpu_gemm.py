"""Base linears of the CPU paths: a dense weight, packed once in the layout that oneDNN's GEMM reads."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["PackedLinear"]

PACK_ROWS = 8
"""Rows that oneDNN is told to expect when it chooses a layout; 8 was as good as the exact number at 1 and 32."""


class PackedLinear:
    """A base linear whose weight is stored once, packed where torch has the private operators for it."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._bias = bias
        self._packed = _pack(weight)
        self._weight = None if self._packed is not None else weight

    def __call__(
        self,
        x: Tensor,  # (num_tokens, in_features)
    ) -> Tensor:  # (num_tokens, out_features)
        """`x @ weight.T + bias`."""
        if self._weight is not None:
            return F.linear(x, self._weight, self._bias)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
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
