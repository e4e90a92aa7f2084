"""A base in 4 bits: whether it is to be, quantizing it while it is loaded, and the cache of the result.

The linears of the layers become 4 bits, the head 8; the embedding, norms and biases stay as they are. What is kept is
an ordinary model folder (config, tokenizer, safetensors) in our own format, see `checkpoints.py`.
"""

import hashlib
import json
import logging
import re
import shutil
import statistics
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from npc_kernels.quant import GROUPS, BaseWeight, Int4Weight, Int8Weight, quantize_int4, quantize_int8, relative_error
from torch import Tensor

from npc_runtime.engine.base_folder import INDEX, weight_files
from npc_runtime.engine.checkpoints import OWN_FORMAT, OWN_METHOD, read_scheme
from npc_runtime.engine.embedded import OnProgress, cache_folder, sweep
from npc_runtime.engine.model import Kernels, ModelShape
from npc_runtime.engine.model_folder import ModelFolder
from npc_runtime.engine.weights import BaseInfo, place_weights, read_config, read_weights
from npc_runtime.errors import StartupError

__all__ = [
    "Quantize",
    "Quantizer",
    "Report",
    "choose_group",
    "has_code_kernels",
    "is_to_be_quantized",
    "load_quantized",
    "write_quantized",
]

logger = logging.getLogger(__name__)

Quantize = Literal["auto", "int4", "none"]

VERSION = 1
"""Part of the cache folder's name; raise it when the same base would be quantized to something else."""

MIN_PARAMETERS = 1_000_000_000
"""From here `auto` quantizes: a smaller base fits any GPU as it is, and loses more."""

LINEAR = re.compile(r"model\.layers\.\d+\.\w+\.(\w+_proj)\.weight")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
REPORT = "quantization.json"
"""A file of our folders, beside config.json: the `Report`."""


@dataclass(frozen=True, slots=True)
class Report:
    """What became of a base."""

    bytes_before: int  # of the weight files
    bytes_after: int
    errors: dict[str, dict[str, float]]
    """`worst` and `median` of |difference| / |weight| (Frobenius norms), of each kind of linear."""


def has_code_kernels(kernels: Kernels) -> bool:
    """Whether the linears of these kernels take codes; for others they are made dense."""
    return kernels.__name__ == "npc_kernels.gpu"


def is_to_be_quantized(wanted: Quantize, folder: Path, shape: ModelShape, kernels: Kernels) -> bool:
    """Whether to quantize a base at load. Raises `StartupError` where that was asked for and is of no use."""
    if wanted == "int4" and not has_code_kernels(kernels):
        raise StartupError(
            "--quantize int4 needs the GPU kernels, and this daemon does not compute with them.",
            "Leave it out: on a CPU every base runs as it is, the embedded one in the 4 bits it was published in.",
        )
    scheme = read_scheme(folder)
    if wanted == "none" or not has_code_kernels(kernels) or (scheme is not None and scheme.is_final):
        return False
    return wanted == "int4" or _num_parameters(shape) >= MIN_PARAMETERS


def _num_parameters(shape: ModelShape) -> int:
    """Weights of the linears and of the embedding."""
    attention = 2 * shape.hidden * (shape.q_size + shape.kv_size)
    return shape.vocab * shape.hidden + shape.num_layers * (attention + 3 * shape.hidden * shape.intermediate)


def choose_group(in_features: int) -> int:
    """The largest group that divides the inputs; of 32, with the last one filled up, if none does."""
    return next((group for group in GROUPS if in_features % group == 0), GROUPS[-1])


@dataclass(frozen=True, slots=True)
class Quantizer:
    """A base that is quantized tensor by tensor, on a device."""

    info: BaseInfo
    device: torch.device
    on_progress: OnProgress
    errors: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def weights(self) -> Iterator[tuple[str, BaseWeight]]:
        """Read the base once; what is not to be quantized passes as it is."""
        label, folder = f"quantizing {self.info.name}", self.info.folder
        is_tied = bool(read_config(folder).tie_word_embeddings)
        weights = read_weights(folder, read_scheme(folder), lambda fraction: self.on_progress(label, fraction))
        for name, weight in weights:
            if name == HEAD and is_tied:
                continue  # some files hold a copy
            if isinstance(weight, Tensor) and (name == HEAD or LINEAR.fullmatch(name)):
                yield name, self._quantize(name, weight.to(self.device))
            else:
                yield name, weight
            if isinstance(weight, Tensor) and name == EMBEDDING and is_tied:
                yield HEAD, self._quantize(HEAD, weight.to(self.device))

    def report(self, bytes_after: int) -> Report:
        """What the quantization cost and saved; after `weights`."""
        before = sum(path.stat().st_size for path in weight_files(self.info.folder))
        errors = {
            kind: {"worst": max(found), "median": statistics.median(found)} for kind, found in self.errors.items()
        }
        return Report(before, bytes_after, errors)

    def _quantize(self, name: str, weight: Tensor) -> Int4Weight | Int8Weight:
        packed = quantize_int8(weight) if name == HEAD else quantize_int4(weight, choose_group(weight.shape[1]))
        self.errors[name.split(".")[-2]].append(relative_error(weight, packed))
        return packed


