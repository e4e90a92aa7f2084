"""Reads a LoRA from a `.nemo` file of NVIDIA NeMo 1 and gives it PEFT's names; it writes nothing.

A `.nemo` is a tar, perhaps with gzip, of `model_config.yaml` and `model_weights.ckpt`, a file of `torch.save`. Its
layout is that of NVIDIA/NeMo, scripts/checkpoint_converters/lora_converters/convert_nemo_to_canonical.py
(`convert_lora_weights_to_canonical`), which agrees with `TransformFns.split_qkv` and `split_fc1` of
nemo/lightning/io/state.py and with what nemo/collections/nlp/modules/common/megatron/adapters/mcore_mixins.py computes:

    lora_kqv_adapter              q, k and v share A; the rows of B go by groups of query heads that share a key head:
                                  the group's query heads, its key head, its value head, and then the next group
    lora_dense_attention_adapter  o
    lora_hto4h_adapter            gate and up share A; the first half of B is gate's
    lora_4htoh_adapter            down
    lora_unfused_…                q, k, v and gate, up with pairs of their own ("canonical")

For example, with 4 query heads and 2 key heads B of q, k and v has the rows of q0 q1 k0 v0 q2 q3 k1 v1. An earlier
version of that converter (13d8018b) took all of q, then k, then v, which is not what NeMo computes. Scaling is
alpha / adapter_dim, and 1 without an alpha (`ParallelLinearAdapter` of parallel_adapters.py, beside mcore_mixins.py).
NeMo 2's names of the same tensors (`linear_qkv.adapter`, nemo/collections/llm/gpt/model/llama.py) are read too.

Nothing is unpickled but tensors: torch maps the file and reads it with `weights_only`, after sizes were checked.
"""

import gzip
import re
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from npc_runtime.engine.model import ModelShape
from npc_runtime.engine.peft_folder import linear_sizes
from npc_runtime.errors import AdapterIncompatible, AdapterMissing

__all__ = ["NemoAdapter", "read_nemo"]

CONFIG, WEIGHTS = "model_config.yaml", "model_weights.ckpt"

MAX_CONFIG_BYTES = 1 << 20
MAX_PICKLE_BYTES = 4 << 20
"""Names and shapes of the tensors, without their values."""
MAX_MEMBERS = 10_000
MAX_RANK = 128
SLACK_BYTES = 16 << 20

FLOAT_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_LAYER = re.compile(r"(?:model\.)?(?:module\.)*decoder\.layers\.(\d{1,4})\.(.+)\.(linear_in|linear_out)\.weight")
_ADAPTERS = {  # (NeMo's module): the linears that its B has the rows of, in PEFT's names
    "self_attention.adapter_layer.lora_kqv_adapter": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention.adapter_layer.lora_unfused_kqv_adapter.q_adapter": ("self_attn.q_proj",),
    "self_attention.adapter_layer.lora_unfused_kqv_adapter.k_adapter": ("self_attn.k_proj",),
    "self_attention.adapter_layer.lora_unfused_kqv_adapter.v_adapter": ("self_attn.v_proj",),
    "self_attention.adapter_layer.lora_dense_attention_adapter": ("self_attn.o_proj",),
    "mlp.adapter_layer.lora_hto4h_adapter": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.adapter_layer.lora_unfused_hto4h_adapter.gate_adapter": ("mlp.gate_proj",),
    "mlp.adapter_layer.lora_unfused_hto4h_adapter.up_adapter": ("mlp.up_proj",),
    "mlp.adapter_layer.lora_4htoh_adapter": ("mlp.down_proj",),
    "self_attention.linear_qkv.adapter": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention.linear_qkv.adapter.adapter_q": ("self_attn.q_proj",),
    "self_attention.linear_qkv.adapter.adapter_k": ("self_attn.k_proj",),
    "self_attention.linear_qkv.adapter.adapter_v": ("self_attn.v_proj",),
    "self_attention.linear_proj.adapter": ("self_attn.o_proj",),
    "mlp.linear_fc1.adapter": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.linear_fc1.adapter.adapter_gate": ("mlp.gate_proj",),
    "mlp.linear_fc1.adapter.adapter_up": ("mlp.up_proj",),
    "mlp.linear_fc2.adapter": ("mlp.down_proj",),
}
_OTHER_FORMS = (  # (what a member of the archive is called, what such a file is, what to do)
    (
        r"model_weights/.+",
        "a distributed checkpoint (model_weights/ in zarr or torch_dist form)",
        "Load it in NeMo and save it with one model_weights.ckpt, or export it to PEFT.",
    ),
    (
        r"(mp_rank|tp_rank)_\d+.*/model_weights\.ckpt",
        "split over tensor or pipeline parallel ranks",
        "Unite it with NeMo's scripts/checkpoint_converters/lora_converters/to_tp1.py.",
    ),
    (r"(weights|context)/.+", "a checkpoint of NeMo 2", "Export it in NeMo: llm.export_ckpt(path, target='hf-peft')."),
)


