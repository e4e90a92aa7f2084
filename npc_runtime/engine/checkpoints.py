"""Quantized checkpoints: which of them can be read, and their tensors as weights in 4 and 8 bits.

Three formats come as safetensors. All of them keep a linear in several tensors that share the front of their names:

    gptq         qweight, qzeros, scales, often g_idx    AutoGPTQ, GPTQModel; `checkpoint_format` gptq and gptq_v2
    awq          qweight, qzeros, scales                 AutoAWQ, version "gemm"
    npc-runtime  words, scale, in_features; or values, scale     what `npc-runtime quantize` writes

This module knows tensors and config.json, not files; `weights.py` reads them.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from npc_kernels.quant import GROUPS, BaseWeight, Int4Weight, Int8Weight, pack_int4
from torch import Tensor

from npc_runtime.errors import StartupError

__all__ = ["OWN_FORMAT", "OWN_METHOD", "Scheme", "read_scheme", "to_parts", "unpack"]

logger = logging.getLogger(__name__)

OWN_METHOD = "npc-runtime"
OWN_FORMAT = 1

PARTS = {
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "awq": ("qweight", "qzeros", "scales"),
    OWN_METHOD: ("words", "scale", "zeros", "in_features", "values"),
}
"""Ends of the names of the tensors that a linear consists of."""

AWQ_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which nibble of an AWQ word holds the code of its first, second, … output (AutoAWQ, `WQLinear_GEMM.from_linear`)."""

REMEDY = (
    "Use a GPTQ or AWQ (gemm) checkpoint of 4 bits in groups of 32, 64 or 128, "
    "or the float16 or bfloat16 version: --quantize int4 quantizes that when it is loaded."
)


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the linears of a checkpoint are stored."""

    method: Literal["gptq", "awq", "npc-runtime"]
    group: int = 0  # inputs that share a scale; 0: each linear says it itself
    is_symmetric: bool = False
    stores_less_one: bool = False  # GPTQ's first format holds each zero minus one
    may_reorder: bool = False  # `desc_act`: the inputs of a group may lie anywhere

    @property
    def is_final(self) -> bool:
        """Whether all linears have codes that our kernels can run as they were published."""
        return not self.may_reorder


def read_scheme(folder: Path) -> Scheme | None:
    """How the folder's weights are quantized, None if they are not. Raises `StartupError` for what is not supported."""
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    found = raw.get("quantization_config") or _read_beside(folder)
    if not found:
        return None
    readers = {"gptq": _gptq_scheme, "awq": _awq_scheme, OWN_METHOD: _own_scheme}
    method = str(found.get("quant_method", "")).lower()
    if method not in readers:
        raise _refusal(folder, f"checkpoints quantized with {method or 'an unnamed method'} are not supported")
    return readers[method](folder, found)


def _read_beside(folder: Path) -> dict[str, Any] | None:
    """Older tools wrote a file of their own instead of an entry in config.json."""
    for name, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
        if (folder / name).is_file():
            found = json.loads((folder / name).read_text(encoding="utf-8"))
            return {"quant_method": method, **found}
    return None


def _gptq_scheme(folder: Path, found: Mapping[str, Any]) -> Scheme:
    form = found.get("checkpoint_format") or "gptq"
    if form not in ("gptq", "gptq_v2"):
        raise _refusal(folder, f"GPTQ checkpoints of the format {form} are not supported")
    if any(not str(pattern).startswith("-") for pattern in found.get("dynamic") or ()):
        raise _refusal(folder, "GPTQ checkpoints with other settings for some layers (dynamic) are not supported")
    return Scheme(
        "gptq",
        _group(folder, found.get("bits"), found.get("group_size")),
        is_symmetric=bool(found.get("sym", True)),
        stores_less_one=form == "gptq",
        may_reorder=bool(found.get("desc_act", False)),
    )


def _awq_scheme(folder: Path, found: Mapping[str, Any]) -> Scheme:
    version = str(found.get("version") or found.get("format") or "gemm").lower()
    if version != "gemm":
        raise _refusal(folder, f"AWQ checkpoints of the version {version} are not supported")
    if not found.get("zero_point", True):
        raise _refusal(folder, "AWQ checkpoints without zero points are not supported")
    bits = found.get("bits", found.get("w_bit"))
    return Scheme("awq", _group(folder, bits, found.get("group_size", found.get("q_group_size"))))


def _own_scheme(folder: Path, found: Mapping[str, Any]) -> Scheme:
    if found.get("format") != OWN_FORMAT:
        raise StartupError(
            f"{folder} was quantized by another version of npc-runtime (format {found.get('format')}).",
            "Quantize the base again: npc-runtime quantize --base FOLDER --out OTHER.",
        )
    return Scheme("npc-runtime")


def _group(folder: Path, bits: object, group: object) -> int:
    if bits != 4:
        raise _refusal(folder, f"quantized weights of {bits} bits are not supported")
    if group not in GROUPS:
        raise _refusal(folder, f"quantized weights in groups of {group} are not supported")
    assert isinstance(group, int)
    return group


def _refusal(folder: Path, problem: str) -> StartupError:
    return StartupError(f"{folder}: {problem}.", REMEDY)


