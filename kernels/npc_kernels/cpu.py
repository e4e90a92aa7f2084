"""The fast CPU path: oneDNN-packed weights, packed adapter pages, attention of single queries as two products.

Same functions as `reference.py`, the same results up to rounding; what is not faster here is taken from there.
The operators that pack weights are private to torch, so they are probed once and done without where they are
missing. Measurements in `kernels/README.md`.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from npc_kernels.batch import PAGE_RANK, BatchMetadata, Codes, LoraBatch, LoraSpan
from npc_kernels.reference import (
    MIN_TEMPERATURE,
    HeadNorms,
    PlannedRow,
    Settings,
    attend_row,
    pick,
    plan_rows,
    prepare,
    rms_norm,
    silu_mul,
    write_kv,
)
from npc_kernels.reference import draw as reference_draw

__all__ = [
    "Linear",
    "Plan",
    "StackedPages",
    "apply_rope",
    "begin",
    "draw",
    "finish_gate_up",
    "finish_qkv",
    "finish_residual",
    "paged_attention",
    "plan",
    "prepare",
]

NUM_CANDIDATES = 256
"""Top logits looked at before a full sort is needed; real nuclei are far smaller."""

PACK_ROWS = 8
"""Rows that oneDNN is told to expect when it chooses a layout; 8 was as good as the exact number at 1 and 32."""


class Linear:
    """A base linear whose weight is stored once, in the layout that oneDNN's GEMM reads."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, codes: Codes | None = None) -> None:
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


class Plan(NamedTuple):
    """What this module wants to know about a step before its first layer."""

    batch: BatchMetadata
    cos: Tensor  # (num_tokens, head_dim / 2) float32
    sin: Tensor  # (num_tokens, head_dim / 2) float32
    rows: tuple[PlannedRow, ...]  # those with more than one token
    decode_slots: Tensor  # (num_decode, max_seen) int64, short rows padded with their first slot
    decode_bias: Tensor  # (num_decode, max_seen), 0 where a slot may be seen, -inf elsewhere
    stack: "_Stack"


class _Stack(NamedTuple):
    """Pages of the pool as they were at `version`, packed."""

    version: int
    live: tuple[int, ...]
    pages: "StackedPages | None"
    mask: Tensor | None  # (num_tokens, num_live) bool


def plan(batch: BatchMetadata, cos: Tensor, sin: Tensor, previous: Any = None) -> Plan:
    """Prepare a step. A slot that was never written may hold a NaN that no bias hides, hence the padding."""
    num_seen = batch.positions[: batch.num_decode, None] + 1
    offsets = torch.arange(batch.block_size)
    slots = (batch.block_tables[: batch.num_decode, :, None] * batch.block_size + offsets).flatten(1)
    slots = slots[:, : int(num_seen.max()) if batch.num_decode else 0]
    hidden = torch.arange(slots.shape[1]) >= num_seen
    return Plan(
        batch,
        cos[batch.positions],
        sin[batch.positions],
        tuple(plan_rows(batch, first=batch.num_decode)),
        decode_slots=torch.where(hidden, slots[:, :1], slots),
        decode_bias=torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf),
        stack=_stack(batch.lora, previous.stack if previous is not None else _Stack(-1, (), None, None)),
    )


def _stack(lora: LoraBatch | None, kept: _Stack) -> _Stack:
    """The live pages; kept, with pages of lines that are over, while at least half is in use."""
    if lora is None:
        return kept._replace(mask=None)
    fits = kept.version == lora.version and set(lora.live) <= set(kept.live)
    if not fits or len(kept.live) > 2 * len(lora.live):
        kept = _Stack(lora.version, lora.live, StackedPages(lora.pool[list(lora.live)]), None)
    mask = torch.zeros(len(lora.mask), len(kept.live), dtype=torch.bool)
    mask[:, [kept.live.index(page) for page in lora.live]] = lora.mask
    return kept._replace(mask=mask)


