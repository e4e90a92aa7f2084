"""Sampling on the GPU without sorting: one program a row, the same draw as the twin; Triton.

The smallest weight that top-k or top-p keeps is found by bisection over the bit patterns of floats, which sort like
the floats; of equal ones the first tokens are kept. The draw walks the kept tokens by their number.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from npc_kernels.reference import MIN_TEMPERATURE, Settings

__all__ = ["draw"]

MAX_BLOCK = 4096
"""Logits of one step."""

COLDEST = tl.constexpr(MIN_TEMPERATURE)
LOG2_E = tl.constexpr(1.4426950408889634)
NONE = tl.constexpr(2**31 - 1)
ABOVE_ONE = tl.constexpr(0x3F800001)  # the float next to 1, as bits


@triton.jit
def _load(logits_ptr, mask_ptr, token, vocab, HAS_MASK: tl.constexpr):
    """A block of logits; what the mask forbids is minus infinity."""
    is_allowed = token < vocab
    if HAS_MASK:
        word = tl.load(mask_ptr + token // 32, mask=is_allowed, other=0)
        is_allowed = is_allowed & (((word >> (token % 32)) & 1) != 0)
    return tl.load(logits_ptr + token, mask=is_allowed, other=float("-inf"))


@triton.jit
def _weigh(logits, best, inverse):
    """Weights in [0, 1]: what is 80 and more below the best is nothing."""
    scaled = (logits - best) * inverse
    return tl.where(scaled > -80.0, tl.exp2(scaled * LOG2_E), 0.0)


@triton.jit
def _sum_from(
    logits_ptr,
    mask_ptr,
    vocab,
    best,
    inverse,
    threshold,
    COUNTS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """How many weights are at least the threshold (`COUNTS`), or what they sum to."""
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, vocab, BLOCK):
        token = first + tl.arange(0, BLOCK)
        weights = _weigh(_load(logits_ptr, mask_ptr, token, vocab, HAS_MASK), best, inverse)
        is_kept = (weights >= threshold) & (token < vocab)
        total += tl.where(is_kept, 1.0 if COUNTS else weights, 0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _cut(
    logits_ptr,
    mask_ptr,
    vocab,
    best,
    inverse,
    goal,
    low,  # the bits of the smallest weight that may be the answer
    COUNTS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The smallest weight among the fewest largest whose count or sum reaches the goal, and how many equal it."""
    high = tl.full((), ABOVE_ONE, dtype=tl.int32)
    while high - low > 1:
        middle = low + (high - low) // 2
        threshold = middle.to(tl.float32, bitcast=True)
        if _sum_from(logits_ptr, mask_ptr, vocab, best, inverse, threshold, COUNTS, HAS_MASK, BLOCK) >= goal:
            low = middle
        else:
            high = middle
    smallest = low.to(tl.float32, bitcast=True)
    above = high.to(tl.float32, bitcast=True)
    missing = goal - _sum_from(logits_ptr, mask_ptr, vocab, best, inverse, above, COUNTS, HAS_MASK, BLOCK)
    if not COUNTS:
        missing = missing / tl.maximum(smallest, 2e-38)
    return low, tl.maximum(tl.ceil(missing), 1.0)


@triton.jit
def _uniform(seed, position):
    """As the twin's `uniform`."""
    z = seed * 0x9E3779B97F4A7C15 + (position + 1) * 0xD1B54A32D192ED03
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return ((z ^ (z >> 31)) >> 11).to(tl.float64) * (1.0 / 9007199254740992.0)


