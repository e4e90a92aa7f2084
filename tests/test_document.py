"""YAML is read plainly and within bounds."""

import time
import tracemalloc

import pytest

from npc_runtime.document import DocumentError, read_document

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
