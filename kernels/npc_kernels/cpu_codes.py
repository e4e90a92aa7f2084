"""Products with 4- and 8-bit weights for few rows, compiled: only as many bytes are read as were published."""

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from npc_kernels.batch import Codes
from npc_kernels.cpu_jit import F32, FAST, Work, array, narrow, next_item, run, wide, work_of
from npc_kernels.cpu_tape import Tape

__all__ = ["LANES", "PackedCodes", "multiply_bytes", "multiply_codes"]

LANES = 64
"""Outputs whose codes lie side by side."""


class PackedCodes:
    """Codes with those of `LANES` outputs side by side, and the work that multiplies them."""

    def __init__(self, codes: Codes) -> None:
        num_out, num_groups, num_bytes = codes.values.shape
        blocks = num_out // LANES
        self._num_blocks = blocks
        self._out_features = num_out
        self._values = codes.values.view(blocks, LANES, num_groups, num_bytes).permute(0, 2, 3, 1).contiguous()
        self._scale = codes.scale.view(blocks, LANES, num_groups).permute(0, 2, 1).contiguous()
        self._kernel = multiply_bytes
        self._work = Work(in_features=32 * num_groups, codes=self._values.data_ptr(), scales=self._scale.data_ptr())
        if codes.minimum is not None:
            self._kernel = multiply_codes
            self._minimum = codes.minimum.view(blocks, LANES, num_groups).permute(0, 2, 1).contiguous()
            self._work.minima = self._minimum.data_ptr()

    @classmethod
    def fits(cls, codes: Codes) -> bool:
        """Whether the outputs come in whole blocks."""
        return len(codes.values) % LANES == 0

    def multiply(
        self,
        x: Tensor,  # (num_tokens, in_features)
        tape: Tape | None = None,
        *,
        wide: bool = False,
    ) -> Tensor:  # (num_tokens, out_features), of x's dtype, or float32 if `wide`
        """`x @ weight.T`."""
        x = x.contiguous()
        result = torch.empty(len(x), self._out_features, dtype=x.dtype)
        scratch = torch.empty(result.shape)
        if tape is not None:
            tape.keep(result)
            tape.keep(scratch)
        work = self._work
        work.x, work.num_tokens = x.data_ptr(), len(x)
        work.result, work.wide_out = result.data_ptr(), scratch.data_ptr()
        run(self._kernel, work, self._num_blocks, x.dtype, tape)
        return scratch if wide else result


@njit(fastmath=FAST)
def _add_product(x: Any, k: Any, codes: Any, scale: Any, out: Any) -> Any:
    """Add four bytes of codes, eight weights, of every output in the block; returns the sum of their inputs."""
    x0, x1, x2, x3 = wide(x[k]), wide(x[k + 1]), wide(x[k + 2]), wide(x[k + 3])
    y0, y1, y2, y3 = wide(x[k + 16]), wide(x[k + 17]), wide(x[k + 18]), wide(x[k + 19])
    c0, c1, c2, c3 = codes[0], codes[1], codes[2], codes[3]
    for n in range(out.shape[0]):
        # Through int32, or numba would widen to 64 bits and halve the lanes.
        low = F32(np.int32(c0[n] & 15)) * x0 + F32(np.int32(c0[n] >> 4)) * y0
        low += F32(np.int32(c1[n] & 15)) * x1 + F32(np.int32(c1[n] >> 4)) * y1
        high = F32(np.int32(c2[n] & 15)) * x2 + F32(np.int32(c2[n] >> 4)) * y2
        high += F32(np.int32(c3[n] & 15)) * x3 + F32(np.int32(c3[n] >> 4)) * y3
        out[n] += scale[n] * (low + high)
    return x0 + x1 + x2 + x3 + y0 + y1 + y2 + y3


@njit(fastmath=FAST)
def _add_scaled(values: Any, factor: Any, out: Any) -> None:
    for n in range(out.shape[0]):
        out[n] += values[n] * factor


def multiply_codes(work: Any) -> None:
    """`result = x @ weight.T`, `weight = scale * code + minimum` in groups of 32 inputs; items are blocks of outputs.

    The low and high half of byte `i` of a group are the codes of inputs `i` and `i + 16` (GGUF's Q4_1).
    """
    w = work_of(work)
    num_groups = w.in_features // 32
    codes = array(w.codes, (w.num_items, num_groups, 4, 4, LANES), np.uint8(0))
    scales = array(w.scales, (w.num_items, num_groups, LANES), F32(0))
    minima = array(w.minima, (w.num_items, num_groups, LANES), F32(0))
    x = array(w.x, (w.num_tokens, w.in_features), w.element)
    wide_out = array(w.wide_out, (w.num_tokens, w.num_items, LANES), F32(0))
    result = array(w.result, (w.num_tokens, w.num_items, LANES), w.element)
    item = next_item(w)
    while item < w.num_items:
        for t in range(w.num_tokens):
            out, row = wide_out[t, item], result[t, item]
            out[:] = F32(0)
            for group in range(num_groups):
                total = F32(0)
                for part in range(4):
                    k = 32 * group + 4 * part
                    total += _add_product(x[t], k, codes[item, group, part], scales[item, group], out)
                _add_scaled(minima[item, group], total, out)
            for n in range(LANES):
                row[n] = narrow(out[n], w.element)
        item = next_item(w)


@njit(fastmath=FAST)
def _add_byte_product(x: Any, k: Any, codes: Any, scale: Any, out: Any) -> None:
    """Add eight weights of every output in the block."""
    x0, x1, x2, x3 = wide(x[k]), wide(x[k + 1]), wide(x[k + 2]), wide(x[k + 3])
    x4, x5, x6, x7 = wide(x[k + 4]), wide(x[k + 5]), wide(x[k + 6]), wide(x[k + 7])
    c0, c1, c2, c3 = codes[0], codes[1], codes[2], codes[3]
    c4, c5, c6, c7 = codes[4], codes[5], codes[6], codes[7]
    for n in range(out.shape[0]):
        low = F32(c0[n]) * x0 + F32(c1[n]) * x1 + F32(c2[n]) * x2 + F32(c3[n]) * x3
        high = F32(c4[n]) * x4 + F32(c5[n]) * x5 + F32(c6[n]) * x6 + F32(c7[n]) * x7
        out[n] += scale[n] * (low + high)


def multiply_bytes(work: Any) -> None:
    """`result = x @ weight.T`, `weight = scale * code` in groups of 32 inputs (Q8_0); items are blocks of outputs."""
    w = work_of(work)
    num_groups = w.in_features // 32
    codes = array(w.codes, (w.num_items, num_groups, 4, 8, LANES), np.int8(0))
    scales = array(w.scales, (w.num_items, num_groups, LANES), F32(0))
    x = array(w.x, (w.num_tokens, w.in_features), w.element)
    wide_out = array(w.wide_out, (w.num_tokens, w.num_items, LANES), F32(0))
    result = array(w.result, (w.num_tokens, w.num_items, LANES), w.element)
    item = next_item(w)
    while item < w.num_items:
        for t in range(w.num_tokens):
            out, row = wide_out[t, item], result[t, item]
            out[:] = F32(0)
            for group in range(num_groups):
                for part in range(4):
                    _add_byte_product(x[t], 32 * group + 8 * part, codes[item, group, part], scales[item, group], out)
            for n in range(LANES):
                row[n] = narrow(out[n], w.element)
        item = next_item(w)
