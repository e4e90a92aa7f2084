"""Sampling a row of logits without sorting it, compiled."""

import math
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from npc_kernels.cpu_jit import F32, FAST, Work, array, as_float, exp, next_item, run, work_of
from npc_kernels.reference import MIN_TEMPERATURE, Settings, forbid

__all__ = ["draw", "draw_rows"]


def draw(
    logits: Tensor,  # (num_rows, vocab) float32, overwritten
    settings: Settings,
    bitmask: Tensor | None = None,  # (num_rows, ceil(vocab / 32)) int32
) -> Tensor:  # (num_rows,) int64
    """As the twin."""
    logits = logits if bitmask is None else forbid(logits, bitmask)
    logits, table = logits.contiguous(), torch.stack(list(settings), dim=1)
    tokens = torch.empty(len(logits), dtype=torch.long)
    work = Work(hidden=logits.data_ptr(), x=table.data_ptr(), result=tokens.data_ptr(), width=logits.shape[1])
    run(draw_rows, work, len(logits), torch.float32)
    return tokens


@njit(fastmath=FAST)
def _sum_from(weights: Any, threshold: Any, counts: Any) -> Any:
    """How many weights are at least the threshold (`counts`), or what they sum to."""
    total = F32(0)
    for i in range(weights.shape[0]):
        kept = F32(1) if counts else weights[i]
        total += kept if weights[i] >= threshold else F32(0)
    return total


@njit(fastmath=FAST)
def _cut(weights: Any, goal: Any, counts: Any) -> None:
    """Keep the largest weights, the fewest whose count or sum reaches the goal; of equal ones the first.

    The smallest kept weight is found by bisection over the bit patterns of floats, which sort like the floats.
    """
    low, high = np.uint32(0), np.uint32(0x3F800001)  # all weights reach the goal; those above 1 do not
    while high - low > 1:
        middle = low + (high - low) // np.uint32(2)
        if _sum_from(weights, as_float(np.uint32(middle)), counts) >= goal:
            low = middle
        else:
            high = middle
    smallest = as_float(np.uint32(low))
    missing = goal - _sum_from(weights, as_float(np.uint32(high)), counts)
    num_equal = max(math.ceil(missing if counts else missing / max(smallest, F32(1e-38))), 1)
    for i in range(weights.shape[0]):
        if weights[i] == smallest and num_equal > 0:
            num_equal -= 1
        elif weights[i] <= smallest:
            weights[i] = F32(0)


@njit(fastmath=FAST)
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


@njit
def _uniform(seed: Any, position: Any) -> Any:
    """As the twin's `uniform`."""
    z = np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(position + 1) * np.uint64(0xD1B54A32D192ED03)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.float64((z ^ (z >> np.uint64(31))) >> np.uint64(11)) / np.float64(1 << 53)


@njit(fastmath=FAST)
def _draw_row(logits: Any, settings: Any) -> Any:
    temperature, top_k, top_p, min_p, seed, position = settings
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
        logits[i] = exp(scaled) if scaled > F32(-80) else F32(0)
    if top_k < logits.shape[0]:
        _cut(logits, F32(top_k), True)
    if top_p < 1:
        _cut(logits, F32(top_p) * _sum_from(logits, F32(0), False), False)
    for i in range(logits.shape[0]):
        logits[i] = logits[i] if logits[i] >= F32(min_p) else F32(0)
    return _pick(logits, _uniform(seed, position))


def draw_rows(work: Any) -> None:
    """`result[row]` = the token drawn from `hidden[row]`, which is overwritten; settings of six float64 in `x`."""
    w = work_of(work)
    logits = array(w.hidden, (w.num_items, w.width), F32(0))
    settings = array(w.x, (w.num_items, 6), 0.0)
    result = array(w.result, (w.num_items,), 0)
    item = next_item(w)
    while item < w.num_items:
        row = settings[item]
        result[item] = _draw_row(logits[item], (row[0], row[1], row[2], row[3], row[4], row[5]))
        item = next_item(w)