def load_quantized(
    info: BaseInfo, *, dtype: torch.dtype, device: torch.device, on_progress: OnProgress
) -> Iterator[tuple[str, BaseWeight]]:
    """Yield the base's weights on a device, in 4 bits: from the cache, or quantized there and put into the cache.

    A cache that cannot be written costs the next start the same work, and a warning.
    """
    kept = _cached(info)
    if _is_intact(kept):
        label = f"loading {info.name} in 4 bits"
        weights = read_weights(kept, read_scheme(kept), lambda fraction: on_progress(label, fraction))
    else:
        weights = _keep(Quantizer(info, device, on_progress), kept)
    return place_weights(weights, dtype=dtype, device=device, keeps_codes=True)


def write_quantized(
    info: BaseInfo, target: Path | None, *, device: torch.device, on_progress: OnProgress
) -> tuple[Path, Report]:
    """Quantize a base into a folder, or for None into the cache, where it may be already. Returns where it is.

    Raises `StartupError` if the folder is not empty or cannot be written, or if the base has codes of its own.
    """
    scheme = read_scheme(info.folder)
    if scheme is not None and scheme.is_final:
        raise StartupError(f"{info.folder} is quantized already ({scheme.method}).", "Use it as it is: --base FOLDER.")
    if target is not None and target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise StartupError(f"{target} exists and is not an empty folder.", "Choose another --out.")
    final = target or _cached(info)
    if target is not None or not _is_intact(final):
        quantizer = Quantizer(info, device, on_progress)
        try:
            if target is None:  # nobody else's folder is swept
                sweep(final.parent)
            with ModelFolder(info.folder, final) as folder:
                for name, weight in quantizer.weights():
                    folder.add(name, weight)
                _finish(folder, quantizer)
        except OSError as error:
            raise StartupError(
                f"The quantized base cannot be written to {final.parent} ({error}).",
                "It needs about a third of the base's room; choose another --out, or set NPC_RUNTIME_CACHE.",
            ) from error
    return final, _read_report(final)


def _keep(quantizer: Quantizer, final: Path) -> Iterator[tuple[str, BaseWeight]]:
    """Pass weights on and write them beside; the base starts whether that can be done or not."""
    with ExitStack() as stack:
        folder: ModelFolder | None = None
        try:
            sweep(final.parent)
            folder = stack.enter_context(ModelFolder(quantizer.info.folder, final))
        except OSError as error:
            _warn(final, error)
        for name, weight in quantizer.weights():
            try:
                if folder:
                    folder.add(name, weight)
            except OSError as error:
                _warn(final, error)
                stack.close()  # makes room
                folder = None
            yield name, weight
        try:
            if folder:
                _finish(folder, quantizer)
        except OSError as error:
            _warn(final, error)


def _warn(final: Path, error: OSError) -> None:
    logger.warning("the quantized base cannot be kept in %s (%s): every start makes it again", final.parent, error)


def _finish(folder: ModelFolder, quantizer: Quantizer) -> None:
    entry = {"quant_method": OWN_METHOD, "format": OWN_FORMAT, "bits": 4, "head_bits": 8}
    folder.flush()
    report = asdict(quantizer.report(folder.num_bytes))
    folder.finish({"quantization_config": entry}, {REPORT: report})


def _cached(info: BaseInfo) -> Path:
    """Its place; a base whose files were written anew since is another one, though its fingerprint may be the same."""
    stamps = hashlib.sha256(info.sha256.encode())
    for path in weight_files(info.folder):
        status = path.stat()
        stamps.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return cache_folder() / "quantized" / f"{stamps.hexdigest()[:16]}-int4-v{VERSION}"


def _is_intact(folder: Path) -> bool:
    """Whether a cached base is there and whole; a damaged one is removed."""
    if not folder.is_dir():
        return False
    try:
        _read_report(folder)
        wanted = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].keys()
        problem = None if _tensor_names(folder) == set(wanted) else "tensors are missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StartupError) as error:
        problem = str(error)
    if problem:
        logger.warning("the quantized base in the cache is damaged (%s); it is made again", problem)
        shutil.rmtree(folder, ignore_errors=True)
    return problem is None


def _tensor_names(folder: Path) -> set[str]:
    """What the headers name; they have the sizes of their files, so this fails for a file that was cut off."""
    from safetensors import SafetensorError, safe_open

    names: set[str] = set()
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                names.update(file.keys())
        except SafetensorError as error:
            raise OSError(f"{path.name}: {error}") from error
    return names


def _read_report(folder: Path) -> Report:
    return Report(**json.loads((folder / REPORT).read_text(encoding="utf-8")))
