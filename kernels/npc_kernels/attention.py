"""Paged attention on the GPU: decode and prefill by the same kernel; Triton.

A program sees one tile of queries (`gpu_plan.py`), one key head with all query heads that read it, and one chunk of
256 keys; of rows that have more than eight, every eighth chunk. Keys are the rows of every product and queries its
columns, so that a token is computed alike alone and among the others of its prompt. Who sees which keys never depends
on the batch; where a row has more than one chunk, a second launch combines the eight planes in order. Softmax as in
flash attention (Dao et al. 2022): a running maximum and a running sum.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from npc_kernels.gpu_plan import CHUNK, PLANES, VARYING, Plan
from npc_kernels.lora import operand

__all__ = ["paged_attention"]

BLOCK_KEYS = 64
"""Keys of one step."""

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=VARYING)
def _attend_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    out_ptr,
    sums_ptr,
    tiles_ptr,
    positions_ptr,
    tables_ptr,
    num_tokens,
    max_blocks,
    scale,
    BLOCK_SIZE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,  # HEAD_DIM, rounded up to a power of two
    GROUP: tl.constexpr,  # query heads of a key head, rounded up to a power of two
    COLUMNS: tl.constexpr,  # tokens that a tile has room for, times GROUP
    CHUNK: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    IS_WHOLE: tl.constexpr,  # there is one chunk
    OPERAND: tl.constexpr,
):
    tile, kv_head, plane = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.load(tiles_ptr + 3 * tile)
    first = tl.load(tiles_ptr + 3 * tile + 1)
    count = tl.load(tiles_ptr + 3 * tile + 2)
    column = tl.arange(0, COLUMNS)
    tokens = first + column // GROUP
    heads = kv_head * (NUM_HEADS // NUM_KV_HEADS) + column % GROUP
    is_query = (column // GROUP < count) & (column % GROUP < NUM_HEADS // NUM_KV_HEADS)
    positions = tl.load(positions_ptr + tokens, mask=is_query, other=0).to(tl.int32)
    last = tl.load(positions_ptr + first + tl.maximum(count, 1) - 1)
    if (count > 0) & (plane * CHUNK <= last):
        dim = tl.arange(0, DIM)
        place = (tokens * NUM_HEADS + heads)[None, :] * HEAD_DIM + dim[:, None]
        is_number = is_query[None, :] & (dim < HEAD_DIM)[:, None]
        q = tl.load(q_ptr + place, mask=is_number, other=0.0).to(OPERAND)
        largest = tl.full((COLUMNS,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((COLUMNS,), dtype=tl.float32)
        acc = tl.zeros((DIM, COLUMNS), dtype=tl.float32)
        # The plane's chunks, one behind the other; of the last one only what the tile sees.
        CHUNK_BLOCKS: tl.constexpr = CHUNK // BLOCK_KEYS
        num_whole = (last // CHUNK - plane) // PLANES
        num_left = tl.minimum(last + 1 - (num_whole * PLANES + plane) * CHUNK, CHUNK)
        for number in range(0, num_whole * CHUNK_BLOCKS + tl.cdiv(num_left, BLOCK_KEYS)):
            chunk = number // CHUNK_BLOCKS * PLANES + plane
            key = chunk * CHUNK + number % CHUNK_BLOCKS * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
            is_key = key <= last
            block = tl.load(tables_ptr + row * max_blocks + key // BLOCK_SIZE, mask=is_key, other=0).to(tl.int64)
            slot = ((block * BLOCK_SIZE + key % BLOCK_SIZE) * NUM_KV_HEADS + kv_head) * HEAD_DIM
            # Slots of nobody may hold anything, a NaN too: they are never read.
            is_stored = is_key[:, None] & (dim < HEAD_DIM)[None, :]
            k = tl.load(k_cache_ptr + slot[:, None] + dim[None, :], mask=is_stored, other=0.0).to(OPERAND)
            scores = tl.dot(k, q, input_precision="ieee") * scale
            scores = tl.where(key[:, None] <= positions[None, :], scores, float("-inf"))
            # A NaN among the scores must reach the logits, and `maximum` may drop it; the sum below keeps it.
            new_largest = tl.maximum(largest, tl.max(scores, axis=0))
            shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)
            weights = tl.exp2((scores - shift[None, :]) * LOG2_E)
            fade = tl.exp2((largest - shift) * LOG2_E)
            total = total * fade + tl.sum(weights, axis=0)
            v = tl.load(v_cache_ptr + slot[None, :] + dim[:, None], mask=tl.trans(is_stored), other=0.0)
            acc = tl.dot(v.to(OPERAND), weights.to(v.dtype).to(OPERAND), acc * fade[None, :], input_precision="ieee")
            largest = new_largest
        if IS_WHOLE:
            tl.store(out_ptr + place, acc / total[None, :], mask=is_number)
        else:
            tl.store(out_ptr + plane * num_tokens * NUM_HEADS * HEAD_DIM + place, acc, mask=is_number)
            sums = sums_ptr + 2 * (plane * num_tokens * NUM_HEADS + tokens * NUM_HEADS + heads)
            tl.store(sums, largest, mask=is_query)
            tl.store(sums + 1, total, mask=is_query)


@triton.jit(do_not_specialize=VARYING)
def _combine_kernel(
    parts_ptr,
    sums_ptr,
    out_ptr,
    positions_ptr,
    num_tokens,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    PLANES: tl.constexpr,
):
    """A token and head: its planes, in order."""
    token, head = tl.program_id(0), tl.program_id(1)
    dim = tl.arange(0, DIM)
    place = (token * NUM_HEADS + head) * HEAD_DIM + dim
    num_planes = tl.minimum(tl.load(positions_ptr + token) // CHUNK + 1, PLANES)
    largest = tl.load(sums_ptr + 2 * (token * NUM_HEADS + head))
    total = tl.load(sums_ptr + 2 * (token * NUM_HEADS + head) + 1)
    acc = tl.load(parts_ptr + place, mask=dim < HEAD_DIM, other=0.0)
    for plane in range(1, num_planes):
        sums = sums_ptr + 2 * ((plane * num_tokens + token) * NUM_HEADS + head)
        part_largest = tl.load(sums)
        part = tl.load(parts_ptr + plane * num_tokens * NUM_HEADS * HEAD_DIM + place, mask=dim < HEAD_DIM, other=0.0)
        new_largest = tl.maximum(largest, part_largest)
        fade, part_fade = tl.exp2((largest - new_largest) * LOG2_E), tl.exp2((part_largest - new_largest) * LOG2_E)
        total = total * fade + tl.load(sums + 1) * part_fade
        acc = acc * fade + part * part_fade
        largest = new_largest
    tl.store(out_ptr + place, acc / total, mask=dim < HEAD_DIM)


def paged_attention(
    q: Tensor,  # (num_tokens, num_heads, head_dim)
    k_cache: Tensor,  # (num_blocks, block_size, num_kv_heads, head_dim)
    v_cache: Tensor,  # like k_cache
    plan: Plan,
) -> Tensor:  # (num_tokens, num_heads * head_dim)
    """Causal attention of every row over its own KV slots, `softmax(q kᵀ / sqrt(head_dim)) v`; GQA."""
    num_tokens, num_heads, head_dim = q.shape
    block_size, num_kv_heads = k_cache.shape[1:3]
    assert q.is_contiguous()
    assert k_cache.is_contiguous()
    assert v_cache.is_contiguous()
    step, num_planes = plan.step, plan.num_planes
    result = torch.empty_like(q)
    group = triton.next_power_of_2(num_heads // num_kv_heads)
    columns = max(16, plan.tile_queries * group)
    if num_tokens == 0:
        return result.flatten(1)
    parts, sums = result, result
    if num_planes > 1:
        parts = torch.empty((num_planes, *q.shape), dtype=torch.float32, device=q.device)
        sums = torch.empty((num_planes, num_tokens, num_heads, 2), dtype=torch.float32, device=q.device)
    _attend_kernel[(len(step.tiles), num_kv_heads, num_planes)](
        q,
        k_cache,
        v_cache,
        parts,
        sums,
        step.tiles,
        step.positions,
        step.tables,
        num_tokens,
        step.tables.shape[1],
        head_dim**-0.5,
        BLOCK_SIZE=block_size,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        DIM=max(16, triton.next_power_of_2(head_dim)),
        GROUP=group,
        COLUMNS=columns,
        CHUNK=CHUNK,
        PLANES=PLANES,
        BLOCK_KEYS=BLOCK_KEYS,
        IS_WHOLE=num_planes == 1,
        OPERAND=operand(q.dtype),
        num_warps=4 if columns <= 32 else 8,  # else registers are spilled
        num_stages=3,
    )
    if num_planes > 1:
        _combine_kernel[(num_tokens, num_heads)](
            parts,
            sums,
            result,
            step.positions,
            num_tokens,
            NUM_HEADS=num_heads,
            HEAD_DIM=head_dim,
            DIM=triton.next_power_of_2(head_dim),
            CHUNK=CHUNK,
            PLANES=PLANES,
            num_warps=1,
        )
    return result.flatten(1)
