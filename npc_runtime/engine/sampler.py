"""From logits to the next token of every row: one batched call, each row with its own settings and seed."""

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch
from torch import Tensor

from npc_runtime.engine.core import SamplingParams, Sequence

__all__ = ["sample", "uniform"]

NUM_CANDIDATES = 256
"""Top logits looked at before a full sort is needed; real nuclei are far smaller."""

MIN_TEMPERATURE = 1e-4
MIN_TOP_P = 1e-6
"""Below these, float32 has nothing left to choose from; the best token is taken either way."""

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
        draws = [uniform(sequences[row].request.sampling.seed, len(sequences[row].output_ids)) for row in drawn]
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
    """Draw from each row's truncated distribution; most rows need only the head of their sorted logits."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, device=logits.device, dtype=torch.float32)[:, None]

    vocab = logits.shape[1]
    logits = logits / column([max(p.temperature, MIN_TEMPERATURE) for p in params])
    settings = _Truncation(
        ranks=column([float(min(p.top_k or vocab, vocab)) for p in params]),
        nucleus=column([max(p.top_p, MIN_TOP_P) for p in params]),
        min_p=column([p.min_p for p in params]),
        draws=column(draws),
        total=logits.logsumexp(dim=-1, keepdim=True),
    )
    # Which way a row is computed depends on its own settings and logits alone, never on its neighbours.
    chosen = torch.empty(len(params), dtype=torch.long, device=logits.device)
    is_whole = ((settings.ranks >= vocab) & (settings.nucleus >= 1))[:, 0]
    whole, cut = is_whole.nonzero()[:, 0], (~is_whole).nonzero()[:, 0]
    if len(whole):
        tokens = torch.arange(vocab, device=logits.device).expand(len(whole), -1)
        chosen[whole] = _choose(logits[whole], tokens, settings.rows(whole))
    if len(cut):
        chosen[cut] = _draw_truncated(logits[cut], settings.rows(cut))
    return chosen


def _draw_truncated(
    logits: Tensor,  # (num_rows, vocab)
    settings: "_Truncation",
) -> Tensor:  # (num_rows,)
    """Try the head of the sorted logits; rows whose top-k or nucleus is not inside it get a full sort."""
    vocab = logits.shape[1]
    values, tokens = _sorted_head(logits)
    mass = (values - settings.total).exp().sum(-1, keepdim=True)
    short = (settings.ranks > values.shape[1]) & ((settings.ranks < vocab) | (mass < settings.nucleus))
    chosen = _choose(values, tokens, settings)
    rest = short[:, 0].nonzero()[:, 0]
    if len(rest):
        values, tokens = logits[rest].sort(dim=-1, descending=True, stable=True)
        chosen[rest] = _choose(values, tokens, settings.rows(rest))
    return chosen


@dataclass(frozen=True, slots=True)
class _Truncation:
    """What each row keeps of its distribution, and its draw; all (num_rows, 1)."""

    ranks: Tensor
    nucleus: Tensor
    min_p: Tensor
    draws: Tensor
    total: Tensor  # log of the sum of all exponentials

    def rows(self, index: Tensor) -> "_Truncation":
        """Some of the rows."""
        return _Truncation(
            self.ranks[index], self.nucleus[index], self.min_p[index], self.draws[index], self.total[index]
        )


def _sorted_head(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logits and their tokens, descending, equal ones by token as a stable sort has them."""
    tokens = logits.topk(min(NUM_CANDIDATES, logits.shape[1]), dim=-1).indices.sort(dim=-1).values
    values, order = logits.gather(1, tokens).sort(dim=-1, descending=True, stable=True)
    return values, tokens.gather(1, order)


def _choose(
    values: Tensor,  # (num_rows, num_candidates), descending where a rank or nucleus cuts them
    tokens: Tensor,  # like values
    settings: _Truncation,
) -> Tensor:  # (num_rows,)
    """Keep the first k; of what they sum to, the fewest that reach p; of those, all above min-p × the best."""
    probabilities = (values - settings.total).exp()
    order = torch.arange(values.shape[1], device=values.device)[None]
    kept = probabilities.masked_fill(order >= settings.ranks, 0)
    before = kept.cumsum(-1) - kept
    # Without top-k the nucleus is a share of the whole distribution, of which the candidates are the head.
    is_top_k = settings.ranks <= values.shape[1]
    whole = torch.where(is_top_k, kept.sum(-1, keepdim=True), torch.ones_like(settings.nucleus))
    cuts = (settings.nucleus < 1) & (order > 0)
    kept = kept.masked_fill((before >= settings.nucleus * whole) & cuts, 0)
    best = probabilities.max(dim=-1, keepdim=True).values
    kept = kept.masked_fill(probabilities < settings.min_p * best, 0)
    cumulative = kept.cumsum(-1)
    index = (cumulative <= settings.draws * cumulative[:, -1:]).sum(-1, keepdim=True)
    # Rounding can push the goal onto the sum itself; the last token that still has weight takes it.
    order_of_last = torch.where(kept > 0, order, 0).max(dim=-1, keepdim=True).values
    index = index.minimum(order_of_last)
    return tokens.gather(1, index)[:, 0]
