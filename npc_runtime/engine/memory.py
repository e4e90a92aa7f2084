"""Whose the GPU's memory is: the base, adapter pages, the KV cache, what a step needs besides, and the game the rest.

The base and the pages are as large as they are; the KV cache takes what is left of the budget, up to what was wanted.
"""

from dataclasses import dataclass

import torch
from npc_kernels.gpu_plan import BUCKETS, PLANES

from npc_runtime.engine.core import EngineConfig
from npc_runtime.engine.model import ModelShape
from npc_runtime.errors import StartupError

__all__ = ["MIN_KV_TOKENS", "GpuMemory", "fit_kv_tokens", "keep_within", "measure_gpu", "step_bytes"]

MIB = 1 << 20

MIN_KV_TOKENS = 512
"""Below this not even one of the shipped personas could speak beside another."""

GRAPH_BYTES = 256 * MIB
"""For CUDA graphs, compiled kernels, and what torch's allocator cannot use."""


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """Bytes of a GPU once the base is loaded."""

    used: int  # by this process: the base
    free: int  # of nobody yet; a game that is still to start needs some of it
    total: int


def measure_gpu(device: torch.device) -> GpuMemory:
    """Ask the driver; what torch's allocator holds without using it counts as free."""
    free, total = torch.cuda.mem_get_info(device)
    used, held = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    return GpuMemory(used=used, free=free + held - used, total=total)


def step_bytes(shape: ModelShape, config: EngineConfig) -> int:
    """What the largest step needs for its activations and logits, generously.

    Activations are float32 planes of the widest linear, and of the attention over rows longer than all its planes, with
    a maximum and a sum each. Logits are what all CUDA graphs leave theirs in, and a step's that is none, twice.
    """
    of_linear = 2 * 4 * config.max_step_tokens * 2 * shape.intermediate
    of_attention = 4 * PLANES * config.max_step_tokens * (shape.q_size + 2 * shape.num_heads)
    logits = 4 * (BUCKETS[-1] + 2 * config.max_rows) * shape.vocab
    return of_linear + of_attention + logits + GRAPH_BYTES


def fit_kv_tokens(
    memory: GpuMemory,
    *,
    budget: int | None,  # bytes of `--gpu-memory`; None: what is free
    pool: int,  # bytes of adapter pages
    step: int,  # bytes, see `step_bytes`
    token: int,  # bytes of one token's keys and values
    wanted: int,  # tokens
) -> int:
    """How many tokens the KV cache can hold, at most the wanted. Raises `StartupError` if they are too few to use."""
    limit = memory.free if budget is None else min(memory.free, budget - memory.used)
    num_tokens = min(wanted, (limit - pool - step) // token)
    if num_tokens >= MIN_KV_TOKENS:
        return num_tokens
    needed = memory.used + pool + step + MIN_KV_TOKENS * token
    parts = f"base {memory.used // MIB}, adapters {pool // MIB}, a step {step // MIB}, then the KV cache"
    if budget is not None and memory.used + memory.free >= needed:
        raise StartupError(
            f"--gpu-memory {budget // MIB} is too little: {-(-needed // MIB)} MiB are needed ({parts}).",
            f"Use {-(-needed // MIB)} or more, --adapter-memory for fewer adapters at once, or a smaller base.",
        )
    raise StartupError(
        f"The GPU has {memory.free // MIB} of {memory.total // MIB} MiB left beside the base, too little: "
        f"{-(-needed // MIB)} MiB are needed in all ({parts}).",
        "Close other programs that use the GPU, or take a smaller base or --adapter-memory.",
    )


def keep_within(budget: int, device: int) -> None:
    """Let torch fail rather than take more bytes than the budget: the game's frames come first."""
    _, total = torch.cuda.mem_get_info(device)
    torch.cuda.set_per_process_memory_fraction(min(budget / total, 1.0), device)