def unpack(tensors: Iterable[tuple[str, Tensor]], scheme: Scheme) -> Iterator[tuple[str, BaseWeight]]:
    """Put the tensors of each linear together, under the name that its dense weight would have; pass on all others.

    A linear whose inputs GPTQ reordered becomes dense, exactly. Raises `StartupError` if parts of a linear are
    missing or do not fit one another.
    """
    ends = PARTS[scheme.method]
    complete = set(ends) if scheme.method != OWN_METHOD else None  # of ours, any part may be absent
    waiting: dict[str, dict[str, Tensor]] = {}
    num_reordered = 0
    for name, tensor in tensors:
        stem, _, end = name.rpartition(".")
        if end not in ends:
            yield name, tensor
            continue
        waiting.setdefault(stem, {})[end] = tensor
        if waiting[stem].keys() == complete:
            weight = _join(stem, waiting.pop(stem), scheme)
            num_reordered += isinstance(weight, Tensor)
            yield f"{stem}.weight", weight
    for stem, parts in waiting.items():
        yield f"{stem}.weight", _join(stem, parts, scheme)
    if num_reordered:
        logger.info(
            "%d linears of this GPTQ checkpoint have their inputs out of order (desc_act), which no 4-bit kernel here "
            "reads: they become dense, and --quantize int4 quantizes them again",
            num_reordered,
        )


def _join(stem: str, parts: dict[str, Tensor], scheme: Scheme) -> BaseWeight:
    join = {"gptq": _join_gptq, "awq": _join_awq, OWN_METHOD: _join_own}[scheme.method]
    try:
        return join(parts, scheme)
    except KeyError as error:
        raise StartupError(f"The base has no tensor {stem}.{error.args[0]}.", "Fetch the model again.") from error
    except (RuntimeError, ValueError) as error:  # of torch: shapes that do not fit
        shapes = ", ".join(f"{end} {tuple(part.shape)}" for end, part in parts.items())
        raise StartupError(
            f"The parts of {stem} do not fit one another ({shapes}; groups of {scheme.group}).",
            "config.json and weights are of different models; fetch the model again.",
        ) from error


def _join_gptq(parts: dict[str, Tensor], scheme: Scheme) -> Int4Weight | Tensor:
    """AutoGPTQ's `QuantLinear`: words of 8 inputs each, `(in / 8, out)`; zeros of 8 outputs each, `(groups, out / 8)`.

    Zeros are stored as words from which 0x11111111 was subtracted, borrows included (GPTQModel,
    `convert_gptq_v2_to_v1_format_module`). Symmetric checkpoints exist that claim the first format and hold the zeros
    of the second (vllm#38966); theirs are 8 whatever is stored.
    """
    codes = _nibbles(parts["qweight"].T)  # (out, in)
    zeros = _nibbles(parts["qzeros"], add=0x11111111 if scheme.stores_less_one else 0).T  # (out, groups)
    scale = parts["scales"].float().T
    _check(codes.shape[0] == len(scale) == len(zeros), "outputs")
    _check(scale.shape == zeros.shape and scale.shape[1] == -(-codes.shape[1] // scheme.group), "groups")
    if scheme.is_symmetric and bool(((zeros == 8) | (zeros == 9)).all()):
        zeros = torch.full_like(zeros, 8)
    order = parts.get("g_idx")
    plain = torch.arange(codes.shape[1]) // scheme.group
    if order is None or not order.any() or torch.equal(order.long().cpu(), plain):
        return pack_int4(codes, scale, None if bool((zeros == 8).all()) else zeros, scheme.group)
    return (codes - zeros[:, order.long()]) * scale[:, order.long()]


def _join_awq(parts: dict[str, Tensor], scheme: Scheme) -> Int4Weight:
    """AutoAWQ's `WQLinear_GEMM`: words of eight outputs each, `(in, out / 8)` and `(groups, out / 8)`."""
    codes, zeros = (_nibbles(parts[end], order=AWQ_NIBBLES).T for end in ("qweight", "qzeros"))
    scale = parts["scales"].float().T
    _check(codes.shape[0] == len(scale) == len(zeros), "outputs")
    _check(scale.shape == zeros.shape and scale.shape[1] == -(-codes.shape[1] // scheme.group), "groups")
    return pack_int4(codes, scale, zeros, scheme.group)


def _join_own(parts: dict[str, Tensor], scheme: Scheme) -> Int4Weight | Int8Weight:
    scale = parts["scale"]
    if "values" in parts:
        _check(len(parts["values"]) == len(scale), "outputs")
        return Int8Weight(parts["values"], scale)
    words, in_features = parts["words"], int(parts["in_features"])
    num_inputs = words.shape[1] * 8
    _check(len(words) == len(scale) and in_features <= num_inputs and num_inputs % scale.shape[1] == 0, "groups")
    return Int4Weight(words, scale, in_features, num_inputs // scale.shape[1], parts.get("zeros"))


def to_parts(name: str, weight: BaseWeight) -> dict[str, Tensor]:
    """The tensors that a weight is stored as in our own format, by their names; a dense one is itself."""
    if isinstance(weight, Tensor):
        return {name: weight}
    stem = name.removesuffix(".weight")
    if isinstance(weight, Int8Weight):
        return {f"{stem}.values": weight.values, f"{stem}.scale": weight.scale}
    parts = {"words": weight.words, "scale": weight.scale, "in_features": torch.tensor(weight.in_features)}
    if weight.zeros is not None:
        parts["zeros"] = weight.zeros
    return {f"{stem}.{end}": part for end, part in parts.items()}


def _nibbles(words: Tensor, *, add: int = 0, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Eight numbers of each int32 word, side by side: (rows, columns) → (rows, 8 · columns) int32."""
    if words.dtype != torch.int32:
        raise ValueError(f"words are {words.dtype}")
    wide = words.long() + add
    shifts = 4 * torch.tensor(order, device=words.device)
    return ((wide[..., None] >> shifts) & 15).flatten(1).to(torch.int32)


def _check(fits: bool, what: str) -> None:
    if not fits:
        raise ValueError(f"numbers of {what} differ")