class StackedPages:
    """The pages in use, regrouped so that a linear group's `A`, and each slice's `B`, is one packed matrix."""

    def __init__(self, pages: Tensor) -> None:
        self._pages = pages
        self._shrinks: dict[int, Linear] = {}
        self._expands: dict[int, list[Linear]] = {}

    def shrink(self, span: LoraSpan) -> Linear:
        """All live `A` of the group: in_features to num_live * num_slices * 16."""
        if span.start not in self._shrinks:
            a = self._pages[:, span.start : span.b_start].reshape(-1, span.in_features)
            self._shrinks[span.start] = Linear(a)
        return self._shrinks[span.start]

    def expand(self, span: LoraSpan) -> list[Linear]:
        """All live `B` of each slice: num_live * 16 to out_features."""
        if span.start not in self._expands:
            self._expands[span.start] = list(_expansions(self._pages, span))
        return self._expands[span.start]


def begin(hidden: Tensor, plan: Plan, weight: Tensor, eps: float) -> Tensor:
    """As the twin."""
    return rms_norm(hidden, weight, eps)


def finish_qkv(
    qkv: Tensor,  # (num_tokens, (num_heads + 2 * num_kv_heads) * head_dim): what the linear made of x
    x: Tensor,  # (num_tokens, hidden)
    k_cache: Tensor,  # (num_blocks, block_size, num_kv_heads, head_dim), written
    v_cache: Tensor,  # like k_cache, written
    plan: Plan,
    span: LoraSpan,
    norms: HeadNorms,
    *,
    rotates: bool,
) -> Tensor:  # (num_tokens, num_heads, head_dim)
    """As the twin, queries and keys rotated together."""
    _add_adapters(qkv, x, plan.stack, span)
    num_kv_heads, head_dim = k_cache.shape[-2:]
    heads = qkv.view(len(qkv), -1, head_dim)
    num_heads = heads.shape[1] - 2 * num_kv_heads
    qk, v = heads[:, :-num_kv_heads], heads[:, -num_kv_heads:]
    if norms.q is not None and norms.k is not None:
        normed = (rms_norm(qk[:, :num_heads], norms.q, norms.eps), rms_norm(qk[:, num_heads:], norms.k, norms.eps))
        qk = torch.cat(normed, dim=1)
    if rotates:
        qk = apply_rope(qk, plan.cos, plan.sin)
    write_kv(qk[:, num_heads:], v, k_cache, v_cache, plan.batch.kv_slots)
    return qk[:, :num_heads]


