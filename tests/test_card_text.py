"""Authors' texts: line ends, macros and slips made plain; dialogue read as exchanges."""

import pytest

from npc_runtime.card_text import (
    Note,
    as_items,
    clean_line,
    clean_text,
    cut_text,
    find_macros,
    is_plain,
    make_id,
    read_dialogue,
    write_dialogue,
)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("  one \r\ntwo\rthree\u2028four  ", "one\ntwo\nthree\nfour"),
        ("<BOT> greets <User>, {{Char}} bows", "{{char}} greets {{user}}, {{Char}} bows"),
        ("a{{// not for the model }}b{{comment: no}}", "ab"),
        ("bell\x07 and half \ud83d", "bell and half \ufffd"),
        (None, ""),
        (7, "7"),
        (True, ""),
        (["x"], ""),
    ],
)
def test_texts(written, read):
    assert clean_text(written) == read
    assert is_plain(clean_text(written))
    assert "\n" not in clean_line(written)


def test_lists_that_are_one_text_or_have_other_things_in_them():
    assert as_items("tavern, nervous,") == ["tavern", " nervous"]
    assert as_items(["a", None, 3, "", {}]) == ["a", "3"]
    assert as_items(None) == as_items({"a": 1}) == []


def test_a_text_is_cut_behind_a_sentence_or_else_a_word():
    assert cut_text("One. Two is longer. Three", 20) == "One. Two is longer."
    assert cut_text("One two three", 9) == "One two"
    assert cut_text("x" * 20, 9) == "x" * 9
    assert cut_text("short", 9) == "short"


def test_macros_that_prompts_do_not_know():
    assert find_macros("{{char}} {{User}} {{random:a,b}} {{}} {{time}}") == {"{{random:a,b}}", "{{time}}"}


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("Élodie d'Arc", "elodie-d-arc"),
        ("odo", "odo"),
        ("the_king-2", "the_king-2"),
        ("涼宮", "character"),
        ("CON", "con-npc"),
        ("--!", "character"),
        ("a" * 90, "a" * 48),
    ],
)
def test_ids(name, made):
    assert make_id(name, "character") == made


def test_dialogue():
    text = """A word before.
<START>
{{user}}: Hi.
{{char}}: Hello.
  And more: this too.
{{USER}} : Bye.
Odo: Farewell.
Odo: Really.
<start>
{{char}}: Alone.
{{user}}: Nobody answers."""
    exchanges, num_other = read_dialogue(text, ["Odo", "odo"])
    assert exchanges == [("Hi.", "Hello.\n  And more: this too."), ("Bye.", "Farewell.\nReally.")]
    assert num_other == 3
    assert read_dialogue(write_dialogue(exchanges), []) == (exchanges, 0)
    assert read_dialogue("", []) == ([], 0)


def test_a_note_is_one_line():
    assert str(Note("tags", "tags", "two")) == "tags → tags: two"
    assert str(Note("fav", "", "beside 'data'")) == "fav: beside 'data'"
