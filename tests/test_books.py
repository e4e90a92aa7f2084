"""Every line ends once, whoever says so first."""

import random
import threading
from collections import Counter

import pytest
from driving import greedy

from npc_runtime.engine.books import Books, BooksClosed
from npc_runtime.engine.core import Ended, EndReason, Spoken, Started, StepOutput
from npc_runtime.errors import DeviceFailed

FAILED = DeviceFailed("The device failed.", "Send the line again.")


class Told:
    def __init__(self):
        self.events = []

    def __call__(self, step):
        self.events += step.events

    def ends(self):
        return [event for event in self.events if isinstance(event, Ended)]


def lines(*numbers):
    return [greedy(number, [3, 4, 5], None) for number in numbers]


def test_a_line_is_open_until_its_end_is_reported():
    told = Told()
    books = Books(told)
    books.open(lines(1, 2, 3), 0.0)
    end = Ended(2, EndReason.STOP)
    books.report(StepOutput((Started(1, 2.0, 1), Spoken(1, "He"), end)), 0.5)
    assert books.open_ids == [1, 3]
    assert told.events == [Started(1, 2.0, 1), Spoken(1, "He"), end]


def test_closing_ends_what_is_open_with_what_was_said():
    told = Told()
    books = Books(told)
    books.open(lines(1, 2), 0.0)
    books.report(StepOutput((Started(1, 250.0, 1), Spoken(1, "Hel"))), 0.5)
    books.report(StepOutput((Spoken(1, "lo."),)), 0.75)
    assert books.close(EndReason.ERROR, FAILED, 2.0)
    first, second = told.ends()
    assert (first.request_id, first.text, first.num_prompt, first.num_completion) == (1, "Hello.", 3, 2)
    assert (first.queue_ms, first.first_text_ms, first.total_ms) == (250.0, 500.0, 2000.0)
    assert (second.request_id, second.text, second.queue_ms, second.first_text_ms) == (2, "", 2000.0, None)
    assert {(end.reason, end.error) for end in (first, second)} == {(EndReason.ERROR, FAILED)}
    assert books.open_ids == []


def test_who_comes_back_late_is_refused_and_tells_nobody():
    told = Told()
    books = Books(told)
    books.open(lines(1), 0.0)
    books.close(EndReason.ERROR, FAILED, 1.0)
    so_far = list(told.events)
    with pytest.raises(BooksClosed):
        books.report(StepOutput((Spoken(1, "late"), Ended(1, EndReason.STOP))), 2.0)
    assert not books.close(EndReason.CANCELLED, None, 2.0)
    assert told.events == so_far


def test_a_line_that_comes_after_the_end_ends_at_once():
    told = Told()
    books = Books(told)
    books.close(EndReason.ERROR, FAILED, 1.0)
    assert told.events == []
    books.open(lines(7, 8), 2.0)
    assert [(end.request_id, end.reason, end.error) for end in told.ends()] == [
        (7, EndReason.ERROR, FAILED),
        (8, EndReason.ERROR, FAILED),
    ]


def test_whoever_is_told_may_submit():
    books = Books(lambda step: books.open(lines(step.events[0].request_id + 100), 1.0))
    books.open(lines(1), 0.0)
    books.report(StepOutput((Spoken(1, "a"),)), 1.0)
    assert books.open_ids == [1, 101]


@pytest.mark.parametrize("seed", range(20))
def test_three_threads_and_one_end_each(seed):
    """One submits, one speaks and ends, one closes in the midst of it."""
    told, chance, is_closed = Told(), random.Random(seed), threading.Event()
    books = Books(told)

    def submit():
        for number in range(300):
            books.open(lines(number), 0.0)

    def speak():
        try:
            for _ in range(3_000):
                ids = books.open_ids[:3]
                events = [event for number in ids for event in (Spoken(number, "x"), Ended(number, EndReason.STOP))]
                books.report(StepOutput(tuple(events)), 0.0)
        except BooksClosed:
            is_closed.set()

    def close():
        is_closed.wait(chance.random() / 100)
        books.close(EndReason.ERROR, FAILED, 0.0)

    threads = [threading.Thread(target=target) for target in (submit, speak, close)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30.0)
    counts = Counter(end.request_id for end in told.ends())
    assert counts == dict.fromkeys(range(300), 1)
    over = set()
    for event in told.events:
        assert event.request_id not in over, "something was said after the end"
        over |= {event.request_id} if isinstance(event, Ended) else set()