@dataclass(frozen=True, slots=True)
class NemoAdapter:
    """A NeMo LoRA in PEFT's names."""

    config: dict[str, Any]  # an adapter_config.json
    tensors: dict[str, Tensor]  # of an adapter_model.safetensors


def read_nemo(path: Path, shape: ModelShape) -> NemoAdapter:
    """Read a `.nemo` LoRA that was made for a base of this shape.

    Raises `AdapterMissing` or `AdapterIncompatible`, naming the file and, where there is one, the tensor.
    """
    if path.is_dir():
        raise AdapterIncompatible(f"{path} is {_OTHER_FORMS[2][1]}, or a folder of another kind.", _OTHER_FORMS[2][2])
    if not path.is_file():
        raise AdapterMissing(f"The adapter {path} does not exist.", "Correct the path.")
    try:
        with tempfile.TemporaryDirectory(prefix="nemo-", ignore_cleanup_errors=True) as work:
            raw_config, weights = _extract(path, Path(work), _max_bytes(shape))
            config = _Config(path, _parse(path, raw_config), shape)
            tensors = _convert(path, config, _load(path, weights))
    except (tarfile.TarError, zlib.error, EOFError, gzip.BadGzipFile) as error:
        raise _damaged(path, error) from error
    except OSError as error:
        raise AdapterMissing(
            f"{path} cannot be read ({error}).", "Check the file, and the room for temporary files."
        ) from error
    return NemoAdapter(config.to_peft(tensors), tensors)


def _max_bytes(shape: ModelShape) -> int:
    """The largest adapter of a base: every linear with the highest rank, in float32."""
    return shape.num_layers * MAX_RANK * 4 * sum(sum(size) for size in linear_sizes(shape).values()) + SLACK_BYTES


def _extract(path: Path, work: Path, max_bytes: int) -> tuple[bytes, Path]:
    """Take configuration and weights out of the archive, none of it larger than the base allows."""
    weights = work / WEIGHTS
    with _open_plain(path, work, max_bytes) as plain, tarfile.open(fileobj=plain, mode="r:") as tar:
        members: dict[str, tarfile.TarInfo] = {}
        for member in tar:
            members[member.name.removeprefix("./")] = member
            if len(members) > MAX_MEMBERS:
                raise AdapterIncompatible(f"{path} has more than {MAX_MEMBERS} members.", "It is no adapter.")
        for pattern, what, hint in _OTHER_FORMS:
            if any(re.fullmatch(pattern, name) for name in members):
                raise AdapterIncompatible(f"{path} is {what}, which is not supported.", hint)
        for name, most in ((CONFIG, MAX_CONFIG_BYTES), (WEIGHTS, max_bytes)):
            found = members.get(name)
            if found is None or not found.isreg() or found.issparse():
                raise AdapterIncompatible(
                    f"{path} has no {name}: it is no .nemo of an adapter.", "Save it again in NeMo."
                )
            if found.size > most:
                raise AdapterIncompatible(
                    f"{path}: {name} has {found.size} bytes, an adapter of this base at most {most}.",
                    "It is no adapter, or made for a larger base.",
                )
        config, ckpt = tar.extractfile(members[CONFIG]), tar.extractfile(members[WEIGHTS])
        assert config is not None
        assert ckpt is not None
        with weights.open("wb") as file:
            shutil.copyfileobj(ckpt, file)
        return config.read(), weights


