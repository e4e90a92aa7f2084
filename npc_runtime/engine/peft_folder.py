"""Reads an adapter in PEFT's folder format and checks it against a base, refusing by name what would not be applied.

Nothing is unpickled, and every shape is checked from the file's header before a tensor is read; so what is read is no
larger than the base allows. What the tensors become on the device is said in `AdapterPages`.
"""

import hashlib
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from npc_kernels.batch import PAGE_RANK, LoraSpan
from torch import Tensor

from npc_runtime.engine.lora_pair import LoraPair
from npc_runtime.engine.model import ModelShape, PageLayout
from npc_runtime.engine.peft_config import PeftConfig
from npc_runtime.errors import AdapterIncompatible, AdapterMissing

__all__ = [
    "CONFIG_NAME",
    "MAX_RANK",
    "WEIGHTS_NAME",
    "AdapterPages",
    "BaseWeights",
    "PeftAdapter",
    "linear_sizes",
    "load_peft_folder",
    "read_peft_folder",
]

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
MAX_RANK = 64
"""Unless more is asked for; the engine's kernels go to 128."""
MAX_HEADER_BYTES = 8 << 20
"""A LoRA of a model with 126 layers has 300 kB."""
FLOAT_TYPES = ("F16", "BF16", "F32", "F64")

BaseWeights = Callable[[Collection[str]], Iterable[tuple[str, Tensor]]]
"""Reads the named weights of the base, dense, one after the other."""

_TENSOR = re.compile(
    r"base_model\.model\.(?P<name>model\.layers\.(?P<layer>\d{1,4})\.(?:self_attn|mlp)\.(?P<linear>\w+_proj))"
    r"\.lora_(?:(?P<side>[AB])(?:\.default)?\.weight|(?P<magnitude>magnitude_vector)(?:\.default)?(?:\.weight)?)"
)
_PLACES = {  # linear: (group of its layer, slice in the group)
    "self_attn.q_proj": (0, 0),
    "self_attn.k_proj": (0, 1),
    "self_attn.v_proj": (0, 2),
    "self_attn.o_proj": (1, 0),
    "mlp.gate_proj": (2, 0),
    "mlp.up_proj": (2, 1),
    "mlp.down_proj": (3, 0),
}
_FOREIGN = (  # what a name that no linear has may mean
    (r"lora_embedding_|embed_tokens.*lora_", "LoRA on the embedding", "Train it on the seven linears."),
    (r"lm_head.*lora_", "LoRA on the head", "Train it on the seven linears."),
    (r"experts|block_sparse_moe|\.router\b", "LoRA on experts", "Bases with experts are not supported."),
    (r"lora_[AB](\.default)?\.bias", "a bias of the LoRA", "Train it with lora_bias=False."),
    (r"trainable_tokens", "trained tokens", "Train it without trainable_token_indices."),
    (r"vision|audio|multi_modal", "LoRA on another part than the text model", "Train it on the text model alone."),
    (r"lora_(diag|mean|rho)|monteclora|kasa", "of a LoRA variant", "Train a plain LoRA, rsLoRA or DoRA."),
    (r"lora_", "LoRA on another module", "Supported are q, k, v, o, gate, up and down projections."),
    (r"modules_to_save|norm|weight|bias", "a whole module", "Train it without modules_to_save and with bias='none'."),
)


@dataclass(frozen=True, slots=True)
class AdapterPages:
    """An adapter in host memory, ready to be copied into the pool."""

    pages: Tensor  # (num_pages, page_elements)
    rank: int
    digest: str  # SHA-256 of weights, configuration and scale: the identity for caches
    made_for: str  # base_model_name_or_path, as the adapter has it
    is_dora: bool = False
    multipliers: Tensor | None = None  # (num_outputs,) float32: DoRA's factors, if the base was at hand


