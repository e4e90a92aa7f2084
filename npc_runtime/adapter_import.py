"""An adapter from elsewhere, PEFT folder or `.nemo` file: checked against a base, described, written as a PEFT folder.

What is written appears under its name all at once, and is read again by the code that the daemon reads it with.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from npc_kernels.batch import PAGE_RANK
from torch import Tensor

from npc_runtime import __version__
from npc_runtime.engine.model import ModelShape, PageLayout
from npc_runtime.engine.nemo_file import read_nemo
from npc_runtime.engine.peft_folder import CONFIG_NAME, WEIGHTS_NAME, PeftAdapter, read_peft_folder
from npc_runtime.engine.weights import BaseInfo, describe_base, read_config
from npc_runtime.errors import AdapterIncompatible, InvalidError

__all__ = ["AdapterReport", "Base", "check_adapter", "import_adapter", "open_adapter"]

RECORD_NAME = "import.json"
"""Where an adapter came from, and for which base it was checked."""

_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NEMO_ENDS = (".nemo", ".tar", ".tar.gz", ".tgz")


@dataclass(frozen=True, slots=True)
class Base:
    """What an adapter is checked against; its weights are not read."""

    info: BaseInfo
    shape: ModelShape

    @classmethod
    def of(cls, name: str, folder: Path) -> "Base":
        """The base of that folder. Raises `StartupError` if it is none."""
        shape = ModelShape.from_config(read_config(folder))
        return cls(describe_base(name, folder), shape)


@dataclass(frozen=True, slots=True)
class AdapterReport:
    """What an adapter is. Sizes are in bytes; pages are for bfloat16."""

    path: str
    source: str  # "PEFT" or "NeMo"
    kind: str
    ranks: dict[int, int]  # rank: number of linears
    targets: dict[str, int]  # linear: number of layers
    num_layers: int
    made_for: str
    base: str
    num_parameters: int
    file_bytes: int
    num_pages: int
    page_bytes: int
    notes: list[str]

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self), ensure_ascii=False)

    def to_text(self) -> str:
        """A table of words, one to a line."""
        targets = ", ".join(
            name if count == self.num_layers else f"{name} ({count} of {self.num_layers} layers)"
            for name, count in self.targets.items()
        )
        ranks = ", ".join(
            str(rank) if len(self.ranks) == 1 else f"{rank} ({count} linears)" for rank, count in self.ranks.items()
        )
        rows = [
            ("kind", f"{self.kind}, from {self.source}"),
            ("rank", ranks),
            ("targets", targets),
            ("made for", f"{self.made_for}; checked against {self.base}"),
            ("size", f"{self.num_parameters:,} numbers, {self.file_bytes / 1e6:,.1f} MB"),
            ("pages", f"{self.num_pages} of {self.page_bytes / 1e6:,.1f} MB in bfloat16"),
            *(("note", note) for note in self.notes),
        ]
        return "\n".join(f"{name:<10} {text}" for name, text in rows)


def check_adapter(path: Path, base: Base, *, max_rank: int) -> AdapterReport:
    """Say what an adapter is, PEFT folder or `.nemo`. Raises `AdapterMissing` or `AdapterIncompatible`."""
    with open_adapter(path, base, max_rank=max_rank) as adapter:
        return _describe(path, adapter, base)


def import_adapter(source: Path, out: Path, base: Base, *, max_rank: int, overwrites: bool = False) -> AdapterReport:
    """Write a checked adapter to `out` as a PEFT folder in safetensors.

    Raises `InvalidError` if there is something already, unless `overwrites`, and then too if that is no adapter; else
    as `check_adapter`, and `OSError` if the disk is full. Nothing is left behind then.
    """
    _check_target(out, overwrites)
    with open_adapter(source, base, max_rank=max_rank) as adapter:
        report = _describe(source, adapter, base)
        record = {
            "source": source.name,
            "sha256": adapter.digest.hexdigest(),
            "base": {"name": base.info.name, "sha256": base.info.sha256},
            "npc_runtime": __version__,
        }
        with _new_folder(out, overwrites) as work:
            for name in (CONFIG_NAME, WEIGHTS_NAME):
                shutil.copyfile(adapter.folder / name, work / name)
            (work / RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            read_peft_folder(work, base.shape, max_rank=max_rank)
    return report


@contextmanager
def open_adapter(path: Path, base: Base, *, max_rank: int, scale: float = 1.0) -> Iterator[PeftAdapter]:
    """The adapter as a PEFT folder that was read; a `.nemo` becomes one for the time being.

    Raises as `check_adapter`.
    """
    if path.is_dir() and not _is_nemo_folder(path):
        yield read_peft_folder(path, base.shape, scale=scale, max_rank=max_rank)
        return
    if path.is_file() and path.suffix in (".safetensors", ".json"):
        raise AdapterIncompatible(f"{path} is a file of an adapter's folder.", f"Name the folder: {path.parent}.")
    if path.is_file() and path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
        raise AdapterIncompatible(
            f"{path} is a pickle and never loaded.", "Save the adapter with PEFT's safe_serialization=True."
        )
    if path.is_file() and not path.name.endswith(NEMO_ENDS):
        raise AdapterIncompatible(f"{path} is neither a PEFT folder nor a .nemo file.", "Name one of those.")
    adapter = read_nemo(path, base.shape)
    with tempfile.TemporaryDirectory(prefix="adapter-") as work:
        _write(Path(work), adapter.config, adapter.tensors)
        try:
            yield read_peft_folder(Path(work), base.shape, scale=scale, max_rank=max_rank)
        except AdapterIncompatible as error:
            raise AdapterIncompatible(error.message.replace(work, str(path)), error.hint) from error


def _is_nemo_folder(path: Path) -> bool:
    """Whether a folder is a checkpoint of NeMo, unpacked, or of NeMo 2."""
    return not (path / CONFIG_NAME).is_file() and any(
        (path / name).exists() for name in ("model_config.yaml", "weights", "model_weights", "context")
    )


def _write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})


def _describe(path: Path, adapter: PeftAdapter, base: Base) -> AdapterReport:
    ranks: dict[int, int] = {}
    targets: dict[str, int] = {}
    for name, pair in adapter.pairs.items():
        linear = name.rpartition(".")[2]
        targets[linear] = targets.get(linear, 0) + 1
        ranks[pair.rank] = ranks.get(pair.rank, 0) + 1
    kind = ("DoRA" if adapter.config.is_dora else "LoRA") + (", scaled as rsLoRA" if adapter.config.is_rs else "")
    tensors = [t for p in adapter.pairs.values() for t in (p.a, p.b, p.magnitude) if t is not None]
    return AdapterReport(
        path=str(path),
        source="PEFT" if path.is_dir() else "NeMo",
        kind=kind,
        ranks=dict(sorted(ranks.items())),
        targets={name: targets[name] for name in _LINEARS if name in targets},
        num_layers=base.shape.num_layers,
        made_for=adapter.config.made_for,
        base=base.info.name,
        num_parameters=sum(tensor.numel() for tensor in tensors),
        file_bytes=sum(tensor.nbytes for tensor in tensors),
        num_pages=-(-adapter.rank // PAGE_RANK),
        page_bytes=PageLayout.of(base.shape).num_elements * torch.bfloat16.itemsize,
        notes=[*adapter.config.notes, *_notes_on_base(adapter, base)],
    )


def _notes_on_base(adapter: PeftAdapter, base: Base) -> list[str]:
    """What is known of the base that the adapter was made for; shapes decide, a name is whatever its folder had."""
    recorded = _recorded_sha256(adapter.folder)
    if recorded == base.info.sha256:
        return []
    if recorded is not None:
        return [f"it was imported for another base than {base.info.name}, by its hash; the shapes fit"]
    if Path(adapter.config.made_for).name.startswith(base.info.name):
        return []
    return [f"its base has another name than {base.info.name}; the shapes fit, but be sure that it is the same model"]


def _recorded_sha256(folder: Path) -> str | None:
    path = folder / RECORD_NAME
    try:
        if path.stat().st_size > 1 << 16:
            return None
        return str(json.loads(path.read_text(encoding="utf-8"))["base"]["sha256"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _check_target(out: Path, overwrites: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrites:
        raise InvalidError(f"{out} exists.", "Choose another folder, or --force to replace that adapter.")
    if not (out / CONFIG_NAME).is_file():
        raise InvalidError(f"{out} is no adapter's folder and is not replaced.", "Choose another folder.")


@contextmanager
def _new_folder(out: Path, overwrites: bool) -> Iterator[Path]:
    """A folder to write to, which becomes `out` at the end; what was there before goes only then."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="making-", dir=out.parent) as temporary:
        work, old = Path(temporary) / "new", Path(temporary) / "old"
        work.mkdir()
        yield work
        if out.exists():
            _check_target(out, overwrites)
            out.rename(old)
        work.rename(out)
