"""What happens to the rows of a step between two base GEMMs: adapters, norms, RoPE, SwiGLU; compiled."""

import math
from typing import Any

import numpy as np
from numba import njit

from npc_kernels.cpu_jit import F32, FAST, array, exp, narrow, next_item, wide, work_of

__all__ = ["TILE", "embed", "gate_up", "norm", "qkv", "residual"]

TILE = 4
"""Tokens of one row that share the reading of an adapter."""


@njit(fastmath=FAST)
def _shrink_tile(x: Any, a: Any, shrunk: Any, t: Any) -> None:
    """`A x` of four tokens, so that `A` is read and widened once."""
    size = x.shape[1]
    for rank in range(0, a.shape[0], 2):
        s00 = s01 = s10 = s11 = s20 = s21 = s30 = s31 = F32(0)
        for k in range(size):
            a0, a1 = wide(a[rank, k]), wide(a[rank + 1, k])
            x0, x1, x2, x3 = x[t, k], x[t + 1, k], x[t + 2, k], x[t + 3, k]
            s00 += a0 * x0
            s01 += a1 * x0
            s10 += a0 * x1
            s11 += a1 * x1
            s20 += a0 * x2
            s21 += a1 * x2
            s30 += a0 * x3
            s31 += a1 * x3
        shrunk[t, rank], shrunk[t, rank + 1] = s00, s01
        shrunk[t + 1, rank], shrunk[t + 1, rank + 1] = s10, s11
        shrunk[t + 2, rank], shrunk[t + 2, rank + 1] = s20, s21
        shrunk[t + 3, rank], shrunk[t + 3, rank + 1] = s30, s31


@njit(fastmath=FAST)
def _shrink_token(x: Any, a: Any, shrunk: Any, t: Any) -> None:
    """`A x` of one token, four ranks at a time."""
    size = x.shape[1]
    for rank in range(0, a.shape[0], 4):
        s0 = s1 = s2 = s3 = F32(0)
        for k in range(size):
            value = x[t, k]
            s0 += value * wide(a[rank, k])
            s1 += value * wide(a[rank + 1, k])
            s2 += value * wide(a[rank + 2, k])
            s3 += value * wide(a[rank + 3, k])
        shrunk[t, rank], shrunk[t, rank + 1], shrunk[t, rank + 2], shrunk[t, rank + 3] = s0, s1, s2, s3


@njit(fastmath=FAST)
def _expand_token(out: Any, b: Any, s: Any) -> None:
    """`out += B s` for one token and slice, eight ranks at a time."""
    for rank in range(0, 16, 8):
        s0, s1, s2, s3 = s[rank], s[rank + 1], s[rank + 2], s[rank + 3]
        s4, s5, s6, s7 = s[rank + 4], s[rank + 5], s[rank + 6], s[rank + 7]
        b0, b1, b2, b3 = b[rank], b[rank + 1], b[rank + 2], b[rank + 3]
        b4, b5, b6, b7 = b[rank + 4], b[rank + 5], b[rank + 6], b[rank + 7]
        for n in range(out.shape[0]):
            low = s0 * wide(b0[n]) + s1 * wide(b1[n]) + s2 * wide(b2[n]) + s3 * wide(b3[n])
            high = s4 * wide(b4[n]) + s5 * wide(b5[n]) + s6 * wide(b6[n]) + s7 * wide(b7[n])
            out[n] += low + high


@njit(fastmath=FAST)
def _widen_row(row: Any, wide_row: Any) -> None:
    for k in range(row.shape[0]):
        wide_row[k] = wide(row[k])


@njit(fastmath=FAST)
def _widen(stored: Any, wide_rows: Any, start: Any, stop: Any) -> None:
    """Rows `[start, stop)` to float32."""
    for t in range(start, stop):
        _widen_row(stored[t], wide_rows[t])


