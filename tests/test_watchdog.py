"""A step that does not come back is noticed, and a machine that sleeps is not taken for one."""

import itertools
import queue
import threading

import pytest
from conftest import MS

from npc_runtime.engine.watchdog import Patience, Watchdog, trace


def test_the_same_step_again_and_again():
    patience = Patience(3)
    assert [patience.wake(7) for _ in range(5)] == [False, False, False, False, True]


def test_every_new_step_and_every_sleep_counts_anew():
    patience = Patience(2)
    steps = [1, 1, 1, 2, 2, 2, None, 2, 2, 2, 3, None, None, None, None]
    assert not any(patience.wake(step) for step in steps)
    assert [patience.wake(4) for _ in range(4)] == [False, False, False, True]


def test_who_hangs_is_told_of_once():
    seen = queue.SimpleQueue()
    numbers = itertools.count()
    dog = Watchdog({"one": lambda: next(numbers), "other": lambda: 7}, seen.put, limit=2, tick_s=2 * MS)
    dog.start()
    assert seen.get(timeout=5_000 * MS) == "other"
    with pytest.raises(queue.Empty):
        seen.get(timeout=50 * MS)
    dog.stop()


def test_who_is_stopped_says_nothing():
    told = []
    dog = Watchdog({"one": lambda: 1}, told.append, limit=0, tick_s=10_000 * MS)
    dog.start()
    dog.stop()
    dog._thread.join(5_000 * MS)
    assert not dog._thread.is_alive()
    assert told == []


def test_where_a_thread_is():
    release = threading.Event()

    def hang_here():
        release.wait(30)

    thread = threading.Thread(target=hang_here)
    assert trace(thread) == ""
    thread.start()
    assert "hang_here" in trace(thread)
    release.set()
    thread.join()
