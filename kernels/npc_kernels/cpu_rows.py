"""What happens to the rows of a step between two base GEMMs, compiled by numba for the processor at hand.

Each kernel takes its work from one struct and its items (tokens, tiles of tokens, attention heads) from a shared
counter, so that any number of threads may run it side by side, one included. What it computes for a row depends
on that row alone, to the last bit. Activations, caches and adapters are bfloat16 (read as uint16) or float32;
everything is computed in float32.

Everything compiled is in this one file: numba's cache looks at the time stamp of the file of the entry point only.
"""

import ctypes
import functools
import math
from typing import Any, Literal, NamedTuple

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, from_dtype, njit, types
from numba.extending import intrinsic

from npc_kernels.reference import MIN_TEMPERATURE

__all__ = ["CHUNK", "LANES", "TILE", "Kernels", "Work", "compile_kernels"]

TILE = 4
"""Tokens of one row that share the reading of an adapter."""

CHUNK = 32
"""Positions whose keys or values are widened at once; enough to be worth a loop, few enough for the processor's first cache."""

LANES = 64
"""Outputs of a linear whose 4-bit codes lie side by side."""

POINTERS = (
    "counter num_items tiles num_tokens hidden x out result weight width "  # what is worked on
    "pool page_size live num_live mask span_start in_features num_slices slice0 slice1 slice2 "  # adapters
    "wide_x wide_out shrunk scores "  # scratch, float32
    "q_norm k_norm rotates cos sin positions kv_slots keys values num_heads num_kv_heads head_dim "  # attention
    "tables max_blocks block_size token_rows max_seen num_parts "
    "codes scales minima"  # 4-bit weights
).split()


class Work(ctypes.Structure):
    """Addresses and sizes, all int64, and the norm's epsilon; what each means is said where it is read."""

    _fields_ = [*((name, ctypes.c_int64) for name in POINTERS), ("eps", ctypes.c_double)]  # noqa: RUF012


_WORK = types.CPointer(from_dtype(np.dtype([*((name, "i8") for name in POINTERS), ("eps", "f8")])))
_FAST = {"reassoc", "contract", "arcp", "nsz"}  # not nnan, ninf: an overflow must be seen at the logits
F32 = np.float32


@intrinsic
def _pointer(_context: Any, _address: Any, dtype: Any) -> Any:
    """An address as a pointer to numbers of a type."""
    kind = types.CPointer(dtype.dtype)

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(kind))

    return kind(types.int64, dtype), generate


@intrinsic
def _next(_context: Any, _counter: Any) -> Any:
    """Take the next item: add one to the counter that all threads share, return what it was."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", args[0], ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(types.CPointer(types.int64)), generate


@intrinsic
def _as_float(_context: Any, _bits: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic
def _wide(_context: Any, value: Any) -> Any:
    """A stored number as float32; a bfloat16 is the upper half of one."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        if value != types.uint16:
            return args[0]
        bits = builder.zext(args[0], ir.IntType(32))
        return builder.bitcast(builder.shl(bits, ir.Constant(ir.IntType(32), 16)), ir.FloatType())

    return types.float32(value), generate