def paged_attention(
    q: Tensor,  # (num_tokens, num_heads, head_dim)
    k_cache: Tensor,  # (num_blocks, block_size, num_kv_heads, head_dim)
    v_cache: Tensor,  # like k_cache
    plan: Plan,
) -> Tensor:  # (num_tokens, num_heads * head_dim)
    """As the twin, with the decode rows' heads gathered side by side and multiplied twice."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    num_decode = plan.batch.num_decode
    if num_decode:
        out[:num_decode] = _decode_attention(q[:num_decode], k_cache, v_cache, plan)
    for row in plan.rows:
        out[row.start : row.stop] = attend_row(q[row.start : row.stop], k_cache, v_cache, row)
    return out.flatten(1)


def _decode_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, plan: Plan) -> Tensor:
    num_rows, length = plan.decode_slots.shape
    num_kv_heads, size = k_cache.shape[-2:]
    heads = torch.arange(num_kv_heads)[:, None]
    index = (plan.decode_slots[:, None] * num_kv_heads + heads).flatten()
    keys = k_cache.view(-1, size).index_select(0, index).view(-1, length, size)
    values = v_cache.view(-1, size).index_select(0, index).view(-1, length, size)
    bias = plan.decode_bias.to(q.dtype)[:, None].expand(-1, num_kv_heads, -1).reshape(-1, 1, length)
    queries = q.reshape(num_rows * num_kv_heads, -1, size)
    scores = torch.baddbmm(bias, queries, keys.transpose(1, 2), alpha=size**-0.5)
    return torch.bmm(scores.softmax(-1), values).view(num_rows, -1, size)


def finish_residual(
    out: Tensor,  # (num_tokens, hidden): what the linear made of x
    x: Tensor,  # (num_tokens, in_features)
    hidden: Tensor,  # (num_tokens, hidden) float32, added to
    plan: Plan,
    span: LoraSpan,
    weight: Tensor,  # (hidden,)
    eps: float,
) -> Tensor:  # (num_tokens, hidden)
    """As the twin."""
    _add_adapters(out, x, plan.stack, span)
    hidden += out
    return rms_norm(hidden, weight, eps)


def finish_gate_up(
    gate_up: Tensor,  # (num_tokens, 2 * intermediate): what the linear made of x
    x: Tensor,  # (num_tokens, hidden)
    plan: Plan,
    span: LoraSpan,
) -> Tensor:  # (num_tokens, intermediate)
    """As the twin."""
    _add_adapters(gate_up, x, plan.stack, span)
    return silu_mul(gate_up)


def _add_adapters(out: Tensor, x: Tensor, stack: _Stack, span: LoraSpan) -> None:
    """One packed product for all `A` of the group, one a slice for `B`."""
    if stack.mask is None or stack.pages is None:
        return
    shrunk = stack.pages.shrink(span)(x).view(len(x), len(stack.live), span.num_slices, PAGE_RANK)
    shrunk = shrunk.masked_fill_(~stack.mask[:, :, None, None], 0)
    column = 0
    for index, expand in enumerate(stack.pages.expand(span)):
        width = expand.shape[0]
        out[:, column : column + width].add_(expand(shrunk[:, :, index].flatten(1)))
        column += width


def draw(logits: Tensor, settings: Settings) -> Tensor:
    """As the twin, looking at the largest logits only, unless some row wants more of them."""
    vocab = logits.shape[1]
    is_cut = (settings.top_k < vocab) | (settings.top_p < 1)
    tokens = torch.empty(len(logits), dtype=torch.long)
    for rows, choose in ((is_cut.nonzero()[:, 0], _draw_cut), ((~is_cut).nonzero()[:, 0], _draw_whole)):
        if len(rows):
            tokens[rows] = choose(logits[rows], Settings(*(values[rows] for values in settings)))
    return tokens


def _draw_whole(logits: Tensor, settings: Settings) -> Tensor:
    """Rows without top-k and top-p: nothing to sort."""
    temperature, _, _, min_p, draws = (values.to(torch.float32)[:, None] for values in settings)
    best = logits.max(dim=-1, keepdim=True)
    weights = ((logits - best.values) / temperature.clamp(min=MIN_TEMPERATURE)).exp()
    chosen = pick(weights.masked_fill_(weights < min_p, 0), draws)
    chosen = torch.where(temperature[:, 0] == 0, best.indices[:, 0], chosen)
    return chosen.where(torch.isfinite(best.values[:, 0]), -1)


def _draw_cut(logits: Tensor, settings: Settings) -> Tensor:
    """Draw among the candidates where they hold the row's top-k or nucleus; else sort it all."""
    vocab = logits.shape[1]
    candidates = logits.topk(min(NUM_CANDIDATES, vocab), dim=-1).indices.sort(dim=-1).values
    heads = logits.gather(1, candidates)
    temperature = settings.temperature.float().clamp(min=MIN_TEMPERATURE)[:, None]
    mass = ((heads / temperature).logsumexp(-1) - (logits / temperature).logsumexp(-1)).exp()
    is_whole = settings.top_k < vocab  # a top-k is a share of itself, a nucleus of everything
    fits = torch.where(is_whole, settings.top_k <= candidates.shape[1], mass > settings.top_p + 1e-4)
    nucleus = torch.where(is_whole, settings.top_p, settings.top_p / mass)
    index = reference_draw(heads, settings._replace(top_p=nucleus))
    chosen = candidates.gather(1, index.clamp(min=0)[:, None])[:, 0].where(index >= 0, -1)
    rest = (~fits & (settings.temperature > 0)).nonzero()[:, 0]
    if len(rest):
        chosen[rest] = reference_draw(logits[rest], Settings(*(values[rest] for values in settings)))
    return chosen


def _expansions(pages: Tensor, span: LoraSpan) -> Iterator[Linear]:
    offset = span.b_start
    for width in span.out_features:
        b = pages[:, offset : offset + PAGE_RANK * width].reshape(-1, width)
        yield Linear(b.T.contiguous())
        offset += PAGE_RANK * width


def _pack(weight: Tensor) -> Tensor | None:
    """The weight in oneDNN's layout, or None where this torch or this processor has no such GEMM."""
    pack: Callable[..., Tensor] | None = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
    if pack is None or (weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return None
    try:
        return pack(weight, PACK_ROWS)
    except RuntimeError:
        return None
