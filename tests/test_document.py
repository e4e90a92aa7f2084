"""YAML is read plainly and within bounds, and a change leaves everything else as it was, to the byte."""

import time
import tracemalloc

import pytest

from npc_runtime.document import DocumentError, read_document
from npc_runtime.document_change import change_document, write_document

FILE = b"""\
# The innkeeper.
# Written in March.

schema: 1
id: odo   # the folder

# Who he is.
bio: >-
  The nervous innkeeper
  of the Lantern.

display_name: 'Odo'      # single quotes
sampling: {temperature: 0.5,   top_p: .9}   # by ear

# --- what he knows ---

knows:
  # first the old things
  - id: mill
    text: "The mill is empty."   # quoted
  - id: king
    text: Odd   spacing stays
    when: 'king == "dead"'       # since act two
# The voice.
examples:

  - player: Hi      # short
    npc: Oh!
tags: [a, b]

# the end
"""


def values(**changes):
    return {**read_document(FILE).value, **changes}


def changed(**changes):
    return change_document(FILE, values(**changes), set(changes)).decode()


def test_values_have_the_types_and_lines_of_the_file():
    document = read_document(FILE)
    assert document.value["bio"] == "The nervous innkeeper of the Lantern."
    assert document.value["sampling"] == {"temperature": 0.5, "top_p": 0.9}
    assert document.value["knows"][1]["when"] == 'king == "dead"'
    lines = FILE.decode().splitlines()
    for path, start in [
        (("id",), "id:"),
        (("knows", 1, "text"), "    text: Odd"),
        (("examples", 0, "npc"), "    npc:"),
    ]:
        assert lines[document.line_of(path) - 1].startswith(start)
    assert document.line_of(("knows", 1, "nothing", 3)) == document.line_of(("knows", 1))
    assert document.line_of(("nothing",)) == 4


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("null", None),
        ("~", None),
        ("", None),
        ("True", True),
        ("tRue", "tRue"),
        ("yes", "yes"),
        ("off", "off"),
        ("2026-01-31", "2026-01-31"),
        ("1_000", "1_000"),
        ("0x1f", 31),
        ("0o17", 15),
        ("-7", -7),
        ("1e3", 1000.0),
        ("9" * 33, "9" * 33),
        ("'7'", "7"),
        ("12:30", "12:30"),
    ],
)
def test_plain_words_are_read_as_yaml_1_2(text, value):
    (read,) = read_document(f"a: {text}\n".encode()).value.values()
    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize(
    ("data", "line", "said"),
    [
        (b"a: 1\nb: [1", 2, "not YAML"),
        (b"a: 1\n\tb: 2", 2, "spaces"),
        (b"a: 1\nb: *x", 2, "aliases"),
        (b"a: &x 1", 1, "anchors"),
        (b"a: !!python/object:os.system x", 1, "tag"),
        (b"a: !x {}", 1, "tag"),
        (b"a: 1\nb: 2\na: 3", 3, "already there, on line 1"),
        (b"a: 1\n---\nb: 2", 2, "second document"),
        (b"? [a]\n: 1", 1, "name of a field"),
        (b"a: " + b"[" * 100_000, 1, "nested"),
        (b"a: " + b"{a: " * 50_000, 1, "nested"),
        (b"- " * 100_000, 1, "nested"),
        (b"a:\n" + b"- b\n" * 30_000, 20_000, "too many values"),
        (b"a: b\n\xff", 2, "UTF-8"),
        (b"a: b\nc: d\x07", 2, ""),
        (b"x" * (256 * 1024 + 1), None, "256 KiB"),
    ],
)
def test_what_is_no_plain_yaml_is_told_with_its_line(data, line, said):
    with pytest.raises(DocumentError) as caught:
        read_document(data)
    assert caught.value.line == line
    assert said in str(caught.value)
    assert caught.value.remedy


@pytest.mark.parametrize(
    "data",
    [
        b"a: &a [x,x,x,x,x]\nb: &b [*a,*a,*a,*a]\nc: [*b,*b,*b,*b]\n" * 100,
        b"{" * 250_000,
        b"? " * 120_000,
        b"- - - " * 40_000,
        b"a: '" + b"x" * 250_000,
        b"a: |\n" + b" x\n" * 80_000,
        b"".join(b"k%d: v\n" % number for number in range(19_000)),
        b'"\\U0010ffff' * 20_000,
        b"a: " + b"9" * 250_000,
        b"#" * 250_000,
        b"%YAML 1.1\n" * 20_000,
        b"a: 0x" + b"f" * 200_000,
    ],
)
def test_a_hostile_file_costs_no_more_than_its_size(data):
    tracemalloc.start()
    started = time.monotonic()
    try:
        read_document(data)
    except DocumentError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 64 << 20
    assert time.monotonic() - started < 60


