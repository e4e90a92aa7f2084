"""Both encodings carry every message unchanged, and no frame whatsoever raises anything but a WireError."""

import json
import random

import golden_messages
import msgpack
import pytest

from npc_runtime import codec
from npc_runtime import protocol as wire
from npc_runtime.errors import FormatUnsupported, InvalidError, ProtocolError, UnsupportedError, WireError
from npc_runtime.prompt import Context

TEXT = 'Quoted "…", 水 and 🙂, \x01\n'
TIMING = wire.Timing(queue_ms=0.5, ttft_ms=None, total_ms=12.25, tokens_per_s=80.0, batch_avg=1.5)
LINE = {
    "line": 1,
    "persona": "brom",
    "input": {"text": TEXT},
    "sampling": {"seed": 2**53 - 1, "stop": ["\n"]},
}

CLIENT = [
    wire.Hello(id=1, protocol=1, token="t", client=wire.ClientInfo(name="game"), want=wire.Want(tick_ms=5)),
    wire.Generate(id="g", batch="b", lines=[LINE, {"line": 2}]),
    wire.Cancel(lines=[1, "two"]),
    wire.Cancel(all=True),
    wire.PersonaList(),
    wire.Warmup(personas=["brom", "odo"]),
    wire.Status(id=2**53 - 1),
    wire.Bye(),
    *golden_messages.CLIENT,
]
SERVER = [
    wire.Welcome(
        session="s1",
        protocol=1,
        version="0",
        device="cpu",
        backend="torch",
        base=wire.BaseModelInfo(name="m", sha256="00", context=2048),
        caps=list(wire.CAPS),
        limits=wire.LIMITS,
        personas=[wire.PersonaInfo(id="a", display_name=TEXT, error=wire.ErrorInfo(code="invalid", message="m"))],
    ),
    wire.Accepted(batch=1, re=3, items=[wire.AcceptedItem(line="x", status="rejected", code="invalid", message="m")]),
    wire.LineStart(line=1, persona="brom", seed=7, queue_ms=0.0, batch_size=3),
    wire.Delta(items=[wire.DeltaItem(line="x", seq=0, text=TEXT)]),
    wire.LineEnd(
        line=1,
        reason="stop",
        text=TEXT,
        usage=wire.Usage(prompt=3, completion=2),
        timing=TIMING,
        seed=7,
        prompt_hash="0",
    ),
    wire.BatchEnd(batch=1, ok=1, failed=0, wall_ms=1.0, forwards=2),
    wire.Reply(re=1, body={"a": [1, None, {"b": TEXT}]}),
    wire.Reply(re=1, part=0, parts=2, data='{"a":'),
    wire.Event(kind="persona.changed", persona=wire.PersonaInfo(id="a", display_name=TEXT)),
    wire.Error(code="invalid", message="m"),
    *golden_messages.SERVER,
]

every_subprotocol = pytest.mark.parametrize("subprotocol", wire.SUBPROTOCOLS)


def pack(document, subprotocol):
    return json.dumps(document) if subprotocol == "npc.v1.json" else msgpack.packb(document)


def name_of(message):
    return message.type


def problem_of(check, *arguments):
    """The message of the error, empty if there was none. Anything but a WireError fails the test."""
    try:
        check(*arguments)
    except WireError as error:
        return error.message
    return ""


def read(frame, subprotocol):
    """Read a frame as the daemon does."""
    message = codec.parse_client(codec.decode(frame, subprotocol))
    if isinstance(message, wire.Generate):
        for line in message.lines:
            codec.parse_line(line)


def take(frame, subprotocol):
    """Whether a frame was understood; if not, the reason is short."""
    problem = problem_of(read, frame, subprotocol)
    assert len(problem) < 600
    return not problem


# -- encodings -----------------------------------------------------------------------------------------------


@every_subprotocol
@pytest.mark.parametrize("message", CLIENT, ids=name_of)
def test_client_messages_round_trip(message, subprotocol):
    assert codec.parse_client(codec.decode(codec.encode(message, subprotocol), subprotocol)) == message


