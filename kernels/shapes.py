"""The bases that kernels are compiled for and measured with, as far as a kernel sees them."""

from dataclasses import dataclass

from npc_runtime.engine.model import ModelShape

__all__ = ["CONTEXT", "MODELS", "Model", "shape"]

CONTEXT = 4096


@dataclass(frozen=True, slots=True)
class Model:
    """A base as far as its kernels see it."""

    shape: ModelShape
    group: int  # of its 4-bit weights
    has_head_norms: bool = False


def shape(hidden: int, intermediate: int, heads: int, kv_heads: int, head_dim: int, vocab: int) -> ModelShape:
    """One layer of a model."""
    return ModelShape(1, hidden, intermediate, heads, kv_heads, head_dim, vocab, CONTEXT, 1e-5)


MODELS = {
    "Llama-3.2-3B": Model(shape(3072, 8192, 24, 8, 128, 128256), 128),
    "Llama-3.2-1B": Model(shape(2048, 8192, 32, 8, 64, 128256), 128),
    "Qwen3-4B": Model(shape(2560, 9728, 32, 8, 128, 151936), 128, has_head_norms=True),
    "SmolLM2-135M": Model(shape(576, 1536, 9, 3, 64, 49152), 64),
}
