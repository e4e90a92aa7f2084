"""How fast the engine may go on, without one: what a second brings, evenly, and what a pause does."""

import math
import random
from itertools import pairwise

import pytest

from npc_runtime.engine.pace import EVEN_S, LATE_S, PROMPT_TOKENS, Pace


def paced(limit, now=0.0):
    pace = Pace()
    pace.configure(now, max_tokens_per_s=limit, paused=False)
    return pace


def test_without_a_bound_nothing_rests():
    pace = Pace()
    for _ in range(100):
        pace.began(0.0, num_spoken=64, num_read=512)
    assert (pace.rest_s(0.0), pace.owed_s(0.0), pace.max_prompt_tokens) == (0.0, 0.0, None)


def test_the_example_of_the_docstring():
    pace = paced(20.0)
    assert pace.rest_s(0.0) == 0.0
    pace.began(0.0, num_spoken=4, num_read=0)
    assert pace.rest_s(0.0) == pytest.approx(0.2)
    assert pace.rest_s(0.15) == pytest.approx(0.05)
    pace.began(0.2, num_spoken=4, num_read=40)
    assert pace.rest_s(0.2) == pytest.approx(0.45)
    pace.began(5.0, num_spoken=4, num_read=0)
    assert pace.rest_s(5.0) == pytest.approx(0.2)


def test_nothing_is_saved_up_while_nobody_speaks():
    pace = paced(100.0)
    for now in (0.0, 60.0, 3600.0):
        pace.began(now, num_spoken=50, num_read=0)
        assert pace.rest_s(now) == pytest.approx(0.5)


@pytest.mark.parametrize("limit", [0.5, 7.0, 20.0, 333.0])
@pytest.mark.parametrize("late_s", [0.0, 0.015])
def test_a_second_brings_what_was_asked_for(limit, late_s):
    """Steps of any size for 200 seconds, begun when they may be or a timer's tick later: never more in any stretch of
    time than the bound and one step, and in all of it not much less.
    """
    chance, pace, now, steps = random.Random(3), paced(limit), 0.0, []
    while now < 200.0:
        num_spoken = chance.randrange(1, 9)
        pace.began(now, num_spoken=num_spoken, num_read=0)
        steps.append((now, num_spoken))
        rest = pace.rest_s(now)
        now += rest + chance.random() * late_s if rest else 1e-4
    for first in range(0, len(steps), max(len(steps) // 40, 1)):
        total = 0
        for at, count in steps[first:]:
            assert total <= limit * (at - steps[first][0] + LATE_S) + 1e-6, "before this step"
            total += count
    assert sum(count for _, count in steps) >= 0.97 * limit * 200.0


def test_steps_are_spread_evenly():
    """The GPU is free again after every step, not after every second."""
    pace, now, begun = paced(40.0), 0.0, []
    for _ in range(20):
        pace.began(now, num_spoken=4, num_read=0)
        begun.append(now)
        now += pace.rest_s(now)
    assert [after - before for before, after in pairwise(begun)] == pytest.approx([0.1] * 19)


def test_who_wakes_up_late_makes_up_for_it_and_for_no_more():
    for late_s, rest_s in ((LATE_S / 2, 0.1 - LATE_S / 2), (2 * LATE_S, 0.1)):
        pace = paced(40.0)
        pace.began(0.0, num_spoken=4, num_read=0)
        pace.began(0.1 + late_s, num_spoken=4, num_read=0)
        assert pace.rest_s(0.1 + late_s) == pytest.approx(rest_s)


def test_prompts_cost_less_than_words_and_come_in_small_pieces():
    pace = paced(20.0)
    assert pace.max_prompt_tokens == 20 * EVEN_S * PROMPT_TOKENS
    pace.began(0.0, num_spoken=0, num_read=pace.max_prompt_tokens)
    assert pace.rest_s(0.0) == pytest.approx(EVEN_S)
    assert paced(0.01).max_prompt_tokens == PROMPT_TOKENS, "it comes to an end"


def test_a_pause_lasts_until_it_is_ended():
    pace = Pace()
    pace.configure(0.0, max_tokens_per_s=None, paused=True)
    assert pace.rest_s(0.0) == pace.rest_s(1e9) == math.inf
    pace.configure(5.0, max_tokens_per_s=None, paused=False)
    assert pace.rest_s(5.0) == 0.0


def test_what_is_owed_stays_owed_when_the_bound_changes():
    """Nobody gets a spurt by asking for the same bound again; and who lifts it need not wait."""
    pace = paced(10.0)
    pace.began(0.0, num_spoken=20, num_read=0)
    pace.configure(1.0, max_tokens_per_s=10.0, paused=False)
    assert pace.rest_s(1.0) == pytest.approx(1.0)
    pace.configure(1.0, max_tokens_per_s=100.0, paused=False)
    assert pace.rest_s(1.0) == pytest.approx(0.1)
    pace.configure(1.0, max_tokens_per_s=None, paused=False)
    assert pace.rest_s(1.0) == 0.0
    pace.configure(1.0, max_tokens_per_s=10.0, paused=False)
    assert pace.rest_s(1.0) == 0.0
