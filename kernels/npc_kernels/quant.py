"""Weights in 4 and 8 bits, as the GPU's GEMMs read them, and their torch twins.

4 bits, in groups of 128, 64 or 32 inputs: `w = (code - zero) * scale`. What is quantized here is symmetric, its zero
is always 8; checkpoints of GPTQ and AWQ bring a zero for each group. Inputs come in blocks of 128, the last one filled
up. Word `j` of a block's 16 holds, in bits `4 i` to `4 i + 3`, the code of input `16 i + j`: one tile of words feeds
eight products of 16 inputs each, and nothing is ever reshaped.

8 bits, symmetric, one scale an output: `w = code * scale`.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

__all__ = [
    "BLOCK",
    "GROUPS",
    "BaseWeight",
    "Int4Weight",
    "Int8Weight",
    "concatenate",
    "dequantize",
    "pack_int4",
    "quantize_int4",
    "quantize_int8",
    "relative_error",
    "to_device",
]

BLOCK = 128
"""Inputs whose codes share 16 words."""

GROUPS = (128, 64, 32)
"""Sizes of a group, the cheapest first."""

MIDDLE = 8
"""The zero of a symmetric weight."""

SLICE = 1 << 22
"""Weights that are quantized at once; some ten times their bytes are needed meanwhile."""


class Int4Weight(NamedTuple):
    """A weight in 4 bits."""

    words: Tensor  # (out_features, ceil(in_features / 128) * 16) int32
    scale: Tensor  # (out_features, ceil(in_features / 128) * 128 / group) float32; may be negative
    in_features: int
    group: int
    zeros: Tensor | None = None  # like scale, int8, 0 to 16; None: 8 everywhere

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return len(self.words), self.in_features


class Int8Weight(NamedTuple):
    """A weight in 8 bits."""

    values: Tensor  # (out_features, in_features) int8
    scale: Tensor  # (out_features,) float32

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return len(self.values), self.values.shape[1]


BaseWeight: TypeAlias = Tensor | Int4Weight | Int8Weight
"""The weight of a base linear; a Tensor is dense, (out_features, in_features) in a float dtype."""


def quantize_int4(
    weight: Tensor,  # (out_features, in_features), of any float dtype, on any device
    group: int = 128,
    *,
    uses_all_codes: bool = True,
) -> Int4Weight:
    """Round to the nearest code. The scale brings each group's largest magnitude to code -8, by its sign.

    Without `uses_all_codes` to 7 or -7, as symmetric rounding usually does. Why nothing is searched: the table in the
    README of `kernels/`.
    """
    if group not in GROUPS:
        raise ValueError(f"groups of {group} inputs are not supported: {', '.join(map(str, GROUPS))} are")
    in_features = weight.shape[1]
    words, scales = [], []
    for part in _slices(weight):
        wide = torch.nn.functional.pad(part.float(), (0, -in_features % BLOCK)).view(len(part), -1, group)
        largest = _nonzero(wide.gather(-1, wide.abs().argmax(-1, keepdim=True)))
        scale = largest / -8 if uses_all_codes else largest.abs() / 7
        words.append(_pack((wide / scale).round_().clamp_(-8, 7) + MIDDLE))
        scales.append(scale[..., 0])
    return Int4Weight(torch.cat(words), torch.cat(scales), in_features, group)


def _slices(weight: Tensor) -> Iterator[Tensor]:
    """Some outputs at a time, so that memory stays bounded."""
    num_rows = _rows_of_a_slice(weight)
    for start in range(0, len(weight), num_rows):
        yield weight[start : start + num_rows]


def _rows_of_a_slice(weight: Tensor) -> int:
    return max(1, SLICE // weight.shape[1])


def _nonzero(values: Tensor) -> Tensor:
    """A group of zeros has a scale too; not the smallest number there is, whose eighth would be none."""
    return torch.where(values == 0, torch.full_like(values, 1e-30), values)


def pack_int4(
    codes: Tensor,  # (out_features, in_features), 0 to 15
    scale: Tensor,  # (out_features, ceil(in_features / group))
    zeros: Tensor | None,  # like scale
    group: int,
) -> Int4Weight:
    """Bring codes that somebody else chose into our layout; not a number changes."""
    in_features = codes.shape[1]
    missing = -in_features % BLOCK
    num_groups = (in_features + missing) // group
    words = _pack(torch.nn.functional.pad(codes, (0, missing)))

    def fill(values: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.nn.functional.pad(values.to(dtype), (0, num_groups - values.shape[1])).contiguous()

    packed = Int4Weight(words, fill(scale, torch.float32), in_features, group)
    return packed if zeros is None else packed._replace(zeros=fill(zeros, torch.int8))


def _pack(codes: Tensor) -> Tensor:  # (out_features, blocks * 128), in any shape → (out_features, blocks * 16) int32
    """Codes of 0 to 15 to words."""
    blocks = codes.to(torch.int32).contiguous().view(len(codes), -1, 8, 16)
    words = blocks[:, :, 0].clone()
    for nibble in range(1, 8):
        words |= blocks[:, :, nibble] << (4 * nibble)
    return words.flatten(1)


def quantize_int8(
    weight: Tensor,  # (out_features, in_features)
) -> Int8Weight:
    """Round to the nearest code; the scale is the output's largest magnitude over 127."""
    values, scales = [], []
    for part in _slices(weight):
        wide = part.float()
        scale = _nonzero(wide.abs().amax(-1, keepdim=True) / 127)
        values.append((wide / scale).round_().to(torch.int8))
        scales.append(scale[:, 0])
    return Int8Weight(torch.cat(values), torch.cat(scales))


