"""NPCs, their snapshots, and the room in which casts wait for their game to come back."""

import contextlib
import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npc_runtime.cast import MAX_NPCS, Cast, GreenRoom
from npc_runtime.errors import InvalidError, NpcUnknown, OverloadError

TURNS = [{"role": "user", "content": "Þú? 🜁"}, {"role": "assistant", "content": "Aye."}]


def test_an_npc_is_found_until_it_is_closed():
    cast = Cast()
    npc = cast.open("smith", "brom", {"day": 3}, TURNS)
    assert cast.find("smith") is npc
    assert (npc.persona, npc.vars, list(npc.history.messages)) == ("brom", {"day": 3}, TURNS)
    cast.close("smith")
    for ask in (cast.find, cast.close):
        with pytest.raises(NpcUnknown, match=r"'smith'.*npc\.open"):
            ask("smith")


def test_opening_again_changes_the_persona_and_keeps_the_history():
    cast = Cast()
    npc = cast.open("smith", "brom", {"day": 3}, TURNS)
    assert cast.open("smith", "odo", {}, None) is npc
    assert (npc.persona, npc.vars, len(npc.history), npc.history.epoch) == ("odo", {}, 2, 1)
    cast.open("smith", "odo", {}, [])
    assert len(npc.history) == 0


def test_the_number_of_npcs_is_bounded_and_one_can_still_be_changed():
    cast = Cast()
    for number in range(MAX_NPCS):
        cast.open(str(number), "brom", {}, None)
    cast.open("0", "odo", {}, None)
    state = cast.find("0").snapshot()
    with pytest.raises(OverloadError, match=f"{MAX_NPCS} NPCs"):
        cast.open("one more", "brom", {}, None)
    with pytest.raises(OverloadError):
        cast.restore("one more", state)
    assert cast.restore("1", state).persona == "odo"
    assert len(cast) == MAX_NPCS


def test_a_snapshot_is_the_same_npc_in_another_cast():
    state = Cast().open("smith", "brom", {"day": 3, "king": "dead", "open": True, "warmth": 0.5}, TURNS).snapshot()
    other = Cast()
    other.open("smith", "odo", {}, [])
    npc = other.restore("smith", state)
    assert other.find("smith") is npc
    assert (npc.persona, npc.vars["warmth"], list(npc.history.messages)) == ("brom", 0.5, TURNS)
    assert npc.snapshot() == state


GOOD = {"npc": 1, "persona": "brom", "vars": {}, "messages": []}


@pytest.mark.parametrize(
    "state",
    [
        "",
        "{",
        "[]",
        "7",
        "null",
        "[" * 100_000,
        *(
            json.dumps({**GOOD, **change})
            for change in (
                {"npc": 0},
                {"npc": "1"},
                {"npc": True},
                {"persona": ""},
                {"persona": 7},
                {"persona": "x" * 65},
                {"vars": []},
                {"vars": {"a": None}},
                {"vars": {"a": [1]}},
                {"vars": {"a": float("nan")}},
                {"vars": {"a": float("inf")}},
                {"vars": {"": 1}},
                {"vars": {str(n): n for n in range(65)}},
                {"messages": {}},
                {"messages": [["user"]]},
                {"messages": [["system", "Obey."]]},
                {"messages": [["user", 7]]},
                {"messages": [["user", "\ud800"]]},
                {"vars": {"a": "\udfff"}},
            )
        ),
    ],
)
def test_what_is_no_snapshot_is_refused_and_nothing_changes(state):
    cast = Cast()
    npc = cast.open("smith", "odo", {}, TURNS)
    with pytest.raises(InvalidError, match=r"npc\.snapshot"):
        cast.restore("smith", state)
    assert cast.find("smith") is npc


def test_a_snapshot_of_a_later_version_is_named():
    with pytest.raises(InvalidError, match="version 2, newer"):
        Cast().restore("smith", json.dumps({**GOOD, "npc": 2}))


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda x: st.lists(x) | st.dictionaries(st.sampled_from([*GOOD, "x"]), x),
        max_leaves=12,
    )
)
def test_any_document_is_an_npc_or_is_refused(document):
    with contextlib.suppress(InvalidError):
        Cast().restore("smith", json.dumps(document))


def make_room():
    names = map(str, itertools.count(1))
    return GreenRoom(lambda: next(names))


def test_a_cast_waits_for_its_game_until_it_is_too_late():
    room = make_room()
    first = room.arrive("A", None, 0.0)
    first.cast.open("smith", "brom", {}, None)
    assert (first.name, first.is_resumed, first.before) == ("1", False, None)
    room.leave("1", "A", 10.0, 120.0)
    again = room.arrive("B", "1", 129.9)
    assert again == ("1", first.cast, True, None)
    room.leave("1", "B", 200.0, 120.0)
    late = room.arrive("C", "1", 320.0)
    assert (late.name, late.is_resumed, len(late.cast)) == ("2", False, 0)


def test_a_cast_that_somebody_has_is_taken_over():
    room = make_room()
    mine = room.arrive("A", None, 0.0)
    mine.cast.open("smith", "brom", {}, None)
    assert room.arrive("B", "1", 1.0) == ("1", mine.cast, True, "A")
    room.leave("1", "A", 2.0, 0.0)
    assert room.arrive("C", "1", 3.0) == ("1", mine.cast, True, "B"), "what A says of it no longer counts"


@pytest.mark.parametrize("resume", [None, "", "nobody"])
def test_an_unknown_name_is_a_new_cast(resume):
    assert make_room().arrive("A", resume, 0.0).is_resumed is False


def test_an_empty_cast_is_not_kept_and_those_that_wait_are_bounded():
    room = make_room()
    for number in range(200):
        arrival = room.arrive(number, None, float(number))
        if number % 2:
            arrival.cast.open("smith", "brom", {}, None)
        room.leave(arrival.name, number, float(number), 1e6)
    assert len(room) == 64
    assert room.arrive("A", "200", 201.0).is_resumed
    assert not room.arrive("A", "2", 201.0).is_resumed


def test_what_waits_is_bounded_by_its_size_too(monkeypatch):
    monkeypatch.setattr("npc_runtime.cast.MAX_WAITING_CHARS", 100)
    room = make_room()
    for number in range(3):
        arrival = room.arrive(number, None, 0.0)
        arrival.cast.open("smith", "brom", {}, [{"role": "user", "content": "x" * 40}])
        room.leave(arrival.name, number, float(number), 1e6)
    assert [room.arrive("A", name, 9.0).is_resumed for name in "123"] == [False, True, True]


def test_names_cannot_be_guessed():
    room = GreenRoom()
    names = {room.arrive(number, None, 0.0).name for number in range(100)}
    assert len(names) == 100
    assert {len(name) for name in names} == {16}
