"""Reads a LoRA in PEFT's folder format into adapter pages, refusing by name whatever would not be applied.

Nothing is unpickled, and every shape is checked from the file's header before a tensor is read.
"""

import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from npc_kernels.batch import PAGE_RANK, LoraSpan
from torch import Tensor

from npc_runtime.engine.model import ModelShape, PageLayout
from npc_runtime.errors import AdapterIncompatible, AdapterMissing

__all__ = ["MAX_RANK", "AdapterPages", "load_peft_folder"]

MAX_RANK = 64

HINT = "Train a plain LoRA or rsLoRA on the seven linears."
REFUSED = frozenset(
    (
        "bias",
        "lora_bias",
        "modules_to_save",
        "trainable_token_indices",
        "target_parameters",
        "fan_in_fan_out",
        "layer_replication",
        "alora_invocation_tokens",
    )
)
HARMLESS = frozenset(["use_rslora", "eva_config", "megatron_config", "runtime_config"])
BASE_CHANGING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
FLOAT_TYPES = ("F16", "BF16", "F32", "F64")

_TENSOR = re.compile(
    r"base_model\.model\.model\.layers\.(?P<layer>\d+)\.(?P<module>(?:self_attn|mlp)\.(?P<linear>\w+_proj))"
    r"\.lora_(?P<side>[AB])(?:\.default)?\.weight"
)
_PLACES = {  # linear: (group of its layer, slice in the group)
    "q_proj": (0, 0),
    "k_proj": (0, 1),
    "v_proj": (0, 2),
    "o_proj": (1, 0),
    "gate_proj": (2, 0),
    "up_proj": (2, 1),
    "down_proj": (3, 0),
}


@dataclass(frozen=True, slots=True)
class AdapterPages:
    """An adapter in host memory, ready to be copied into the pool."""

    pages: Tensor  # (num_pages, page_elements)
    rank: int
    digest: str  # SHA-256 of weights, configuration and scale: the identity for caches
    made_for: str  # base_model_name_or_path, as the adapter has it


