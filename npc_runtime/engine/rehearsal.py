"""Steps of nobody's, computed before the first line, so that nothing is compiled or captured while somebody speaks.

What Triton compiles a kernel for is little and does not depend on a step's numbers (`gpu_plan.py`): whether every row
has one token; the number of tokens up to 16, up to 32 or beyond; whether a row is longer than one chunk of the
attention; and the pages of the largest adapter, by class. Graphs are captured by the number of rows, of pages and of
planes, in classes each. All of it is rehearsed for the adapters at hand, whatever lines will come.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from npc_kernels.batch import BatchMetadata, LoraBatch
from npc_kernels.gpu_plan import BUCKETS, CHUNK, PLANES

__all__ = ["rehearse_decode", "rehearse_prefill"]

LENGTHS = (1, *(CHUNK * (1 << power) + 1 for power in range((PLANES - 1).bit_length())))
"""The shortest rows of each class of planes."""

PROMPTS = ((0, 17), (0, 33), (CHUNK, 17))
"""First position and tokens of prompts: kernels differ by the number of tokens and by whether there is one chunk."""


def rehearse_decode(
    max_rows: int, longest: int, page_counts: Iterable[int], adapters: LoraBatch, block_size: int
) -> Iterator[BatchMetadata]:
    """Steps of up to so many rows that speak, none longer than the longest, with adapters of these numbers of pages."""
    sizes = sorted({min(size, max_rows) for size in BUCKETS}, reverse=True)
    for num_pages in sorted({0, *page_counts}, reverse=True):
        for num_seen in (length for length in LENGTHS if length <= longest):
            for num_rows in sizes:  # the largest first: the smaller ones fit into its memory
                yield _step([num_seen - 1] * num_rows, 1, num_pages, adapters, block_size)


def rehearse_prefill(
    max_tokens: int, longest: int, page_counts: Iterable[int], adapters: LoraBatch, block_size: int
) -> Iterator[BatchMetadata]:
    """Steps in which a prompt is read; the largest there can be among them, so that its memory is there."""
    for num_pages in sorted({0, *page_counts}, reverse=True):
        for start, num_tokens in (*PROMPTS, (0, max_tokens)):
            length = min(num_tokens, max_tokens, longest - start)
            if length > 0:
                yield _step([start], length, num_pages, adapters, block_size)


def _step(starts: list[int], length: int, num_pages: int, adapters: LoraBatch, block_size: int) -> BatchMetadata:
    """Rows that begin at these positions, all of one length and in block 0, which nobody has yet."""
    positions = torch.tensor([start + offset for start in starts for offset in range(length)])
    bounds = tuple(length * number for number in range(len(starts) + 1))
    max_seen = max(starts) + length
    pages = (tuple(range(num_pages)),) * len(starts)
    return BatchMetadata(
        token_ids=torch.zeros_like(positions),
        sampled=torch.tensor(bounds[1:]) - 1,
        positions=positions,
        kv_slots=positions % block_size,
        num_decode=len(starts) if length == 1 else 0,
        row_starts=bounds,
        block_tables=torch.zeros(len(starts), -(-max_seen // block_size), dtype=torch.long),
        block_size=block_size,
        max_seen=max_seen,
        lora=replace(adapters, pages=pages) if num_pages else None,
    )
