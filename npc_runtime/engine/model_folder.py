"""A model folder while it is written: weights in shards, their index, and all that comes beside them.

It takes its final name by one rename, so what is half written is never mistaken for a model.
"""

import json
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

from npc_kernels.quant import BaseWeight
from torch import Tensor

from npc_runtime.engine.base_folder import INDEX
from npc_runtime.engine.checkpoints import to_parts
from npc_runtime.engine.embedded import put_in_place

__all__ = ["ModelFolder"]

SHARD_BYTES = 1 << 30
"""Tensors that are held back until they are written."""

NOT_COPIED = ("*.safetensors", INDEX, "*.bin", "*.pt", "*.pth", "*.gguf", "quant*_config.json", "config.json")
"""What the weights replace, and the source's weights in other formats."""

MAX_COPIED_BYTES = 64 << 20
"""Larger files are no tokenizer."""


class ModelFolder:
    """Writes a folder like `source` with other weights. All methods raise `OSError` when the disk is full."""

    def __init__(self, source: Path, final: Path) -> None:
        """Make a temporary folder beside the final one."""
        self._source, self._final = source, final
        final.parent.mkdir(parents=True, exist_ok=True)
        self._work = Path(tempfile.mkdtemp(prefix="making-", dir=final.parent))
        self._shard: dict[str, Tensor] = {}
        self._places: dict[str, str] = {}

    def __enter__(self) -> "ModelFolder":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Remove what was not finished."""
        shutil.rmtree(self._work, ignore_errors=True)

    def add(self, name: str, weight: BaseWeight) -> None:
        """Write a weight, sooner or later."""
        for part, tensor in to_parts(name, weight).items():
            self._shard[part] = tensor.cpu().contiguous()
        if sum(tensor.nbytes for tensor in self._shard.values()) >= SHARD_BYTES:
            self.flush()

    def finish(self, config: dict[str, Any], documents: dict[str, Any]) -> None:
        """Write the rest, with these entries in config.json and documents beside it, and give it its name."""
        self.flush()
        source_config = json.loads((self._source / "config.json").read_text(encoding="utf-8"))
        self._write(INDEX, {"metadata": {"total_size": self.num_bytes}, "weight_map": self._places})
        self._write("config.json", {**source_config, **config})
        for name, document in documents.items():
            self._write(name, document)
        for path in self._source.iterdir():
            if _is_copied(path):
                shutil.copyfile(path, self._work / path.name)
        if self._final.is_dir() and not any(self._final.iterdir()):
            self._final.rmdir()
        self._work.chmod(0o755)  # a temporary folder is made for its owner alone
        put_in_place(self._work, self._final)

    @property
    def num_bytes(self) -> int:
        """The size of the weight files so far."""
        return sum(path.stat().st_size for path in self._work.glob("*.safetensors"))

    def flush(self) -> None:
        """Write what is held back."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        if not self._shard:
            return
        name = f"model-{len(set(self._places.values())) + 1:05}.safetensors"
        try:
            save_file(self._shard, self._work / name, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(str(error)) from error
        self._places.update(dict.fromkeys(self._shard, name))
        self._shard.clear()

    def _write(self, name: str, document: dict[str, Any]) -> None:
        (self._work / name).write_text(json.dumps(document, indent=2), encoding="utf-8")


def _is_copied(path: Path) -> bool:
    if not path.is_file() or path.stat().st_size > MAX_COPIED_BYTES:
        return False
    return not any(path.match(pattern) for pattern in NOT_COPIED)
