"""Blocks are counted right, prefixes are found again, and never under another adapter."""

import pytest

from npc_runtime.engine.blocks import BlockPool
from npc_runtime.engine.core import Request, SamplingParams, Sequence


def make_sequence(tokens, key=""):
    sampling = SamplingParams(seed=0, max_tokens=50)
    return Sequence(Request(id=1, prompt_ids=tuple(tokens), sampling=sampling, arrival=0.0, cache_key=key))


def compute(pool, tokens, key=""):
    """A sequence whose tokens are all in the cache; returns it and how many it did not have to compute."""
    sequence = make_sequence(tokens, key)
    cached = pool.take_prefix(sequence)
    pool.extend(sequence, len(tokens))
    sequence.num_computed = len(tokens)
    pool.remember(sequence)
    return sequence, cached


def test_the_worked_example():
    pool = BlockPool(8, 4)
    first, _ = compute(pool, range(10))
    assert first.blocks == [0, 1, 2]
    second, cached = compute(pool, [*range(9), 77, 78])
    assert cached == 8
    assert second.blocks == [0, 1, 3]
    pool.check_integrity([first, second])
    pool.release(first)
    pool.release(second)
    assert (pool.num_free, pool.num_known) == (8, 2)
    third = make_sequence(range(100, 104))
    pool.extend(third, 24)
    assert not {0, 1} & set(third.blocks)
    pool.check_integrity([third])


@pytest.mark.parametrize(("num_tokens", "cached"), [(4, 0), (5, 4), (8, 4), (9, 8), (12, 8)])
def test_one_token_is_always_left_to_compute(num_tokens, cached):
    pool = BlockPool(8, 4)
    compute(pool, range(8))
    assert compute(pool, range(num_tokens))[1] == cached


def test_adapters_never_share():
    pool = BlockPool(16, 4)
    compute(pool, range(9), key="one")
    assert compute(pool, range(9), key="two")[1] == 0
    assert compute(pool, range(9), key="")[1] == 0
    assert compute(pool, range(9), key="one")[1] == 8


def test_a_prefix_counts_from_the_start_only():
    pool = BlockPool(16, 4)
    compute(pool, range(12))
    assert compute(pool, [99, *range(1, 12)])[1] == 0
    assert compute(pool, [*range(4), 99, *range(5, 12)])[1] == 4


def test_what_is_not_computed_is_not_known():
    pool = BlockPool(8, 4)
    sequence = make_sequence(range(12))
    pool.extend(sequence, 12)
    sequence.num_computed = 7
    pool.remember(sequence)
    assert compute(pool, range(12))[1] == 4


def test_the_least_recently_used_prefix_goes_first():
    pool = BlockPool(4, 4)
    for start in (0, 100, 200):
        pool.release(compute(pool, range(start, start + 4))[0])
    used_again, cached = compute(pool, range(5))
    assert cached == 4
    pool.release(used_again)
    big = make_sequence(range(300, 312))
    pool.extend(big, 12)
    pool.release(big)
    assert compute(pool, range(5))[1] == 4
    assert compute(pool, range(100, 105))[1] == 0


def test_replies_extend_the_known_prefix():
    """The next turn of a conversation begins with this turn's prompt and reply."""
    pool = BlockPool(8, 4)
    sequence, _ = compute(pool, range(6))
    sequence.output_ids = [50, 51, 52]
    pool.extend(sequence, 8)
    sequence.num_computed = 8
    pool.remember(sequence)
    pool.release(sequence)
    assert compute(pool, [*range(6), 50, 51, 52, 90])[1] == 8


def test_after_forgetting_nothing_is_known():
    pool = BlockPool(8, 4)
    sequence, _ = compute(pool, range(8))
    pool.forget_all()
    pool.check_integrity([sequence])
    assert compute(pool, range(8))[1] == 0


@pytest.mark.parametrize("damage", [lambda s: s.blocks.pop(), lambda s: s.blocks.append(s.blocks[0])])
def test_lost_and_doubled_blocks_are_noticed(damage):
    pool = BlockPool(4, 4)
    sequence, _ = compute(pool, range(8))
    damage(sequence)
    with pytest.raises(AssertionError):
        pool.check_integrity([sequence])