@triton.jit
def _draw_kernel(
    logits_ptr,
    settings_ptr,
    mask_ptr,
    out_ptr,
    vocab,
    num_words,
    HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * vocab
    mask_ptr += row.to(tl.int64) * num_words
    settings_ptr += row * 6
    temperature = tl.load(settings_ptr).to(tl.float32)
    top_k = tl.load(settings_ptr + 1).to(tl.float32)
    top_p = tl.load(settings_ptr + 2).to(tl.float32)
    min_p = tl.load(settings_ptr + 3).to(tl.float32)
    seed = tl.load(settings_ptr + 4).to(tl.int64).to(tl.uint64)
    position = tl.load(settings_ptr + 5).to(tl.int64).to(tl.uint64)

    highest = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    broken = tl.zeros((BLOCK,), dtype=tl.int32)
    for first in range(0, vocab, BLOCK):
        logits = _load(logits_ptr, mask_ptr, first + tl.arange(0, BLOCK), vocab, HAS_MASK)
        broken = broken | (logits != logits).to(tl.int32)
        highest = tl.maximum(highest, logits)
    best = tl.max(highest, axis=0)
    is_broken = (tl.max(broken, axis=0) > 0) | (best == float("inf")) | (best == float("-inf"))
    chosen = tl.full((), -1, dtype=tl.int32)
    if not is_broken:
        if temperature == 0.0:
            found = tl.full((BLOCK,), NONE, dtype=tl.int32)
            for first in range(0, vocab, BLOCK):
                token = first + tl.arange(0, BLOCK)
                logits = _load(logits_ptr, mask_ptr, token, vocab, HAS_MASK)
                found = tl.minimum(found, tl.where(logits == best, token, NONE))
            chosen = tl.min(found, axis=0)
        else:
            inverse = 1.0 / tl.maximum(temperature, COLDEST)
            low = tl.full((), 0, dtype=tl.int32)
            num_equal = tl.full((), 3e38, dtype=tl.float32)
            mass = _sum_from(logits_ptr, mask_ptr, vocab, best, inverse, 0.0, False, HAS_MASK, BLOCK)
            if top_k < vocab:
                low, num_equal = _cut(logits_ptr, mask_ptr, vocab, best, inverse, top_k, low, True, HAS_MASK, BLOCK)
                above = (low + 1).to(tl.float32, bitcast=True)
                mass = _sum_from(logits_ptr, mask_ptr, vocab, best, inverse, above, False, HAS_MASK, BLOCK)
                mass += num_equal * low.to(tl.float32, bitcast=True)
            if top_p < 1.0:
                low, num_equal = _cut(
                    logits_ptr, mask_ptr, vocab, best, inverse, top_p * mass, low, False, HAS_MASK, BLOCK
                )
            smallest = low.to(tl.float32, bitcast=True)
            chosen = _pick(
                logits_ptr,
                mask_ptr,
                vocab,
                best,
                inverse,
                smallest,
                num_equal,
                min_p,
                _uniform(seed, position).to(tl.float32),
                HAS_MASK,
                BLOCK,
            )
    tl.store(out_ptr + row, chosen.to(tl.int64))


@triton.jit
def _keep(weights, token, vocab, smallest, num_equal, equal_before, min_p):
    """The weights that remain, 0 for the others; and how many so far equalled the smallest."""
    is_equal = ((weights == smallest) & (token < vocab)).to(tl.int32)
    rank = equal_before + tl.cumsum(is_equal, axis=0) - is_equal
    is_kept = (weights > smallest) | ((is_equal > 0) & (rank.to(tl.float32) < num_equal))
    return tl.where(is_kept & (weights >= min_p) & (token < vocab), weights, 0.0), equal_before + tl.sum(is_equal)


@triton.jit
def _pick(
    logits_ptr,
    mask_ptr,
    vocab,
    best,
    inverse,
    smallest,
    num_equal,
    min_p,
    uniform,
    HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The first token at which the running sum of what is kept exceeds the draw's share of the whole."""
    total = tl.full((), 0.0, dtype=tl.float32)
    num_seen = tl.full((), 0, dtype=tl.int32)
    for first in range(0, vocab, BLOCK):
        token = first + tl.arange(0, BLOCK)
        weights = _weigh(_load(logits_ptr, mask_ptr, token, vocab, HAS_MASK), best, inverse)
        kept, num_seen = _keep(weights, token, vocab, smallest, num_equal, num_seen, min_p)
        total += tl.sum(kept, axis=0)
    goal = uniform * total
    before = tl.full((), 0.0, dtype=tl.float32)
    num_seen = tl.full((), 0, dtype=tl.int32)
    chosen = tl.full((), NONE, dtype=tl.int32)
    last = tl.full((), 0, dtype=tl.int32)
    for first in range(0, vocab, BLOCK):
        token = first + tl.arange(0, BLOCK)
        weights = _weigh(_load(logits_ptr, mask_ptr, token, vocab, HAS_MASK), best, inverse)
        kept, num_seen = _keep(weights, token, vocab, smallest, num_equal, num_seen, min_p)
        is_beyond = (before + tl.cumsum(kept, axis=0) > goal) & (kept > 0)
        chosen = tl.minimum(chosen, tl.min(tl.where(is_beyond, token, NONE), axis=0))
        last = tl.maximum(last, tl.max(tl.where(kept > 0, token, 0), axis=0))
        before += tl.sum(kept, axis=0)
    # Rounding can push the goal onto the sum itself; the last token that still has weight takes it.
    return tl.minimum(chosen, last)


def draw(
    logits: Tensor,  # (num_rows, vocab) float32
    settings: Settings,
    bitmask: Tensor | None = None,  # (num_rows, ceil(vocab / 32)) int32
) -> Tensor:  # (num_rows,) int64
    """As the twin."""
    assert logits.is_contiguous()
    num_rows, vocab = logits.shape
    result = torch.empty(num_rows, dtype=torch.long, device=logits.device)
    table = torch.stack(list(settings), dim=1)
    block = min(MAX_BLOCK, triton.next_power_of_2(vocab))
    if num_rows:
        _draw_kernel[(num_rows,)](
            logits,
            table,
            table if bitmask is None else bitmask,
            result,
            vocab,
            0 if bitmask is None else bitmask.shape[1],
            HAS_MASK=bitmask is not None,
            BLOCK=block,
            num_warps=min(16, max(1, block // 256)),
        )
    return result
