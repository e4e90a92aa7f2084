"""Weights in 4 and 8 bits, as the GPU's GEMMs read them, and their torch twins.

4 bits, symmetric, in groups of 128, 64 or 32 inputs: `w = (code - 8) * scale`. Inputs come in blocks of 128, the last
one filled up with zeros. Word `j` of a block's 16 holds, in bits `4 i` to `4 i + 3`, the code of input `16 i + j`: one
tile of words feeds eight products of 16 inputs each, and nothing is ever reshaped.

8 bits, symmetric, one scale an output: `w = code * scale`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["BLOCK", "Int4Weight", "Int8Weight", "dequantize", "quantize_int4", "quantize_int8"]

BLOCK = 128
"""Inputs whose codes share 16 words."""

GROUPS = (128, 64, 32)


class Int4Weight(NamedTuple):
    """A weight in 4 bits."""

    words: Tensor  # (out_features, ceil(in_features / 128) * 16) int32
    scale: Tensor  # (out_features, ceil(in_features / 128) * 128 / group) float32
    in_features: int
    group: int


class Int8Weight(NamedTuple):
    """A weight in 8 bits."""

    values: Tensor  # (out_features, in_features) int8
    scale: Tensor  # (out_features,) float32


def quantize_int4(
    weight: Tensor,  # (out_features, in_features)
    group: int = 128,
) -> Int4Weight:
    """Round to the nearest code; the scale is the group's largest magnitude over 7."""
    if group not in GROUPS:
        raise ValueError(f"groups of {group} inputs are not supported: {', '.join(map(str, GROUPS))} are")
    out_features, in_features = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -in_features % BLOCK)).view(out_features, -1, group)
    scale = (padded.abs().amax(-1, keepdim=True) / 7).clamp(min=torch.finfo(torch.float32).tiny)
    codes = ((padded / scale).round().clamp(-8, 7) + 8).to(torch.int64).view(out_features, -1, 8, 16)
    shifts = 4 * torch.arange(8, device=weight.device)
    words = (codes << shifts[:, None]).sum(2).to(torch.int32)  # the upper half wraps around
    return Int4Weight(words.flatten(1).contiguous(), scale[..., 0].contiguous(), in_features, group)


def quantize_int8(
    weight: Tensor,  # (out_features, in_features)
) -> Int8Weight:
    """Round to the nearest code; the scale is the output's largest magnitude over 127."""
    wide = weight.float()
    scale = (wide.abs().amax(-1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return Int8Weight((wide / scale[:, None]).round().to(torch.int8), scale)


def dequantize(weight: Int4Weight | Int8Weight) -> Tensor:  # (out_features, in_features) float32
    """The weight that the codes stand for."""
    if isinstance(weight, Int8Weight):
        return weight.values.float() * weight.scale[:, None]
    shifts = 4 * torch.arange(8, device=weight.words.device)
    words = weight.words.view(len(weight.words), -1, 1, 16)
    codes = ((words >> shifts[:, None]) & 15).float() - 8
    wide = codes.view(*weight.scale.shape, weight.group) * weight.scale[..., None]
    return wide.flatten(1)[:, : weight.in_features]
