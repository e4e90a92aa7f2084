"""What an NPC remembers."""

import time

import pytest

from npc_runtime.history import MAX_HISTORY_CHARS, MAX_HISTORY_MESSAGES, History


def turns(*texts):
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def test_an_exchange_is_remembered_in_its_order():
    history = History(turns("Hi", "Hm."))
    history.remember("Who?", "Me.")
    assert list(history.messages) == turns("Hi", "Hm.", "Who?", "Me.")
    assert (len(history), history.epoch) == (4, 0)


def test_what_changes_it_by_hand_counts_as_an_epoch():
    history = History(turns("Hi", "Hm."))
    history.append(turns("Who?"))
    assert list(history.messages) == [*turns("Hi", "Hm."), *turns("Who?")]
    history.set(turns("A", "B"))
    history.pop()
    assert (list(history.messages), history.epoch) == ([], 3)


@pytest.mark.parametrize(
    ("before", "gone"),
    [
        (turns("A", "B", "C", "D"), turns("C", "D")),
        (turns("A", "B", "C"), turns("C")),
        (turns("A", "B") + turns("", "C")[1:], turns("A", "B") + turns("", "C")[1:]),
        (turns("", "B")[1:], turns("", "B")[1:]),
        ([], []),
    ],
)
def test_pop_takes_the_players_last_turn_and_what_followed(before, gone):
    history = History(before)
    assert history.pop() == gone
    assert list(history.messages) == before[: len(before) - len(gone)]


@pytest.mark.parametrize(("num", "size"), [(2 * MAX_HISTORY_MESSAGES, 1), (400, MAX_HISTORY_CHARS // 100)])
def test_it_is_bounded_and_forgets_the_oldest_first_many_at_once(num, size):
    history = History()
    firsts = set()
    for number in range(num // 2):
        history.remember(f"{number:08}".rjust(size), "x" * size)
        messages = history.messages
        assert len(messages) <= MAX_HISTORY_MESSAGES
        assert sum(len(turn["content"]) for turn in messages) <= MAX_HISTORY_CHARS
        assert messages[0]["role"] == "user"
        assert messages[-2]["content"].endswith(f"{number:08}")
        firsts.add(messages[0]["content"])
    assert 2 <= len(firsts) < num // 20, "a prompt that begins otherwise every turn finds nothing cached"


def test_a_history_without_the_player_keeps_its_newest_turns():
    replies = [{"role": "assistant", "content": f"{n}"} for n in range(MAX_HISTORY_MESSAGES + 1)]
    history = History(replies)
    assert history.messages[-1] == replies[-1]
    assert len(history) == 0.75 * MAX_HISTORY_MESSAGES


def test_forgetting_takes_no_time():
    started = time.monotonic()
    History(turns(*("x" for _ in range(100_000))))
    assert time.monotonic() - started < 1.0


def test_one_turn_that_is_too_large_is_forgotten_too():
    [left] = History(turns("x" * (MAX_HISTORY_CHARS + 1), "y")).messages
    assert left["content"] == "y"
