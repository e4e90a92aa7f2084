"""The torch twin of every kernel: the readable definition, and the oracle the fast ones are tested against.

Plain torch, any device, any float dtype. A twin may be slow; it may not be clever.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from npc_kernels.batch import PAGE_RANK, BatchMetadata, LoraSpan

__all__ = [
    "Linear",
    "apply_rope",
    "lora_expand",
    "lora_shrink",
    "paged_attention",
    "prefill_attention",
    "rms_norm",
    "silu_mul",
    "stack_pages",
    "write_kv",
]


class Linear:
    """`x @ weight.T + bias`: the one base GEMM that all rows of a step share."""

    def __init__(
        self,
        weight: Tensor,  # (out_features, in_features)
        bias: Tensor | None = None,  # (out_features,)
    ) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(
        self,
        x: Tensor,  # (num_tokens, in_features)
    ) -> Tensor:  # (num_tokens, out_features)
        """Apply it."""
        return F.linear(x, self.weight, self.bias)


def rms_norm(
    x: Tensor,  # (..., size)
    weight: Tensor,  # (size,)
    eps: float,
) -> Tensor:  # (..., size)
    """`x / sqrt(mean(x²) + eps) * weight`, the mean in float32 (Zhang & Sennrich 2019, eq. 4)."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


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
    batch: BatchMetadata,
) -> Tensor:  # (num_tokens, num_heads, head_dim)
    """Causal attention of every row over its own KV slots.

    `softmax(q kᵀ / sqrt(head_dim)) v`, query head `h` reading KV head `h // (num_heads / num_kv_heads)`. Rows with
    one query are padded to the longest of them; rows with more are taken one by one, so that a long prompt costs
    its own size and not its neighbours' too.
    """
    keys, values = k_cache.flatten(0, 1), v_cache.flatten(0, 1)
    out = torch.empty_like(q)
    if batch.num_decode:
        queries = q[: batch.num_decode, :, None]
        seen = keys[batch.decode_slots].transpose(1, 2), values[batch.decode_slots].transpose(1, 2)
        bias = batch.decode_bias[:, None, None]
        decoded = F.scaled_dot_product_attention(queries, *seen, attn_mask=bias, enable_gqa=True)
        out[: batch.num_decode] = decoded[:, :, 0]
    prefill_attention(q, keys, values, batch, out)
    return out


def prefill_attention(
    q: Tensor,  # (num_tokens, num_heads, head_dim)
    keys: Tensor,  # (num_slots, num_kv_heads, head_dim)
    values: Tensor,  # like keys
    batch: BatchMetadata,
    out: Tensor,  # like q, written where prefill rows are
) -> None:
    """Attention of the rows with more than one query, one by one."""
    for row in batch.prefill:
        queries = q[None, row.start : row.stop].transpose(1, 2)
        seen = keys[row.kv_slots][None].transpose(1, 2), values[row.kv_slots][None].transpose(1, 2)
        read = F.scaled_dot_product_attention(queries, *seen, attn_mask=row.mask, enable_gqa=True)
        out[row.start : row.stop] = read[0].transpose(0, 1)


def silu_mul(
    gate_up: Tensor,  # (num_tokens, 2 * intermediate)
) -> Tensor:  # (num_tokens, intermediate)
    """`silu(gate) * up` of the two halves (Shazeer 2020, SwiGLU)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def stack_pages(
    pages: Tensor,  # (num_live, page_elements)
    spans: Iterable[LoraSpan],
) -> Tensor:  # (num_live, page_elements)
    """Prepare the live pages for `lora_shrink` and `lora_expand`; the twin needs no preparation."""
    return pages


def lora_shrink(
    x: Tensor,  # (num_tokens, in_features)
    pages: Tensor,  # (num_live, page_elements)
    mask: Tensor,  # (num_tokens, num_live) bool
    span: LoraSpan,
) -> Tensor:  # (num_tokens, num_live, num_slices, 16)
    """`A x` of every live page for every token, zero where the token's adapter does not own the page.

    The mask selects rather than multiplies, so that a neighbour's overflow cannot become this row's NaN.
    """
    num_live = pages.shape[0]
    a = pages[:, span.start : span.b_start].reshape(-1, span.in_features)
    shrunk = (x @ a.T).view(-1, num_live, span.num_slices, PAGE_RANK)
    return shrunk.masked_fill(~mask[:, :, None, None], 0)


def lora_expand(
    shrunk: Tensor,  # (num_tokens, num_live, num_slices, 16)
    pages: Tensor,  # (num_live, page_elements)
    span: LoraSpan,
    out: Tensor,  # (num_tokens, sum(out_features)), added to
) -> None:
    """Add `B (A x)` to the base output, slice by slice; `B` carries the adapter's scaling."""
    column, offset = 0, span.b_start
    for index, width in enumerate(span.out_features):
        b = pages[:, offset : offset + PAGE_RANK * width].reshape(-1, width)
        out[:, column : column + width].addmm_(shrunk[:, :, index].flatten(1), b)
        column, offset = column + width, offset + PAGE_RANK * width
