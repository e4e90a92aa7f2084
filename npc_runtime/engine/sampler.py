"""From logits to the next token of every row: penalties and bounds here, the draw in one kernel for all rows.

Nothing waits for the device before the tokens are read: all that a step says of its sampling is one copy from pinned
memory (`_Told`). What it costs to say it does not grow with the rows: which tokens they have seen is known from before.
"""

from array import array
from collections.abc import Callable
from collections.abc import Sequence as Rows
from typing import NamedTuple

import torch
from npc_kernels.batch import copies_from_pinned
from npc_kernels.reference import Settings
from npc_kernels.reference import draw as reference_draw
from torch import Tensor

from npc_runtime.engine.core import Sequence

__all__ = ["sample"]

FAR = 1e30
"""Where a penalty next to nothing pushes a logit: beyond all others, and still a number."""

NUM_COLUMNS = 1 + len(Settings._fields)


class _Told(NamedTuple):
    """How the rows are sampled: views of one tensor on the device of the logits."""

    settings: Settings
    penalties: Tensor  # (num_rows,) float64
    seen: Tensor  # places of seen tokens among all logits, of rows with a penalty; (num_seen,) int64
    barred: Tensor  # places of ends that come too early; (num_barred,) int64


@torch.inference_mode()
def sample(
    logits: Tensor,  # (num_rows, vocab) float32, changed
    sequences: Rows[Sequence],
    eos_ids: frozenset[int],
    draw: Callable[[Tensor, Settings], Tensor] = reference_draw,
) -> list[int]:
    """Choose the next token of each row; -1 for a row whose logits are not finite.

    Order: penalty, minimum length, temperature, top-k, top-p, min-p.
    """
    told = _tell(sequences, eos_ids, logits.shape[1], logits.device)
    if len(told.seen):
        _penalise(logits, told)
    if len(told.barred):
        logits.view(-1).index_fill_(0, told.barred, -torch.inf)
    ids: list[int] = draw(logits, told.settings).tolist()
    return ids


def _penalise(
    logits: Tensor,  # (num_rows, vocab), changed
    told: _Told,
) -> None:
    """Divide positive and multiply negative logits of seen tokens (Keskar et al. 2019), as transformers does."""
    scores = logits.view(-1)[told.seen]
    factors = told.penalties.float()[told.seen // logits.shape[1]]
    changed = torch.where(scores > 0, scores / factors, scores * factors)
    logits.view(-1)[told.seen] = changed.clamp(-FAR, FAR)


def _tell(sequences: Rows[Sequence], eos_ids: frozenset[int], vocab: int, device: torch.device) -> _Told:
    """Everything at once. The pinned memory is torch's own, which it reuses when the copy is done."""
    num_rows = len(sequences)
    seen, counts = array("q"), [0] * num_rows
    for row, sequence in enumerate(sequences):
        if sequence.request.sampling.repetition_penalty != 1.0:
            ids = sequence.seen_ids
            seen += ids
            counts[row] = len(ids)
    barred = [
        row * vocab + token
        for row, sequence in enumerate(sequences)
        if len(sequence.output_ids) < sequence.request.sampling.min_tokens
        for token in sorted(eos_ids)
    ]
    sizes = [num_rows * NUM_COLUMNS, len(seen), len(barred)]
    is_pinned = copies_from_pinned(device)
    host = torch.empty(sum(sizes), dtype=torch.long, pin_memory=is_pinned)
    columns, of_seen, of_barred = torch.split(host, sizes)
    columns.view(torch.float64).view(NUM_COLUMNS, num_rows).copy_(_columns(sequences, vocab))
    if seen:
        firsts = torch.arange(num_rows).mul_(vocab).repeat_interleave(torch.tensor(counts), output_size=len(seen))
        torch.add(torch.frombuffer(seen, dtype=torch.long), firsts, out=of_seen)
    if barred:
        of_barred.copy_(torch.tensor(barred))
    columns, of_seen, of_barred = torch.split(host.to(device, non_blocking=is_pinned), sizes)
    penalties, *settings = columns.view(torch.float64).view(NUM_COLUMNS, num_rows).unbind()
    return _Told(Settings(*settings), penalties, of_seen, of_barred)


def _columns(sequences: Rows[Sequence], vocab: int) -> Tensor:  # (NUM_COLUMNS, num_rows) float64
    """Penalties and settings."""
    params = [sequence.request.sampling for sequence in sequences]
    columns = (
        [p.repetition_penalty for p in params],
        [p.temperature for p in params],
        [p.top_k or vocab for p in params],
        [p.top_p for p in params],
        [p.min_p for p in params],
        [p.seed for p in params],
        [len(sequence.output_ids) for sequence in sequences],
    )
    return torch.tensor(columns, dtype=torch.float64)
