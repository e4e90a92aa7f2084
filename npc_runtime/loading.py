"""From what was asked for to what a daemon computes with: personas, a base in memory, adapters, and their sizes."""

import logging
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from npc_runtime.engine.adapters import AdapterStore
from npc_runtime.engine.bases import resolve_base
from npc_runtime.engine.checkpoints import read_scheme
from npc_runtime.engine.codes import read_codes
from npc_runtime.engine.core import EngineConfig
from npc_runtime.engine.device import Device, DTypeName, choose_device, explain_unused_gpu
from npc_runtime.engine.embedded import OnProgress
from npc_runtime.engine.memory import MIN_KV_TOKENS, fit_kv_tokens, keep_within, measure_gpu, step_bytes
from npc_runtime.engine.model import Decoder, Kernels, ModelShape, PageLayout, choose_kernels
from npc_runtime.engine.quantized import Quantize, has_code_kernels, is_to_be_quantized, load_quantized
from npc_runtime.engine.tokenizer import ChatTokenizer
from npc_runtime.engine.weights import (
    BaseInfo,
    dense_weights,
    describe_base,
    iterate_weights,
    read_config,
)
from npc_runtime.errors import AdapterIncompatible, ContextOverflow, StartupError, WireError
from npc_runtime.persona import Library, Persona
from npc_runtime.settings import Settings

__all__ = [
    "LoadedBase",
    "check_personas",
    "find_context",
    "fit_gpu",
    "limit_gpu",
    "load_adapters",
    "load_base",
    "make_config",
    "make_store",
]

logger = logging.getLogger(__name__)

MAX_DEFAULT_KV_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class LoadedBase:
    """A base model that is ready to compute."""

    info: BaseInfo
    device: Device
    decoder: Decoder
    tokenizer: ChatTokenizer
    is_int4: bool = False

    @property
    def backend(self) -> str:
        """What computes, for `welcome` and for whoever reads a measurement."""
        kernels, dtype = self.decoder.kernels.__name__, str(self.device.dtype)
        weights = ", int4 weights" if self.is_int4 else ""
        return f"torch {torch.__version__}, {kernels}, {dtype.removeprefix('torch.')}{weights}"


def load_base(
    name: str,
    dtype: DTypeName,
    on_progress: OnProgress,
    *,
    deterministic: bool = False,
    quantize: Quantize = "auto",
    kernels: Kernels | None = None,
) -> LoadedBase:
    """Find the base (fetching the embedded one the first time) and bring it into memory.

    `kernels` None takes the fastest for the device, or with `deterministic` those whose rows are independent.
    `quantize` auto makes 4 bits of a large base where the kernels compute with them. Raises `StartupError`.
    """
    problem = explain_unused_gpu()
    if problem:
        logger.warning("%s", problem)
    device = choose_device(dtype)
    kernels = kernels or choose_kernels(device.torch_device, device.dtype, deterministic=deterministic)
    kernels.prepare(device.dtype, lambda fraction: on_progress("preparing kernels", fraction))
    folder = resolve_base(name, on_progress)
    config = read_config(folder)
    info = describe_base(name, folder)
    tokenizer = ChatTokenizer(folder)
    reads_codes = has_code_kernels(kernels)
    is_quantized = is_to_be_quantized(quantize, folder, ModelShape.from_config(config), kernels)
    if is_quantized:
        tensors = load_quantized(info, dtype=device.dtype, device=device.torch_device, on_progress=on_progress)
    else:
        tensors = iterate_weights(
            folder,
            dtype=device.dtype,
            device=device.torch_device,
            on_progress=lambda fraction: on_progress(f"loading {info.name}", fraction),
            keeps_codes=reads_codes,
        )
    try:
        decoder = Decoder(config, tensors, kernels, read_codes(folder))
    except torch.OutOfMemoryError as error:
        raise StartupError(
            f"{info.name} does not fit on the GPU, or not into --gpu-memory.",
            "Take a smaller base, --quantize int4, or close other programs that use the GPU.",
        ) from error
    is_int4 = is_quantized or (reads_codes and read_scheme(folder) is not None)
    return LoadedBase(info, device, decoder, tokenizer, is_int4)


