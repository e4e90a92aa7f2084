"""Conditions say what their grammar says, about any facts, and a bad one is told with its column."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npc_runtime.condition import MAX_CHARS, ConditionError, parse_condition

FACTS = {
    "quest.dragon": "dead",
    "quest": {"king": "alive", "crown.found": False},
    "day": 3,
    "gold": 2.5,
    "war": True,
    "nobody": None,
    "items": ["sword", 7, True],
    "said": "Where is the KING's horse?",
    "zero": 0,
    "empty": "",
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('quest.dragon == "dead"', True),
        ("quest.dragon == 'dead'", True),
        ("quest.dragon == 'DEAD'", False),
        ("quest.king == 'alive'", True),
        ("quest.crown.found", False),
        ("not quest.crown.found", True),
        ("day > 2 and day <= 3", True),
        ("day >= 3.5 or gold < 2.6", True),
        ("day == 3.0", True),
        ("day != 3", False),
        ("war", True),
        ("war == true", True),
        ("day == true", False),
        ("zero == false", False),
        ('day == "3"', False),
        ("not zero and not empty", True),
        ('"sword" in items', True),
        ("7 in items", True),
        ("1 in items", False),
        ("true in items", True),
        ('"shield" not in items', True),
        ('"king" in said', True),
        ('"kings" in said', False),
        ("day in [1, 2, 3]", True),
        ('quest.dragon in ["asleep", "dead"]', True),
        ("day in []", False),
        ('items == ["sword", 7, true]', True),
        ('"e" in 3', False),
        # A fact that is not set.
        ("missing", False),
        ("missing == missing", False),
        ('missing != "dead"', True),
        ("nobody == nobody", False),
        ("missing < 3 or missing >= 3", False),
        ("missing in items", False),
        ("missing not in items", True),
        ("quest.dragon.age == 3", False),
        ("quest", True),
        # Precedence: not, and, or; brackets.
        ("war or war and false", True),
        ("(war or war) and false", False),
        ("not war or war", True),
        ("not (war or war)", False),
        ("not not war", True),
        ("not day == 4", True),
        # Kinds that cannot be ordered.
        ("war > 0", False),
        ("said < 3", False),
        # Texts.
        (r'"a\"b" == ' + "'a\"b'", True),
        (r'"\\" in "a\\b"', True),
        ("-1 < 0", True),
        ("  war  ", True),
    ],
)
def test_what_holds(text, expected):
    assert parse_condition(text).holds(FACTS) is expected


@pytest.mark.parametrize(
    ("text", "column", "said"),
    [
        ('quest.dragon = "dead"', 14, "Write == to compare"),
        ("a && b", 3, "Write and"),
        ("a || b", 3, "Write or"),
        ("!a", 1, "Write not"),
        ("a AND b", 3, "Write and in small letters"),
        ('a is "b"', 3, "Write == to compare"),
        ("a b", 3, "Join conditions with and, or"),
        ("1 < a < 3", 7, "two values at a time"),
        ('a < "3"', 5, "leave the quotes out"),
        ('a == "dead', 6, "Close the text"),
        ("a == “dead”", 6, "straight quotes"),
        ("(a", 3, "Add ')'"),
        ("a)", 2, "Join"),
        ("a in [1, 2", 11, "Add ','"),
        ("a in [1 2]", 9, "Add ','"),
        ("a ==", 5, "A value is"),
        ("and a", 1, "A value is"),
        ("a not", 6, "not in"),
        ("3x", 1, "Names have"),
        ("a; b", 2, "Names have"),
        ("__import__('os')", 11, "Join"),
        (".".join("abcdefghij"), 1, "at most 8 words"),
        ("(" * 40 + "a", 18, "The limit is"),
        ("[" * 40, 18, "The limit is"),
    ],
)
def test_a_mistake_is_told_with_its_column(text, column, said):
    with pytest.raises(ConditionError) as caught:
        parse_condition(text)
    assert caught.value.what.startswith(f"column {column}:")
    assert said in str(caught.value)


def test_a_long_one_is_refused():
    with pytest.raises(ConditionError, match="500"):
        parse_condition("a or " * MAX_CHARS)


def test_a_condition_tells_which_facts_it_asks_for():
    assert parse_condition("a.b == 1 or not (c in [d, 'e'])").names == {"a.b", "c", "d"}


def test_a_name_of_many_words_is_looked_up_at_once():
    """Every way to split it, in facts made for that."""
    facts = {}
    for _ in range(30):
        facts = {"a": facts, "a.a": facts, "a.a.a": facts}
    started = time.monotonic()
    assert not parse_condition("a.a.a.a.a.a.a.a == 1").holds(facts)
    assert time.monotonic() - started < 0.1


WORDS = st.sampled_from(
    [
        "a",
        "b.c",
        "and",
        "or",
        "not",
        "in",
        "true",
        "(",
        ")",
        "[",
        "]",
        ",",
        "==",
        "!=",
        "<",
        ">=",
        "1",
        '"x"',
        "'",
        "=",
        "é",
    ]
)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b", "c"]), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=1_000, deadline=None)
@given(
    text=st.text(max_size=60) | st.lists(WORDS, max_size=20).map(" ".join),
    facts=st.dictionaries(st.sampled_from(["a", "b", "b.c"]), ANYTHING),
)
def test_any_text_is_a_condition_or_an_error_and_any_facts_are_answered(text, facts):
    try:
        condition = parse_condition(text)
    except ConditionError:
        return
    assert condition.holds(facts) in (True, False)
