"""PEFT's adapter_config.json: what of it is applied, what changes nothing, and what is refused by name.

Nothing that changes the result is left out in silence; PEFT 0.21's `LoraConfig` was gone through key by key. The
file comes from anywhere: its size is bounded, and so is the work of the regular expressions in it.
"""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npc_runtime.errors import AdapterIncompatible

__all__ = ["PeftConfig"]

HINT = "Train a plain LoRA, rsLoRA or DoRA on the seven linears."
REFUSED = {
    "bias": "Train it with bias='none': the base's biases are shared by all personas.",
    "lora_bias": "Train it with lora_bias=False.",
    "modules_to_save": "Train it without: whole modules cannot be shared with other personas; a persona of its own "
    "daemon can have them merged into the base with PEFT.",
    "trainable_token_indices": "Train it without: the embedding is shared by all personas.",
    "target_parameters": "Experts and bare parameters are not supported; train it on the seven linears.",
    "fan_in_fan_out": "It is for GPT-2's Conv1D, which no supported base has.",
    "layer_replication": "It makes another model of the base; merge it with PEFT and serve that.",
    "alora_invocation_tokens": "An activated LoRA changes in the middle of a prompt; train a plain one.",
}
APPLIED = frozenset(
    [
        *["peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"],
        *["target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"],
        *["init_lora_weights", "base_model_name_or_path"],
    ]
)
HARMLESS = frozenset(
    [
        *["task_type", "auto_mapping", "peft_version", "revision", "inference_mode"],  # nobody reads these
        *["lora_dropout", "eva_config", "velora_config", "runtime_config", "ensure_weight_tying"],  # training does
        *["megatron_config", "megatron_core", "qalora_group_size"],  # of bases and variants that are refused
    ]
)
HARMLESS_STARTS = frozenset(["true", "false", "none", "gaussian", "eva", "orthogonal", "mica"])
"""Values of `init_lora_weights` that leave the base as it is. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA do not."""

MAX_BYTES = 1 << 20
MAX_PATTERNS = 4_096
MAX_REPEATS = 6
"""Of `*`, `+` and `{` in one expression, none of them around a group: what is left takes polynomial time."""
MAX_REPEATING = 32
"""Expressions of a table that repeat anything."""

_PLAIN = re.compile(r"[\w.]*")
_LITERAL = re.compile(r"\\.|\[\^?\]?[^\]]*\]", re.DOTALL)  # escapes and sets, which repeat nothing
_REPEAT = re.compile(r"[*+{]")

Numbers = tuple[tuple[re.Pattern[str], float], ...]
Names = str | re.Pattern[str] | tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """A LoRA's configuration, checked. Modules are named as in the base: `model.layers.0.self_attn.q_proj`."""

    path: Path
    made_for: str  # base_model_name_or_path, as the adapter has it
    is_dora: bool
    is_rs: bool
    notes: tuple[str, ...]  # what was seen and left out, because PEFT leaves it out too
    _rank: float
    _alpha: float
    _ranks: Numbers
    _alphas: Numbers
    _targets: Names
    _excluded: Names
    _layers: tuple[int, ...] | None

    @classmethod
    def read(cls, path: Path) -> "PeftConfig":
        """Read and check the file. Raises `AdapterIncompatible`, naming the key; `OSError` if it cannot be read."""
        config = _read_json(path)
        _check_kind(path, config)
        return cls(
            path=path,
            made_for=str(config.get("base_model_name_or_path")),
            is_dora=_flag(path, config, "use_dora"),
            is_rs=_flag(path, config, "use_rslora"),
            notes=_check_keys(path, config),
            _rank=_number(path, config, "r", 8),
            _alpha=_number(path, config, "lora_alpha", 8),
            _ranks=_table(path, config, "rank_pattern"),
            _alphas=_table(path, config, "alpha_pattern"),
            _targets=_names(path, config, "target_modules"),
            _excluded=_names(path, config, "exclude_modules"),
            _layers=_layers(path, config),
        )

    def rank_of(self, module: str) -> float:
        """The rank that PEFT would make the module with: `rank_pattern`, else `r`."""
        return _look_up(self._ranks, module, self._rank)

    def scaling_of(self, module: str, rank: int) -> float:
        """PEFT's scaling: alpha / r, or alpha / sqrt(r) with rsLoRA (`LoraLayer.update_layer`)."""
        return _look_up(self._alphas, module, self._alpha) / (math.sqrt(rank) if self.is_rs else rank)

    def has_target(self, module: str) -> bool:
        """Whether PEFT would give the module an adapter (`tuners_utils.check_target_module_exists`)."""
        if self._excluded is not None and _is_among(self._excluded, module):
            return False
        if self._targets is None or self._targets == "all-linear":
            return True
        if not _is_among(self._targets, module):
            return False
        # A module that is named in full is meant whatever the layers say, as in PEFT.
        if self._layers is None or (isinstance(self._targets, tuple) and module in self._targets):
            return True
        return int(module.split(".")[2]) in self._layers