@njit(fastmath=FAST)
def _add_page(w: Any, page: Any, start: Any, stop: Any, x: Any, out: Any) -> None:
    """`out += B (A x)` of one adapter page for the tokens of a tile."""
    shrunk = array(w.shrunk, (w.num_tokens, 3 * 16), F32(0))
    offset = w.span_start + w.num_slices * 16 * w.in_features
    a = page[w.span_start : offset].reshape(w.num_slices * 16, w.in_features)
    if stop - start == TILE:
        _shrink_tile(x, a, shrunk, start)
    else:
        for t in range(start, stop):
            _shrink_token(x, a, shrunk, t)
    first = 0
    for index in range(w.num_slices):
        size = w.slice0 if index == 0 else (w.slice1 if index == 1 else w.slice2)
        b = page[offset : offset + 16 * size].reshape(16, size)
        for t in range(start, stop):
            _expand_token(out[t, first : first + size], b, shrunk[t, 16 * index : 16 * index + 16])
        offset += 16 * size
        first += size


@njit(fastmath=FAST)
def _scale_row(row: Any, factors: Any) -> None:
    for n in range(row.shape[0]):
        row[n] *= factors[n]


@njit(fastmath=FAST)
def _return_bias(row: Any, bias: Any, factors: Any) -> None:
    for n in range(row.shape[0]):
        row[n] += wide(bias[n]) * (F32(1) - factors[n])


@njit(fastmath=FAST)
def _scale_tile(w: Any, start: Any, stop: Any, out: Any) -> None:
    """DoRA: every output times its adapter's factor, but for the bias, which the GEMM has added already."""
    page = array(w.first_pages, (w.num_tokens,), 0)[start]
    if page < 0:
        return
    place = page * w.num_outputs + w.first_output
    factors = array(w.multipliers, (place + w.width,), F32(0))[place:]
    for t in range(start, stop):
        _scale_row(out[t], factors)
        if w.bias != 0:
            _return_bias(out[t], array(w.bias, (w.width,), w.element), factors)