def make_config(settings: Settings, shape: ModelShape, device: Device) -> EngineConfig:
    """The engine's sizes from the user's budgets. Raises `StartupError` if the KV cache would be too small to use."""
    config = EngineConfig()
    token_bytes = _kv_token_bytes(shape, device)
    if settings.kv_mib is None:
        num_tokens = min(config.kv_tokens, max(MAX_DEFAULT_KV_BYTES // token_bytes, MIN_KV_TOKENS))
    else:
        num_tokens = settings.kv_mib * 2**20 // token_bytes
    if num_tokens < MIN_KV_TOKENS:
        needed = -(-MIN_KV_TOKENS * token_bytes // 2**20)
        raise StartupError(
            f"--kv-memory {settings.kv_mib} holds {num_tokens} tokens of this base.", f"Use {needed} or more."
        )
    config = replace(config, kv_tokens=num_tokens // config.block_size * config.block_size)
    if settings.max_adapter_rank is not None:
        config = replace(config, max_adapter_rank=settings.max_adapter_rank)
    if settings.adapter_mib is not None:
        num_bytes = settings.adapter_mib * 2**20
        config = replace(config, adapter_pool_bytes=num_bytes, adapter_host_bytes=num_bytes)
    return config


def limit_gpu(settings: Settings) -> None:
    """Let nothing that is loaded from here on take more of the GPU than `--gpu-memory`. Raises `StartupError`."""
    if settings.gpu_mib is None:
        return
    if not torch.cuda.is_available():
        raise StartupError("--gpu-memory is for a GPU, and this daemon computes on the CPU.", "Leave it out.")
    keep_within(settings.gpu_mib * 2**20, torch.cuda.current_device())


def fit_gpu(settings: Settings, base: LoadedBase, adapters: AdapterStore, config: EngineConfig) -> EngineConfig:
    """The configuration with as much KV cache as the GPU, or the budget for it, has room for; on a CPU as it is.

    Raises `StartupError` if that is too little to use, or less than was asked for.
    """
    if base.device.torch_device.type != "cuda":
        return config
    memory = measure_gpu(base.device.torch_device)
    budget = None if settings.gpu_mib is None else settings.gpu_mib * 2**20
    token_bytes = _kv_token_bytes(base.decoder.shape, base.device)
    num_tokens = fit_kv_tokens(
        memory,
        budget=budget,
        pool=adapters.num_bytes,
        step=step_bytes(base.decoder.shape, config),
        token=token_bytes,
        wanted=config.kv_tokens,
    )
    if settings.kv_mib is not None and num_tokens < config.kv_tokens:
        fits = num_tokens * token_bytes // 2**20
        raise StartupError(f"--kv-memory {settings.kv_mib} does not fit on the GPU, {fits} does.", "Lower it.")
    if num_tokens < config.kv_tokens:
        logger.warning("the KV cache has room for %d tokens instead of %d", num_tokens, config.kv_tokens)
    return replace(config, kv_tokens=num_tokens // config.block_size * config.block_size)


def _kv_token_bytes(shape: ModelShape, device: Device) -> int:
    """A key and a value in every layer."""
    return 2 * shape.num_layers * shape.kv_size * device.dtype.itemsize


def make_store(shape: ModelShape, device: Device, config: EngineConfig, folder: Path | None = None) -> AdapterStore:
    """An empty adapter store for a base; from its folder come the weights that DoRA adapters are computed from."""
    return AdapterStore(
        shape,
        PageLayout.of(shape),
        dtype=device.dtype,
        device=device.torch_device,
        max_pages=config.max_adapter_pages,
        max_pool_bytes=config.adapter_pool_bytes,
        max_host_bytes=config.adapter_host_bytes,
        max_rank=config.max_adapter_rank,
        base=None if folder is None else partial(dense_weights, folder),
        spare_pages=config.spare_adapter_pages,
    )


def load_adapters(store: AdapterStore, library: Library, base_name: str) -> dict[str, str]:
    """Read every persona's adapter into the store; a persona whose adapter cannot be used gets the reason.

    Returns a note for each persona that can speak.
    """
    notes = {}
    for persona in list(library):
        if not persona.adapter:
            notes[persona.id] = "prompt only"
            continue
        try:
            pages = store.add(persona.id, persona.adapter_parts)
        except Exception as error:  # files come from anywhere; whatever is wrong is this persona's problem alone
            problem = error if isinstance(error, WireError) else _unreadable(persona, error)
            library.reject(persona.id, problem)
            logger.warning("persona %s cannot be used: %s", persona.id, problem)
            continue
        notes[persona.id] = f"adapter of rank {pages.rank}"
        if not Path(pages.made_for).name.startswith(base_name):
            notes[persona.id] += f", made for '{pages.made_for}'; its shapes fit {base_name}"
            logger.info("persona %s: %s", persona.id, notes[persona.id])
    return notes


def find_context(folder: Path) -> int:
    """The tokens that a daemon with default settings has for prompt and reply together."""
    return min(ModelShape.from_config(read_config(folder)).context, EngineConfig().kv_tokens)


def check_personas(library: Library, base: str, on_progress: OnProgress) -> dict[str, str]:
    """Check all adapters and prompts as the daemon would, without loading the base's weights; notes as
    `load_adapters`.
    """
    device = choose_device("auto")
    folder = resolve_base(base, on_progress)
    config = EngineConfig(adapter_host_bytes=0)  # nothing is going to speak
    store = make_store(ModelShape.from_config(read_config(folder)), device, config, folder)
    notes = load_adapters(store, library, describe_base(base, folder).name)
    tokenizer, context = ChatTokenizer(folder), find_context(folder)
    for persona in list(library):
        size = len(tokenizer.render(persona.messages([], "")).token_ids)
        notes[persona.id] += f", a prompt of {size} tokens"
        if size + persona.limits.hard_tokens > context:
            what = f"The prompt of {persona.id} has {size} tokens before anybody spoke; the base holds {context}."
            library.reject(persona.id, ContextOverflow(what, "Shorten bio, examples, or knowledge without 'when'."))
    return notes


def _unreadable(persona: Persona, error: Exception) -> AdapterIncompatible:
    return AdapterIncompatible(
        f"The adapter of {persona.id} cannot be read ({type(error).__name__}: {error}).", "Export it again."
    )