@contextmanager
def _open_plain(path: Path, work: Path, max_bytes: int) -> Iterator[IO[bytes]]:
    """Open the tar; one with gzip is unpacked first, as far as an adapter of the base could reach."""
    with path.open("rb") as file:
        is_packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if not is_packed:
            if path.stat().st_size > max_bytes + SLACK_BYTES:
                raise _too_large(path, max_bytes)
            yield file
            return
        with (work / "unpacked.tar").open("w+b") as plain, gzip.GzipFile(fileobj=file) as packed:
            while block := packed.read(1 << 20):
                plain.write(block)
                if plain.tell() > max_bytes + SLACK_BYTES:
                    raise _too_large(path, max_bytes)
            plain.seek(0)
            yield plain


def _too_large(path: Path, max_bytes: int) -> AdapterIncompatible:
    return AdapterIncompatible(
        f"{path} has more than the {max_bytes} bytes that an adapter of this base can have.",
        "It is no adapter, or made for a larger base.",
    )


def _damaged(path: Path, error: object) -> AdapterIncompatible:
    return AdapterIncompatible(
        f"{path} is damaged or not a .nemo file ({str(error)[:200]}).", "Copy it again, or save it again in NeMo."
    )


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    from ruamel.yaml import YAML

    try:
        config = YAML(typ="safe", pure=True).load(raw.decode())
        if not isinstance(config, dict):
            raise ValueError("it is no table")
    except Exception as error:  # the parser raises half a dozen unrelated types
        raise AdapterIncompatible(
            f"{path}: {CONFIG} cannot be read ({str(error)[:200]}).", "Save it again in NeMo."
        ) from error
    return config


class _Config:
    """`model_config.yaml`, as far as it says what the tensors are."""

    def __init__(self, path: Path, config: dict[str, Any], shape: ModelShape) -> None:
        self._path = path
        self.shape = shape
        self._check_base(config)
        peft = config.get("peft")
        peft = peft if isinstance(peft, dict) else {}
        scheme = peft.get("peft_scheme", "lora")
        if scheme != "lora":
            raise self._refusal(f"peft_scheme {scheme} is not supported.", "Train it with peft_scheme: lora.")
        lora = peft.get("lora_tuning")
        lora = lora if isinstance(lora, dict) else {}
        if lora.get("weight_tying"):
            raise self._refusal("lora_tuning.weight_tying is not supported.", "Train it without.")
        self.rank = self._number(lora, "adapter_dim")
        self.alpha = self._number(lora, "alpha") or self.rank
        source = config.get("restore_from_path") or peft.get("restore_from_path")
        self._made_for = Path(str(source)).name if source else "unknown (a .nemo)"

    def _check_base(self, config: dict[str, Any]) -> None:
        """Compare what the file says of its base with ours."""
        shape = self.shape
        ours = {
            "num_layers": shape.num_layers,
            "hidden_size": shape.hidden,
            "ffn_hidden_size": shape.intermediate,
            "num_attention_heads": shape.num_heads,
            "num_query_groups": shape.num_kv_heads,
            "kv_channels": shape.head_dim,
        }
        for key, wanted in ours.items():
            if config.get(key) is not None and config[key] != wanted:
                raise self._refusal(
                    f"{key} of its base is {str(config[key])[:40]}, this base has {wanted}.",
                    "It was made for another base.",
                )
        for key in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
            if config.get(key) not in (None, 1):
                raise self._refusal(f"{key} is {str(config[key])[:40]}, not 1.", _OTHER_FORMS[1][2])

    def _number(self, table: dict[str, Any], key: str) -> float | None:
        value = table.get(key)
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool) and value > 0):
            return None if value is None else float(value)
        raise self._refusal(f"lora_tuning.{key} is {str(value)[:40]}.", "Correct it, or save it again in NeMo.")

    def to_peft(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """An adapter_config.json."""
        rank = next(tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name)
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self._made_for,
            "r": rank,
            "lora_alpha": rank if self.alpha is None else self.alpha,
            "target_modules": sorted({name.split(".")[6] for name in tensors}),
            "bias": "none",
            "inference_mode": True,
        }

    def _refusal(self, problem: str, hint: str) -> AdapterIncompatible:
        return AdapterIncompatible(f"{self._path}: {problem}", hint)


