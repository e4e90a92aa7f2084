"""The CPU path that gives a row the same bits alone and in any company: fresh, from the prefix cache, preempted.

The compiled kernels compute every token by itself anyway. A library's GEMM does not: with the number of rows it
changes its algorithm and with it the order of its sums. So every GEMM here has the same number of rows.
"""

from typing import Any

from torch import Tensor

from npc_kernels.batch import BatchMetadata, Codes
from npc_kernels.cpu import (
    Plan,
    Room,
    begin,
    draw,
    embed,
    finish_gate_up,
    finish_qkv,
    finish_residual,
    head,
    paged_attention,
    prepare,
    project,
)
from npc_kernels.cpu_gemm import Cut, PackedLinear, join
from npc_kernels.cpu_tape import Tape

__all__ = [
    "ROWS",
    "Linear",
    "begin",
    "draw",
    "embed",
    "finish_gate_up",
    "finish_qkv",
    "finish_residual",
    "head",
    "paged_attention",
    "plan",
    "prepare",
    "project",
    "room",
]

ROWS = 16
"""Rows of every GEMM; fewer are padded with zeros, more are taken in turns."""


class Linear:
    """A base linear for blocks of `ROWS` rows."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, codes: Codes | None = None) -> None:
        self._dense = PackedLinear(weight, bias)
        self.bias = bias

    def __call__(
        self,
        x: Tensor,  # (num_tokens, in_features)
        tape: Tape | None = None,
        *,
        wide: bool = False,
    ) -> Tensor:  # (num_tokens, out_features), of x's dtype, or float32 if `wide`
        """`x @ weight.T + bias`."""
        return join(self.multiply(x, _cut_rows(len(x))), len(x), wide=wide)

    def multiply(self, x: Tensor, cut: Cut, tape: Tape | None = None) -> tuple[Tensor, ...]:
        """The same block by block, padded."""
        return self._dense.multiply(x, cut)


def _cut_rows(num_rows: int) -> Cut:
    return Cut(ROWS, -(-num_rows // ROWS) * ROWS)


def room(batch: BatchMetadata) -> None:
    """Torch multiplies, and what torch does is not recorded."""


def plan(batch: BatchMetadata, cos: Tensor, sin: Tensor, previous: Any = None, *, room: Room | None = None) -> Plan:
    """Prepare a step."""
    return Plan(batch, cos, sin, previous, cut=_cut_rows(len(batch.positions)), exact=True)
