"""The fast CPU path: oneDNN-packed weights, packed adapter pages, attention of single queries as two products.

Same functions as `reference.py`, the same results up to rounding; what is not faster here is taken from there.
The operators that pack weights are private to torch, so they are probed once and done without where they are
missing. Measurements in `kernels/README.md`.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from npc_kernels.batch import PAGE_RANK, BatchMetadata, LoraSpan
from npc_kernels.reference import prefill_attention, rms_norm, silu_mul, write_kv

__all__ = [
    "Linear",
    "StackedPages",
    "apply_rope",
    "lora_expand",
    "lora_shrink",
    "paged_attention",
    "rms_norm",
    "silu_mul",
    "stack_pages",
    "write_kv",
]

PACK_ROWS = 8
"""Rows that oneDNN is told to expect when it chooses a layout; 8 was as good as the exact number at 1 and 32."""


class Linear:
    """A base linear whose weight is stored once, in the layout that oneDNN's GEMM reads."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._bias = bias
        self._packed = _pack(weight)
        self._weight = None if self._packed is not None else weight
        self.shape = weight.shape

    def __call__(
        self,
        x: Tensor,  # (num_tokens, in_features)
    ) -> Tensor:  # (num_tokens, out_features)
        """`x @ weight.T + bias`."""
        if self._weight is not None:
            return F.linear(x, self._weight, self._bias)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return out


def apply_rope(
    x: Tensor,  # (num_tokens, num_heads, head_dim)
    cos: Tensor,  # (num_tokens, head_dim / 2) float32
    sin: Tensor,  # (num_tokens, head_dim / 2) float32
) -> Tensor:  # (num_tokens, num_heads, head_dim)
    """The same rotation as one product with the halves swapped: `x · [cos, cos] + swap(x) · [-sin, sin]`."""
    wide = x.float()
    cosines = torch.cat((cos, cos), dim=-1)[:, None]
    sines = torch.cat((-sin, sin), dim=-1)[:, None]
    return torch.addcmul(wide * cosines, wide.roll(x.shape[-1] // 2, -1), sines).to(x.dtype)


def paged_attention(
    q: Tensor,  # (num_tokens, num_heads, head_dim)
    k_cache: Tensor,  # (num_blocks, block_size, num_kv_heads, head_dim)
    v_cache: Tensor,  # like k_cache
    batch: BatchMetadata,
) -> Tensor:  # (num_tokens, num_heads, head_dim)
    """As the twin, with the decode rows' heads gathered side by side and multiplied twice."""
    out = torch.empty_like(q)
    if batch.num_decode:
        out[: batch.num_decode] = _decode_attention(q[: batch.num_decode], k_cache, v_cache, batch)
    prefill_attention(q, k_cache.flatten(0, 1), v_cache.flatten(0, 1), batch, out)
    return out


def _decode_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: BatchMetadata) -> Tensor:
    num_rows, length = batch.decode_slots.shape
    num_kv_heads, size = k_cache.shape[-2:]
    heads = torch.arange(num_kv_heads, device=q.device)[:, None]
    index = (batch.decode_slots[:, None] * num_kv_heads + heads).flatten()
    keys = k_cache.view(-1, size).index_select(0, index).view(-1, length, size)
    values = v_cache.view(-1, size).index_select(0, index).view(-1, length, size)
    bias = batch.decode_bias[:, None].expand(-1, num_kv_heads, -1).reshape(-1, 1, length)
    queries = q.reshape(num_rows * num_kv_heads, -1, size)
    scores = torch.baddbmm(bias, queries, keys.transpose(1, 2), alpha=size**-0.5)
    return torch.bmm(scores.softmax(-1), values).view(num_rows, -1, size)


class StackedPages:
    """The pages in use, regrouped so that a linear group's `A`, and each slice's `B`, is one packed matrix."""

    def __init__(self, pages: Tensor, spans: Iterable[LoraSpan]) -> None:
        self.num_live = len(pages)
        self._shrinks: dict[int, Linear] = {}
        self._expands: dict[int, list[Linear]] = {}
        for span in spans:
            self._shrinks[span.start] = Linear(pages[:, span.start : span.b_start].reshape(-1, span.in_features))
            self._expands[span.start] = list(_expansions(pages, span))

    def shrink(self, span: LoraSpan) -> Linear:
        """All live `A` of the group: in_features to num_live * num_slices * 16."""
        return self._shrinks[span.start]

    def expand(self, span: LoraSpan) -> list[Linear]:
        """All live `B` of each slice: num_live * 16 to out_features."""
        return self._expands[span.start]


def stack_pages(
    pages: Tensor,  # (num_live, page_elements)
    spans: Iterable[LoraSpan],
) -> StackedPages:
    """Regroup the live pages; done when their set changes, not in every step."""
    return StackedPages(pages, spans)


def lora_shrink(
    x: Tensor,  # (num_tokens, in_features)
    pages: StackedPages,
    mask: Tensor,  # (num_tokens, num_live) bool
    span: LoraSpan,
) -> Tensor:  # (num_tokens, num_live, num_slices, 16)
    """As the twin, with one packed product for the group."""
    shrunk = pages.shrink(span)(x).view(-1, pages.num_live, span.num_slices, PAGE_RANK)
    return shrunk.masked_fill_(~mask[:, :, None, None], 0)


def lora_expand(
    shrunk: Tensor,  # (num_tokens, num_live, num_slices, 16)
    pages: StackedPages,
    span: LoraSpan,
    out: Tensor,  # (num_tokens, sum(out_features)), added to
) -> None:
    """As the twin, with one packed product a slice."""
    column = 0
    for index, expand in enumerate(pages.expand(span)):
        width = expand.shape[0]
        out[:, column : column + width].add_(expand(shrunk[:, :, index].flatten(1)))
        column += width


def _expansions(pages: Tensor, span: LoraSpan) -> Iterator[Linear]:
    offset = span.b_start
    for width in span.out_features:
        b = pages[:, offset : offset + PAGE_RANK * width].reshape(-1, width)
        yield Linear(b.T.contiguous())
        offset += PAGE_RANK * width


def _pack(weight: Tensor) -> Tensor | None:
    """The weight in oneDNN's layout, or None where this torch or this processor has no such GEMM."""
    pack: Callable[..., Tensor] | None = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
    if pack is None or weight.dtype != torch.bfloat16 or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    try:
        return pack(weight, PACK_ROWS)
    except RuntimeError:
        return None