def _load(path: Path, weights: Path) -> dict[str, Tensor]:
    """The tensors of a `torch.save` file, copied out of it.

    Torch maps the file instead of reading it: storages are then slices of it, which cannot reach beyond its end, and
    nothing is allocated by what the pickle claims.
    """
    hint = "Save it again in NeMo, with torch 1.6 or later."
    try:
        with zipfile.ZipFile(weights) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise AdapterIncompatible(f"{path}: {WEIGHTS} is compressed.", hint)
            if any(entry.filename.endswith(".pkl") and entry.file_size > MAX_PICKLE_BYTES for entry in entries):
                raise AdapterIncompatible(f"{path}: {WEIGHTS} holds more than tensors.", hint)
        table = torch.load(weights, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(table, dict) or not table:
            raise ValueError("it is no table of tensors")
        return {str(name): value for name, value in table.items() if not str(name).endswith("_extra_state")}
    except AdapterIncompatible:
        raise
    except Exception as error:  # whatever is wrong with a file from anywhere
        reason = str(error).partition("\n")[0][:200]
        raise AdapterIncompatible(f"{path}: {WEIGHTS} holds no plain tensors ({reason}).", hint) from error


def _convert(path: Path, config: _Config, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give every tensor its shape's check and PEFT's name."""
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = _LAYER.fullmatch(name)
        linears = _ADAPTERS.get(match[2]) if match else None
        if match is None or linears is None:
            raise AdapterIncompatible(
                f"{path}: the tensor {name[:200]} is not one this engine applies.", _hint_for(name)
            )
        _check(path, config, name, tensor, linears, is_in=match[3] == "linear_in")
        parts = [tensor] * len(linears) if match[3] == "linear_in" else _split(tensor, linears, config.shape)
        side = "A" if match[3] == "linear_in" else "B"
        for linear, part in zip(linears, parts, strict=True):
            key = f"base_model.model.model.layers.{match[1]}.{linear}.lora_{side}.weight"
            if key in result:
                raise AdapterIncompatible(
                    f"{path}: {name} is there twice, fused and by itself.", "Save it again in NeMo."
                )
            result[key] = part.clone().contiguous()
    return result


def _hint_for(name: str) -> str:
    if "language_model.encoder" in name:
        return "It was trained before NeMo's move to Megatron Core (mcore_gpt); train it on such a base."
    if "embedding" in name or "output_layer" in name:
        return "LoRA on embedding or head is not supported; train it on the attention and the MLP."
    if "experts" in name:
        return "Bases with experts are not supported."
    return "Supported are the attention_qkv, attention_dense, mlp_fc1 and mlp_fc2 targets of peft_scheme lora."


def _check(path: Path, config: _Config, name: str, tensor: object, linears: tuple[str, ...], *, is_in: bool) -> None:
    """Check the type and shape of one tensor. Raises `AdapterIncompatible`."""
    if not isinstance(tensor, Tensor) or tensor.dtype not in FLOAT_TYPES or tensor.layout is not torch.strided:
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise AdapterIncompatible(f"{path}: {name} is of type {kind}.", "Save it in bfloat16 or float32.")
    sizes = [linear_sizes(config.shape)[linear] for linear in linears]
    axis, size = (1, sizes[0][0]) if is_in else (0, sum(outputs for _, outputs in sizes))
    found = tuple(tensor.shape)
    if len(found) != 2 or found[axis] != size:
        wanted = f"(rank, {size})" if is_in else f"({size}, rank)"
        raise AdapterIncompatible(
            f"{path}: {name} has shape {found}, this base needs {wanted}.", "It was made for another base."
        )
    rank = found[1 - axis]
    if not 1 <= rank <= MAX_RANK or (config.rank is not None and rank != config.rank):
        wanted = f"1 to {MAX_RANK}" if config.rank is None else f"{config.rank:g}, as adapter_dim says"
        raise AdapterIncompatible(f"{path}: {name} has rank {rank}, not {wanted}.", "Save it again in NeMo.")


def _split(b: Tensor, linears: tuple[str, ...], shape: ModelShape) -> list[Tensor]:
    """The rows of each linear's `B`, in the order of its outputs; see the module's docstring."""
    if len(linears) == 1:
        return [b]
    if len(linears) == 2:
        return list(b.chunk(2))
    groups = b.reshape(shape.num_kv_heads, -1, shape.head_dim, b.shape[1])  # (groups, query heads + 2, head_dim, rank)
    return [part.reshape(-1, b.shape[1]) for part in (groups[:, :-2], groups[:, -2], groups[:, -1])]