def test_a_change_touches_the_line_it_concerns():
    after = changed(display_name="Otto")
    assert after == FILE.decode().replace("'Odo'      #", "'Otto'     #") or after == FILE.decode().replace(
        "'Odo'", "'Otto'"
    )


def test_a_change_deep_in_a_list_keeps_the_comments_around_it():
    knows = [dict(entry) for entry in values()["knows"]]
    knows[1]["text"] = "The king is dead."
    after = changed(knows=knows)
    for kept in ("# first the old things", "# quoted", "# since act two", "\n# --- what he knows ---\n\nknows:\n"):
        assert kept in after
    before, now = FILE.decode().splitlines(), after.splitlines()
    assert [line for line in now if line not in before] == ["    text: The king is dead."]
    assert [line for line in before if line not in now] == ["    text: Odd   spacing stays"]


@pytest.mark.parametrize(
    "make",
    [
        lambda knows: knows[1:],
        lambda knows: knows[:1],
        lambda knows: [],
        lambda knows: [knows[1], knows[0]],
        lambda knows: [{"id": "new", "text": "x: y # z"}, *knows],
        lambda knows: [knows[0], {"id": "new", "text": "two\nlines"}, knows[1]],
        lambda knows: [*knows, {"id": "new", "text": "1e5", "when": "true"}],
    ],
)
def test_lists_grow_and_shrink(make):
    knows = make(values()["knows"])
    after = changed(knows=knows)
    assert read_document(after.encode()).value == values(knows=knows)
    assert after.split("knows:")[0] == FILE.decode().split("knows:")[0]
    assert after.split("# The voice.")[1] == FILE.decode().split("# The voice.")[1]
    if any(entry["id"] == "mill" for entry in knows):
        assert "# quoted" in after
    if any(entry["id"] == "king" for entry in knows):
        assert "# since act two" in after


def test_a_field_comes_and_goes():
    wanted = {key: value for key, value in values().items() if key != "tags"}
    order = list(wanted)
    wanted = (
        {key: wanted[key] for key in order[:4]} | {"goals": ["a: b", "yes"]} | {key: wanted[key] for key in order[4:]}
    )
    after = change_document(FILE, wanted, {"tags", "goals"}).decode()
    assert read_document(after.encode()).value == wanted
    assert "tags" not in after
    assert after.endswith("\n# the end\n")
    assert after.index("display_name") < after.index("goals") < after.index("sampling")
    assert [line for line in after.splitlines() if line not in FILE.decode().splitlines()] == [
        "goals:",
        '  - "a: b"' if '  - "a: b"' in after else "  - 'a: b'",
        "  - yes",
    ]


def test_nothing_changed_is_nothing_written():
    assert change_document(FILE, values(), set()) == FILE


def test_line_ends_and_the_byte_order_mark_stay():
    windows = b"\xef\xbb\xbf" + FILE.replace(b"\n", b"\r\n")
    after = change_document(windows, values(tags=["c"]), {"tags"})
    assert after.startswith(b"\xef\xbb\xbf# The")
    assert after.count(b"\r\n") == after.count(b"\n")
    assert read_document(after).value["tags"] == ["c"]


@pytest.mark.parametrize(
    "data", [b'{"a": 1, "b": [1, 2]}', b"{a: 1, b: [1,2]}", b"a: 1\nb:\n- 1\n- 2", b"---\na: 1\nb: [1, 2]\n"]
)
def test_files_of_another_make_are_changed_too(data):
    wanted = {"a": 1, "b": [1, 2, 3], "c": {"d": "e"}}
    assert read_document(change_document(data, wanted, {"b", "c"})).value == wanted


ODD = ["", " ", "~", "null", "yes", "1e5", "0x1", "- a", "a: b", "# c", "a #b", "'", '"', "two\nlines", "\n", "a\n"]
ODD += ["trailing \nspace", " a\nb", "tab\there", "\u2028", "a\r\nb", "é🜁", "{a}", "[a", "*a", "&a", "!a", "%a", "@a"]
ODD += ["`a", "=", "<<", "---", "...", "x" * 500, "a\n\n\nb", "a\n  b\n", "# a\nb", "\\", "a\\\nb", "\x07", "\ufeff"]


@pytest.mark.parametrize("text", ODD)
def test_any_text_can_be_written(text):
    for value in ({"a": text}, {"a": [text, {"b": text}]}):
        assert read_document(write_document(value)).value == value
    assert read_document(change_document(FILE, values(bio=text), {"bio"})).value == values(bio=text)
    assert (
        read_document(change_document(FILE, values(display_name=text), {"display_name"})).value["display_name"] == text
    )
