"""Whether this GPU computes what the interpreter proved: a small layer by the Triton kernels and by their torch twins.

A driver, a compiler or a card that nobody tried must cost speed, not words: who starts a daemon asks first.
"""

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from npc_kernels import gpu, reference
from npc_kernels.batch import BatchMetadata, LoraBatch, LoraSpan
from npc_kernels.quant import dequantize, quantize_int4, quantize_int8
from npc_kernels.reference import HeadNorms, Settings

__all__ = ["check_gpu"]

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, VOCAB = 192, 6, 2, 32, 320, 500
GROUP = 64
BLOCK_SIZE, NUM_SEEN = 16, 300
"""More keys than one chunk of the attention."""

TOLERANCE = {torch.bfloat16: 5e-2, torch.float32: 1e-3}
"""Of the largest number; float32 leaves room for products in the reduced precision that torch may be set to."""


class _Layer(NamedTuple):
    """Random weights and caches of one layer, and its place in an adapter page."""

    weights: tuple[Tensor, ...]  # qkv, o, gate_up, down, head
    spans: tuple[LoraSpan, ...]
    norm: Tensor
    head_norm: Tensor
    hidden: Tensor
    caches: Tensor


def check_gpu(device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong with the kernels on this device, in words; None: nothing. Compiles each kernel once."""
    generator = torch.Generator().manual_seed(0)
    layer = _make_layer(device, dtype, generator)
    batch = _make_batch(layer, device, dtype, generator)
    angles = torch.rand(NUM_SEEN, HEAD_DIM // 2, generator=generator).to(device)
    try:
        got = _compute(gpu, layer, batch, angles) | _multiply_codes(layer, batch, angles)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception as error:  # Triton, its compiler and the driver raise what they like
        return f"{type(error).__name__}: {error}"
    expected = _compute(reference, layer, batch, angles) | _multiply_dense(layer, batch)
    for name in expected:
        scale = expected[name].double().abs().max()
        worst = (got[name].double() - expected[name].double()).abs().max() / scale
        if not worst <= TOLERANCE[dtype]:  # a NaN is not
            return f"{name} differs by {worst:.1%} of the largest number"
    return None


def _make_layer(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> _Layer:
    def random(*size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(size, generator=generator)).to(device, dtype)

    kv_size, q_size = KV_HEADS * HEAD_DIM, HEADS * HEAD_DIM
    groups: list[tuple[int, tuple[int, ...]]] = [(HIDDEN, (q_size, kv_size, kv_size)), (q_size, (HIDDEN,))]
    groups += [(HIDDEN, (INTERMEDIATE, INTERMEDIATE)), (INTERMEDIATE, (HIDDEN,))]
    spans: list[LoraSpan] = []
    for in_features, out_features in groups:
        spans.append(LoraSpan(spans[-1].stop if spans else 0, in_features, out_features))
    shapes = [*((sum(span.out_features), span.in_features) for span in spans), (VOCAB, HIDDEN)]
    return _Layer(
        weights=tuple(random(*shape, scale=shape[1] ** -0.5) for shape in shapes),
        spans=tuple(spans),
        norm=random(HIDDEN),
        head_norm=random(HEAD_DIM),
        hidden=random(VOCAB, HIDDEN),
        caches=random(2, 64, BLOCK_SIZE, KV_HEADS, HEAD_DIM),
    )


def _make_batch(layer: _Layer, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> BatchMetadata:
    """A row with two adapter pages that speaks, one with one page that reads its prompt, and one of the base alone."""
    rows = [(NUM_SEEN - 1, NUM_SEEN), (0, 19), (40, 43)]
    positions = [position for start, stop in rows for position in range(start, stop)]
    tables = torch.randperm(64, generator=generator)[: 3 * 20].view(3, 20)
    owners = [row for row, (start, stop) in enumerate(rows) for _ in range(start, stop)]
    slots = [
        int(tables[row, position // BLOCK_SIZE]) * BLOCK_SIZE + position % BLOCK_SIZE
        for row, position in zip(owners, positions, strict=True)
    ]
    pool = torch.randn(4, layer.spans[-1].stop, generator=generator) / 8
    return BatchMetadata(
        token_ids=torch.randint(0, VOCAB, (len(positions),), generator=generator),
        sampled=torch.tensor([0, 19, 22]),
        positions=torch.tensor(positions),
        kv_slots=torch.tensor(slots),
        num_decode=1,
        row_starts=(0, 1, 20, 23),
        block_tables=tables,
        block_size=BLOCK_SIZE,
        max_seen=NUM_SEEN,
        lora=LoraBatch(pool.to(device, dtype), ((3, 1), (2,), ())),
    )


def _compute(kernels: ModuleType, layer: _Layer, batch: BatchMetadata, angles: Tensor) -> dict[str, Tensor]:
    """The layer, the logits and the tokens drawn from them; caches are changed, so each caller gets a copy."""
    layer = layer._replace(caches=layer.caches.clone())
    qkv, o, gate_up, down, head = (kernels.Linear(weight) for weight in layer.weights)
    plan: Any = kernels.plan(batch, angles.cos(), angles.sin())
    keys, values = layer.caches
    norms = HeadNorms(layer.head_norm, layer.head_norm, 1e-6)
    hidden = kernels.embed(layer.hidden, plan)
    x = kernels.begin(hidden, plan, layer.norm, 1e-5)
    product = kernels.project(qkv, x, plan, layer.spans[0])
    q = kernels.finish_qkv(product, keys, values, plan, layer.spans[0], norms, rotates=True)
    attended = kernels.paged_attention(q, keys, values, plan)
    product = kernels.project(o, attended, plan, layer.spans[1])
    x = kernels.finish_residual(product, hidden, plan, layer.spans[1], layer.norm, 1e-5)
    product = kernels.project(gate_up, x, plan, layer.spans[2])
    product = kernels.project(down, kernels.finish_gate_up(product, plan, layer.spans[2]), plan, layer.spans[3])
    x = kernels.finish_residual(product, hidden, plan, layer.spans[3], layer.norm, 1e-5)
    logits = kernels.head(head, x, plan)
    columns = torch.tensor([[0.0] * 3, [50.0] * 3, [0.9] * 3, [0.0] * 3, [1.0, 2.0, 3.0], [0.0] * 3])
    settings = Settings(*columns.to(logits.device, torch.float64).unbind())
    return {
        "queries": q,
        "keys": keys,
        "values": values,
        "attention": attended,
        "residual stream": hidden,
        "logits": logits,
        "drawn": logits.gather(1, kernels.draw(logits.clone(), settings)[:, None].clamp(min=0)),
    }


def _multiply_codes(layer: _Layer, batch: BatchMetadata, angles: Tensor) -> dict[str, Tensor]:
    """Products with the gate's and the head's weight in 4 and 8 bits."""
    plan = gpu.plan(batch, angles.cos(), angles.sin())
    x = layer.hidden[: len(batch.positions)]
    four, eight = quantize_int4(layer.weights[2], GROUP), quantize_int8(layer.weights[4])
    return {
        "4 bits": gpu.project(gpu.Linear(four), x, plan, layer.spans[2]).out.sum(0),
        "8 bits": gpu.head(gpu.Linear(eight), x, plan),
    }


def _multiply_dense(layer: _Layer, batch: BatchMetadata) -> dict[str, Tensor]:
    """The same with what the codes stand for."""
    x = layer.hidden[: len(batch.positions)].float()
    four, eight = quantize_int4(layer.weights[2], GROUP), quantize_int8(layer.weights[4])
    return {"4 bits": x @ dequantize(four).T, "8 bits": x[batch.sampled.to(x.device)] @ dequantize(eight).T}