@dataclass(frozen=True, slots=True)
class PeftAdapter:
    """An adapter folder, read and checked."""

    folder: Path
    config: PeftConfig
    pairs: dict[str, LoraPair]  # by the name of the base's module, with all scaling but a persona's
    digest: "hashlib._Hash"

    @property
    def rank(self) -> int:
        """The largest rank of any linear."""
        return max(pair.rank for pair in self.pairs.values())

    @property
    def num_pages(self) -> int:
        """Pages of the pool that the adapter needs."""
        return -(-self.rank // PAGE_RANK)


def read_peft_folder(folder: Path, shape: ModelShape, *, scale: float = 1.0, max_rank: int = MAX_RANK) -> PeftAdapter:
    """Read one adapter and check it against the base; `scale` multiplies every scaling, as PEFT's `scale_layer`.

    Raises `AdapterMissing` or `AdapterIncompatible`, naming the file and, where there is one, the tensor.
    """
    config_path, weights_path = _find_files(folder)
    try:
        config = PeftConfig.read(config_path, _modules(shape))
        names = _Header(weights_path, config, shape, max_rank).check()
        raw, raw_config = weights_path.read_bytes(), config_path.read_bytes()
    except OSError as error:
        raise AdapterMissing(f"{folder} cannot be read ({error}).", "Check the files.") from error
    if not names:
        raise AdapterIncompatible(f"{weights_path} holds no LoRA tensors.", "Train or export it again.")
    tensors = _read_tensors(weights_path, raw, names)
    pairs = {
        name: _as_pair(weights_path, config, name, parts, scale) for name, parts in _by_module(tensors, names).items()
    }
    return PeftAdapter(folder, config, pairs, hashlib.sha256(raw + raw_config))


def load_peft_folder(
    folder: Path,
    shape: ModelShape,
    layout: PageLayout,
    *,
    dtype: torch.dtype,
    scale: float = 1.0,
    max_rank: int = MAX_RANK,
    base: BaseWeights | None = None,
) -> AdapterPages:
    """Read one adapter into pages. All scaling (alpha/r, rsLoRA, alpha_pattern, `scale`) is folded into `B`.

    With `base`, DoRA's factors are computed from the base's weights, which takes about as long as reading them. Raises
    as `read_peft_folder`.
    """
    adapter = read_peft_folder(folder, shape, scale=scale, max_rank=max_rank)
    pages = torch.zeros(adapter.num_pages, layout.num_elements, dtype=dtype)
    for name, pair in adapter.pairs.items():
        _write_pair(pages, *_place(layout, name), pair.a, pair.b.float().T * pair.scaling)
    multipliers = None
    if adapter.config.is_dora and base is not None:
        multipliers = _multipliers(adapter, layout, base)
    if not torch.isfinite(pages).all() or (multipliers is not None and not torch.isfinite(multipliers).all()):
        raise AdapterIncompatible(
            f"{folder / WEIGHTS_NAME}: its values times lora_alpha / r, or DoRA's magnitudes, do not fit {dtype}.",
            "Check lora_alpha, or train it again.",
        )
    adapter.digest.update(repr(scale).encode())
    config = adapter.config
    return AdapterPages(pages, adapter.rank, adapter.digest.hexdigest(), config.made_for, config.is_dora, multipliers)


def _find_files(folder: Path) -> tuple[Path, Path]:
    config, weights = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    if not folder.is_dir():
        raise AdapterMissing(
            f"The adapter folder {folder} does not exist.",
            "Train it (npc-runtime train), correct the persona's 'adapter', or remove that key for a prompt-only "
            "persona.",
        )
    for path in (config, weights):
        if not path.is_file():
            pickles = [found.name for found in sorted(folder.iterdir()) if found.suffix in (".bin", ".pt", ".pth")]
            hint = "Copy the whole PEFT folder."
            if pickles and path == weights:
                hint = f"{pickles[0]} is a pickle and never loaded; save it with safe_serialization=True."
            raise AdapterMissing(f"{path} does not exist.", hint)
    return config, weights


class _Named(NamedTuple):
    """A tensor of the file, by its name."""

    module: str  # of the base: model.layers.0.self_attn.q_proj
    part: str  # A, B or magnitude
    shape: tuple[int, ...]


class _Header:
    """The header of a weights file: names, shapes and types, checked without reading a tensor."""

    def __init__(self, path: Path, config: PeftConfig, shape: ModelShape, max_rank: int) -> None:
        self._path, self._config, self._shape, self._max_rank = path, config, shape, max_rank
        self._sizes = linear_sizes(shape)
        self._hint = f"It was made for '{config.made_for[:200]}'; train one for this base (npc-runtime train)."

    def check(self) -> dict[str, _Named]:
        """The tensors by their names in the file. Raises `AdapterIncompatible`, or `OSError`."""
        from safetensors import SafetensorError, safe_open

        self._check_length()
        names: dict[str, _Named] = {}
        try:
            with safe_open(str(self._path), framework="pt", device="cpu") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    part = file.get_slice(name)
                    names[name] = self._check_tensor(name, tuple(part.get_shape()), part.get_dtype())
        except SafetensorError as error:
            raise _damaged(self._path, error) from error
        if len({named[:2] for named in names.values()}) != len(names):
            raise _damaged(self._path, "it has two tensors for one place")
        return names

    def _check_length(self) -> None:
        """Safetensors begins with the length of its header; it would read whatever that says."""
        size = self._path.stat().st_size
        with self._path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise _damaged(self._path, f"{size} bytes, and a header of {length}")

    def _check_tensor(self, name: str, found: tuple[int, ...], dtype: str) -> _Named:
        match = _TENSOR.fullmatch(name)
        module = match["name"].split(".", 3)[3] if match else ""
        if match is None or module not in _PLACES:
            raise _foreign(self._path, name)
        if int(match["layer"]) >= self._shape.num_layers:
            raise self._refusal(
                f"{name} belongs to layer {match['layer']}, but this base has {self._shape.num_layers} layers."
            )
        if dtype not in FLOAT_TYPES:
            raise self._refusal(f"the tensor {name} is of type {dtype}.", "Save it in bfloat16 or float32.")
        named = _Named(match["name"], match["side"] or "magnitude", found)
        self._check_shape(name, named, *self._sizes[module])
        if named.part == "magnitude" and not self._config.is_dora:
            raise self._refusal(f"{name} is DoRA's, but use_dora is not set.", "Set it, or export the adapter again.")
        if named.module not in self._config.targets:
            raise self._refusal(
                f"PEFT would leave {name} out, by target_modules and its like in {CONFIG_NAME}.",
                "Correct the configuration, or export the adapter again.",
            )
        return named

    def _check_shape(self, name: str, named: _Named, in_features: int, out_features: int) -> None:
        found = named.shape
        if named.part == "magnitude":
            if found != (out_features,):
                raise self._refusal(f"{name} has shape {found}, this base needs ({out_features},).")
            return
        axis, size = (1, in_features) if named.part == "A" else (0, out_features)
        if len(found) != 2 or found[axis] != size:
            wanted = f"(rank, {size})" if named.part == "A" else f"({size}, rank)"
            raise self._refusal(f"{name} has shape {found}, this base needs {wanted}.")
        rank = found[1 - axis]
        if not 1 <= rank <= self._max_rank:
            more = " or allow more with --max-adapter-rank 128" if self._max_rank < rank <= 128 else ""
            raise self._refusal(f"{name} has rank {rank}, not 1 to {self._max_rank}.", f"Train it with another{more}.")
        if rank != self._config.ranks[named.module]:
            raise self._refusal(
                f"{name} has rank {rank}, {CONFIG_NAME} says {self._config.ranks[named.module]:g}.",
                "Configuration and weights are of different adapters; copy or export it again.",
            )

    def _refusal(self, problem: str, hint: str | None = None) -> AdapterIncompatible:
        return AdapterIncompatible(f"{self._path}: {problem}", hint or self._hint)


def linear_sizes(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of the linears that an adapter may change, by their names in a layer."""
    return {
        "self_attn.q_proj": (shape.hidden, shape.q_size),
        "self_attn.k_proj": (shape.hidden, shape.kv_size),
        "self_attn.v_proj": (shape.hidden, shape.kv_size),
        "self_attn.o_proj": (shape.q_size, shape.hidden),
        "mlp.gate_proj": (shape.hidden, shape.intermediate),
        "mlp.up_proj": (shape.hidden, shape.intermediate),
        "mlp.down_proj": (shape.intermediate, shape.hidden),
    }


def _modules(shape: ModelShape) -> list[str]:
    return [f"model.layers.{layer}.{module}" for layer in range(shape.num_layers) for module in linear_sizes(shape)]


def _foreign(path: Path, name: str) -> AdapterIncompatible:
    """Say what a tensor is that is no part of a LoRA on the seven linears."""
    for pattern, what, hint in _FOREIGN:
        if re.search(pattern, name):
            return AdapterIncompatible(f"{path}: the tensor {name[:200]} is {what}, which is not applied here.", hint)
    return AdapterIncompatible(
        f"{path}: the tensor {name[:200]} is not one this engine applies.",
        "Supported is LoRA on q, k, v, o, gate, up and down projections.",
    )


def _read_tensors(path: Path, raw: bytes, names: dict[str, _Named]) -> dict[str, Tensor]:
    """Take the tensors from the file's bytes: those of the digest, and `safe_open` leaks with every tensor it reads."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors: dict[str, Tensor] = load(raw)
    except (SafetensorError, ValueError, KeyError) as error:
        raise _damaged(path, error) from error
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != {name: names[name].shape for name in names}:
        raise _damaged(path, "it changed while it was read")
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise AdapterIncompatible(f"{path}: the tensor {name} has NaN or infinite values.", "Train it again.")
    return tensors


def _by_module(tensors: dict[str, Tensor], names: dict[str, _Named]) -> dict[str, dict[str, Tensor]]:
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        modules.setdefault(names[name].module, {})[names[name].part] = tensor
    return modules


def _as_pair(path: Path, config: PeftConfig, name: str, parts: dict[str, Tensor], scale: float) -> LoraPair:
    wanted = {"A", "B", "magnitude"} if config.is_dora else {"A", "B"}
    missing = sorted(wanted - parts.keys())
    if missing:
        raise AdapterIncompatible(
            f"{path}: {name} lacks lora_{missing[0].replace('magnitude', 'magnitude_vector')}.", "Export it again."
        )
    rank = parts["A"].shape[0]
    return LoraPair(parts["A"], parts["B"], scale * config.scaling_of(name, rank), parts.get("magnitude"))


def _damaged(path: Path, reason: object) -> AdapterIncompatible:
    text = str(reason)[:300]
    return AdapterIncompatible(f"{path} is damaged or not a safetensors file ({text}).", "Copy or export it again.")


def _place(layout: PageLayout, name: str) -> tuple[LoraSpan, int]:
    """Where a module lies in a page: its group, and its slice of the group."""
    _, _, layer, module = name.split(".", 3)
    group, index = _PLACES[module]
    return layout.layers[int(layer)][group], index


def _write_pair(
    pages: Tensor,  # (num_pages, page_elements), written
    span: LoraSpan,
    index: int,
    a: Tensor,  # (rank, in_features)
    b: Tensor,  # (rank, out_features), scaled
) -> None:
    a_start = span.start + index * PAGE_RANK * span.in_features
    b_start = span.b_start + PAGE_RANK * sum(span.out_features[:index])
    for page, start in enumerate(range(0, a.shape[0], PAGE_RANK)):
        rows = slice(start, start + PAGE_RANK)
        pages[page, a_start : a_start + a[rows].numel()] = a[rows].flatten().to(pages.dtype)
        pages[page, b_start : b_start + b[rows].numel()] = b[rows].flatten().to(pages.dtype)


def _multipliers(adapter: PeftAdapter, layout: PageLayout, base: BaseWeights) -> Tensor:  # (num_outputs,) float32
    """DoRA's factor of every output of the base, 1 where the adapter has none."""
    multipliers = torch.ones(layout.num_outputs)
    missing = {f"{name}.weight" for name in adapter.pairs}
    for name, weight in base(frozenset(missing)):
        span, index = _place(layout, name.removesuffix(".weight"))
        first = span.first_output + sum(span.out_features[:index])
        factors = adapter.pairs[name.removesuffix(".weight")].factors(weight)
        multipliers[first : first + len(factors)] = factors
        missing.discard(name)
    assert not missing, f"the base lacks {sorted(missing)[:3]}"
    return multipliers
