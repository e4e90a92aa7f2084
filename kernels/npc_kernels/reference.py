"""The torch twin of every kernel: the readable definition, and the oracle the fast ones are tested against.

Plain torch, any device, any float dtype. A twin may be slow; it may not be clever.

A layer is four times `project`, the base GEMM, and behind each of them what `finish_qkv`, `paged_attention`,
`finish_residual` and `finish_gate_up` compute: what the adapters add, and the row-wise work that follows it anyway.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from npc_kernels.batch import PAGE_RANK, BatchMetadata, Codes, LoraBatch, LoraSpan

__all__ = [
    "MIN_TEMPERATURE",
    "HeadNorms",
    "Linear",
    "Plan",
    "PlannedRow",
    "Product",
    "Settings",
    "apply_rope",
    "attend_row",
    "begin",
    "draw",
    "embed",
    "finish_gate_up",
    "finish_qkv",
    "finish_residual",
    "forbid",
    "head",
    "lora_expand",
    "lora_shrink",
    "paged_attention",
    "pick",
    "plan",
    "plan_rows",
    "prepare",
    "project",
    "rms_norm",
    "room",
    "silu_mul",
    "uniform",
    "write_kv",
]


MIN_TEMPERATURE = 1e-4
"""Below it float32 has nothing left to choose from; the best token is taken."""


class Linear:
    """A base linear: the one GEMM that all rows of a step share."""

    def __init__(
        self,
        weight: Tensor,  # (out_features, in_features)
        bias: Tensor | None = None,  # (out_features,)
        codes: Codes | None = None,  # the same weight in 4 bits, for kernels that can use it
    ) -> None:
        self.weight = weight
        self.bias = bias


class Product(NamedTuple):
    """What a linear made of x, on its way to what finishes it: adapters and bias are still to come."""

    out: Tensor  # (num_tokens, out_features)
    x: Tensor  # (num_tokens, in_features)
    bias: Tensor | None  # (out_features,)


class HeadNorms(NamedTuple):
    """How query and key heads are normalised before they are rotated (Qwen3); None: not at all."""

    q: Tensor | None  # (head_dim,)
    k: Tensor | None  # (head_dim,)
    eps: float


def prepare(dtype: torch.dtype, on_progress: Callable[[float], None]) -> None:
    """Do what takes long once, before the first step: nothing here."""


class PlannedRow(NamedTuple):
    """A row of the step: its tokens `[start, stop)`, and the slots of all its tokens so far."""

    start: int
    stop: int
    kv_slots: Tensor  # (num_seen,) int64
    mask: Tensor  # (stop - start, num_seen) bool, True = may be seen


class Plan(NamedTuple):
    """What this module wants to know about a step before its first layer."""

    batch: BatchMetadata
    cos: Tensor  # (num_tokens, head_dim / 2) float32
    sin: Tensor  # (num_tokens, head_dim / 2) float32
    rows: tuple[PlannedRow, ...]
    lora_mask: Tensor | None  # (num_tokens, num_live) bool


def plan(
    batch: BatchMetadata,
    cos: Tensor,  # (context, head_dim / 2) float32
    sin: Tensor,  # (context, head_dim / 2) float32
    previous: Any = None,  # the plan of the step before
    *,
    room: None = None,
) -> Plan:
    """Prepare a step."""
    batch = batch.to(cos.device)
    mask = None if batch.lora is None else batch.lora.mask(batch.row_starts).to(cos.device)
    return Plan(batch, cos[batch.positions], sin[batch.positions], tuple(plan_rows(batch, first=0)), mask)


def room(batch: BatchMetadata) -> None:
    """What such steps have in common that can be recorded: nothing here."""


def plan_rows(batch: BatchMetadata, *, first: int) -> Iterator[PlannedRow]:
    """The step's rows from row `first` on."""
    offsets = torch.arange(batch.block_size, device=batch.positions.device)
    for row in range(first, len(batch.row_starts) - 1):
        start, stop = batch.row_starts[row], batch.row_starts[row + 1]
        positions = batch.positions[start:stop, None]
        num_seen = int(positions[-1, 0]) + 1
        blocks = batch.block_tables[row, : -(-num_seen // batch.block_size), None]
        slots = (blocks * batch.block_size + offsets).flatten()[:num_seen]
        yield PlannedRow(start, stop, slots, torch.arange(num_seen, device=slots.device) <= positions)


def rms_norm(
    x: Tensor,  # (..., size)
    weight: Tensor,  # (size,)
    eps: float,
) -> Tensor:  # (..., size), of the weight's dtype
    """`x / sqrt(mean(x²) + eps) * weight`, the mean in float32 (Zhang & Sennrich 2019, eq. 4)."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(weight.dtype)


def apply_rope(
    x: Tensor,  # (num_tokens, num_heads, head_dim)
    cos: Tensor,  # (num_tokens, head_dim / 2) float32
    sin: Tensor,  # (num_tokens, head_dim / 2) float32
) -> Tensor:  # (num_tokens, num_heads, head_dim)
    """Rotate the pairs `(x[i], x[i + head_dim/2])` by the token's angles, in float32 (Su et al. 2021)."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def write_kv(
    k: Tensor,  # (num_tokens, num_kv_heads, head_dim)
    v: Tensor,  # (num_tokens, num_kv_heads, head_dim)
    k_cache: Tensor,  # (num_blocks, block_size, num_kv_heads, head_dim), written
    v_cache: Tensor,  # like k_cache, written
    kv_slots: Tensor,  # (num_tokens,)
) -> None:
    """Store each token's key and value in its slot of the paged cache."""
    k_cache.flatten(0, 1).index_copy_(0, kv_slots, k)
    v_cache.flatten(0, 1).index_copy_(0, kv_slots, v)


def paged_attention(
    q: Tensor,  # (num_tokens, num_heads, head_dim)
    k_cache: Tensor,  # (num_blocks, block_size, num_kv_heads, head_dim)
    v_cache: Tensor,  # like k_cache
    plan: Plan,
) -> Tensor:  # (num_tokens, num_heads * head_dim)
    """Causal attention of every row over its own KV slots.

    `softmax(q kᵀ / sqrt(head_dim)) v`, query head `h` reading KV head `h // (num_heads / num_kv_heads)`.
    """
    out = torch.empty_like(q)
    for row in plan.rows:
        out[row.start : row.stop] = attend_row(q[row.start : row.stop], k_cache, v_cache, row)
    return out.flatten(1)


def attend_row(q: Tensor, k_cache: Tensor, v_cache: Tensor, row: PlannedRow) -> Tensor:
    """Attention of one row's queries, `(num_queries, num_heads, head_dim)`, over what each may see."""
    keys, values = (cache.flatten(0, 1)[row.kv_slots].transpose(0, 1)[None] for cache in (k_cache, v_cache))
    read = F.scaled_dot_product_attention(q.transpose(0, 1)[None], keys, values, attn_mask=row.mask, enable_gqa=True)
    return read[0].transpose(0, 1)


def silu_mul(
    gate_up: Tensor,  # (num_tokens, 2 * intermediate)
) -> Tensor:  # (num_tokens, intermediate)
    """`silu(gate) * up` of the two halves (Shazeer 2020, SwiGLU)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def lora_shrink(
    x: Tensor,  # (num_tokens, in_features)
    lora: LoraBatch,
    mask: Tensor,  # (num_tokens, num_live) bool: the token's adapter owns the page
    span: LoraSpan,
) -> Tensor:  # (num_tokens, num_live, num_slices, 16)
    """`A x` of every live page for every token, zero where the token's adapter does not own the page.

    The mask selects rather than multiplies, so that a neighbour's overflow cannot become this row's NaN.
    """
    a = lora.pool[list(lora.live), span.start : span.b_start].reshape(-1, span.in_features)
    shrunk = (x @ a.T).view(-1, len(lora.live), span.num_slices, PAGE_RANK)
    return shrunk.masked_fill(~mask[:, :, None, None], 0)


def lora_expand(
    shrunk: Tensor,  # (num_tokens, num_live, num_slices, 16)
    lora: LoraBatch,
    span: LoraSpan,
    out: Tensor,  # (num_tokens, sum(out_features)), added to
) -> None:
    """Add `B (A x)` to the base output, slice by slice; `B` carries the adapter's scaling."""
    column, offset = 0, span.b_start
    for index, width in enumerate(span.out_features):
        b = lora.pool[list(lora.live), offset : offset + PAGE_RANK * width].reshape(-1, width)
        out[:, column : column + width].addmm_(shrunk[:, :, index].flatten(1), b)
        column, offset = column + width, offset + PAGE_RANK * width


def embed(
    table: Tensor,  # (vocab, hidden)
    plan: Plan,
) -> Tensor:  # (num_tokens, hidden) float32
    """The residual stream before the first layer."""
    return table[plan.batch.token_ids].float()


def begin(
    hidden: Tensor,  # (num_tokens, hidden) float32
    plan: Plan,
    weight: Tensor,  # (hidden,)
    eps: float,
) -> Tensor:  # (num_tokens, hidden), of the weight's dtype
    """The norm before the first linear."""
    return rms_norm(hidden, weight, eps)


def project(
    linear: Linear,
    x: Tensor,  # (num_tokens, in_features)
    plan: Plan,
    span: LoraSpan,
) -> Product:
    """`x @ weight.T`, all rows at once."""
    return Product(F.linear(x, linear.weight), x, linear.bias)


def head(
    linear: Linear,
    x: Tensor,  # (num_tokens, hidden)
    plan: Plan,
) -> Tensor:  # (num_sampled, vocab) float32
    """`x @ weight.T + bias` of the sampled tokens: their logits."""
    return F.linear(x[plan.batch.sampled], linear.weight, linear.bias).float()


def finish_qkv(
    product: Product,  # of (num_heads + 2 * num_kv_heads) * head_dim
    k_cache: Tensor,  # (num_blocks, block_size, num_kv_heads, head_dim), written
    v_cache: Tensor,  # like k_cache, written
    plan: Plan,
    span: LoraSpan,
    norms: HeadNorms,
    *,
    rotates: bool,
) -> Tensor:  # (num_tokens, num_heads, head_dim)
    """Adapters, head norms, RoPE; stores keys and values, returns the queries."""
    qkv = _finish_linear(product, plan, span)
    num_kv_heads, head_dim = k_cache.shape[-2:]
    heads = qkv.view(len(qkv), -1, head_dim)
    q, k, v = heads[:, : -2 * num_kv_heads], heads[:, -2 * num_kv_heads : -num_kv_heads], heads[:, -num_kv_heads:]
    if norms.q is not None and norms.k is not None:
        q, k = rms_norm(q, norms.q, norms.eps), rms_norm(k, norms.k, norms.eps)
    if rotates:
        q, k = apply_rope(q, plan.cos, plan.sin), apply_rope(k, plan.cos, plan.sin)
    write_kv(k, v, k_cache, v_cache, plan.batch.kv_slots)
    return q


def finish_residual(
    product: Product,  # of hidden
    hidden: Tensor,  # (num_tokens, hidden) float32, added to
    plan: Plan,
    span: LoraSpan,
    weight: Tensor,  # (hidden,)
    eps: float,
) -> Tensor:  # (num_tokens, hidden)
    """Adapters, the residual stream, and the norm before the next linear."""
    hidden += _finish_linear(product, plan, span)
    return rms_norm(hidden, weight, eps)


def finish_gate_up(
    product: Product,  # of 2 * intermediate
    plan: Plan,
    span: LoraSpan,
) -> Tensor:  # (num_tokens, intermediate)
    """Adapters, then SwiGLU."""
    return silu_mul(_finish_linear(product, plan, span))


class Settings(NamedTuple):
    """How each row is sampled; all `(num_rows,)` float64 on the device of the logits."""

    temperature: Tensor  # 0: the best token
    top_k: Tensor  # the vocabulary's size or more: off
    top_p: Tensor
    min_p: Tensor
    seed: Tensor  # whole numbers, 0 to 2**53 - 1
    position: Tensor  # of the token in its line


def uniform(
    seed: Tensor,  # (num_rows,) float64
    position: Tensor,  # (num_rows,) float64
) -> Tensor:  # (num_rows,) float64 in [0, 1)
    """A number that depends on (seed, position) alone: SplitMix64 (Steele et al. 2014), 53 bits.

    Counter-based, so that a line replays the same whoever shares its batch. int64 wraps as uint64 does.
    """
    z = seed.long() * _as_int64(0x9E3779B97F4A7C15) + (position.long() + 1) * _as_int64(0xD1B54A32D192ED03)
    z = (z ^ _shift(z, 30)) * _as_int64(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _as_int64(0x94D049BB133111EB)
    return _shift(z ^ _shift(z, 31), 11).double() / (1 << 53)


def _as_int64(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift(z: Tensor, bits: int) -> Tensor:
    """Shift to the right without the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def forbid(
    logits: Tensor,  # (num_rows, vocab)
    bitmask: Tensor,  # (num_rows, ceil(vocab / 32)) int32: bit `i % 32` of word `i // 32` allows token `i`
) -> Tensor:
    """The logits, minus infinity where the mask forbids a token."""
    bits = (bitmask[:, :, None] >> torch.arange(32, device=logits.device)) & 1
    return logits.masked_fill(bits.flatten(1)[:, : logits.shape[1]] == 0, -torch.inf)


def draw(
    logits: Tensor,  # (num_rows, vocab) float32, may be overwritten
    settings: Settings,
    bitmask: Tensor | None = None,  # (num_rows, ceil(vocab / 32)) int32, see `forbid`
) -> Tensor:  # (num_rows,) int64, -1 where the best logit is not finite or any is NaN
    """Draw from softmax(logits / temperature): of the first k, the fewest that reach p; of those, all above min-p.

    Of equal logits the token with the lower number is the larger. The draw walks the kept tokens by their number.
    """
    logits = logits if bitmask is None else forbid(logits, bitmask)
    temperature, top_k, top_p, min_p, *_ = (values.to(torch.float32)[:, None] for values in settings)
    draws = uniform(settings.seed, settings.position).to(torch.float32)[:, None]
    best = logits.max(dim=-1)
    values, tokens = (logits / temperature.clamp(min=MIN_TEMPERATURE)).sort(dim=-1, descending=True, stable=True)
    probabilities = values.softmax(dim=-1)
    rank = torch.arange(values.shape[1], device=values.device)
    kept = probabilities.masked_fill(rank >= top_k, 0)
    before = kept.cumsum(-1) - kept
    kept = kept.masked_fill((before >= top_p * kept.sum(-1, keepdim=True)) & (top_p < 1) & (rank > 0), 0)
    kept = kept.masked_fill(probabilities < min_p * probabilities[:, :1], 0)
    chosen = pick(torch.zeros_like(kept).scatter(1, tokens, kept), draws)
    chosen = torch.where(temperature[:, 0] == 0, best.indices, chosen)
    return chosen.where(torch.isfinite(best.values), -1)


def pick(
    weights: Tensor,  # (num_rows, num_candidates)
    draws: Tensor,  # (num_rows, 1)
) -> Tensor:  # (num_rows,)
    """The first candidate at which the running sum of weights exceeds the draw's share of their sum."""
    cumulative = weights.cumsum(-1)
    index = (cumulative <= draws * cumulative[:, -1:]).sum(-1)
    # Rounding can push the goal onto the sum itself; the last candidate that still has weight takes it.
    last = torch.where(weights > 0, torch.arange(weights.shape[1], device=weights.device), 0).amax(-1)
    return index.minimum(last)


def _finish_linear(product: Product, plan: Plan, span: LoraSpan) -> Tensor:
    """`(x @ weight.T + B A x) * multiplier + bias`, of every token with its own adapter."""
    out, lora = product.out, plan.batch.lora
    if lora is not None and plan.lora_mask is not None:
        lora_expand(lora_shrink(product.x, lora, plan.lora_mask, span), lora, span, out)
        if lora.multipliers is not None:
            _multiply(out, lora, plan.batch.row_starts, span)
    return out if product.bias is None else out + product.bias


def _multiply(out: Tensor, lora: LoraBatch, row_starts: tuple[int, ...], span: LoraSpan) -> None:
    """DoRA: scale every output of a row by its adapter's factor."""
    assert lora.multipliers is not None
    for pages, (start, stop) in zip(lora.pages, pairwise(row_starts), strict=True):
        if pages:
            factors = lora.multipliers[pages[0], span.first_output :][: out.shape[1]]
            out[start:stop] = (out[start:stop].float() * factors).to(out.dtype)
