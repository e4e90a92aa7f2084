"""The Llama-family decoder over the kernel functions: Llama 2/3.x, SmolLM2/3, Mistral, Qwen2.5, Qwen3.

Holds the base weights and computes logits for one step of many rows. It does not know where KV blocks or
adapter pages come from; `BatchMetadata` says which to use.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from npc_kernels import reference
from npc_kernels.batch import BatchMetadata, Codes, LoraSpan
from npc_kernels.quant import BaseWeight, Int4Weight, Int8Weight, concatenate
from npc_kernels.reference import HeadNorms, Settings
from torch import Tensor

from npc_runtime.errors import StartupError

__all__ = ["Decoder", "Kernels", "KvCache", "ModelShape", "PageLayout", "choose_kernels"]

logger = logging.getLogger(__name__)

FIXED_ROPES = ("default", "linear", "llama3", "yarn")
"""RoPE variants whose frequencies do not depend on the length of the text."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a base; everything that an adapter or a KV cache must agree with."""

    num_layers: int
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab: int
    context: int
    norm_eps: float

    @classmethod
    def from_config(cls, config: Any) -> "ModelShape":
        """Read a transformers configuration. Raises `StartupError` for a variant that is not computed here."""
        if getattr(config, "mlp_bias", False) or config.hidden_act != "silu":
            raise StartupError(
                f"This {config.model_type} variant is not supported (mlp_bias={getattr(config, 'mlp_bias', False)}, "
                f"hidden_act={config.hidden_act}).",
                "Use the model as it was published by its authors.",
            )
        # Inside the sliding window, windowed and full attention are the same thing.
        window = getattr(config, "sliding_window", None) or config.max_position_embeddings
        return cls(
            num_layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            vocab=config.vocab_size,
            context=min(config.max_position_embeddings, window),
            norm_eps=config.rms_norm_eps,
        )

    @property
    def q_size(self) -> int:
        """Outputs of q_proj."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Outputs of k_proj, and of v_proj."""
        return self.num_kv_heads * self.head_dim


class Kernels(Protocol):
    """What a module of `npc_kernels` offers; `reference.py` defines what each computes."""

    __name__: str

    def Linear(self, weight: Any, bias: Tensor | None = None, codes: Codes | None = None) -> Any:
        """A base linear; a class in each module. The GPU's takes weights in 4 and 8 bits as well as dense ones."""
        ...

    def prepare(self, dtype: torch.dtype, on_progress: Callable[[float], None]) -> None:
        """Do what takes long once, such as compiling."""
        ...

    def room(self, batch: BatchMetadata) -> Any:
        """What the step has in common with others, so that one recording serves them all; None: it is not recorded.

        Hashable, with `num_rows`: the recording may have more rows than the step.
        """
        ...

    def plan(self, batch: BatchMetadata, cos: Tensor, sin: Tensor, previous: Any = None, *, room: Any = None) -> Any:
        """Prepare a step; what it returns is `plan` below, and `previous` of the next step.

        With a room it has `record(compute)`, which returns what runs `compute` again without Python between the
        kernels, or None where that cannot be; and `refill(batch)`, which takes another step of that room.
        """
        ...

    def embed(self, table: Tensor, plan: Any) -> Tensor:
        """The residual stream before the first layer."""
        ...

    def begin(self, hidden: Tensor, plan: Any, weight: Tensor, eps: float) -> Any:
        """The norm before the first linear: what a linear takes, `x` below."""
        ...

    def project(self, linear: Any, x: Any, plan: Any, span: LoraSpan) -> Any:
        """The base GEMM, and what a module likes to do beside it: `product` below."""
        ...

    def head(self, linear: Any, x: Any, plan: Any) -> Tensor:
        """The logits of the sampled tokens, float32."""
        ...

    def finish_qkv(
        self,
        product: Any,
        k_cache: Tensor,
        v_cache: Tensor,
        plan: Any,
        span: LoraSpan,
        norms: HeadNorms,
        *,
        rotates: bool,
    ) -> Tensor:
        """Adapters, head norms, RoPE; store keys and values."""
        ...

    def paged_attention(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, plan: Any) -> Any:
        """Attend each row to its own slots."""
        ...

    def finish_residual(
        self, product: Any, hidden: Tensor, plan: Any, span: LoraSpan, weight: Tensor, eps: float
    ) -> Any:
        """Adapters, the residual stream, and the next norm."""
        ...

    def finish_gate_up(self, product: Any, plan: Any, span: LoraSpan) -> Any:
        """Adapters, then SwiGLU."""
        ...

    def draw(self, logits: Tensor, settings: Settings, bitmask: Tensor | None = None) -> Tensor:
        """Sample every row; -1 where the logits are not finite."""
        ...