def dequantize(weight: Int4Weight | Int8Weight) -> Tensor:  # (out_features, in_features) float32
    """The weight that the codes stand for."""
    if isinstance(weight, Int8Weight):
        return weight.values.float() * weight.scale[:, None]
    shifts = 4 * torch.arange(8, device=weight.words.device, dtype=torch.int32)
    words = weight.words.view(len(weight.words), -1, 1, 16)
    codes = ((words >> shifts[:, None]) & 15).float().view(*weight.scale.shape, weight.group)
    codes -= MIDDLE if weight.zeros is None else weight.zeros[..., None]
    return (codes * weight.scale[..., None]).flatten(1)[:, : weight.in_features]


def relative_error(
    weight: Tensor,  # (out_features, in_features)
    packed: Int4Weight | Int8Weight,
) -> float:
    """|difference| / |weight|, Frobenius norms; 0 for a weight of zeros."""
    difference = total = 0.0
    for start in range(0, len(weight), _rows_of_a_slice(weight)):
        rows = slice(start, start + _rows_of_a_slice(weight))
        wide = weight[rows].float()
        difference += float((dequantize(_take_rows(packed, rows)) - wide).square().sum())
        total += float(wide.square().sum())
    return (difference / total) ** 0.5 if total else 0.0


def _take_rows(weight: Int4Weight | Int8Weight, rows: slice) -> Int4Weight | Int8Weight:
    if isinstance(weight, Int8Weight):
        return Int8Weight(weight.values[rows], weight.scale[rows])
    zeros = None if weight.zeros is None else weight.zeros[rows]
    return weight._replace(words=weight.words[rows], scale=weight.scale[rows], zeros=zeros)


def to_device(weight: Int4Weight | Int8Weight, device: torch.device) -> Int4Weight | Int8Weight:
    """The weight with all its tensors on a device."""
    if isinstance(weight, Int8Weight):
        return Int8Weight(weight.values.to(device), weight.scale.to(device))
    zeros = None if weight.zeros is None else weight.zeros.to(device)
    return weight._replace(words=weight.words.to(device), scale=weight.scale.to(device), zeros=zeros)


def concatenate(parts: Sequence[BaseWeight]) -> BaseWeight:
    """Weights of one input as one, its outputs one below the other.

    In 4 bits if all are, in groups of one size; else codes become dense, in the dtype of the dense ones or float32.
    """
    if len(parts) == 1:
        return parts[0]
    packed = [part for part in parts if isinstance(part, Int4Weight)]
    if len(packed) < len(parts) or len({part.group for part in packed}) > 1:
        dtype = next((part.dtype for part in parts if isinstance(part, Tensor)), torch.float32)
        return torch.cat([part if isinstance(part, Tensor) else dequantize(part).to(dtype) for part in parts])
    zeros = [
        torch.full_like(part.scale, MIDDLE, dtype=torch.int8) if part.zeros is None else part.zeros for part in packed
    ]
    return Int4Weight(
        torch.cat([part.words for part in packed]),
        torch.cat([part.scale for part in packed]),
        packed[0].in_features,
        packed[0].group,
        None if all(part.zeros is None for part in packed) else torch.cat(zeros),
    )
