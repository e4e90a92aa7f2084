"""Entries of a lorebook become knowledge with conditions, and what is edited goes back into its entry."""

import copy

import pytest

from npc_runtime.lorebook import can_be_keys, read_book, strip_decorators, write_book
from npc_runtime.schema import Knowledge


def entry(content="The king owes money.", *, keys=("king",), **fields):
    keys = keys if isinstance(keys, str) else list(keys)
    return {"keys": keys, "content": content, "extensions": {}, "enabled": True, "insertion_order": 1, **fields}


def read(*entries):
    notes = []
    return [lore.knowledge for lore in read_book({"entries": list(entries)}, notes)], [str(note) for note in notes]


def holds(knowledge, said):
    return Knowledge(**knowledge).condition.holds({"said": said})


@pytest.mark.parametrize(
    ("fields", "yes", "no"),
    [
        ({"keys": ["king", "queen"]}, ["The KING?", "a queen"], ["Bread, please."]),
        ({"keys": 'king, "crown\\"'}, ["king", '"crown\\"'], ["crown"]),
        ({"selective": True, "secondary_keys": ["debt", "gold"]}, ["The king's gold"], ["The king", "gold"]),
        ({"selective": False, "secondary_keys": ["debt"]}, ["The king"], []),
        ({"selective": True, "secondary_keys": []}, ["The king"], []),
        (
            {"selective": True, "secondary_keys": ["a1", "b1"], "extensions": {"selectiveLogic": 3}},
            ["king a1 b1"],
            ["king a1"],
        ),
        (
            {"selective": True, "secondary_keys": ["a1", "b1"], "extensions": {"selectiveLogic": 2}},
            ["king"],
            ["king a1"],
        ),
        (
            {"selective": True, "secondary_keys": ["a1", "b1"], "extensions": {"selectiveLogic": 1}},
            ["king a1"],
            ["king a1 b1"],
        ),
        (
            {"content": "@@exclude_keys dead,gone\n@@additional_keys old\nHe lives."},
            ["old king"],
            ["king", "old dead king"],
        ),
        ({"keys": ["king", "/qu(een)?/i"]}, ["king"], ["queen"]),
    ],
)
def test_keys_become_a_condition(fields, yes, no):
    (knowledge,), _ = read(entry(**fields))
    assert all(holds(knowledge, said) for said in yes)
    assert not any(holds(knowledge, said) for said in no)


@pytest.mark.parametrize(
    "fields",
    [{"constant": True}, {"constant": True, "keys": []}, {"content": "@@activate\n@@dont_activate\nHe lives."}],
)
def test_what_is_constant_is_always_known(fields):
    (knowledge,), _ = read(entry(**fields))
    assert "when" not in knowledge


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"enabled": False}, "is switched off"),
        ({"content": "@@dont_activate\nx"}, "is switched off (@@dont_activate)"),
        ({"content": " "}, "has no text"),
        ({"keys": []}, "has no keys"),
        ({"keys": [], "extensions": {"npc-runtime": {"when": "a ="}}}, "its condition cannot be read"),
        ({"use_regex": True}, "regular expressions"),
        ({"keys": ["/a/"]}, "regular expressions"),
        ({"keys": ["k" * 600]}, "too long"),
    ],
)
def test_what_cannot_be_known_is_named(fields, told):
    known, notes = read(entry(**fields), entry("Other."))
    assert [knowledge["text"] for knowledge in known] == ["Other."]
    assert any(note.startswith("character_book, entry 1") and told in note for note in notes)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"keys": [f"key number {number}" for number in range(40)]}, "the first 19 of 40 keys"),
        ({"case_sensitive": True}, "large and small letters"),
        ({"content": "@@depth 4\n@@@role user\nx"}, "@@depth: not followed"),
        ({"content": "x" * 5_000}, "5,000 characters; the first 4,000"),
    ],
)
def test_what_is_known_in_part_is_named(fields, told):
    (knowledge,), notes = read(entry(**fields))
    assert any(told in note for note in notes)
    Knowledge(**knowledge)


def test_order_ids_priority_and_comments():
    known, _ = read(
        entry("Second.", name="The Mill", insertion_order=9, priority=5),
        entry("First.", name="The mill", insertion_order=-3.5, comment="by Ann"),
        entry("Third.", keys=["涼宮"], insertion_order=None, priority="high"),
    )
    assert known == [
        {"id": "the-mill-2", "text": "First.", "when": '"king" in said', "notes": "by Ann"},
        {"id": "lore", "text": "Third.", "when": '"涼宮" in said'},
        {"id": "the-mill", "text": "Second.", "when": '"king" in said', "priority": 5},
    ]


def test_books_that_are_none():
    for book in (None, [], {}, {"entries": None}, {"entries": [None, 3]}, {"entries": {"0": "x"}}):
        notes = []
        assert read_book(book, notes) == []


def test_a_world_file_has_its_entries_in_a_map():
    notes = []
    assert read_book({"entries": {"0": entry()}}, notes)[0].knowledge["text"] == "The king owes money."


def test_only_the_edited_entry_is_written():
    book = {
        "name": "kept",
        "entries": [
            entry("A.", keys=["a"], id=7),
            entry("Off.", enabled=False),
            entry("@@depth 2\nB.", keys=["b"]),
            None,
        ],
    }
    before = copy.deepcopy(book)
    was = read_book(book, [])
    now = [Knowledge(**lore.knowledge) for lore in was]
    assert write_book(book, was, now) == book
    now[0] = now[0].model_copy(update={"text": "A, changed."})
    written = write_book(book, was, now)
    assert written["entries"][0] == {**book["entries"][0], "content": "A, changed."}
    assert written["entries"][1:] == book["entries"][1:]
    assert written["name"] == "kept"
    assert book == before
    assert write_book(book, was, now[1:])["entries"] == book["entries"][1:]


@pytest.mark.parametrize(
    ("when", "fields"),
    [
        ("", {"constant": True, "keys": []}),
        ('"a" in said or "b\\"" in said', {"constant": False, "keys": ["a", 'b"']}),
        (
            '("a" in said) and ("b" in said or "c" in said)',
            {"keys": ["a"], "selective": True, "secondary_keys": ["b", "c"]},
        ),
        ("quest.dragon == 'dead'", {"keys": [], "extensions": {"npc-runtime": {"when": "quest.dragon == 'dead'"}}}),
    ],
)
def test_new_knowledge_comes_back_from_its_entry(when, fields):
    knowledge = Knowledge(id="dragon", text="It is dead.", when=when, priority=3, notes="Act two.")
    book = write_book(None, [], [knowledge])
    assert book["entries"][0].items() >= fields.items()
    (lore,) = read_book(book, [])
    assert Knowledge(**lore.knowledge) == knowledge
    assert can_be_keys(when) is not when.startswith("quest")


def test_a_new_order_is_written():
    book = {"entries": [entry("A.", keys=["a"]), entry("B.", keys=["b"])]}
    was = read_book(book, [])
    now = [Knowledge(**lore.knowledge) for lore in reversed(was)]
    again = read_book(write_book(book, was, now), [])
    assert [lore.knowledge["text"] for lore in again] == ["B.", "A."]


def test_decorators_go():
    assert strip_decorators("@@depth 4\n@@@role user\n\nThe @@mill.\n") == "The @@mill."
