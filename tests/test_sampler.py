"""Draws follow the distribution that a line asked for, and depend on its own seed and position alone."""

import functools

import numpy as np
import pytest
import torch
from npc_kernels import cpu, gpu, reference
from npc_kernels.reference import uniform
from transformers import RepetitionPenaltyLogitsProcessor

from npc_runtime.engine import sampler
from npc_runtime.engine.core import Request, SamplingParams, SeenTokens, Sequence

NO_EOS = frozenset()
LOGITS = torch.tensor([2.0, -1.0, 0.5, 1.5, 0.0, 1.0, -3.0, 0.7])
NUM_DRAWS = 4_000
COUNT = torch.arange(20_000, dtype=torch.float64)


@pytest.fixture(params=[reference, cpu], ids=["reference", "cpu"])
def sample(request):
    """`sample` with each module's draw."""
    return functools.partial(sampler.sample, draw=request.param.draw)


def make_row(seed=0, prompt=(), output=(), **sampling):
    params = SamplingParams(**{"seed": seed, "max_tokens": 99, "temperature": 1.0, **sampling})
    request = Request(id=seed, prompt_ids=tuple(prompt), sampling=params, arrival=0.0)
    return Sequence(request, output_ids=list(output))


def draw_many(sample, logits, **sampling):
    """The share of each token in many draws, one seed each."""
    rows = [make_row(seed, **sampling) for seed in range(NUM_DRAWS)]
    tokens = sample(logits.expand(NUM_DRAWS, -1).clone(), rows, NO_EOS)
    return np.bincount(tokens, minlength=len(logits)) / NUM_DRAWS