def load_peft_folder(
    folder: Path, shape: ModelShape, layout: PageLayout, *, dtype: torch.dtype, scale: float = 1.0
) -> AdapterPages:
    """Read one adapter. All scaling (alpha/r, rsLoRA, alpha_pattern, `scale`) is folded into `B`.

    Raises `AdapterMissing` or `AdapterIncompatible`, naming the file and, where there is one, the tensor.
    """
    config_path, weights_path = _find_files(folder)
    config = _read_config(config_path)
    scaling = _Scaling(config_path, config, scale)
    made_for = str(config.get("base_model_name_or_path"))
    try:
        names = _check_header(weights_path, shape, layout, made_for)
        raw = weights_path.read_bytes()
    except OSError as error:
        raise AdapterMissing(f"{weights_path} cannot be read ({error}).", "Check the file.") from error
    pairs = _read_pairs(weights_path, raw, names)
    rank = max((a.shape[0] for a, _ in pairs.values()), default=0)
    if rank == 0:
        raise AdapterIncompatible(f"{weights_path} holds no LoRA tensors.", "Train or export it again.")
    pages = torch.zeros(-(-rank // PAGE_RANK), layout.num_elements, dtype=dtype)
    for (layer, module), (a, b) in pairs.items():
        group, index = _PLACES[module.split(".")[1]]
        factor = scaling.of(f"model.layers.{layer}.{module}", a.shape[0])
        _write_pair(pages, layout.layers[layer][group], index, a, b.float().T * factor)
    if not torch.isfinite(pages).all():
        raise AdapterIncompatible(
            f"{weights_path}: its values times lora_alpha / r do not fit {dtype}.",
            "Check lora_alpha, or train it again.",
        )
    digest = hashlib.sha256(raw + config_path.read_bytes() + repr(scale).encode()).hexdigest()
    return AdapterPages(pages, rank, digest, made_for)


def _find_files(folder: Path) -> tuple[Path, Path]:
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if not folder.is_dir():
        raise AdapterMissing(
            f"The adapter folder {folder} does not exist.",
            "Train it (npc-runtime train), correct the persona's 'adapter', or remove that key for a prompt-only "
            "persona.",
        )
    for path in (config, weights):
        if not path.is_file():
            pickled = weights.with_suffix(".bin").is_file() and path == weights
            hint = "adapter_model.bin is a pickle and never loaded; save it with safe_serialization=True."
            raise AdapterMissing(f"{path} does not exist.", hint if pickled else "Copy the whole PEFT folder.")
    return config, weights


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(config, dict)
    except (OSError, ValueError, RecursionError, AssertionError) as error:
        raise AdapterIncompatible(f"{path} is not a PEFT configuration ({error}).", "Export it again.") from error
    kind = str(config.get("peft_type")).upper()
    if kind != "LORA":
        raise AdapterIncompatible(f"{path}: peft_type {kind} is not supported.", HINT)
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(BASE_CHANGING_STARTS):
        raise AdapterIncompatible(
            f"{path}: init_lora_weights '{start}' changes the base, which this adapter shares with all others.",
            "Convert it to a plain LoRA (PEFT: save_pretrained with path_initial_model_for_weight_conversion).",
        )
    for key, value in config.items():
        is_option = key in REFUSED or key.startswith("use_") or key.endswith("_config")
        if is_option and key not in HARMLESS and value not in (None, False, "none", [], {}):
            raise AdapterIncompatible(f"{path}: {key} is not supported.", HINT)
    return config


class _Scaling:
    """PEFT's scaling of each module: alpha / r, or alpha / sqrt(r) with rsLoRA (`LoraLayer.update_layer`)."""

    def __init__(self, path: Path, config: dict[str, Any], scale: float) -> None:
        pattern = config.get("alpha_pattern") or {}
        try:
            self._alpha = float(config.get("lora_alpha", 8))
            # A pattern matches a whole name or its end behind a dot, as in peft.utils.get_pattern_key.
            self._pattern = [(re.compile(rf"(.*\.)?({key})"), float(value)) for key, value in pattern.items()]
        except (TypeError, ValueError, AttributeError, re.error) as error:
            raise AdapterIncompatible(
                f"{path}: lora_alpha or alpha_pattern cannot be read ({error}).", "Export it again."
            ) from error
        self._rs = config.get("use_rslora") or False
        if not isinstance(self._rs, bool):
            raise AdapterIncompatible(f"{path}: use_rslora is not true or false.", "Export it again.")
        self._scale = scale

    def of(self, module: str, rank: int) -> float:
        alpha = next((value for pattern, value in self._pattern if pattern.fullmatch(module)), self._alpha)
        return self._scale * alpha / (math.sqrt(rank) if self._rs else rank)


Names = dict[str, tuple[re.Match[str], tuple[int, ...]]]  # tensor: its parts, its shape
Pairs = dict[tuple[int, str], tuple[Tensor, Tensor]]  # (layer, module): (A (r, in), B (out, r))


def _check_header(path: Path, shape: ModelShape, layout: PageLayout, made_for: str) -> Names:
    """Check names, shapes and types without reading a tensor."""
    from safetensors import SafetensorError, safe_open

    names = {}
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                match = _TENSOR.fullmatch(name)
                if match is None or match["linear"] not in _PLACES:
                    raise AdapterIncompatible(
                        f"{path}: the tensor {name} is not one this engine applies.",
                        "Supported is LoRA on q, k, v, o, gate, up and down projections.",
                    )
                part = file.get_slice(name)
                found = tuple(part.get_shape())
                _check_shape(path, name, match, found, shape, layout, made_for)
                if part.get_dtype() not in FLOAT_TYPES:
                    raise AdapterIncompatible(
                        f"{path}: the tensor {name} is of type {part.get_dtype()}.", "Save it in bfloat16 or float32."
                    )
                names[name] = match, found
    except SafetensorError as error:
        raise _damaged(path, error) from error
    return names


def _read_pairs(path: Path, raw: bytes, names: Names) -> Pairs:
    """Take the tensors from the file's bytes: those of the digest, and `safe_open` leaks with every tensor it reads."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors: dict[str, Tensor] = load(raw)
    except (SafetensorError, ValueError, KeyError) as error:
        raise _damaged(path, error) from error
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != {name: names[name][1] for name in names}:
        raise _damaged(path, "it changed while it was read")
    sides: dict[tuple[int, str], dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise AdapterIncompatible(f"{path}: the tensor {name} has NaN or infinite values.", "Train it again.")
        match, _ = names[name]
        sides.setdefault((int(match["layer"]), match["module"]), {})[match["side"]] = tensor
    return {key: _as_pair(path, key, pair) for key, pair in sides.items()}


def _damaged(path: Path, reason: object) -> AdapterIncompatible:
    return AdapterIncompatible(f"{path} is damaged or not a safetensors file ({reason}).", "Copy or export it again.")


def _as_pair(path: Path, key: tuple[int, str], pair: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    if len(pair) != 2 or pair["A"].shape[0] != pair["B"].shape[1]:
        raise AdapterIncompatible(
            f"{path}: layer {key[0]} {key[1]} lacks lora_A or lora_B, or their ranks differ.",
            "Export it again.",
        )
    return pair["A"], pair["B"]


def _check_shape(
    path: Path,
    name: str,
    match: re.Match[str],
    found: tuple[int, ...],
    shape: ModelShape,
    layout: PageLayout,
    made_for: str,
) -> None:
    layer = int(match["layer"])
    hint = f"It was made for '{made_for}'; train one for this base (npc-runtime train)."
    if layer >= shape.num_layers:
        raise AdapterIncompatible(
            f"{path}: {name} belongs to layer {layer}, but this base has {shape.num_layers} layers.", hint
        )
    group, index = _PLACES[match["linear"]]
    span = layout.layers[layer][group]
    axis, size = (1, span.in_features) if match["side"] == "A" else (0, span.out_features[index])
    if len(found) != 2 or found[axis] != size:
        wanted = f"(rank, {size})" if match["side"] == "A" else f"({size}, rank)"
        raise AdapterIncompatible(f"{path}: {name} has shape {found}, this base needs {wanted}.", hint)
    if not 1 <= found[1 - axis] <= MAX_RANK:
        raise AdapterIncompatible(
            f"{path}: {name} has rank {found[1 - axis]}, not 1 to {MAX_RANK}.", "Train it with another rank."
        )


def _write_pair(
    pages: Tensor,  # (num_pages, page_elements), written
    span: LoraSpan,
    index: int,
    a: Tensor,  # (rank, in_features)
    b: Tensor,  # (rank, out_features), scaled
) -> None:
    a_start = span.start + index * PAGE_RANK * span.in_features
    b_start = span.b_start + PAGE_RANK * sum(span.out_features[:index])
    for page, start in enumerate(range(0, a.shape[0], PAGE_RANK)):
        rows = slice(start, start + PAGE_RANK)
        pages[page, a_start : a_start + a[rows].numel()] = a[rows].flatten().to(pages.dtype)
        pages[page, b_start : b_start + b[rows].numel()] = b[rows].flatten().to(pages.dtype)