@njit(fastmath=FAST)
def _finish_linear(w: Any, start: Any, stop: Any) -> Any:
    """Rows `[start, stop)` of what a linear returned, in float32, with what their adapter adds.

    All tokens of a tile wear the same adapter, so the first one's mask speaks for them.
    """
    out = array(w.wide_out, (w.num_tokens, w.width), F32(0))
    for t in range(start, stop):
        part = w.out if t < w.out_rows else array(w.outs, (t // w.out_rows + 1,), 0)[t // w.out_rows]
        _widen_row(array(part, (w.out_rows, w.width), w.element)[t % w.out_rows], out[t])
    mask = array(w.mask, (w.num_tokens, w.num_live), np.uint8(0))
    live = array(w.live, (w.num_live,), 0)
    x = array(w.wide_x, (w.num_tokens, w.in_features), F32(0))
    is_loaded = False
    for column in range(w.num_live):
        if mask[start, column] != 0:
            if not is_loaded:
                _widen(array(w.x, (w.num_tokens, w.in_features), w.element), x, start, stop)
                is_loaded = True
            page = array(w.pool, (live[column] + 1, w.page_size), w.element)[live[column]]
            _add_page(w, page, start, stop, x, out)
    if w.multipliers != 0:
        _scale_tile(w, start, stop, out)
    return out


@njit(fastmath=FAST)
def _normalise(row: Any, weight: Any, eps: Any, result: Any) -> None:
    """RMS norm of one row."""
    total = F32(0)
    for k in range(row.shape[0]):
        total += row[k] * row[k]
    factor = F32(1) / math.sqrt(total / F32(row.shape[0]) + F32(eps))
    for k in range(row.shape[0]):
        result[k] = narrow(row[k] * factor * wide(weight[k]), result[k])


def embed(work: Any) -> None:
    """`hidden = x[token_ids]`, in float32."""
    w = work_of(work)
    token_ids = array(w.token_ids, (w.num_tokens,), 0)
    hidden = array(w.hidden, (w.num_tokens, w.width), F32(0))
    item = next_item(w)
    while item < w.num_items:
        table = array(w.x, (token_ids[item] + 1, w.width), w.element)
        row, stored = hidden[item], table[token_ids[item]]
        for k in range(w.width):
            row[k] = wide(stored[k])
        item = next_item(w)


def norm(work: Any) -> None:
    """The norm before the first linear: `result = rms_norm(hidden)`."""
    w = work_of(work)
    hidden = array(w.hidden, (w.num_tokens, w.width), F32(0))
    result = array(w.result, (w.num_tokens, w.width), w.element)
    weight = array(w.weight, (w.width,), w.element)
    item = next_item(w)
    while item < w.num_items:
        _normalise(hidden[item], weight, w.eps, result[item])
        item = next_item(w)


def residual(work: Any) -> None:
    """`hidden += out + adapters(x); result = rms_norm(hidden)`."""
    w = work_of(work)
    tiles = array(w.tiles, (w.num_items + 1,), 0)
    hidden = array(w.hidden, (w.num_tokens, w.width), F32(0))
    result = array(w.result, (w.num_tokens, w.width), w.element)
    weight = array(w.weight, (w.width,), w.element)
    item = next_item(w)
    while item < w.num_items:
        out = _finish_linear(w, tiles[item], tiles[item + 1])
        for t in range(tiles[item], tiles[item + 1]):
            row, added = hidden[t], out[t]
            for n in range(w.width):
                row[n] += added[n]
            _normalise(row, weight, w.eps, result[t])
        item = next_item(w)


def gate_up(work: Any) -> None:
    """`result = silu(gate) * up` of `out + adapters(x)`."""
    w = work_of(work)
    tiles = array(w.tiles, (w.num_items + 1,), 0)
    size = w.width // 2
    result = array(w.result, (w.num_tokens, size), w.element)
    item = next_item(w)
    while item < w.num_items:
        out = _finish_linear(w, tiles[item], tiles[item + 1])
        for t in range(tiles[item], tiles[item + 1]):
            gates, ups, row = out[t, :size], out[t, size:], result[t]
            for n in range(size):
                gate = gates[n]
                row[n] = narrow(gate / (F32(1) + exp(-gate)) * ups[n], w.element)
        item = next_item(w)


@njit(fastmath=FAST)
def _normalise_head(head: Any, weight: Any, eps: Any) -> None:
    total = F32(0)
    for d in range(head.shape[0]):
        total += head[d] * head[d]
    factor = F32(1) / math.sqrt(total / F32(head.shape[0]) + F32(eps))
    for d in range(head.shape[0]):
        head[d] = head[d] * factor * wide(weight[d])


def qkv(work: Any) -> None:
    """Head norms and RoPE of `out + adapters(x)`; queries to `result`, keys and values to their slots."""
    w = work_of(work)
    tiles = array(w.tiles, (w.num_items + 1,), 0)
    size, num_q, num_kv = w.head_dim, w.num_heads, w.num_kv_heads
    half = size // 2
    queries = array(w.result, (w.num_tokens, num_q * size), w.element)
    positions = array(w.positions, (w.num_tokens,), 0)
    slots = array(w.kv_slots, (w.num_tokens,), 0)
    item = next_item(w)
    while item < w.num_items:
        out = _finish_linear(w, tiles[item], tiles[item + 1])
        for t in range(tiles[item], tiles[item + 1]):
            if w.q_norm != 0:
                for head in range(num_q + num_kv):
                    weight = array(w.q_norm if head < num_q else w.k_norm, (size,), w.element)
                    _normalise_head(out[t, head * size : (head + 1) * size], weight, w.eps)
            if w.rotates != 0:
                angle = positions[t] * half
                cos = array(w.cos, (angle + half,), F32(0))[angle:]
                sin = array(w.sin, (angle + half,), F32(0))[angle:]
                for head in range(num_q + num_kv):
                    row = out[t, head * size : (head + 1) * size]
                    for d in range(half):
                        first, second = row[d], row[d + half]
                        row[d] = first * cos[d] - second * sin[d]
                        row[d + half] = second * cos[d] + first * sin[d]
            row, query = out[t], queries[t]
            for d in range(num_q * size):
                query[d] = narrow(row[d], w.element)
            kv_size = num_kv * size
            key = array(w.keys, ((slots[t] + 1) * kv_size,), w.element)[slots[t] * kv_size :]
            value = array(w.values, ((slots[t] + 1) * kv_size,), w.element)[slots[t] * kv_size :]
            for d in range(kv_size):
                key[d] = narrow(row[num_q * size + d], w.element)
                value[d] = narrow(row[num_q * size + kv_size + d], w.element)
        item = next_item(w)