def plain(logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The same in plain numpy: first k, then the fewest that reach p of their sum, then all above min-p."""
    scores = logits.double().numpy() / temperature
    probabilities = np.exp(scores - scores.max())
    probabilities /= probabilities.sum()
    kept = np.argsort(-probabilities, kind="stable")[: top_k or None]
    shares = np.cumsum(probabilities[kept]) / probabilities[kept].sum()
    kept = kept[: np.searchsorted(shares, top_p) + 1]
    kept = kept[probabilities[kept] >= min_p * probabilities.max()]
    result = np.zeros_like(probabilities)
    result[kept] = probabilities[kept] / probabilities[kept].sum()
    return result


# -- random numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "counters",
    [
        pytest.param((COUNT, torch.full_like(COUNT, 3)), id="seeds"),
        pytest.param((torch.full_like(COUNT, 3), COUNT), id="positions"),
        pytest.param((2**53 - 1 - COUNT, torch.zeros_like(COUNT)), id="large-seeds"),
    ],
)
def test_uniform_is_uniform(counters):
    draws = uniform(*counters).numpy()
    assert 0.0 <= min(draws) < max(draws) < 1.0
    counts = np.histogram(draws, bins=20, range=(0, 1))[0]
    assert ((counts - 1_000) ** 2 / 1_000).sum() < 43.8  # chi-square with 19 degrees of freedom, p = 0.001
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.03


def test_uniform_differs_by_seed_and_position():
    draws = uniform(COUNT[:100].repeat(100), COUNT[:100].repeat_interleave(100))
    assert len(draws.unique()) == 10_000
    # Fixed for good: a seed in somebody's save game must replay its line.
    assert uniform(COUNT[1:2], COUNT[:1]).item() == 0.17601256256594233


# -- one row -------------------------------------------------------------------------------------------------


def test_no_temperature_is_the_best_token(sample):
    torch.manual_seed(0)
    logits = torch.randn(16, 50)
    rows = [make_row(seed, temperature=0.0, top_k=3, min_p=0.5) for seed in range(16)]
    assert sample(logits.clone(), rows, NO_EOS) == logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 1},
        {"top_k": 3},
        {"top_k": 99},
        {"top_p": 0.01},
        {"top_p": 0.6},
        {"min_p": 0.3},
        {"min_p": 1.0},
        {"top_k": 4, "top_p": 0.7},
        {"temperature": 2.0, "top_k": 6, "top_p": 0.9, "min_p": 0.3},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(settings, sample):
    expected = plain(LOGITS, **settings)
    shares = draw_many(sample, LOGITS, **settings)
    assert set(np.flatnonzero(expected > 0.005)) <= set(np.flatnonzero(shares)) <= set(np.flatnonzero(expected))
    assert abs(shares - expected).sum() / 2 < 0.03


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"top_k": 1_500},
        {"top_p": 0.5},
        {"top_k": 256, "top_p": 0.5},
        {"top_k": 2_000, "top_p": 0.3},
    ],
    ids=str,
)
def test_a_flat_distribution_reaches_far(settings, sample):
    """The tokens that can be drawn, by walking the whole distribution; close logits, but no two alike."""
    logits = torch.linspace(0.0, 0.5, 3_000)
    rows = [make_row(seed, **settings) for seed in range(NUM_DRAWS)]
    drawn = sample(logits.expand(NUM_DRAWS, -1).clone(), rows, NO_EOS)
    possible = np.flatnonzero(plain(logits, **settings))
    assert min(drawn) >= possible.min()
    assert min(drawn) < possible.min() + 60
    assert max(drawn) > 2_940


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1e-40},
        {"temperature": 1e-300},
        {"temperature": 1e-5},
        {"top_p": 1e-300},
        {"min_p": 1.0, "top_p": 1e-9, "top_k": 1},
        {"temperature": 0.0, "repetition_penalty": 5.0},
    ],
    ids=str,
)
def test_the_extremes_that_the_protocol_allows_give_the_best_token(settings, sample):
    assert sample(20 * LOGITS[None], [make_row(prompt=[1], **settings)], NO_EOS) == [0]


@pytest.mark.parametrize("penalty", [1e-40, 1e-300])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_extreme_penalty_gives_a_token(penalty, temperature, sample):
    row = make_row(prompt=[0, 1], repetition_penalty=penalty, temperature=temperature)
    assert sample(LOGITS[None].clone(), [row], NO_EOS) == [0]


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3])
def test_the_penalty_is_that_of_transformers(penalty):
    torch.manual_seed(1)
    logits = torch.randn(1, 40)
    prompt, output = [3, 5, 5, 8], [8, 13]
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + output]), logits.clone())
    changed = logits.clone()
    row = make_row(prompt=prompt, output=output, repetition_penalty=penalty)
    sampler.sample(changed, [row], NO_EOS, draw=lambda logits, settings: torch.zeros(1))
    torch.testing.assert_close(changed, expected)


def test_penalties_of_many_rows_from_step_to_step():
    """Rows with different penalties and without, that come and go and grow; each token is looked at once."""
    torch.manual_seed(4)
    penalties = (1.1, 1.0, 0.7, 3.0)
    rows = [make_row(n, prompt=[n, 7, 7, 30 + n], repetition_penalty=p) for n, p in enumerate(penalties)]
    for step in range(6):
        at_hand = rows[step % 3 :]
        logits = 5 * torch.randn(len(at_hand), 40)
        expected = [
            RepetitionPenaltyLogitsProcessor(row.request.sampling.repetition_penalty)(
                torch.tensor([[*row.request.prompt_ids, *row.output_ids]]), logits[number : number + 1].clone()
            )
            for number, row in enumerate(at_hand)
        ]
        sampler.sample(logits, at_hand, NO_EOS, draw=lambda logits, settings: torch.zeros(1))
        assert torch.equal(logits, torch.cat(expected))
        for number, row in enumerate(at_hand):
            row.output_ids.append((step * 5 + number) % 40)


def test_a_step_looks_at_new_tokens_only(monkeypatch):
    """What a penalty costs does not grow with the line."""
    looked_at, add = [], SeenTokens.add
    monkeypatch.setattr(SeenTokens, "add", lambda self, tokens: (looked_at.append(len(tokens)), add(self, tokens)))
    row = make_row(prompt=[3] * 350, repetition_penalty=1.1)
    for token in (4, 5, 5, 6):
        sampler.sample(torch.zeros(1, 40), [row], NO_EOS)
        row.output_ids.append(token)
    assert looked_at == [350, 1, 1, 1]
    assert row.seen_ids.tolist() == [3, 4, 5, 6]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("num_output", "is_banned"), [(0, True), (1, True), (2, False)])
def test_no_end_token_before_min_tokens(num_output, is_banned, temperature, sample):
    logits = torch.tensor([[0.0, 50.0, 49.0, 1.0]])
    row = make_row(output=[3] * num_output, min_tokens=2, temperature=temperature)
    [token] = sample(logits, [row], frozenset({1, 2}))
    assert (token not in (1, 2)) == is_banned


def test_min_tokens_of_a_base_without_an_end_token(sample):
    assert sample(LOGITS[None].clone(), [make_row(min_tokens=5, temperature=0.0)], NO_EOS) == [0]


# -- many rows -----------------------------------------------------------------------------------------------


def test_a_seed_replays_and_another_does_not(sample):
    def line(seed):
        return [sample(LOGITS[None].clone(), [make_row(seed, output=[0] * n)], NO_EOS)[0] for n in range(30)]

    assert line(7) == line(7)
    assert len(set(line(7))) > 3
    assert line(7) != line(8)


@pytest.mark.parametrize("step", [None, 0.125], ids=["distinct-logits", "equal-logits"])
@pytest.mark.parametrize(
    "settings", [{"top_p": 0.9}, {"top_k": 40}, {"temperature": 0.3}, {"top_k": 1_100, "top_p": 0.9}], ids=str
)
def test_a_row_does_not_depend_on_its_batch_mates(settings, step, sample):
    """The mates need the whole vocabulary sorted. With bfloat16 weights many logits are equal."""
    torch.manual_seed(2)
    logits = 4 * torch.randn(20, 3_000)
    logits = logits if step is None else (logits / step).round() * step
    rows = [make_row(seed, **settings) for seed in range(20)]
    mates = [make_row(temperature=5.0), make_row(temperature=0.0)]
    alone = [sample(logits[number : number + 1].clone(), [row], NO_EOS)[0] for number, row in enumerate(rows)]
    others = torch.stack([torch.linspace(0, 1, 3_000), torch.linspace(0, 9, 3_000)])
    together = sample(torch.cat([others, logits]), [*mates, *rows], NO_EOS)
    assert together[2:] == alone


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.9}], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_that_overflowed_is_told_and_harms_nobody(settings, value, sample):
    logits = torch.randn(3, 500)
    logits[1, 77] = value
    rows = [make_row(seed, **settings) for seed in range(3)]
    tokens = sample(logits.clone(), rows, NO_EOS)
    assert tokens[1] == -1
    assert [tokens[0], tokens[2]] == [sample(logits[n : n + 1].clone(), [rows[n]], NO_EOS)[0] for n in (0, 2)]


@pytest.mark.parametrize("step", [None, 0.125], ids=["distinct-logits", "equal-logits"])
@pytest.mark.parametrize(
    "settings", [{}, {"top_k": 7}, {"top_p": 0.7}, {"top_k": 40, "top_p": 0.9, "min_p": 0.05}], ids=str
)
def test_all_modules_draw_the_same_tokens(settings, step):
    """A seed replays a line on another machine, but for draws that fall onto a rounding error."""
    torch.manual_seed(3)
    logits = 3 * torch.randn(200, 3_000)
    logits = logits if step is None else (logits / step).round() * step
    rows = [make_row(seed, **settings) for seed in range(200)]
    chosen = [sampler.sample(logits.clone(), rows, NO_EOS, draw=m.draw) for m in (reference, cpu)]
    assert sum(a != b for a, b in zip(*chosen, strict=True)) <= 2


# -- the GPU's kernel, in the interpreter: slow, so a row of every kind ---------------------------------------

KINDS = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.5},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 10_000},
    {"top_p": 0.02},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"top_k": 40, "top_p": 0.9, "min_p": 0.05, "temperature": 0.8},
]


def settings_of(rows, vocab):
    return sampler._tell(rows, NO_EOS, vocab, torch.device("cpu")).settings


@pytest.mark.parametrize("step", [None, 0.5], ids=["distinct-logits", "equal-logits"])
@pytest.mark.parametrize("vocab", [61, 4_097])
def test_the_gpu_draws_what_its_twin_draws(vocab, step):
    torch.manual_seed(5)
    rows = [
        make_row(seed, output=range(seed % 5), **kind) for seed, kind in enumerate(KINDS * (3 if vocab < 99 else 1))
    ]
    logits = 3 * torch.randn(len(rows), vocab)
    logits = logits if step is None else (logits / step).round() * step
    settings = settings_of(rows, vocab)
    assert gpu.draw(logits, settings).tolist() == reference.draw(logits.clone(), settings).tolist()


@pytest.mark.parametrize("module", [reference, cpu, gpu], ids=["reference", "cpu", "gpu"])
@pytest.mark.parametrize("settings", [{"top_k": 7}, {"top_p": 0.17}], ids=str)
def test_of_equal_tokens_the_first_are_kept(settings, module):
    """Seven of forty, whether they are counted or weighed."""
    rows = [make_row(seed, **settings) for seed in range(60)]
    drawn = module.draw(torch.zeros(60, 40), settings_of(rows, 40)).tolist()
    assert set(drawn) == set(range(7))


@pytest.mark.parametrize("module", [reference, cpu, gpu], ids=["reference", "cpu", "gpu"])
def test_a_bitmask_forbids_tokens(module):
    """Whatever else is asked for; and a row that may say nothing says that it cannot."""
    torch.manual_seed(6)
    vocab, rows = 71, [make_row(seed, **kind) for seed, kind in enumerate(KINDS)]
    allowed = torch.rand(len(rows), vocab) < 0.2
    allowed[3] = False
    logits = 3 * torch.randn(len(rows), vocab)
    logits[~allowed] += 9
    bits = torch.nn.functional.pad(allowed, (0, -vocab % 32)).view(len(rows), -1, 32).long()
    words = (bits << torch.arange(32)).sum(-1)
    bitmask = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    settings = settings_of(rows, vocab)
    drawn = module.draw(logits.clone(), settings, bitmask)
    assert drawn[3] == -1
    del rows[3]
    kept = [row for row in range(len(KINDS)) if row != 3]
    assert allowed[kept, drawn[kept]].all()
    assert torch.equal(drawn, reference.draw(logits.masked_fill(~allowed, -torch.inf), settings))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_the_gpu_says_that_logits_are_no_numbers(number):
    logits = torch.randn(3, 40)
    logits[1, 17] = number
    logits[2] = -torch.inf
    drawn = gpu.draw(logits, settings_of([make_row(seed) for seed in range(3)], 40))
    assert drawn[0] >= 0
    assert drawn[1:].tolist() == [-1, -1]
