"""The folder of a trained adapter, in PEFT's format: what is in it, and how it takes the place of an older one.

Two equal trainings write equal bytes, and whoever reads the folder meanwhile finds the old files or the new ones.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["install_adapter", "peft_config", "round_adapter"]


def round_adapter(model: Any) -> dict[str, Tensor]:
    """The adapter in bfloat16, as it is saved; the training weights stay as they are."""
    from peft import get_peft_model_state_dict

    tensors = get_peft_model_state_dict(model)
    return {name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in tensors.items()}


def peft_config(model: Any, base_name: str) -> dict[str, Any]:
    """What PEFT itself writes, without what differs between two equal runs: the machine's path, the order of a set."""
    with tempfile.TemporaryDirectory() as folder:
        model.peft_config["default"].save_pretrained(folder)
        config: dict[str, Any] = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
    targets = sorted(config["target_modules"])
    return {**config, "base_model_name_or_path": base_name, "target_modules": targets}


def install_adapter(target: Path, tensors: dict[str, Tensor], config: dict[str, Any], log: dict[str, Any]) -> None:
    """Write all files beside those that are there, then put them in their place, the weights last."""
    from safetensors.torch import save_file

    target.mkdir(parents=True, exist_ok=True)
    names = ("training.json", "adapter_config.json", "adapter_model.safetensors")
    fresh = [target / f"{name}.new" for name in names]
    _write_json(fresh[0], log)
    _write_json(fresh[1], config)
    save_file(tensors, str(fresh[2]), metadata={"format": "pt"})
    for path, name in zip(fresh, names, strict=True):
        os.replace(path, target / name)


def _write_json(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")