@every_subprotocol
@pytest.mark.parametrize("message", SERVER, ids=name_of)
def test_server_messages_round_trip(message, subprotocol):
    frame = codec.encode(message, subprotocol)
    assert codec.parse_server(codec.decode(frame, subprotocol)) == message
    assert codec.frame_size(message, subprotocol) == len(frame.encode() if isinstance(frame, str) else frame)


def test_every_message_is_in_the_round_trips():
    assert {type(message) for message in CLIENT} == set(wire.CLIENT_MESSAGES)
    assert {type(message) for message in SERVER} == set(wire.SERVER_MESSAGES)


@every_subprotocol
def test_fields_that_are_none_are_left_out(subprotocol):
    frame = codec.encode(wire.Error(code="invalid", message="m"), subprotocol)
    assert codec.decode(frame, subprotocol) == {
        "type": "error",
        "code": "invalid",
        "message": "m",
        "hint": "",
        "retryable": False,
    }


@every_subprotocol
def test_the_other_frame_type_is_refused(subprotocol):
    frame = b'{"type":"bye"}' if subprotocol == "npc.v1.json" else '{"type":"bye"}'
    with pytest.raises(ProtocolError, match="carries"):
        codec.decode(frame, subprotocol)


@every_subprotocol
@pytest.mark.parametrize("document", [None, 1, "bye", [], {}, {"type": None}, {"type": 1}, {"type": ["bye"]}])
def test_a_frame_is_a_map_with_a_type(document, subprotocol):
    with pytest.raises(ProtocolError, match="map with a text 'type'"):
        codec.decode(pack(document, subprotocol), subprotocol)


# -- hostile frames ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param("", id="empty"),
        pytest.param("[" * 100_000, id="deep-list"),
        pytest.param('{"type":"bye","x":' + '{"a":' * 50_000, id="deep-map"),
        pytest.param('{"type":"bye","x":' + "[" * 50_000 + "]" * 50_000 + "}", id="deep-and-closed"),
        pytest.param('{"type":"bye","x":' + "9" * 5_000 + "}", id="huge-int"),
        pytest.param('{"type":"bye","x":"\\ud800"}', id="high-surrogate"),
        pytest.param('{"type":"bye","x":"\\uDC00\\uD83D"}', id="swapped-surrogates"),
        pytest.param('{"type":"bye","\\udfff":1}', id="surrogate-key"),
        pytest.param('{"type":"bye",1:2}', id="int-key"),
        pytest.param('{"type":"bye"}{}', id="two-maps"),
        pytest.param('\ufeff{"type":"bye"}', id="byte-order-mark"),
        pytest.param(b"", id="empty"),
        pytest.param(b"\x91" * 100_000, id="deep-list"),
        pytest.param(b"\x82\xa4type\xa3bye\xa1x" + b"\x81\xa1a" * 50_000, id="deep-map"),
        pytest.param(b"\x82\xa4type\xa3bye\x01\x02", id="int-key"),
        pytest.param(b"\x82\xa4type\xa3bye\x90\x02", id="list-key"),
        pytest.param(b"\x82\xa4type\xa3bye\xa1x\xa3\xed\xa0\x80", id="surrogate"),
        pytest.param(b"\x82\xa4type\xa3bye\xa1x\xa1\xff", id="not-utf-8"),
        pytest.param(b"\x81\xc4\x04type\xa3bye", id="bytes-key"),
        pytest.param(b"\x81\xa4type\xc4\x03bye", id="bytes-type"),
        pytest.param(b"\x81\xa4type\xa3bye\xc0", id="bytes-behind"),
        pytest.param(b"\xdd\xff\xff\xff\xff", id="huge-list"),
        pytest.param(b"\xc1", id="unused-byte"),
        pytest.param(b"\xc7\x0c\xff" + b"\xff" * 12, id="impossible-time"),
    ],
)
def test_a_hostile_frame_is_a_protocol_error(frame):
    with pytest.raises(ProtocolError) as caught:
        codec.decode(frame, "npc.v1.json" if isinstance(frame, str) else "npc.v1.msgpack")
    assert len(caught.value.message) < 300


def test_a_surrogate_pair_is_a_character():
    document = codec.decode('{"type":"bye","x":"\\ud83d\\ude00","y":"\\\\ud800"}', "npc.v1.json")
    assert document["x"] == "😀"
    assert document["y"] == "\\ud800"


