"""A change of a YAML file leaves everything else as it was, to the byte, and never takes long."""

import time

import pytest
from test_document import FILE, values

from npc_runtime.document import read_document
from npc_runtime.document_change import change_document, write_document


def changed(**changes):
    return change_document(FILE, values(**changes), set(changes)).decode()


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


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([0] * 5_000, [0, 1] * 2_500),
        ([0] * 5_000, [*[0] * 5_000, 1]),
        ([0, 1] * 44, [0, 0, 1] * 30),
        (list(range(900)), [number ^ 1 for number in range(900)]),
        (list(range(2_000)), list(range(2_000, 0, -1))),
    ],
)
def test_long_lists_that_are_alike_and_not_equal_take_no_time(before, after):
    """Looking for the smallest difference takes the square of the items, and more where many are equal."""
    file = write_document({"a": before, "b": 1})
    started = time.process_time()
    changed = change_document(file, {"a": after, "b": 1}, {"a"})
    assert time.process_time() - started < 5
    assert read_document(changed).value == {"a": after, "b": 1}


def test_one_item_of_a_long_list_is_one_line():
    before = list(range(3_000))
    after = [*before[:1_000], "new", *before[1_000:]]
    old, new = (write_document({"a": items}).decode().splitlines() for items in (before, after))
    changed = change_document("\n".join([*old[:5], "  # five", *old[5:], ""]).encode(), {"a": after}, {"a"}).decode()
    assert changed.splitlines() == [*new[:5], "  # five", *new[5:]]


def test_empty_lines_take_no_time():
    """As many as somebody keeps a key down for, in front of a field."""
    file = b"bio: x\n" + b"\n" * 10_000 + b"tags: [a]\n"
    started = time.process_time()
    assert change_document(file, {"bio": "y", "tags": ["a"]}, {"bio"}) == file.replace(b"x", b"y")
    assert time.process_time() - started < 2


ODD_FIELDS = [b"notes: {<<: a}", b"goals: [<<: yes]", b"notes: 2026-99-99", b"1: x", b"null: x", b"true: 1"]
ODD_FIELDS += [b"notes: {1: a, '1.0': b}", b"notes: 0o9", b"notes: 1_000", b"notes: 12:30:45"]


@pytest.mark.parametrize("line", ODD_FIELDS)
@pytest.mark.parametrize("where", ["before", "behind"])
def test_what_means_something_else_to_ruamel_is_kept_with_the_comments(line, where):
    """Merge keys, numbers and times of YAML 1.1: here they are text."""
    more, gone = {**read_document(line).value}, {"examples", "tags"}
    file = line + b"\n" + FILE.lstrip() if where == "before" else FILE + line + b"\n"
    wanted = {key: value for key, value in {**values(), **more, "bio": "Other."}.items() if key not in gone}
    after = change_document(file, wanted, {"bio", *gone})
    assert read_document(after).value == wanted
    assert line in after
    for comment in (b"# the folder", b"# by ear", b"# --- what he knows ---", b"# quoted", b"# the end"):
        assert after.count(comment) == 1
    assert b"# The voice." not in after


@pytest.mark.parametrize("line", [b"<<: x", b"~: x", b"=: =", b"? notes\n: x"])
def test_what_is_no_field_at_all_costs_comments_at_most(line):
    wanted = {**values(), "bio": "Other."}
    assert read_document(change_document(FILE + line + b"\n", wanted, {"bio", "<<", "~", "=", "notes"})).value == wanted
