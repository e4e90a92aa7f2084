"""A base with adapters merged into it: an ordinary model folder, for a daemon with one persona."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from npc_runtime.engine.checkpoints import read_scheme
from npc_runtime.engine.lora_pair import LoraPair
from npc_runtime.engine.model_folder import ModelFolder
from npc_runtime.engine.peft_folder import PeftAdapter
from npc_runtime.engine.weights import BaseInfo, read_weights
from npc_runtime.errors import AdapterIncompatible, InvalidError, StartupError

__all__ = ["MergeDType", "MergeResult", "write_merged"]

RECORD_NAME = "merged.json"
MergeDType = Literal["base", "float32", "bfloat16"]


@dataclass(frozen=True, slots=True)
class MergeResult:
    """What was written."""

    num_merged: int  # linears
    num_bytes: int


def write_merged(
    base: BaseInfo,
    adapters: list[PeftAdapter],
    out: Path,
    *,
    dtype: MergeDType = "base",
    on_progress: Callable[[float], None],
) -> MergeResult:
    """Write the base's folder with the adapters added to its weights, one tensor at a time.

    The sum is made in float32 and stored in `dtype`, or in what the base is stored in. Raises `InvalidError` if there
    is something at `out`, `AdapterIncompatible` for DoRA among several, `StartupError` if the base is quantized or
    cannot be read or there is no room; nothing is left behind then.
    """
    scheme = read_scheme(base.folder)
    if scheme is not None:
        raise StartupError(
            f"{base.name} is quantized ({scheme.method}): merging would have to round its weights a second time.",
            "Merge into the float16 or bfloat16 version, and quantize the result (npc-runtime quantize).",
        )
    if len(adapters) > 1 and any(adapter.config.is_dora for adapter in adapters):
        raise AdapterIncompatible(
            "A DoRA cannot be merged together with other adapters: each would rescale what the others add.",
            "Merge one adapter, and the next into the result, if that is what you mean.",
        )
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InvalidError(f"{out} exists.", "Choose another folder.")
    torch_dtype = None if dtype == "base" else getattr(torch, dtype)
    num_merged = 0
    try:
        with ModelFolder(base.folder, out) as folder:
            for name, weight in read_weights(base.folder, None, on_progress):
                assert isinstance(weight, Tensor)
                pairs = [adapter.pairs[module] for adapter in adapters if (module := _module(name)) in adapter.pairs]
                num_merged += bool(pairs)
                folder.add(name, _merge(name, weight, pairs).to(torch_dtype or weight.dtype))
            _check_all(adapters, num_merged)
            folder.finish(_dtype_entries(base.folder, torch_dtype), {RECORD_NAME: _record(base, adapters)})
            return MergeResult(num_merged, sum(path.stat().st_size for path in out.glob("*.safetensors")))
    except OSError as error:
        raise StartupError(
            f"{out} cannot be written ({error}).", "It needs as much room as the base; choose another folder."
        ) from error


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _merge(name: str, weight: Tensor, pairs: list[LoraPair]) -> Tensor:
    """The weight with every pair added; as it is without any."""
    if not pairs:
        return weight
    merged = weight
    for pair in pairs:
        merged = pair.merged(merged)
    if not torch.isfinite(merged).all():
        raise AdapterIncompatible(f"{name} would have infinite values.", "Check lora_alpha of the adapters.")
    return merged


def _check_all(adapters: list[PeftAdapter], num_merged: int) -> None:
    """Assert that no linear of any adapter was left out; their names were checked against the base's shape."""
    assert num_merged == len(set().union(*(adapter.pairs for adapter in adapters))), "the base lacks linears"


def _dtype_entries(folder: Path, dtype: torch.dtype | None) -> dict[str, Any]:
    """What config.json says of the dtype, which transformers called torch_dtype before it called it dtype."""
    if dtype is None:
        return {}
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = str(dtype).removeprefix("torch.")
    return {key: name for key in ("dtype", "torch_dtype") if key in config} or {"dtype": name}


def _record(base: BaseInfo, adapters: list[PeftAdapter]) -> dict[str, Any]:
    """What the folder was made of."""
    return {
        "base": {"name": base.name, "sha256": base.sha256},
        "adapters": [{"folder": adapter.folder.name, "sha256": adapter.digest.hexdigest()} for adapter in adapters],
    }