@pytest.mark.parametrize("seed", [0, 1])
@every_subprotocol
def test_random_frames(subprotocol, seed):
    """2,000 for each subprotocol; half of the text frames are made of JSON's own characters."""
    rng = random.Random(seed)
    for number in range(1_000):
        data = rng.randbytes(rng.randrange(60))
        if subprotocol == "npc.v1.msgpack":
            take(data, subprotocol)
        elif number % 2:
            take(data.decode("latin-1"), subprotocol)
        else:
            take("".join(rng.choices('{}[]",:\\u0d8tfnals-1e9NaI type', k=len(data))), subprotocol)


@every_subprotocol
def test_truncated_frames(subprotocol):
    for message in CLIENT:
        frame = codec.encode(message, subprotocol)
        assert take(frame, subprotocol) or isinstance(message, wire.Generate)
        assert not any(take(frame[:size], subprotocol) for size in range(len(frame)))


@every_subprotocol
def test_mutated_frames(subprotocol):
    rng = random.Random(7)
    for _ in range(2_000):
        frame = codec.encode(rng.choice(CLIENT), subprotocol)
        for _ in range(rng.randrange(1, 4)):
            place = rng.randrange(len(frame))
            noise = rng.randbytes(1) if isinstance(frame, bytes) else rng.choice('{}[]",:\\u019.-Ee\x00é')
            frame = frame[:place] + noise + frame[place + rng.randrange(2) :]
        take(frame, subprotocol)


@every_subprotocol
def test_clients_meet_nothing_but_a_protocol_error(subprotocol):
    rng = random.Random(8)
    for _ in range(2_000):
        frame = codec.encode(rng.choice(SERVER), subprotocol)
        place = rng.randrange(len(frame))
        noise = rng.randbytes(1) if isinstance(frame, bytes) else rng.choice('{}[]",:\\u019.-Ee\x00é')
        try:
            codec.parse_server(codec.decode(frame[:place] + noise + frame[place + 1 :], subprotocol))
        except ProtocolError:
            continue


VALUES = [
    *(None, True, -1, 2**53, 2**63, 10**400, -(10**400), 1.5, float("nan"), float("inf"), 1e308),
    *("", "x" * 65, "\x00", "\ud800", b"\xff", [], [[]], {}, {"a": {}}, {b"a": 1}, [None], ["x" * 65] * 9),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: repr(value)[:20])
def test_any_value_in_any_field_is_taken_or_named(value):
    """Straight into the models, so that values that only one encoding has meet every field."""
    sampling = dict.fromkeys(wire.LineSampling.model_fields, value)
    documents = [{"type": "generate", "batch": 1, "lines": [1], name: value} for name in wire.Generate.model_fields]
    documents += [{"type": "hello", "protocol": 1, name: value} for name in wire.Hello.model_fields]
    documents += [{"type": "hello", "protocol": 1, "want": {name: value}} for name in wire.Want.model_fields]
    documents += [{"type": "cancel", name: value} for name in wire.Cancel.model_fields]
    for message in golden_messages.CLIENT:
        good = message.model_dump(mode="json", exclude_none=True)
        documents += [{**good, name: value} for name in type(message).model_fields]
    for document in documents:
        if isinstance(document["type"], str):
            assert len(problem_of(codec.parse_client, document)) < 400
    lines = [{**LINE, name: value} for name in wire.LineRequest.model_fields]
    lines += [{**LINE, "sampling": {name: value}} for name in sampling]
    lines += [{**LINE, "format": {name: value}} for name in wire.Format.model_fields]
    lines += [{**LINE, "context": {name: value}} for name in Context.model_fields]
    lines += [{**LINE, "sampling": {str(value): 1}}, {**LINE, str(value): 1}, value]
    for line in lines:
        assert len(problem_of(codec.parse_line, line)) < 400


def test_clients_pass_over_what_a_later_daemon_may_send():
    later = [{"type": "line.mark", "line": 1}, {"type": "event", "kind": "train.progress", "step": 3}]
    assert [codec.parse_server(message) for message in later] == [None, None]
    with pytest.raises(ProtocolError):
        codec.parse_server({"type": "event", "kind": "shutdown", "message": 7})


