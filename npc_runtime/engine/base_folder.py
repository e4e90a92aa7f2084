"""A model folder, as far as that can be told without its tensors: can we run it, and which files are its weights."""

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from npc_runtime.errors import StartupError

__all__ = [
    "INDEX",
    "SUPPORTED",
    "TOKENIZERS",
    "choose_weights",
    "is_complete",
    "read_index",
    "read_raw_config",
    "weight_files",
]

INDEX = "model.safetensors.index.json"

SINGLE = "model.safetensors"

SUPPORTED = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "SmolLM3ForCausalLM",
)
"""Architectures that `model.py` computes; the README names the models."""

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""Any of these is one."""

SHARD = re.compile(r"-\d+-of-\d+\.safetensors$")


def read_raw_config(folder: Path) -> dict[str, Any]:
    """Read config.json as it is. Raises `StartupError` if it is not of a model that this engine can run."""
    path = folder / "config.json"
    if not path.is_file():
        raise StartupError(
            f"{folder} is not a model folder: it has no config.json.",
            "Point --base at the folder that holds config.json and *.safetensors.",
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        architecture = (raw.get("architectures") or ["none"])[0]
    except (OSError, ValueError, AttributeError, LookupError, TypeError, RecursionError) as error:
        raise StartupError(f"{path} cannot be read ({error}).", "Fetch the model again.") from error
    if architecture not in SUPPORTED:
        raise StartupError(
            f"{folder}: the architecture {architecture} is not supported.", f"Supported are {', '.join(SUPPORTED)}."
        )
    return dict(raw)


def weight_files(folder: Path) -> list[Path]:
    """The weights of a model folder. Raises `StartupError` if there are none, or fewer than the index names."""
    names = {path.name for path in folder.glob("*.safetensors")}
    chosen = choose_weights(names, read_index(folder / INDEX) if (folder / INDEX).is_file() else None)
    missing = [name for name in chosen if not (folder / name).is_file()]
    if missing:
        raise StartupError(f"{folder} lacks {', '.join(missing)}.", "Fetch the model again.")
    if not chosen:
        raise StartupError(
            f"{folder} is not a model folder: it has no *.safetensors file.",
            "Weights in pickle formats (.bin, .pt) are never loaded; get the safetensors files of the model.",
        )
    return [folder / name for name in chosen]


def choose_weights(names: Collection[str], indexed: Collection[str] | None) -> list[str]:
    """The files that the index names, or the one usual file, or whatever there is; some folders hold copies."""
    if indexed is not None:
        return sorted(indexed)
    return [SINGLE] if SINGLE in names else sorted(name for name in names if name.endswith(".safetensors"))


def read_index(path: Path) -> set[str]:
    """The weight files that an index names. Raises `StartupError`."""
    try:
        return {str(name) for name in json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise StartupError(f"{path} cannot be read ({error}).", "Fetch the model again.") from error


def is_complete(folder: Path) -> bool:
    """Whether everything is there that a download of the model brings. Shards without their index are a part of it."""
    if not (folder / "config.json").is_file() or not any((folder / name).is_file() for name in TOKENIZERS):
        return False
    try:
        files = weight_files(folder)
    except StartupError:
        return False
    return (folder / INDEX).is_file() or not any(SHARD.search(path.name) for path in files)
