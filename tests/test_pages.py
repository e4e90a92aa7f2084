"""Who owns which adapter page: order of leaving, promises, pins, and no page lost when a load fails."""

import pytest

from npc_runtime.engine.core import Admission, Request, SamplingParams, Sequence
from npc_runtime.engine.pages import PagePool

ADMITTED, LOADING, NO_ROOM = Admission.ADMITTED, Admission.LOADING, Admission.NO_ROOM


class Game:
    """A pool and its lines; loads are done when the test says so."""

    def __init__(self, num_pages, **sizes):
        self.loads = {}
        self.pool = PagePool(num_pages, sizes, self.loads.__setitem__)
        self.running, self.waiting = [], []

    def ask(self, name, line=None):
        """One more line for the adapter, or a line that asks again."""
        if line is None:
            number = len(self.running) + len(self.waiting) + 1
            request = Request(number, (1,), SamplingParams(seed=0, max_tokens=1), arrival=0.0, adapter=name)
            line = Sequence(request)
            self.waiting.append(line)
        outcome = self.pool.admit(line)
        line.is_promised = outcome is LOADING
        if outcome is ADMITTED:
            self.waiting.remove(line)
            self.running.append(line)
        self.check()
        return line, outcome

    def leave(self, line):
        self.pool.leave(line)
        (self.running if line in self.running else self.waiting).remove(line)
        self.check()

    def speak(self, name):
        """A line that loads the adapter if it must, speaks and leaves."""
        line, outcome = self.ask(name)
        if outcome is LOADING:
            self.pool.loaded(name)
            assert self.ask(name, line)[1] is ADMITTED
        self.leave(line)

    def check(self):
        self.pool.check_integrity(self.running, self.waiting)


def test_a_line_without_an_adapter_is_admitted():
    game = Game(1, a=1)
    assert game.ask(None)[1] is ADMITTED


def test_an_adapter_is_loaded_once_for_all_who_want_it():
    game = Game(4, a=2)
    first, outcome = game.ask("a")
    second, again = game.ask("a")
    assert (outcome, again) == (LOADING, LOADING)
    assert game.loads == {"a": game.pool._slots["a"].pages}
    assert (game.pool.num_free, game.pool.resident) == (2, ())
    game.pool.loaded("a")
    assert game.pool.resident == ("a",)
    assert game.ask("a", first)[1] is ADMITTED
    assert game.ask("a", second)[1] is ADMITTED
    assert game.pool.pages_of("a") == game.loads["a"]


def test_the_least_recently_used_makes_room():
    game = Game(3, a=1, b=1, c=1, d=1)
    for name in "abca":
        game.speak(name)
    game.speak("d")
    assert game.pool.resident == ("a", "c", "d")


def test_a_line_that_ends_late_was_used_late():
    game = Game(2, a=1, b=1, c=1)
    game.speak("a")
    long, _ = game.ask("a")
    game.speak("b")
    game.leave(long)
    game.speak("c")
    assert game.pool.resident == ("a", "c")


def test_adapters_in_use_stay():
    game = Game(2, a=1, b=1, c=1)
    game.speak("a")
    game.speak("b")
    user, _ = game.ask("a")
    game.ask("b")
    waiting, outcome = game.ask("c")
    assert outcome is NO_ROOM
    game.leave(user)
    assert game.ask("c", waiting)[1] is LOADING
    game.pool.loaded("c")
    assert game.pool.resident == ("b", "c")


def test_a_loaded_adapter_stays_for_the_line_that_asked():
    """No livelock: without promises a and b would push each other out in every plan, and no line would speak."""
    game = Game(2, a=2, b=2)
    first, _ = game.ask("a")
    second, outcome = game.ask("b")
    assert outcome is NO_ROOM
    game.pool.loaded("a")
    assert game.ask("b", second)[1] is NO_ROOM
    assert game.ask("a", first)[1] is ADMITTED
    game.leave(first)
    assert game.ask("b", second)[1] is LOADING


def test_a_promise_ends_with_the_line():
    game = Game(2, a=2, b=2)
    first, _ = game.ask("a")
    game.leave(first)
    second, outcome = game.ask("b")
    assert outcome is NO_ROOM, "its pages are still being written"
    game.pool.loaded("a")
    assert game.ask("b", second)[1] is LOADING


def test_nobody_is_pushed_out_for_a_load_that_still_finds_no_room():
    game = Game(4, a=1, b=1, c=1, wide=4)
    for name in "abc":
        game.speak(name)
    game.ask("a")
    assert game.ask("wide")[1] is NO_ROOM
    assert game.pool.resident == ("a", "b", "c")


def test_pinned_adapters_leave_last_but_leave():
    game = Game(3, a=1, b=1, c=1, d=1, wide=3)
    for name in "abc":
        game.speak(name)
    game.pool.pin("a")
    game.speak("d")
    assert game.pool.resident == ("a", "c", "d")
    game.speak("b")
    game.speak("c")
    assert game.pool.resident == ("a", "b", "c")
    game.speak("wide")
    assert game.pool.resident == ("wide",), "a pin never keeps a line waiting"
    for name in "abcd":
        game.speak(name)
    assert game.pool.resident == ("b", "c", "d"), "the pin of a ended when it was pushed out"


def test_a_failed_load_names_who_waited_and_gives_the_pages_back():
    game = Game(2, a=2, b=1)
    first, _ = game.ask("a")
    second, _ = game.ask("a")
    gone, _ = game.ask("a")
    game.leave(gone)
    assert game.pool.failed("a") == {first.request.id, second.request.id}
    assert (game.pool.num_free, game.pool.resident) == (2, ())
    game.waiting.clear()
    game.loads.clear()
    game.speak("b")
    assert game.ask("a")[1] is LOADING, "a later line tries again"
    assert set(game.loads) == {"b", "a"}


def test_placing_takes_free_pages_only():
    game = Game(3, a=1, b=1, wide=2)
    assert len(game.pool.place("a")) == 1
    game.pool.loaded("a")
    assert len(game.pool.place("wide")) == 2
    game.pool.loaded("wide")
    assert game.pool.place("b") == []
    assert game.pool.resident == ("a", "wide")


def lose_a_page(game):
    game.pool._free.pop()


def own_a_page_twice(game):
    game.pool._free.append(game.pool.pages_of("a")[0])


def forget_a_user(game):
    game.pool._slots["a"].users.clear()


def keep_a_promise_for_nobody(game):
    game.pool._slots["a"].promised.add(77)


@pytest.mark.parametrize("damage", [lose_a_page, own_a_page_twice, forget_a_user, keep_a_promise_for_nobody])
def test_damage_is_noticed(damage):
    game = Game(4, a=2)
    game.speak("a")
    game.ask("a")
    damage(game)
    with pytest.raises(AssertionError):
        game.check()