# -- what is refused -----------------------------------------------------------------------------------------


def test_unknown_fields_are_ignored():
    hello = codec.parse_client({"type": "hello", "protocol": 1, "new": 1, "client": {"os": "x"}, "want": {"zip": 1}})
    assert hello == wire.Hello(protocol=1)
    assert codec.parse_line({**LINE, "new": 1, "context": {"weather": "rain"}}).line == 1


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"sampling": {"temprature": 1.0}}, "sampling.temprature"),
        ({"format": {"kind": "text", "strict": True}}, "format.strict"),
        ({"sampling": {"trim": "words"}}, "sampling.trim"),
        ({"format": {"kind": "xml"}}, "format.kind"),
        ({"history": "forget"}, "history"),
        ({"sampling": {"temperature": float("nan")}}, "sampling.temperature"),
        ({"sampling": {"temperature": -0.1}}, "sampling.temperature"),
        ({"sampling": {"top_p": 0}}, "sampling.top_p"),
        ({"sampling": {"seed": 2**53}}, "sampling.seed"),
        ({"sampling": {"max_tokens": 1_025}}, "sampling.max_tokens"),
        ({"sampling": {"stop": [""]}}, "sampling.stop.0"),
        ({"sampling": {"stop": ["a"] * 9}}, "sampling.stop"),
        ({"priority": 10}, "priority"),
        ({"deadline_ms": 0}, "deadline_ms"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages.0.role"),
        ({"line": None}, "line"),
        ({"line": "x" * 65}, "line"),
        ({"line": 2**53}, "line"),
        ({"input": {"speaker": "x"}}, "input.text"),
    ],
)
def test_a_wrong_option_is_invalid_and_named(fields, named):
    with pytest.raises(InvalidError) as caught:
        codec.parse_line({**LINE, **fields})
    assert f"'{named}'" in caught.value.message
    assert caught.value.code == "invalid"


@pytest.mark.parametrize(
    ("document", "named"),
    [
        ({"type": "generate", "batch": 1, "lines": [{}], "mode": "shuffled"}, "'mode'"),
        ({"type": "generate", "batch": 1, "lines": []}, "'lines'"),
        ({"type": "generate", "batch": 1, "lines": [{}] * 65}, "'lines'"),
        ({"type": "generate", "lines": [{}]}, "'batch'"),
        ({"type": "hello"}, "'protocol'"),
        ({"type": "hello", "protocol": "new"}, "'protocol'"),
        ({"type": "hello", "protocol": 1, "want": {"max_frame": 1024}}, "'want.max_frame'"),
        ({"type": "cancel", "lines": [1] * 1_025}, "'lines'"),
        ({"type": "config", "max_tokens_per_s": 0}, "'max_tokens_per_s'"),
        ({"type": "config", "max_tokens": 10}, "'max_tokens' is not an option"),
    ],
)
def test_a_wrong_field_of_a_message_is_named(document, named):
    with pytest.raises(InvalidError, match=named):
        codec.parse_client(document)


@pytest.mark.parametrize("kind", ["world.set", "train.start", "test.run", "welcome", "x" * 9_000, ""])
def test_a_type_that_is_not_served_is_unsupported(kind):
    with pytest.raises(UnsupportedError) as caught:
        codec.parse_client({"type": kind})
    assert f"'{kind[:64]}'" in caught.value.message
    assert len(caught.value.message) < 200


@pytest.mark.parametrize("kind", ["regex", "choice", "json_schema"])
def test_a_format_that_cannot_be_enforced_is_refused(kind):
    with pytest.raises(FormatUnsupported, match=kind):
        codec.parse_line({**LINE, "format": {"kind": kind, "value": "a+"}})


def test_an_empty_list_asks_for_nothing():
    assert codec.parse_line({**LINE, "emotions": [], "actions": []}).line == LINE["line"]


@pytest.mark.parametrize("field", [{"emotions": ["joy"]}, {"actions": ["wave"]}])
def test_a_field_of_a_later_version_is_refused(field):
    with pytest.raises(UnsupportedError, match=f"'{next(iter(field))}'"):
        codec.parse_line({**LINE, **field})
