"""PEFT's adapter_config.json: what of it is applied, what changes nothing, and what is refused by name.

Nothing that changes the result is left out in silence; PEFT 0.21's `LoraConfig` was gone through key by key. The
file comes from anywhere: its size is bounded, and so is the time of the regular expressions in it.
"""

import json
import math
import time
from collections.abc import Mapping, Sequence
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
MAX_PATTERNS = 1_024
MAX_PATTERN_CHARS = 2_000
MAX_SECONDS = 0.5
"""For all expressions of a file; one can be written that takes for ever."""


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """A LoRA's configuration, checked and resolved for the modules of a base."""

    made_for: str  # base_model_name_or_path, as the adapter has it
    is_dora: bool
    is_rs: bool
    notes: tuple[str, ...]  # what was seen and left out, because PEFT leaves it out too
    targets: frozenset[str]  # modules that PEFT would give an adapter
    ranks: Mapping[str, float]  # of every module of the base, by `rank_pattern` or `r`
    alphas: Mapping[str, float]  # likewise

    @classmethod
    def read(cls, path: Path, modules: Sequence[str]) -> "PeftConfig":
        """Read and check the file for a base with modules of these names (`model.layers.0.self_attn.q_proj`, …).

        Raises `AdapterIncompatible`, naming the key; `OSError` if the file cannot be read.
        """
        config = _read_json(path)
        _check_kind(path, config)
        notes = _check_keys(path, config)
        names = _Names(path, modules)
        return cls(
            made_for=str(config.get("base_model_name_or_path")),
            is_dora=_flag(path, config, "use_dora"),
            is_rs=_flag(path, config, "use_rslora"),
            notes=notes,
            targets=_targets(path, config, names),
            ranks=names.look_up("rank_pattern", config.get("rank_pattern"), _number(path, config, "r", 8)),
            alphas=names.look_up("alpha_pattern", config.get("alpha_pattern"), _number(path, config, "lora_alpha", 8)),
        )

    def scaling_of(self, module: str, rank: int) -> float:
        """PEFT's scaling: alpha / r, or alpha / sqrt(r) with rsLoRA (`LoraLayer.update_layer`)."""
        return self.alphas[module] / (math.sqrt(rank) if self.is_rs else rank)


class _Names:
    """The modules of a base, found by names and expressions in a file that may say anything."""

    def __init__(self, path: Path, modules: Sequence[str]) -> None:
        self._path, self._modules = path, modules
        self._ends: dict[str, list[str]] = {}  # all names that end so behind a dot
        for module in modules:
            parts = module.split(".")
            for first in range(len(parts)):
                self._ends.setdefault(".".join(parts[first:]), []).append(module)
        self._deadline = time.monotonic() + MAX_SECONDS

    @property
    def every(self) -> set[str]:
        """All modules."""
        return set(self._modules)

    def ending(self, names: list[str]) -> set[str]:
        """Modules of these names, or whose names end so behind a dot."""
        return {module for name in names for module in self._ends.get(name, ())}

    def matching(self, key: str, pattern: str) -> list[str]:
        """Modules whose whole name an expression matches. Raises `AdapterIncompatible` if that takes too long."""
        import regex  # as `re`, but can be told to stop

        try:
            if len(pattern) > MAX_PATTERN_CHARS:
                raise ValueError(f"{len(pattern)} characters")
            compiled = regex.compile(pattern)
            return [m for m in self._modules if compiled.fullmatch(m, timeout=self._seconds_left()) is not None]
        except TimeoutError as error:
            raise AdapterIncompatible(
                f"{self._path}: {key} has an expression that takes too long ('{pattern[:60]}').",
                "Name the modules instead.",
            ) from error
        except Exception as error:  # an expression may be wrong in more ways than the parser has errors for
            raise AdapterIncompatible(
                f"{self._path}: {key} cannot be read ({type(error).__name__}: {str(error)[:80]}).", "Export it again."
            ) from error

    def look_up(self, key: str, table: object, default: float) -> dict[str, float]:
        """The number of every module: of the first pattern that matches a whole name or its end behind a dot.

        So does PEFT (`peft.utils.other.get_pattern_key`).
        """
        table = table or {}
        if not isinstance(table, dict) or len(table) > MAX_PATTERNS:
            raise AdapterIncompatible(
                f"{self._path}: {key} is no table of up to {MAX_PATTERNS} patterns.", "Export it again."
            )
        found: dict[str, float] = {}
        for pattern in table:
            value = _number(self._path, table, pattern, 0)
            for module in self._ends.get(pattern) or self.matching(key, rf"(.*\.)?({pattern})"):
                found.setdefault(module, value)
        return {module: found.get(module, default) for module in self._modules}

    def _seconds_left(self) -> float:
        return max(self._deadline - time.monotonic(), 1e-4)


def _targets(path: Path, config: dict[str, Any], names: _Names) -> frozenset[str]:
    """As PEFT's `tuners_utils.check_target_module_exists`; None, which no saved file has, is every linear."""
    found = names.every
    target, excluded = (config.get(key) for key in ("target_modules", "exclude_modules"))
    if isinstance(target, str) and target != "all-linear":
        found = set(names.matching("target_modules", target))
    elif isinstance(target, list):
        layers = _layers(path, config)
        found = {
            module
            for module in names.ending(_as_names(path, "target_modules", target))
            # A module that is named in full is meant whatever the layers say, as in PEFT.
            if layers is None or module in target or int(module.split(".")[2]) in layers
        }
    elif target is not None and target != "all-linear":
        _as_names(path, "target_modules", target)
    if isinstance(excluded, str) and excluded:
        return frozenset(found - set(names.matching("exclude_modules", excluded)))
    return frozenset(found - names.ending(_as_names(path, "exclude_modules", excluded or [])))


def _as_names(path: Path, key: str, value: object) -> list[str]:
    if isinstance(value, list) and len(value) <= MAX_PATTERNS and all(isinstance(name, str) for name in value):
        return value
    raise AdapterIncompatible(f"{path}: {key} is neither a list of names nor an expression.", "Export it again.")


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
