"""From logits to the next token of every row: penalties and bounds here, the draw in one kernel for all rows.

Nothing waits for the device before the tokens are read: what a step sends to it are copies from pinned memory.
"""

from collections.abc import Callable
from collections.abc import Sequence as Rows
from typing import Any

import torch
from npc_kernels.reference import Settings
from npc_kernels.reference import draw as reference_draw
from torch import Tensor

from npc_runtime.engine.core import Sequence

__all__ = ["sample"]

FAR = 1e30
"""Where a penalty next to nothing pushes a logit: beyond all others, and still a number."""


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
    _penalise(logits, sequences)
    unripe = [row for row, s in enumerate(sequences) if len(s.output_ids) < s.request.sampling.min_tokens]
    if unripe:
        places = [row * logits.shape[1] + token for row in unripe for token in sorted(eos_ids)]
        logits.view(-1).index_fill_(0, _send(places, torch.long, logits.device), -torch.inf)
    ids: list[int] = draw(logits, _settings(sequences, logits)).tolist()
    return ids


def _settings(sequences: Rows[Sequence], logits: Tensor) -> Settings:
    params = [sequence.request.sampling for sequence in sequences]
    columns = (
        [p.temperature for p in params],
        [p.top_k or logits.shape[1] for p in params],
        [p.top_p for p in params],
        [p.min_p for p in params],
        [p.seed for p in params],
        [len(sequence.output_ids) for sequence in sequences],
    )
    return Settings(*_send(columns, torch.float64, logits.device).unbind())


def _penalise(
    logits: Tensor,  # (num_rows, vocab), changed
    sequences: Rows[Sequence],
) -> None:
    """Divide positive and multiply negative logits of seen tokens (Keskar et al. 2019), as transformers does.

    A token seen twice is written twice, with the same value.
    """
    places: list[int] = []
    penalties: list[float] = []
    for row, sequence in enumerate(sequences):
        penalty = sequence.request.sampling.repetition_penalty
        if penalty != 1.0:
            seen = (*sequence.request.prompt_ids, *sequence.output_ids)
            places += [row * logits.shape[1] + token for token in seen]
            penalties += [penalty] * len(seen)
    if not places:
        return
    index = _send(places, torch.long, logits.device)
    factors = _send(penalties, torch.float32, logits.device)
    scores = logits.view(-1)[index]
    changed = torch.where(scores > 0, scores / factors, scores * factors)
    logits.view(-1)[index] = changed.clamp(-FAR, FAR)


def _send(values: Rows[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers on the device. The pinned memory is torch's own, which it reuses when the copy is done."""
    on_gpu = device.type == "cuda"
    return torch.tensor(values, dtype=dtype, pin_memory=on_gpu).to(device, non_blocking=on_gpu)
