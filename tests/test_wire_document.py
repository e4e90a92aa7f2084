"""What a client sends is checked for what a file can hold, and numbers survive every client."""

import json

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npc_runtime.document import read_document
from npc_runtime.document_change import write_document
from npc_runtime.wire_document import find_unusable, from_wire, to_wire

NUMBERS = {
    "small": 7,
    "large": 2**53 + 1,
    "huge": -(10**30),
    "list": [{"inner": 2**64}],
    "endless": float("inf"),
    "half": 0.5,
    "is_it": True,
    "nothing": None,
}


def nested(depth, value="x"):
    for _ in range(depth):
        value = [value]
    return value


def test_numbers_that_a_client_cannot_hold_travel_as_text():
    sent = to_wire(NUMBERS)
    assert sent["small"] == 7
    assert sent["half"] == 0.5
    assert sent["is_it"] is True
    assert (sent["large"], sent["huge"]) == (str(2**53 + 1), str(-(10**30)))
    assert json.loads(json.dumps(sent, allow_nan=False)) == sent == msgpack.unpackb(msgpack.packb(sent))
    assert find_unusable(sent) is None
    assert from_wire(sent, NUMBERS) == NUMBERS


def test_what_was_changed_beside_a_number_leaves_the_number():
    sent = to_wire(NUMBERS)
    sent["small"], sent["huge"] = 8, "of text now"
    sent["list"].append(str(2**64))
    assert from_wire(sent, NUMBERS) == {
        **NUMBERS,
        "small": 8,
        "huge": "of text now",
        "list": [{"inner": 2**64}, str(2**64)],
    }
    assert from_wire(sent, None) == sent


@pytest.mark.parametrize(
    ("document", "path", "what"),
    [
        ({"a": [1, b"bytes"]}, ("a", 1), "bytes"),
        ({"a": {2: "b"}}, ("a",), "name of a field"),
        ({"a": {b"k": "b"}}, ("a",), "name of a field"),
        ({"a": "\ud800"}, ("a",), "half of a character"),
        ({"a": {"\udfff": 1}}, ("a",), "half of a character"),
        ({"a": float("nan")}, ("a",), "too large"),
        ({"a": 2**53 + 1}, ("a",), "too large"),
        ({"a": -(10**5_000)}, ("a",), "too large"),
        ({"a": nested(13)}, ("a", *[0] * 11), "nested"),
        ({"a": ["x"] * 20_001}, None, "too many values"),
        ({"a": "x" * 262_145}, ("a",), "256 KiB"),
        ({"x" * 262_145: 1}, (), "256 KiB"),
        ({"a": ["é" * 100_000] * 2}, ("a", 1), "256 KiB"),
        (object(), (), "nothing that a file has"),
    ],
)
def test_what_no_file_holds_is_named(document, path, what):
    problem = find_unusable(document)
    assert what in problem.what
    assert problem.remedy
    assert path is None or problem.path == path
    assert len(json.dumps(problem.to_wire())) < 2_000


@pytest.mark.parametrize("document", [{}, [], "x", 1, None, {"a": nested(11)}, {"a": ["x"] * 19_000}, {"\0": "\0"}])
def test_what_a_file_holds_is_not_objected_to(document):
    assert find_unusable(document) is None


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.text(max_size=10), values, max_size=4))
def test_what_is_not_objected_to_can_be_written_and_read(document):
    if find_unusable(document) is None:
        assert read_document(write_document(document)).value == document
