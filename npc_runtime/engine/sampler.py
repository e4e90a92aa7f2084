"""From logits to the next token of every row: one batched call, each row with its own settings and seed."""

from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from npc_runtime.engine.core import SamplingParams, Sequence

__all__ = ["sample", "uniform"]

NUM_CANDIDATES = 1_024
"""Top logits looked at before a full sort is needed; real nuclei are far smaller."""

_MASK64 = (1 << 64) - 1


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on (seed, position) alone: SplitMix64 (Steele et al. 2014), 53 bits.

    Counter-based, so that a line replays the same whoever shares its batch.
    """
    z = (seed * 0x9E3779B97F4A7C15 + (position + 1) * 0xD1B54A32D192ED03) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return ((z ^ (z >> 31)) >> 11) / (1 << 53)


@torch.inference_mode()
def sample(
    logits: Tensor,  # (num_rows, vocab) float32, changed
    sequences: Rows[Sequence],
    eos_ids: frozenset[int],
) -> list[int]:
    """Choose the next token of each row. Order: penalty, minimum length, temperature, top-k, top-p, min-p."""
    for row, sequence in enumerate(sequences):
        _penalise(logits[row], sequence)
        if len(sequence.output_ids) < sequence.request.sampling.min_tokens:
            logits[row, list(eos_ids)] = -torch.inf
    chosen = logits.argmax(dim=-1)
    drawn = [row for row, s in enumerate(sequences) if s.request.sampling.temperature > 0]
    if drawn:
        draws = [
            uniform(sequences[row].request.sampling.seed, len(sequences[row].output_ids)) for row in drawn
        ]
        params = [sequences[row].request.sampling for row in drawn]
        chosen[drawn] = _draw(logits[drawn], params, draws)
    ids: list[int] = chosen.tolist()
    return ids


def _penalise(
    logits: Tensor,  # (vocab,), changed
    sequence: Sequence,
) -> None:
    """Divide positive and multiply negative logits of seen tokens (Keskar et al. 2019), as transformers does."""
    penalty = sequence.request.sampling.repetition_penalty
    if penalty == 1.0:
        return
    seen = torch.tensor(
        sorted({*sequence.request.prompt_ids, *sequence.output_ids}), device=logits.device, dtype=torch.long
    )
    scores = logits[seen]
    logits[seen] = torch.where(scores > 0, scores / penalty, scores * penalty)


def _draw(
    logits: Tensor,  # (num_rows, vocab)
    params: list[SamplingParams],
    draws: list[float],
) -> Tensor:  # (num_rows,)
    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, device=logits.device, dtype=torch.float32)[:, None]

    logits = logits / column([p.temperature for p in params])
    total = logits.logsumexp(dim=-1, keepdim=True)
    vocab = logits.shape[1]
    ranks = column([float(p.top_k or vocab) for p in params])
    nucleus = column([p.top_p for p in params])
    values, tokens = logits.topk(min(NUM_CANDIDATES, vocab), dim=-1)
    probabilities = (values - total).exp()
    beyond = (probabilities.sum(-1, keepdim=True) < nucleus) & (ranks > probabilities.shape[1])
    if beyond.any():
        values, tokens = logits.sort(dim=-1, descending=True)
        probabilities = (values - total).exp()
    probabilities = _truncate(probabilities, ranks, nucleus, column([p.min_p for p in params]))
    cumulative = probabilities.cumsum(-1)
    goal = column(draws) * cumulative[:, -1:]
    index = (cumulative <= goal).sum(-1, keepdim=True)
    # Rounding can push the goal onto the sum itself; the last token that still has weight takes it.
    index = index.minimum((probabilities > 0).sum(-1, keepdim=True) - 1)
    return tokens.gather(1, index)[:, 0]


def _truncate(
    probabilities: Tensor,  # (num_rows, num_candidates), descending
    ranks: Tensor,  # (num_rows, 1) top-k
    nucleus: Tensor,  # (num_rows, 1) top-p
    min_p: Tensor,  # (num_rows, 1)
) -> Tensor:  # (num_rows, num_candidates), zero where dropped
    """Keep the first k; of what they sum to, the fewest that reach p; of those, all above min-p × the best."""
    order = torch.arange(probabilities.shape[1], device=probabilities.device)[None]
    kept = probabilities.masked_fill(order >= ranks, 0)
    before = kept.cumsum(-1) - kept
    # Without top-k the nucleus is a share of the whole distribution, of which the candidates are the head.
    whole = torch.where(ranks < probabilities.shape[1], kept.sum(-1, keepdim=True), torch.ones_like(nucleus))
    kept = kept.masked_fill(before >= nucleus * whole, 0)
    return kept.masked_fill(probabilities < min_p * probabilities[:, :1], 0)
