"""Steps of nobody's, computed before the first line, so that nothing is compiled or captured while somebody speaks."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from npc_kernels.batch import BatchMetadata, LoraBatch

__all__ = ["rehearse_decode", "rehearse_prefill"]

NUM_SEEN = (1, 257)
"""Lengths of rows, on both sides of the attention's first border between chunks."""

PROMPTS = (17, 40, 64, 512)
"""Tokens of prompts: kernels differ by how many tokens a program takes, and in whether 16 divides the step's."""


def rehearse_decode(
    max_rows: int, page_counts: Iterable[int], adapters: LoraBatch, block_size: int
) -> Iterator[BatchMetadata]:
    """Steps of up to so many rows that speak, with adapters of these numbers of pages."""
    for num_pages in sorted({0, *page_counts}, reverse=True):
        for num_seen in NUM_SEEN:
            for num_rows in range(max_rows, 0, -1):  # the largest first: the smaller ones fit into its memory
                yield _step([num_seen - 1] * num_rows, 1, num_pages, adapters, block_size)


def rehearse_prefill(
    max_tokens: int, page_counts: Iterable[int], adapters: LoraBatch, block_size: int
) -> Iterator[BatchMetadata]:
    """Steps in which a prompt is read."""
    for num_pages in {0, *page_counts}:
        for num_tokens in PROMPTS:
            yield _step([0], min(num_tokens, max_tokens), num_pages, adapters, block_size)


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
