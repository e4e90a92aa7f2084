"""Where a base model comes from, whether it is one we can run, and its tensors in the engine's dtype."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from npc_runtime.engine.embedded import EMBEDDED_BASE, OnProgress, ensure_embedded_base
from npc_runtime.errors import StartupError

__all__ = ["SUPPORTED", "BaseInfo", "describe_base", "iterate_weights", "read_config", "resolve_base"]

SUPPORTED = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "SmolLM3ForCausalLM",
)
"""Architectures that `model.py` computes; the README names the models."""


FLOAT_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, slots=True)
class BaseInfo:
    """The base as `welcome.base` describes it.

    `sha256` covers config.json, and of each weight file its header and last MiB: enough to tell two bases apart
    in milliseconds. It is not a check of integrity.
    """

    name: str
    folder: Path
    sha256: str


def resolve_base(name: str, on_progress: OnProgress) -> Path:
    """Turn `--base` into a model folder. Raises `StartupError` if it is neither embedded nor a model folder."""
    if name == EMBEDDED_BASE:
        return ensure_embedded_base(on_progress)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise StartupError(
            f"--base {name}: there is no such folder, and no embedded base of that name.",
            f"Use {EMBEDDED_BASE}, or the folder of a Llama-family model (config.json and *.safetensors).",
        )
    return folder


def describe_base(name: str, folder: Path) -> BaseInfo:
    """Name the base and take its fingerprint. `read_config` has seen that the files are there."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in _weight_files(folder):
        with path.open("rb") as file:
            digest.update(file.read(min(int.from_bytes(file.read(8), "little"), 1 << 24)))
            file.seek(max(path.stat().st_size - (1 << 20), 0))
            digest.update(file.read())
    return BaseInfo(name if name == EMBEDDED_BASE else folder.resolve().name, folder, digest.hexdigest())


def read_config(folder: Path) -> Any:
    """Read the folder's configuration. Raises `StartupError` if it is not a model this engine can run."""
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise StartupError(
            f"{folder} is not a model folder: it has no config.json.",
            "Point --base at the folder that holds config.json and *.safetensors.",
        )
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        architecture = (raw.get("architectures") or ["none"])[0]
        if architecture not in SUPPORTED:
            raise StartupError(
                f"{folder}: the architecture {architecture} is not supported.",
                f"Supported are {', '.join(SUPPORTED)}.",
            )
        if raw.get("quantization_config"):
            raise StartupError(
                f"{folder}: quantized checkpoints are not supported yet.",
                "Use the model's float16 or bfloat16 version.",
            )
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except StartupError:
        raise
    except Exception as error:  # transformers validates with half a dozen unrelated types
        raise StartupError(f"{folder}/config.json cannot be read ({error}).", "Fetch the model again.") from error
    _weight_files(folder)
    return config


def iterate_weights(
    folder: Path, *, dtype: torch.dtype, device: torch.device, on_progress: Callable[[float], None]
) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the folder's safetensors files. Raises `StartupError` for a file that is not one."""
    from safetensors import SafetensorError, safe_open

    files = _weight_files(folder)
    for index, path in enumerate(files):
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                names = list(file.keys())
                for done, name in enumerate(names):
                    tensor = file.get_tensor(name)
                    if tensor.dtype not in FLOAT_TYPES:
                        raise StartupError(
                            f"{path}: {name} is of type {tensor.dtype}.", "Use the float16 or bfloat16 version."
                        )
                    yield name, tensor.to(device=device, dtype=dtype)
                    on_progress((index + (done + 1) / len(names)) / len(files))
        except (SafetensorError, OSError) as error:
            raise StartupError(f"{path} cannot be read ({error}).", "Fetch the model again.") from error


def _weight_files(folder: Path) -> list[Path]:
    """The files that the index names, or the one usual file, or whatever there is; some folders hold copies."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            files = sorted(folder / str(name) for name in names)
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise StartupError(f"{index} cannot be read ({error}).", "Fetch the model again.") from error
        missing = [path.name for path in files if not path.is_file()]
        if missing:
            raise StartupError(f"{folder} lacks {', '.join(missing)}.", "Fetch the model again.")
        return files
    files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise StartupError(
            f"{folder} is not a model folder: it has no *.safetensors file.",
            "Weights in pickle formats (.bin, .pt) are never loaded; get the safetensors files of the model.",
        )
    return files
