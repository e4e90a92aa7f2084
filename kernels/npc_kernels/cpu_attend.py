"""Attention of single tokens over the paged cache, compiled.

Its loops are functions of plain matrices, of which LLVM makes far better code than of one large nest.
"""

import math
from typing import Any

from numba import njit

from npc_kernels.cpu_jit import F32, FAST, array, exp, narrow, next_item, wide, work_of

__all__ = ["CHUNK", "attend"]

CHUNK = 32
"""Positions whose keys or values are widened at once; enough to be worth a loop, few enough for the first cache."""


@njit(fastmath=FAST)
def _weigh(scores: Any) -> None:
    """Softmax in place; all NaN if any score is."""
    best, check = scores[0], F32(0)
    for p in range(scores.shape[0]):
        best = max(best, scores[p])
        check += scores[p]
    total = F32(0)
    for p in range(scores.shape[0]):
        scores[p] = exp(scores[p] - best)
        total += scores[p]
    factor = F32(1) / total if check == check else check
    for p in range(scores.shape[0]):
        scores[p] *= factor


@njit(fastmath=FAST)
def _widen(stored: Any, row: Any) -> None:
    for d in range(stored.shape[0]):
        row[d] = wide(stored[d])


@njit(fastmath=FAST)
def _dot_all(query: Any, keys: Any, scores: Any) -> None:
    """`scores = keys @ query`."""
    for p in range(scores.shape[0]):
        score = F32(0)
        for d in range(query.shape[0]):
            score += query[d] * keys[p, d]
        scores[p] = score


@njit(fastmath=FAST)
def _add_weighted(weights: Any, values: Any, read: Any) -> None:
    """`read += weights @ values`, four positions for each time that `read` is loaded and stored."""
    num_fours = weights.shape[0] // 4 * 4
    for p in range(0, num_fours, 4):
        w0, w1, w2, w3 = weights[p], weights[p + 1], weights[p + 2], weights[p + 3]
        v0, v1, v2, v3 = values[p], values[p + 1], values[p + 2], values[p + 3]
        for d in range(read.shape[0]):
            read[d] += (w0 * v0[d] + w1 * v1[d]) + (w2 * v2[d] + w3 * v3[d])
    for p in range(num_fours, weights.shape[0]):
        weight, value = weights[p], values[p]
        for d in range(read.shape[0]):
            read[d] += weight * value[d]


@njit(fastmath=FAST)
def _load_chunk(cache: Any, table: Any, block_size: Any, span: Any, heads: Any, chunk: Any) -> None:
    """Positions `span` of some heads to float32; arrays stay whole, since a slice may not look contiguous to LLVM."""
    for p in range(span[0], span[1]):
        slot = table[p // block_size] * block_size + p % block_size
        for head in range(heads[0], heads[1]):
            _widen(cache[slot, head], chunk[head, p - span[0]])


@njit(fastmath=FAST)
def _score(heads: Any, queries: Any, chunk: Any, scores: Any, span: Any) -> None:
    for head in range(heads[0], heads[1]):
        for h in range(queries.shape[1]):
            _dot_all(queries[head, h], chunk[head], scores[head, h, span[0] : span[1]])


@njit(fastmath=FAST)
def _read(heads: Any, scores: Any, chunk: Any, reads: Any, span: Any) -> None:
    for head in range(heads[0], heads[1]):
        for h in range(reads.shape[1]):
            _add_weighted(scores[head, h, span[0] : span[1]], chunk[head], reads[head, h])


@njit(fastmath=FAST)
def _begin(heads: Any, stored: Any, queries: Any, reads: Any) -> None:
    """Scaled queries in float32, and nothing read yet."""
    scale = F32(1) / math.sqrt(F32(stored.shape[2]))
    for head in range(heads[0], heads[1]):
        for h in range(stored.shape[1]):
            _widen(stored[head, h], queries[head, h])
            for d in range(stored.shape[2]):
                queries[head, h, d] *= scale
                reads[head, h, d] = F32(0)


@njit(fastmath=FAST)
def _attend_item(w: Any, item: Any) -> None:
    """Some KV heads of one token and the query heads that share them, chunk by chunk of what it may see."""
    size, num_kv, parts = w.head_dim, w.num_kv_heads, w.num_parts
    group = w.num_heads // num_kv
    place, part = item // parts, item % parts
    t = w.first_token + place
    heads = (part * num_kv // parts, (part + 1) * num_kv // parts)
    stored = array(w.x, (w.num_tokens, num_kv, group, size), w.element)[t]
    result = array(w.result, (w.num_tokens, num_kv, group, size), w.element)[t]
    scores = array(w.scores, (place + 1, num_kv, group, w.max_seen), F32(0))[place]
    wide_heads = array(w.wide_out, (place + 1, 2, num_kv, group, size), F32(0))[place]
    chunk = array(w.wide_x, (place + 1, num_kv, CHUNK, size), F32(0))[place]
    num_seen = array(w.positions, (w.num_tokens,), 0)[t] + 1
    row = array(w.token_rows, (w.num_tokens,), 0)[t]
    table = array(w.tables, (row + 1, w.max_blocks), 0)[row]
    num_slots = (table[: -(-num_seen // w.block_size)].max() + 1) * w.block_size
    keys = array(w.keys, (num_slots, num_kv, size), w.element)
    values = array(w.values, (num_slots, num_kv, size), w.element)
    queries, reads = wide_heads[0], wide_heads[1]
    _begin(heads, stored, queries, reads)
    for start in range(0, num_seen, CHUNK):
        span = (start, min(start + CHUNK, num_seen))
        _load_chunk(keys, table, w.block_size, span, heads, chunk)
        _score(heads, queries, chunk, scores, span)
    for head in range(heads[0], heads[1]):
        for h in range(group):
            _weigh(scores[head, h, :num_seen])
    for start in range(0, num_seen, CHUNK):
        span = (start, min(start + CHUNK, num_seen))
        _load_chunk(values, table, w.block_size, span, heads, chunk)
        _read(heads, scores, chunk, reads, span)
    for head in range(heads[0], heads[1]):
        for h in range(group):
            for d in range(size):
                result[head, h, d] = narrow(reads[head, h, d], w.element)


def attend(work: Any) -> None:
    """Attention of single tokens over all slots up to their own."""
    w = work_of(work)
    item = next_item(w)
    while item < w.num_items:
        _attend_item(w, item)
        item = next_item(w)
