"""The CPU path that gives a row the same bits alone and in any company: fresh, from the prefix cache, preempted.

The compiled kernels compute every token by itself anyway. A library's GEMM does not: with the number of rows it
changes its algorithm and with it the order of its sums. So every GEMM here has the same number of rows.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from npc_kernels.batch import BatchMetadata, Codes
from npc_kernels.cpu import (
    Plan,
    begin,
    draw,
    finish_gate_up,
    finish_qkv,
    finish_residual,
    head,
    paged_attention,
    prepare,
    project,
)
from npc_kernels.cpu_gemm import PackedLinear

__all__ = [
    "ROWS",
    "Linear",
    "begin",
    "draw",
    "finish_gate_up",
    "finish_qkv",
    "finish_residual",
    "head",
    "paged_attention",
    "plan",
    "prepare",
    "project",
]

ROWS = 16
"""Rows of every GEMM; fewer are padded with zeros, more are taken in turns."""


class Linear:
    """A base linear for blocks of `ROWS` rows."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, codes: Codes | None = None) -> None:
        self._dense = PackedLinear(weight, bias)

    def __call__(
        self,
        x: Tensor,  # (num_tokens, in_features)
    ) -> Tensor:  # (num_tokens, out_features)
        """`x @ weight.T + bias`."""
        padded = F.pad(x, (0, 0, 0, -len(x) % ROWS))
        return torch.cat([self._dense(block) for block in torch.split(padded, ROWS)])[: len(x)]


def plan(batch: BatchMetadata, cos: Tensor, sin: Tensor, previous: Any = None) -> Plan:
    """Prepare a step."""
    return Plan(batch, cos, sin, previous, exact=True)
