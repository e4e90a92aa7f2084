"""A base model's configuration and its tensors, in the engine's dtype."""

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from npc_kernels.quant import BaseWeight, dequantize, to_device
from torch import Tensor

from npc_runtime.engine.base_folder import read_raw_config, weight_files
from npc_runtime.engine.bases import base_name
from npc_runtime.engine.checkpoints import Scheme, read_scheme, unpack
from npc_runtime.errors import StartupError

__all__ = [
    "BaseInfo",
    "dense_weights",
    "describe_base",
    "iterate_weights",
    "place_weights",
    "read_config",
    "read_weights",
]

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


def describe_base(name: str, folder: Path) -> BaseInfo:
    """Name the base and take its fingerprint. `read_config` has seen that the files are there."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in weight_files(folder):
        with path.open("rb") as file:
            digest.update(file.read(min(int.from_bytes(file.read(8), "little"), 1 << 24)))
            file.seek(max(path.stat().st_size - (1 << 20), 0))
            digest.update(file.read())
    return BaseInfo(base_name(name, folder).rpartition("/")[2], folder, digest.hexdigest())


def read_config(folder: Path) -> Any:
    """Read the folder's configuration. Raises `StartupError` if it is not a model this engine can run."""
    from transformers import AutoConfig

    read_raw_config(folder)
    try:
        read_scheme(folder)
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except StartupError:
        raise
    except Exception as error:  # transformers validates with half a dozen unrelated types
        raise StartupError(f"{folder}/config.json cannot be read ({error}).", "Fetch the model again.") from error
    weight_files(folder)
    return config


def iterate_weights(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    on_progress: Callable[[float], None],
    keeps_codes: bool = False,
) -> Iterator[tuple[str, BaseWeight]]:
    """Yield every weight of the folder on a device; as dense ones, unless codes are kept, in `dtype`.

    Raises `StartupError` for a file that cannot be read.
    """
    weights = read_weights(folder, read_scheme(folder), on_progress)
    return place_weights(weights, dtype=dtype, device=device, keeps_codes=keeps_codes)


def place_weights(
    weights: Iterable[tuple[str, BaseWeight]], *, dtype: torch.dtype, device: torch.device, keeps_codes: bool
) -> Iterator[tuple[str, BaseWeight]]:
    """Bring weights to a device; what codes stand for is made dense, exactly up to `dtype`, unless they are kept."""
    for name, weight in weights:
        if isinstance(weight, Tensor):
            yield name, weight.to(device=device, dtype=dtype)
        elif keeps_codes:
            yield name, to_device(weight, device)
        else:
            yield name, dequantize(to_device(weight, device)).to(dtype)


def dense_weights(folder: Path, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield the named linears of a base, one after the other, dense and in main memory. Raises `StartupError`."""
    weights = read_weights(folder, read_scheme(folder), lambda fraction: None, names=names)
    for name, weight in place_weights(weights, dtype=torch.float32, device=torch.device("cpu"), keeps_codes=False):
        if name in names and isinstance(weight, Tensor):  # a bias has the same front
            yield name, weight


def read_weights(
    folder: Path,
    scheme: Scheme | None,
    on_progress: Callable[[float], None],
    *,
    names: Collection[str] | None = None,
) -> Iterator[tuple[str, BaseWeight]]:
    """Yield the weights of the folder's safetensors files as they are stored, in main memory; of all or of these."""
    stems = None if names is None else {name.removesuffix(".weight") for name in names}
    tensors = _read_tensors(folder, on_progress, stems)
    for name, weight in tensors if scheme is None else unpack(tensors, scheme):
        if isinstance(weight, Tensor) and weight.dtype not in FLOAT_TYPES:
            raise StartupError(f"{folder}: {name} is of type {weight.dtype}.", "Use the float16 or bfloat16 version.")
        yield name, weight


def _read_tensors(
    folder: Path, on_progress: Callable[[float], None], stems: Collection[str] | None
) -> Iterator[tuple[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    files = weight_files(folder)
    for index, path in enumerate(files):
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                names = list(file.keys())
                for done, name in enumerate(names):
                    if stems is None or name.rpartition(".")[0] in stems:
                        yield name, file.get_tensor(name)
                    on_progress((index + (done + 1) / len(names)) / len(files))
        except (SafetensorError, OSError) as error:
            raise StartupError(f"{path} cannot be read ({error}).", "Fetch the model again.") from error
