"""What is generated is fresh, complete, and says the same in both encodings."""

import json
from pathlib import Path

import generate
import msgpack
import pytest
from golden_messages import CLIENT, SERVER

from npc_runtime import codec
from npc_runtime import protocol as wire

GOLDEN = Path(__file__).parent / "golden"


def test_protocol_page_is_fresh():
    path = generate.ROOT / "npc_runtime" / "PROTOCOL.md"
    assert path.read_text(encoding="utf-8") == generate.protocol_page(), "run: make generate"


def test_golden_files_are_fresh():
    assert {path.name: path.read_bytes() for path in GOLDEN.iterdir()} == generate.golden_files(), "make generate"


def test_every_message_has_an_example():
    assert {type(message) for message in CLIENT} == set(wire.CLIENT_MESSAGES)
    assert {type(message) for message in SERVER} == set(wire.SERVER_MESSAGES)


@pytest.mark.parametrize("name", sorted(path.stem for path in GOLDEN.glob("*.json")))
def test_both_encodings_parse_to_the_same_message(name):
    packed = msgpack.unpackb((GOLDEN / f"{name}.msgpack").read_bytes())
    assert packed == json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
    parse = codec.parse_client if name.startswith("client.") else codec.parse_server
    for subprotocol in wire.SUBPROTOCOLS:
        message = parse(packed)
        assert parse(codec.decode(codec.encode(message, subprotocol), subprotocol)) == message