@intrinsic
def _narrow(_context: Any, _value: Any, dtype: Any) -> Any:
    """A float32 as it is stored; a bfloat16 is rounded to nearest, ties to even."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        if dtype.dtype != types.uint16:
            return args[0]
        word = ir.IntType(32)
        bits = builder.bitcast(args[0], word)
        is_odd = builder.and_(builder.lshr(bits, ir.Constant(word, 16)), ir.Constant(word, 1))
        rounded = builder.add(builder.add(bits, ir.Constant(word, 0x7FFF)), is_odd)
        return builder.trunc(builder.lshr(rounded, ir.Constant(word, 16)), ir.IntType(16))

    return dtype.dtype(types.float32, dtype), generate


@njit(inline="always")
def _array(address: Any, shape: Any, dtype: Any) -> Any:
    return carray(_pointer(address, dtype), shape)


@njit(fastmath=_FAST, inline="always")
def _exp(x: Any) -> Any:
    """e^x to about 2 ulp in operations that vectorise (Cephes expf: Cody-Waite reduction, degree 6)."""
    x = min(max(x, F32(-87.0)), F32(88.0))
    n = np.floor(x * F32(1.44269504) + F32(0.5))
    r = x - n * F32(0.693359375) + n * F32(2.12194440e-4)
    p = F32(1.9875691500e-4)
    p = p * r + F32(1.3981999507e-3)
    p = p * r + F32(8.3334519073e-3)
    p = p * r + F32(4.1665795894e-2)
    p = p * r + F32(1.6666665459e-1)
    p = p * r + F32(5.0000001201e-1)
    return (p * r * r + r + F32(1)) * _as_float(np.uint32(np.int32(n) + np.int32(127)) << np.uint32(23))


@njit(fastmath=_FAST)
def _shrink_tile(x: Any, a: Any, shrunk: Any, t: Any) -> None:
    """`A x` of four tokens, so that `A` is read and widened once."""
    size = x.shape[1]
    for rank in range(0, a.shape[0], 2):
        s00 = s01 = s10 = s11 = s20 = s21 = s30 = s31 = F32(0)
        for k in range(size):
            a0, a1 = _wide(a[rank, k]), _wide(a[rank + 1, k])
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


@njit(fastmath=_FAST)
def _shrink_token(x: Any, a: Any, shrunk: Any, t: Any) -> None:
    """`A x` of one token, four ranks at a time."""
    size = x.shape[1]
    for rank in range(0, a.shape[0], 4):
        s0 = s1 = s2 = s3 = F32(0)
        for k in range(size):
            value = x[t, k]
            s0 += value * _wide(a[rank, k])
            s1 += value * _wide(a[rank + 1, k])
            s2 += value * _wide(a[rank + 2, k])
            s3 += value * _wide(a[rank + 3, k])
        shrunk[t, rank], shrunk[t, rank + 1], shrunk[t, rank + 2], shrunk[t, rank + 3] = s0, s1, s2, s3


@njit(fastmath=_FAST)
def _expand_token(out: Any, b: Any, s: Any) -> None:
    """`out += B s` for one token and slice, eight ranks at a time."""
    for rank in range(0, 16, 8):
        s0, s1, s2, s3 = s[rank], s[rank + 1], s[rank + 2], s[rank + 3]
        s4, s5, s6, s7 = s[rank + 4], s[rank + 5], s[rank + 6], s[rank + 7]
        b0, b1, b2, b3 = b[rank], b[rank + 1], b[rank + 2], b[rank + 3]
        b4, b5, b6, b7 = b[rank + 4], b[rank + 5], b[rank + 6], b[rank + 7]
        for n in range(out.shape[0]):
            low = s0 * _wide(b0[n]) + s1 * _wide(b1[n]) + s2 * _wide(b2[n]) + s3 * _wide(b3[n])
            high = s4 * _wide(b4[n]) + s5 * _wide(b5[n]) + s6 * _wide(b6[n]) + s7 * _wide(b7[n])
            out[n] += low + high


@njit(fastmath=_FAST)
def _finish_linear(w: Any, start: Any, stop: Any, dtype: Any) -> Any:
    """Rows `[start, stop)` of what a linear returned, in float32, with what their adapter adds.

    All tokens of a tile wear the same adapter, so the first one's mask speaks for them.
    """
    out = _array(w.out, (w.num_tokens, w.width), dtype)
    wide_out = _array(w.wide_out, (w.num_tokens, w.width), np.float32)
    for t in range(start, stop):
        for n in range(w.width):
            wide_out[t, n] = _wide(out[t, n])
    mask = _array(w.mask, (w.num_tokens, w.num_live), np.uint8)
    live = _array(w.live, (w.num_live,), np.int64)
    x = _array(w.x, (w.num_tokens, w.in_features), dtype)
    wide_x = _array(w.wide_x, (w.num_tokens, w.in_features), np.float32)
    shrunk = _array(w.shrunk, (w.num_tokens, 48), np.float32)
    is_loaded = False
    for column in range(w.num_live):
        if mask[start, column] == 0:
            continue
        if not is_loaded:
            for t in range(start, stop):
                for k in range(w.in_features):
                    wide_x[t, k] = _wide(x[t, k])
            is_loaded = True
        page = _array(w.pool, (live[column] + 1, w.page_size), dtype)[live[column]]
        b_start = w.span_start + w.num_slices * 16 * w.in_features
        a = page[w.span_start : b_start].reshape(w.num_slices * 16, w.in_features)
        if stop - start == TILE:
            _shrink_tile(wide_x, a, shrunk, start)
        else:
            for t in range(start, stop):
                _shrink_token(wide_x, a, shrunk, t)
        first = 0
        for index in range(w.num_slices):
            size = w.slice0 if index == 0 else (w.slice1 if index == 1 else w.slice2)
            b = page[b_start : b_start + 16 * size].reshape(16, size)
            for t in range(start, stop):
                _expand_token(wide_out[t, first : first + size], b, shrunk[t, 16 * index : 16 * index + 16])
            b_start += 16 * size
            first += size
    return wide_out


@njit(fastmath=_FAST)
def _normalise(row: Any, weight: Any, eps: Any, result: Any, dtype: Any) -> None:
    """RMS norm of one row."""
    total = F32(0)
    for k in range(row.shape[0]):
        total += row[k] * row[k]
    factor = F32(1) / math.sqrt(total / F32(row.shape[0]) + F32(eps))
    for k in range(row.shape[0]):
        result[k] = _narrow(row[k] * factor * _wide(weight[k]), dtype)


@njit(fastmath=_FAST)
def _norm(work: Any, dtype: Any) -> None:
    """The norm before the first linear: `result = rms_norm(hidden)`."""
    w = carray(work, 1)[0]
    hidden = _array(w.hidden, (w.num_tokens, w.width), np.float32)
    result = _array(w.result, (w.num_tokens, w.width), dtype)
    weight = _array(w.weight, (w.width,), dtype)
    counter = _pointer(w.counter, np.int64)
    item = _next(counter)
    while item < w.num_items:
        _normalise(hidden[item], weight, w.eps, result[item], dtype)
        item = _next(counter)


@njit(fastmath=_FAST)
def _residual(work: Any, dtype: Any) -> None:
    """`hidden += out + adapters(x); result = rms_norm(hidden)`."""
    w = carray(work, 1)[0]
    tiles = _array(w.tiles, (w.num_items + 1,), np.int64)
    hidden = _array(w.hidden, (w.num_tokens, w.width), np.float32)
    result = _array(w.result, (w.num_tokens, w.width), dtype)
    weight = _array(w.weight, (w.width,), dtype)
    counter = _pointer(w.counter, np.int64)
    item = _next(counter)
    while item < w.num_items:
        out = _finish_linear(w, tiles[item], tiles[item + 1], dtype)
        for t in range(tiles[item], tiles[item + 1]):
            row, added = hidden[t], out[t]
            for n in range(w.width):
                row[n] += added[n]
            _normalise(row, weight, w.eps, result[t], dtype)
        item = _next(counter)


@njit(fastmath=_FAST)
def _gate_up(work: Any, dtype: Any) -> None:
    """`result = silu(gate) * up` of `out + adapters(x)`."""
    w = carray(work, 1)[0]
    tiles = _array(w.tiles, (w.num_items + 1,), np.int64)
    size = w.width // 2
    result = _array(w.result, (w.num_tokens, size), dtype)
    counter = _pointer(w.counter, np.int64)
    item = _next(counter)
    while item < w.num_items:
        out = _finish_linear(w, tiles[item], tiles[item + 1], dtype)
        for t in range(tiles[item], tiles[item + 1]):
            gates, ups, row = out[t, :size], out[t, size:], result[t]
            for n in range(size):
                gate = gates[n]
                row[n] = _narrow(gate / (F32(1) + _exp(-gate)) * ups[n], dtype)
        item = _next(counter)


@njit(fastmath=_FAST)
def _normalise_head(head: Any, weight: Any, eps: Any) -> None:
    total = F32(0)
    for d in range(head.shape[0]):
        total += head[d] * head[d]
    factor = F32(1) / math.sqrt(total / F32(head.shape[0]) + F32(eps))
    for d in range(head.shape[0]):
        head[d] = head[d] * factor * _wide(weight[d])


@njit(fastmath=_FAST)
def _qkv(work: Any, dtype: Any) -> None:
    """Head norms and RoPE of `out + adapters(x)`; queries to `result`, keys and values to their slots."""
    w = carray(work, 1)[0]
    tiles = _array(w.tiles, (w.num_items + 1,), np.int64)
    size, num_q, num_kv = w.head_dim, w.num_heads, w.num_kv_heads
    half = size // 2
    queries = _array(w.result, (w.num_tokens, num_q * size), dtype)
    positions = _array(w.positions, (w.num_tokens,), np.int64)
    slots = _array(w.kv_slots, (w.num_tokens,), np.int64)
    counter = _pointer(w.counter, np.int64)
    item = _next(counter)
    while item < w.num_items:
        out = _finish_linear(w, tiles[item], tiles[item + 1], dtype)
        for t in range(tiles[item], tiles[item + 1]):
            if w.q_norm != 0:
                for head in range(num_q + num_kv):
                    weight = _array(w.q_norm if head < num_q else w.k_norm, (size,), dtype)
                    _normalise_head(out[t, head * size : (head + 1) * size], weight, w.eps)
            if w.rotates != 0:
                angle = positions[t] * half
                cos = _array(w.cos, (angle + half,), np.float32)[angle:]
                sin = _array(w.sin, (angle + half,), np.float32)[angle:]
                for head in range(num_q + num_kv):
                    row = out[t, head * size : (head + 1) * size]
                    for d in range(half):
                        first, second = row[d], row[d + half]
                        row[d] = first * cos[d] - second * sin[d]
                        row[d + half] = second * cos[d] + first * sin[d]
            row, query = out[t], queries[t]
            for d in range(num_q * size):
                query[d] = _narrow(row[d], dtype)
            kv_size = num_kv * size
            key = _array(w.keys, ((slots[t] + 1) * kv_size,), dtype)[slots[t] * kv_size :]
            value = _array(w.values, ((slots[t] + 1) * kv_size,), dtype)[slots[t] * kv_size :]
            for d in range(kv_size):
                key[d] = _narrow(row[num_q * size + d], dtype)
                value[d] = _narrow(row[num_q * size + kv_size + d], dtype)
        item = _next(counter)


@njit(fastmath=_FAST)
def _weigh(scores: Any) -> None:
    """Softmax in place; all NaN if any score is."""
    best, check = scores[0], F32(0)
    for p in range(scores.shape[0]):
        best = max(best, scores[p])
        check += scores[p]
    total = F32(0)
    for p in range(scores.shape[0]):
        scores[p] = _exp(scores[p] - best)
        total += scores[p]
    factor = F32(1) / total if check == check else check
    for p in range(scores.shape[0]):
        scores[p] *= factor


# The loops of attention are functions of plain matrices, which LLVM turns into far better code than one large nest.


@njit(fastmath=_FAST)
def _widen(stored: Any, wide: Any) -> None:
    for d in range(stored.shape[0]):
        wide[d] = _wide(stored[d])


@njit(fastmath=_FAST)
def _dot_all(query: Any, keys: Any, scores: Any) -> None:
    """`scores = keys @ query`."""
    for p in range(scores.shape[0]):
        score = F32(0)
        for d in range(query.shape[0]):
            score += query[d] * keys[p, d]
        scores[p] = score


@njit(fastmath=_FAST)
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


@njit(fastmath=_FAST)
def _load_chunk(cache: Any, table: Any, block_size: Any, span: Any, heads: Any, chunk: Any) -> None:
    """Positions `span` of some heads to float32; arrays stay whole, since a slice may not look contiguous to LLVM."""
    for p in range(span[0], span[1]):
        slot = table[p // block_size] * block_size + p % block_size
        for head in range(heads[0], heads[1]):
            _widen(cache[slot, head], chunk[head, p - span[0]])


@njit(fastmath=_FAST)
def _attend_item(w: Any, item: Any, dtype: Any) -> None:
    """Some KV heads of one token and the query heads that share them."""
    size, num_kv, parts, block_size = w.head_dim, w.num_kv_heads, w.num_parts, w.block_size
    group = w.num_heads // num_kv
    t, part = item // parts, item % parts
    first, last = part * num_kv // parts, (part + 1) * num_kv // parts
    queries = _array(w.x, (w.num_tokens, num_kv, group, size), dtype)[t]
    result = _array(w.result, (w.num_tokens, num_kv, group, size), dtype)[t]
    scores = _array(w.scores, (w.num_tokens, num_kv, group, w.max_seen), np.float32)[t]
    wide = _array(w.wide_out, (w.num_tokens, 2, num_kv, group, size), np.float32)[t]
    chunk = _array(w.wide_x, (w.num_tokens, num_kv, CHUNK, size), np.float32)[t]
    num_seen = _array(w.positions, (w.num_tokens,), np.int64)[t] + 1
    row = _array(w.token_rows, (w.num_tokens,), np.int64)[t]
    table = _array(w.tables, (row + 1, w.max_blocks), np.int64)[row]
    num_slots = (table[: -(-num_seen // block_size)].max() + 1) * block_size
    keys = _array(w.keys, (num_slots, num_kv, size), dtype)
    values = _array(w.values, (num_slots, num_kv, size), dtype)
    scale = F32(1) / math.sqrt(F32(size))
    for head in range(first, last):
        for h in range(group):
            query, read = wide[0, head, h], wide[1, head, h]
            _widen(queries[head, h], query)
            for d in range(size):
                query[d] *= scale
                read[d] = F32(0)
    for start in range(0, num_seen, CHUNK):
        stop = min(start + CHUNK, num_seen)
        _load_chunk(keys, table, block_size, (start, stop), (first, last), chunk)
        for head in range(first, last):
            for h in range(group):
                _dot_all(wide[0, head, h], chunk[head], scores[head, h, start:stop])
    for head in range(first, last):
        for h in range(group):
            _weigh(scores[head, h, :num_seen])
    for start in range(0, num_seen, CHUNK):
        stop = min(start + CHUNK, num_seen)
        _load_chunk(values, table, block_size, (start, stop), (first, last), chunk)
        for head in range(first, last):
            for h in range(group):
                _add_weighted(scores[head, h, start:stop], chunk[head], wide[1, head, h])
    for head in range(first, last):
        for h in range(group):
            read, row_out = wide[1, head, h], result[head, h]
            for d in range(size):
                row_out[d] = _narrow(read[d], dtype)


@njit(fastmath=_FAST)
def _attend(work: Any, dtype: Any) -> None:
    """Attention of single tokens over all slots up to their own."""
    w = carray(work, 1)[0]
    counter = _pointer(w.counter, np.int64)
    item = _next(counter)
    while item < w.num_items:
        _attend_item(w, item, dtype)
        item = _next(counter)


@njit(fastmath=_FAST)
def _multiply_codes(x: Any, k: Any, codes: Any, scale: Any, out: Any, dtype: Any) -> Any:
    """Add four bytes of codes, eight weights, of every output in the block; returns the sum of their inputs."""
    x0, x1, x2, x3 = _wide(x[k]), _wide(x[k + 1]), _wide(x[k + 2]), _wide(x[k + 3])
    y0, y1, y2, y3 = _wide(x[k + 16]), _wide(x[k + 17]), _wide(x[k + 18]), _wide(x[k + 19])
    c0, c1, c2, c3 = codes[0], codes[1], codes[2], codes[3]
    for n in range(out.shape[0]):
        # Through int32, or numba would widen to 64 bits and halve the lanes.
        low = F32(np.int32(c0[n] & 15)) * x0 + F32(np.int32(c0[n] >> 4)) * y0
        low += F32(np.int32(c1[n] & 15)) * x1 + F32(np.int32(c1[n] >> 4)) * y1
        high = F32(np.int32(c2[n] & 15)) * x2 + F32(np.int32(c2[n] >> 4)) * y2
        high += F32(np.int32(c3[n] & 15)) * x3 + F32(np.int32(c3[n] >> 4)) * y3
        out[n] += scale[n] * (low + high)
    return x0 + x1 + x2 + x3 + y0 + y1 + y2 + y3


@njit(fastmath=_FAST)
def _add_scaled(values: Any, factor: Any, out: Any) -> None:
    for n in range(out.shape[0]):
        out[n] += values[n] * factor


@njit(fastmath=_FAST)
def _codes(work: Any, dtype: Any) -> None:
    """`result = x @ weight.T` with `weight = scale * code + minimum` in groups of 32 inputs; items are blocks of outputs.

    The low and high half of byte `i` of a group are the codes of inputs `i` and `i + 16` (GGUF's Q4_1).
    """
    w = carray(work, 1)[0]
    num_groups = w.in_features // 32
    codes = _array(w.codes, (w.num_items, num_groups, 4, 4, LANES), np.uint8)
    scales = _array(w.scales, (w.num_items, num_groups, LANES), np.float32)
    minima = _array(w.minima, (w.num_items, num_groups, LANES), np.float32)
    x = _array(w.x, (w.num_tokens, w.in_features), dtype)
    wide_out = _array(w.wide_out, (w.num_tokens, w.num_items, LANES), np.float32)
    result = _array(w.result, (w.num_tokens, w.num_items, LANES), dtype)
    counter = _pointer(w.counter, np.int64)
    item = _next(counter)
    while item < w.num_items:
        for t in range(w.num_tokens):
            out, row = wide_out[t, item], result[t, item]
            out[:] = F32(0)
            for group in range(num_groups):
                total = F32(0)
                for part in range(4):
                    k = 32 * group + 4 * part
                    total += _multiply_codes(x[t], k, codes[item, group, part], scales[item, group], out, dtype)
                _add_scaled(minima[item, group], total, out)
            for n in range(LANES):
                row[n] = _narrow(out[n], dtype)
        item = _next(counter)


@njit(fastmath=_FAST)
def _sum_from(weights: Any, threshold: Any, counts: Any) -> Any:
    """How many weights are at least the threshold (`counts`), or what they sum to."""
    total = F32(0)
    for i in range(weights.shape[0]):
        kept = F32(1) if counts else weights[i]
        total += kept if weights[i] >= threshold else F32(0)
    return total


@njit(fastmath=_FAST)
def _cut(weights: Any, goal: Any, counts: Any) -> None:
    """Keep the largest weights, the fewest whose count or sum reaches the goal; of equal ones the first.

    The smallest kept weight is found by bisection over the bit patterns of floats, which sort like the floats.
    """
    low, high = np.uint32(0), np.uint32(0x3F800001)  # all weights reach the goal; those above 1 do not
    while high - low > 1:
        middle = low + (high - low) // np.uint32(2)
        if _sum_from(weights, _as_float(np.uint32(middle)), counts) >= goal:
            low = middle
        else:
            high = middle
    smallest = _as_float(np.uint32(low))
    missing = goal - _sum_from(weights, _as_float(np.uint32(high)), counts)
    num_equal = max(int(math.ceil(missing if counts else missing / max(smallest, F32(1e-38)))), 1)
    for i in range(weights.shape[0]):
        if weights[i] == smallest and num_equal > 0:
            num_equal -= 1
        elif weights[i] <= smallest:
            weights[i] = F32(0)


@njit(fastmath=_FAST)
def _pick(weights: Any, draw: Any) -> Any:
    """The first token at which the running sum of weights exceeds `draw` times their sum."""
    total = 0.0
    for start in range(0, weights.shape[0], 256):
        total += weights[start : start + 256].sum()
    goal, last = draw * total, 0
    for start in range(0, weights.shape[0], 256):
        block = weights[start : start + 256]
        in_block = block.sum()
        if in_block > 0:
            for i in range(block.shape[0]):
                if block[i] > 0:
                    last = start + i
                    if in_block > goal and block[: i + 1].sum() > goal:
                        return last
        goal -= in_block
    return last


@njit(fastmath=_FAST)
def _draw_row(logits: Any, settings: Any) -> Any:
    temperature, top_k, top_p, min_p, draw = settings
    best, check = logits[0], F32(0)
    for i in range(logits.shape[0]):
        best = max(best, logits[i])
        check += logits[i]
    if check != check or best == np.inf or best == -np.inf:
        return -1
    if temperature == 0:
        for i in range(logits.shape[0]):
            if logits[i] == best:
                return i
    inverse = F32(1 / max(temperature, MIN_TEMPERATURE))
    for i in range(logits.shape[0]):
        scaled = (logits[i] - best) * inverse
        logits[i] = _exp(scaled) if scaled > F32(-80) else F32(0)
    if top_k < logits.shape[0]:
        _cut(logits, F32(top_k), True)
    if top_p < 1:
        _cut(logits, F32(top_p) * _sum_from(logits, F32(0), False), False)
    for i in range(logits.shape[0]):
        logits[i] = logits[i] if logits[i] >= F32(min_p) else F32(0)
    return _pick(logits, draw)


def _draw(work: Any) -> None:
    """`result[row]` = the token drawn from `hidden[row]`, which is overwritten; settings of five float64 in `x`."""
    w = carray(work, 1)[0]
    logits = _array(w.hidden, (w.num_items, w.width), np.float32)
    settings = _array(w.x, (w.num_items, 5), np.float64)
    result = _array(w.result, (w.num_items,), np.int64)
    counter = _pointer(w.counter, np.int64)
    item = _next(counter)
    while item < w.num_items:
        row = settings[item]
        result[item] = _draw_row(logits[item], (row[0], row[1], row[2], row[3], row[4]))
        item = _next(counter)


def _norm_bfloat16(work: Any) -> None:
    _norm(work, np.uint16)


def _residual_bfloat16(work: Any) -> None:
    _residual(work, np.uint16)


def _gate_up_bfloat16(work: Any) -> None:
    _gate_up(work, np.uint16)


def _qkv_bfloat16(work: Any) -> None:
    _qkv(work, np.uint16)


def _codes_bfloat16(work: Any) -> None:
    _codes(work, np.uint16)


def _attend_bfloat16(work: Any) -> None:
    _attend(work, np.uint16)


def _norm_float32(work: Any) -> None:
    _norm(work, np.float32)


def _residual_float32(work: Any) -> None:
    _residual(work, np.float32)


def _gate_up_float32(work: Any) -> None:
    _gate_up(work, np.float32)


def _qkv_float32(work: Any) -> None:
    _qkv(work, np.float32)


def _codes_float32(work: Any) -> None:
    _codes(work, np.float32)


def _attend_float32(work: Any) -> None:
    _attend(work, np.float32)


class Kernels(NamedTuple):
    """Compiled functions of a pointer to `Work`."""

    norm: Any
    residual: Any
    gate_up: Any
    qkv: Any
    attend: Any
    codes: Any
    draw: Any


@functools.cache
def compile_kernels(dtype: Literal["bfloat16", "float32"]) -> Kernels:
    """Compile for weights of a dtype.

    The first call on a machine takes seconds; numba keeps the result beside this file or in the user's cache.
    """
    entries = {
        "bfloat16": (
            _norm_bfloat16,
            _residual_bfloat16,
            _gate_up_bfloat16,
            _qkv_bfloat16,
            _attend_bfloat16,
            _codes_bfloat16,
            _draw,
        ),
        "float32": (
            _norm_float32,
            _residual_float32,
            _gate_up_float32,
            _qkv_float32,
            _attend_float32,
            _codes_float32,
            _draw,
        ),
    }[dtype]
    return Kernels(*(cfunc(types.void(_WORK), fastmath=_FAST, cache=True)(entry) for entry in entries))