def _read_json(path: Path) -> dict[str, Any]:
    if path.stat().st_size > MAX_BYTES:
        raise AdapterIncompatible(
            f"{path} has {path.stat().st_size} bytes, more than any PEFT configuration.", "Export it again."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it is no JSON object")
    except (ValueError, RecursionError) as error:
        raise AdapterIncompatible(f"{path} is not a PEFT configuration ({error}).", "Export it again.") from error
    return config


def _check_kind(path: Path, config: dict[str, Any]) -> None:
    kind = str(config.get("peft_type")).upper()
    if kind != "LORA":
        raise AdapterIncompatible(f"{path}: peft_type {kind[:40]} is not supported.", HINT)
    start = str(config.get("init_lora_weights", True)).lower()
    if start not in HARMLESS_STARTS:
        raise AdapterIncompatible(
            f"{path}: init_lora_weights '{start[:40]}' changes the base, which this adapter shares with all others.",
            "Convert it to a plain LoRA (PEFT: save_pretrained with path_initial_model_for_weight_conversion).",
        )


def _check_keys(path: Path, config: dict[str, Any]) -> tuple[str, ...]:
    """Refuse what would change the result and is not applied; return notes on keys that nobody knows."""
    notes = []
    for key, value in config.items():
        if value in (None, False, "none", "", [], {}) or key in APPLIED | HARMLESS:
            continue
        if key in REFUSED or key.startswith("use_") or key.endswith("_config"):
            raise AdapterIncompatible(f"{path}: {key} is not supported.", REFUSED.get(key, HINT))
        notes.append(f"{key[:60]} is not a key of PEFT 0.21's LoraConfig and was ignored")
    return tuple(notes)


def _flag(path: Path, config: dict[str, Any], key: str) -> bool:
    value = config.get(key) or False
    if not isinstance(value, bool):
        raise AdapterIncompatible(f"{path}: {key} is not true or false.", "Export it again.")
    return value


def _number(path: Path, config: dict[str, Any], key: str, default: float) -> float:
    try:
        return float(config.get(key, default))
    except (TypeError, ValueError, OverflowError) as error:
        raise AdapterIncompatible(f"{path}: {key} cannot be read ({error}).", "Export it again.") from error


def _table(path: Path, config: dict[str, Any], key: str) -> Numbers:
    """A pattern matches a whole name or its end behind a dot, as in `peft.utils.other.get_pattern_key`."""
    table = config.get(key) or {}
    if not isinstance(table, dict) or len(table) > MAX_PATTERNS:
        raise AdapterIncompatible(f"{path}: {key} is no table of up to {MAX_PATTERNS} patterns.", "Export it again.")
    if sum(_PLAIN.fullmatch(pattern) is None for pattern in table) > MAX_REPEATING:
        raise AdapterIncompatible(
            f"{path}: {key} has more than {MAX_REPEATING} regular expressions.", "Name the modules instead."
        )
    return tuple(
        (_compile(path, key, pattern, rf"(.*\.)?({pattern})"), _number(path, table, pattern, 0)) for pattern in table
    )


def _names(path: Path, config: dict[str, Any], key: str) -> Names:
    value = config.get(key)
    if value is None or value == "all-linear":
        return None if value is None else "all-linear"
    if isinstance(value, str):
        return _compile(path, key, value, value)
    if not isinstance(value, list) or len(value) > MAX_PATTERNS or not all(isinstance(name, str) for name in value):
        raise AdapterIncompatible(f"{path}: {key} is neither a list of names nor a pattern.", "Export it again.")
    return tuple(value)


def _layers(path: Path, config: dict[str, Any]) -> tuple[int, ...] | None:
    """`layers_to_transform`; empty means all, as in PEFT. `layers_pattern` has one answer in the Llama family."""
    value, pattern = config.get("layers_to_transform"), config.get("layers_pattern")
    if value is None or value == []:
        return None
    layers = value if isinstance(value, list) else [value]
    if not all(isinstance(layer, int) for layer in layers):
        raise AdapterIncompatible(f"{path}: layers_to_transform is no list of numbers.", "Export it again.")
    if pattern and "layers" not in (pattern if isinstance(pattern, list) else [pattern]):
        raise AdapterIncompatible(f"{path}: layers_pattern is not 'layers'.", "It belongs to another kind of model.")
    return tuple(layers)


def _compile(path: Path, key: str, pattern: str, whole: str) -> re.Pattern[str]:
    bare = _LITERAL.sub("x", pattern)
    repeats = len(_REPEAT.findall(bare))
    if repeats > MAX_REPEATS or re.search(r"\)[*+{]", bare):
        raise AdapterIncompatible(
            f"{path}: {key} has an expression that could take for ever ('{pattern[:60]}').", "Name the modules instead."
        )
    try:
        return re.compile(whole)
    except (re.error, RecursionError, OverflowError, Warning) as error:
        raise AdapterIncompatible(f"{path}: {key} cannot be read ({error}).", "Export it again.") from error


def _look_up(table: Numbers, module: str, default: float) -> float:
    return next((value for pattern, value in table if pattern.fullmatch(module)), default)


def _is_among(names: Names, module: str) -> bool:
    if isinstance(names, re.Pattern):
        return names.fullmatch(module) is not None
    assert isinstance(names, Iterable)
    return any(module == name or module.endswith(f".{name}") for name in names)