def choose_kernels(device: torch.device, dtype: torch.dtype, *, deterministic: bool = False) -> Kernels:
    """The fastest kernels there are for a device, or those whose rows do not depend on one another, to the last bit.

    On a GPU those in Triton if they compute there what they should, else their torch twins, with a warning. Raises
    `StartupError` where deterministic ones are not to be had.
    """
    if device.type == "cpu":
        from npc_kernels import cpu, cpu_exact  # numba: not for machines that compute on a GPU

        return cpu_exact if deterministic else cpu
    if deterministic:
        raise StartupError(
            f"--deterministic is served on the CPU only, and this daemon computes on {device.type}.",
            "Leave it out, or hide the GPU from it: CUDA_VISIBLE_DEVICES=-1.",
        )
    problem = _find_gpu_problem(device, dtype)
    if problem is None:
        from npc_kernels import gpu

        return gpu
    logger.warning("the GPU kernels cannot be used here, torch computes instead, far slower: %s", problem)
    return reference


def _find_gpu_problem(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton's kernels cannot be used; None if they can."""
    if device.type != "cuda":
        return f"they are for CUDA, not for {device.type}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} has no bfloat16 products (they came with the RTX 30 series)"
    try:
        from npc_kernels.gpu_check import check_gpu
    except ImportError as error:
        return f"Triton is missing ({error}); on Windows: pip install triton-windows"
    return check_gpu(device, dtype)


@dataclass(frozen=True, slots=True)
class PageLayout:
    """Where each layer's linear groups lie in an adapter page of this base."""

    layers: tuple[tuple[LoraSpan, LoraSpan, LoraSpan, LoraSpan], ...]  # qkv, o, gate_up, down
    num_elements: int
    num_outputs: int

    @property
    def spans(self) -> tuple[LoraSpan, ...]:
        """All groups of all layers."""
        return tuple(span for layer in self.layers for span in layer)

    @classmethod
    def of(cls, shape: ModelShape) -> "PageLayout":
        """Lay the groups out one behind the other, layer by layer."""
        groups = (
            (shape.hidden, (shape.q_size, shape.kv_size, shape.kv_size)),
            (shape.q_size, (shape.hidden,)),
            (shape.hidden, (shape.intermediate, shape.intermediate)),
            (shape.intermediate, (shape.hidden,)),
        )
        layers, start, first_output = [], 0, 0
        for _ in range(shape.num_layers):
            spans = []
            for in_features, out_features in groups:
                spans.append(LoraSpan(start, in_features, out_features, first_output))
                start, first_output = spans[-1].stop, first_output + sum(out_features)
            layers.append((spans[0], spans[1], spans[2], spans[3]))
        return cls(tuple(layers), start, first_output)


@dataclass(frozen=True, slots=True)
class KvCache:
    """Keys and values of all layers in blocks."""

    keys: Tensor  # (num_layers, num_blocks, block_size, num_kv_heads, head_dim)
    values: Tensor  # like keys

    @classmethod
    def allocate(
        cls, shape: ModelShape, *, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> "KvCache":
        """Zeros, so that a masked slot can never hold a NaN."""
        size = (shape.num_layers, num_blocks, block_size, shape.num_kv_heads, shape.head_dim)
        return cls(torch.zeros(size, dtype=dtype, device=device), torch.zeros(size, dtype=dtype, device=device))


@dataclass(frozen=True, slots=True)
class _Layer:
    input_norm: Tensor
    qkv: Any  # the kernels' Linear, as all of these
    norms: HeadNorms
    o: Any
    mlp_norm: Tensor
    gate_up: Any
    down: Any
    rotates: bool  # SmolLM3 leaves some layers without RoPE


class Decoder:
    """The base model. `forward` is the one place where its weights are read."""

    def __init__(
        self,
        config: Any,
        tensors: Iterable[tuple[str, BaseWeight]],
        kernels: Kernels,
        codes: Mapping[str, Codes] | None = None,
    ) -> None:
        """Take the weights, fusing q/k/v and gate/up. Raises `StartupError` naming what is missing or misshapen.

        `codes` has the same weights in 4 or 8 bits, as far as the base was published so; by tensor name.
        """
        self.kernels = kernels
        self.shape = ModelShape.from_config(config)
        self.layout = PageLayout.of(self.shape)
        weights = _Weights(dict(tensors), codes or {})
        self.embedding = weights.take("model.embed_tokens.weight", self.shape.vocab, self.shape.hidden)
        rotates = getattr(config, "no_rope_layers", None) or [1] * self.shape.num_layers
        self._layers = [
            _take_layer(weights, self.shape, index, rotates=bool(rotates[index]), kernels=kernels)
            for index in range(self.shape.num_layers)
        ]
        self._norm = weights.take("model.norm.weight", self.shape.hidden)
        head = "lm_head.weight"
        is_tied = bool(config.tie_word_embeddings) and not weights.has_codes(head)
        self.head = kernels.Linear(
            self.embedding if is_tied else weights.take_linear(head, self.shape.vocab, self.shape.hidden),
            codes=weights.codes("model.embed_tokens.weight" if is_tied else head),
        )
        weights.check_empty(ignored=head if is_tied else None)
        self._cos, self._sin = _rope_tables(config, self.shape, self.embedding.device)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and activations."""
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.embedding.device

    def plan(self, batch: BatchMetadata, previous: Any = None, *, room: Any = None) -> Any:
        """Prepare a step for `forward`; `previous` is the plan of the step before."""
        return self.kernels.plan(batch, self._cos, self._sin, previous, room=room)

    def forward(self, plan: Any, kv: KvCache) -> Tensor:  # (num_sampled, vocab) float32
        """One pass over all rows of the step: writes their keys and values, returns the wanted logits."""
        kernels, eps = self.kernels, self.shape.norm_eps
        hidden = kernels.embed(self.embedding, plan)
        x = kernels.begin(hidden, plan, self._layers[0].input_norm, eps)
        next_norms = [layer.input_norm for layer in self._layers[1:]] + [self._norm]
        for index, (layer, next_norm) in enumerate(zip(self._layers, next_norms, strict=True)):
            of_qkv, of_o, of_gate_up, of_down = self.layout.layers[index]
            cache = kv.keys[index], kv.values[index]
            product = kernels.project(layer.qkv, x, plan, of_qkv)
            q = kernels.finish_qkv(product, *cache, plan, of_qkv, layer.norms, rotates=layer.rotates)
            product = kernels.project(layer.o, kernels.paged_attention(q, *cache, plan), plan, of_o)
            x = kernels.finish_residual(product, hidden, plan, of_o, layer.mlp_norm, eps)
            product = kernels.project(layer.gate_up, x, plan, of_gate_up)
            product = kernels.project(layer.down, kernels.finish_gate_up(product, plan, of_gate_up), plan, of_down)
            x = kernels.finish_residual(product, hidden, plan, of_down, next_norm, eps)
        return kernels.head(self.head, x, plan)


class _Weights:
    """Tensors by name, each taken once, its shape checked."""

    def __init__(self, tensors: dict[str, BaseWeight], codes: Mapping[str, Codes]) -> None:
        self._tensors = tensors
        self._codes = codes

    def has(self, name: str) -> bool:
        return name in self._tensors

    def has_codes(self, name: str) -> bool:
        """Whether a weight is in 4 or 8 bits: of a tied base the head may be, beside the dense embedding."""
        return isinstance(self._tensors.get(name), (Int4Weight, Int8Weight))

    def take(self, name: str, *shape: int) -> Tensor:
        tensor = self.take_linear(name, *shape)
        if not isinstance(tensor, Tensor):
            raise StartupError(f"{name} of the base is quantized.", "It is a variant that is not supported yet.")
        return tensor

    def take_linear(self, name: str, *shape: int) -> BaseWeight:
        if name not in self._tensors:
            raise StartupError(f"The base has no tensor {name}.", "Fetch the model again.")
        tensor = self._tensors.pop(name)
        if tensor.shape != shape:
            raise StartupError(
                f"{name} of the base has shape {tuple(tensor.shape)}, config.json asks for {shape}.",
                "Configuration and weights are of different models; fetch the model again.",
            )
        return tensor

    def codes(self, *names: str) -> Codes | None:
        """The codes of several weights, one below the other; None unless there are some of each."""
        parts = [self._codes[name] for name in names if name in self._codes]
        if len(parts) != len(names):
            return None
        minima = [part.minimum for part in parts if part.minimum is not None]
        return Codes(
            values=torch.cat([part.values for part in parts]),
            scale=torch.cat([part.scale for part in parts]),
            minimum=torch.cat(minima) if minima else None,
        )

    def check_empty(self, *, ignored: str | None) -> None:
        """Raise for tensors that nobody took: a bias or a scale that is left out would change every word."""
        left = [name for name in self._tensors if name != ignored and not name.endswith("rotary_emb.inv_freq")]
        if left:
            raise StartupError(
                f"The base has tensors that this program does not use ({', '.join(left[:3])}).",
                "It is a variant that is not supported yet.",
            )

    def take_optional(self, name: str, *shape: int) -> Tensor | None:
        return self.take(name, *shape) if self.has(name) else None


def _take_layer(weights: _Weights, shape: ModelShape, index: int, *, rotates: bool, kernels: Kernels) -> _Layer:
    prefix = f"model.layers.{index}"
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"

    def linear(parent: str, sizes: dict[str, int], in_features: int) -> Any:
        """Linears of one input as one."""
        names = [f"{parent}.{name}_proj.weight" for name in sizes]
        parts = [weights.take_linear(name, size, in_features) for name, size in zip(names, sizes.values(), strict=True)]
        biases = [weights.take_optional(f"{parent}.{name}_proj.bias", size) for name, size in sizes.items()]
        present = [bias for bias in biases if bias is not None]
        bias = torch.cat(present) if len(present) == len(biases) else None
        return kernels.Linear(concatenate(parts), bias, weights.codes(*names))

    return _Layer(
        input_norm=weights.take(f"{prefix}.input_layernorm.weight", shape.hidden),
        qkv=linear(attention, {"q": shape.q_size, "k": shape.kv_size, "v": shape.kv_size}, shape.hidden),
        norms=HeadNorms(
            weights.take_optional(f"{attention}.q_norm.weight", shape.head_dim),
            weights.take_optional(f"{attention}.k_norm.weight", shape.head_dim),
            shape.norm_eps,
        ),
        o=linear(attention, {"o": shape.hidden}, shape.q_size),
        mlp_norm=weights.take(f"{prefix}.post_attention_layernorm.weight", shape.hidden),
        gate_up=linear(mlp, {"gate": shape.intermediate, "up": shape.intermediate}, shape.hidden),
        down=linear(mlp, {"down": shape.hidden}, shape.intermediate),
        rotates=rotates,
    )


def _rope_tables(config: Any, shape: ModelShape, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position, `(context, head_dim / 2)`, float32."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = config.rope_parameters["rope_type"]
    if kind not in FIXED_ROPES:
        raise StartupError(f"RoPE of type {kind} is not supported.", f"Supported types are {', '.join(FIXED_ROPES)}.")
    scaling = 1.0
    if kind == "default":
        exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
        frequencies = 1.0 / (config.rope_parameters["rope_theta"] ** exponents)
    else:
        init: Callable[..., tuple[Tensor, float]] = ROPE_INIT_FUNCTIONS[kind]
        frequencies, scaling = init(config)
    angles = torch.arange(shape.context, dtype=torch.float32)[:, None] * frequencies[None]
    return (angles.cos() * scaling).to(device), (angles.sin() * scaling).to(device)
