"""A real daemon, over real sockets, by a client that shares no code with it."""

import asyncio
import json

import pytest
from conftest import MS
from game import deltas, line, play
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from npc_runtime.client import Client, RequestError
from npc_runtime.errors import DisconnectedError
from npc_runtime.persona import shipped_personas

ALL = ("brom", "marta", "odo", "thalindra", "vaskar")


@pytest.mark.parametrize("subprotocol", ["npc.v1.msgpack", "npc.v1.json"])
async def test_one_batch_all_personas(daemon, subprotocol):
    async with play(daemon, subprotocol) as game:
        assert [persona["id"] for persona in game.welcome["personas"]] == list(ALL)
        lines = [line(n, persona, "The king is dead!") for n, persona in enumerate(ALL)]
        await game.send(type="generate", id=9, batch="b", lines=lines)
        messages = await game.until("batch.end")
    accepted, end = messages[0], messages[-1]
    assert accepted["type"] == "accepted"
    assert accepted["re"] == 9
    assert {item["status"] for item in accepted["items"]} == {"queued"}
    starts = {m["line"]: m for m in messages if m["type"] == "line.start"}
    ends = {m["line"]: m for m in messages if m["type"] == "line.end"}
    assert {starts[n]["adapter"] if n != 1 else None for n in range(5)} == {*ALL, None} - {"marta"}
    assert {start["batch_size"] for start in starts.values()} == {5}
    assert "adapter" not in starts[1]
    assert (end["ok"], end["failed"]) == (5, 0)
    assert end["forwards"] == max(m["usage"]["completion"] for m in ends.values())
    for number, finished in ends.items():
        assert deltas(messages, number).startswith(finished["text"])
        assert finished["text"]
        assert finished["usage"]["completion"] <= 60
        assert finished["timing"]["ttft_ms"] > 0


async def test_lines_end_at_a_sentence(daemon):
    async with play(daemon) as game:
        lines = [
            line(n, persona, text) for n, (persona, text) in enumerate((p, t) for p in ALL for t in ["Hello?", "Help!"])
        ]
        await game.send(type="generate", batch=1, lines=lines)
        ends = [m for m in await game.until("batch.end") if m["type"] == "line.end"]
    assert len(ends) == 10
    for end in ends:
        assert end["text"].rstrip("\"'”’)")[-1] in ".!?…", end
        assert end["text"] == end["text"].strip()


async def test_a_seed_replays_a_line_alone_and_in_a_crowd(daemon):
    async with play(daemon) as game:
        crowd = [line(n, persona, "Who are you?", sampling={"seed": 40 + n}) for n, persona in enumerate(ALL)]
        await game.send(type="generate", batch=1, lines=crowd)
        together = {m["line"]: m for m in await game.until("batch.end") if m["type"] == "line.end"}
        await game.send(type="generate", batch=2, lines=[crowd[3]])
        alone = [m for m in await game.until("batch.end") if m["type"] == "line.end"]
    assert alone[0]["text"] == together[3]["text"]
    assert alone[0]["seed"] == 43
    assert alone[0]["prompt_hash"] == together[3]["prompt_hash"]


async def test_bad_lines_are_named_and_the_others_finish(daemon):
    bad = {
        "unknown": (line("unknown", "nobody"), "persona_unknown"),
        "empty": (line("empty", text=" \n"), "invalid"),
        "long": (line("long", text="a" * 8_001), "invalid"),
        "option": (line("option", sampling={"temprature": 1}), "invalid"),
        "npc": ({"line": "npc", "npc": "odo_1", "input": {"text": "Hi."}}, "npc_unknown"),
        "format": (line("format", format={"kind": "regex", "value": "a"}), "format_unsupported"),
    }
    async with play(daemon) as game:
        lines = [line("good"), *(document for document, _ in bad.values())]
        await game.send(type="generate", batch=1, lines=lines)
        messages = await game.until("batch.end")
    items = {item["line"]: item for item in messages[0]["items"]}
    assert items.pop("good")["status"] == "queued"
    assert {name: item["code"] for name, item in items.items()} == {name: code for name, (_, code) in bad.items()}
    assert all(item["message"] and item["hint"] for item in items.values())
    assert "temprature" in items["option"]["message"]
    assert "8000" in items["long"]["hint"]
    assert (messages[-1]["ok"], messages[-1]["failed"]) == (1, len(bad))
    assert [m["line"] for m in messages if m["type"] == "line.end"] == ["good"]


async def test_cancel_ends_one_line_and_leaves_its_neighbours(daemon):
    async with play(daemon) as game:
        long = {"trim": "none", "max_tokens": 400, "min_tokens": 400}
        short = {"seed": 3, "max_tokens": 30}
        lines = [line("cancelled", sampling=long), line("kept", "brom", sampling=short)]
        await game.send(type="generate", batch=1, lines=lines)
        await game.until("line.start")
        await game.send(type="cancel", lines=["cancelled", "never existed"])
        await game.send(type="cancel", lines=["cancelled"])
        messages = await game.until("batch.end")
        ends = {m["line"]: m for m in messages if m["type"] == "line.end"}
        assert ends["cancelled"]["reason"] == "cancelled"
        assert ends["cancelled"]["usage"]["completion"] < 400
        await game.send(type="generate", batch=2, lines=[line("alone", "brom", sampling=short)])
        alone = [m for m in await game.until("batch.end") if m["type"] == "line.end"]
    assert alone[0]["text"] == ends["kept"]["text"]


async def test_a_deadline_ends_a_line_with_what_it_has(daemon):
    async with play(daemon) as game:
        long = {"trim": "none", "max_tokens": 500, "min_tokens": 500}
        lines = [line(1, sampling=long, deadline_ms=2_500.0), line(2, sampling=long, deadline_ms=0.001)]
        await game.send(type="generate", batch=1, lines=lines)
        ends = {m["line"]: m for m in await game.until("batch.end") if m["type"] == "line.end"}
    assert (ends[1]["reason"], ends[2]["reason"]) == ("deadline", "deadline")
    assert ends[1]["text"]
    assert not ends[1]["fallback"]
    assert ends[2]["fallback"]
    assert "boiling over" in ends[2]["text"]
    assert ends[2]["usage"]["completion"] == 0


async def test_status_and_persona_list(daemon):
    async with await Client.connect(daemon.url, token=daemon.token) as client:
        await client.say("odo", "Hello.")
        status = await client.status()
        personas = await client.personas()
    assert (status["active"], status["queued"], status["kv_used"]) == (0, 0, 0.0)
    assert status["forwards"] > 0
    assert "odo" in status["adapters"]
    assert [persona.id for persona in personas] == list(ALL)


async def test_after_a_warmup_the_first_line_finds_its_prompt(make_daemon):
    """A daemon that has said nothing yet: both kinds of persona, and one that is not there."""
    daemon = make_daemon("--personas", str(shipped_personas()), "--dtype", "float32")
    async with await Client.connect(daemon.url, token=daemon.token) as client:
        odo, marta, nobody = await client.warmup(["odo", "marta", "nobody"])
        assert (nobody.status, nobody.code) == ("rejected", "persona_unknown")
        status = await client.status()
        assert status["tokens"] == 0
        assert "odo" in status["adapters"]
        for item in (odo, marta):
            assert (item.status, item.code) == ("ready", None)
            assert item.prompt_tokens - 16 < item.cached_tokens <= item.prompt_tokens
            end = await client.say(item.persona, "Who are you?")
            assert end.usage.cached == item.cached_tokens > 0
            assert end.usage.cached >= end.usage.prompt - 48, "all but the player's words and what follows them"


async def test_a_warmup_ends_with_its_connection(daemon):
    async with play(daemon) as game:
        await game.send(type="warmup", id=1, personas=list(ALL))
    async with await Client.connect(daemon.url, token=daemon.token) as client:
        for _ in range(100):
            status = await client.status()
            if status["active"] + status["queued"] == 0 and status["connections"] == 1:
                break
            await asyncio.sleep(50 * MS)
        assert (status["active"], status["queued"], status["kv_used"]) == (0, 0, 0.0)


@pytest.mark.parametrize("as_json", [True, False])
async def test_frames_of_random_bytes_are_answered(daemon, as_json):
    import random

    noise = random.Random(5)
    name = "npc.v1.json" if as_json else "npc.v1.msgpack"
    async with play(daemon, name) as game:
        for _ in range(300):
            frame = noise.randbytes(noise.randrange(1, 200))
            await game.socket.send(frame.decode("latin-1") if as_json else frame)
            answer = await game.receive()
            assert answer["type"] == "error"
            assert answer["code"] in ("protocol", "invalid", "unsupported")
        await game.send(type="generate", batch=1, lines=[line(1)])
        assert (await game.until("batch.end"))[-1]["ok"] == 1


async def closed_with(url, *, first=None, **options):
    """The close code and reason that a connection meets."""
    async with connect(url, compression=None, **options) as socket_:
        if first is not None:
            await socket_.send(first)
        with pytest.raises(ConnectionClosed) as caught:
            await asyncio.wait_for(socket_.recv(), 8_000 * MS)
    return caught.value.rcvd.code, caught.value.rcvd.reason


HELLO = {"type": "hello", "protocol": 1}


@pytest.mark.parametrize(
    ("hello", "code", "reason"),
    [
        ({**HELLO, "token": "wrong"}, 4401, "token is wrong"),
        (HELLO, 4401, "no token"),
        ({**HELLO, "protocol": 2}, 4400, "protocol 1, not 2"),
        ({"type": "status"}, 4400, "must be hello"),
        ({"type": "hello"}, 4400, "protocol"),
    ],
)
async def test_a_bad_opening_closes_with_a_reason(daemon, hello, code, reason):
    got = await closed_with(daemon.url, first=json.dumps(hello), subprotocols=["npc.v1.json"])
    assert got[0] == code
    assert reason in got[1]


async def test_other_subprotocols_and_frame_types_are_refused(daemon):
    assert await closed_with(daemon.url, subprotocols=["chat"]) == (
        4400,
        "offer a subprotocol: npc.v1.msgpack or npc.v1.json",
    )
    assert (await closed_with(daemon.url))[0] == 4400
    text = json.dumps({**HELLO, "token": daemon.token})
    assert (await closed_with(daemon.url, first=text, subprotocols=["npc.v1.msgpack"]))[0] == 4400
    assert (await closed_with(daemon.url, first=b"x" * (2**20 + 1), subprotocols=["npc.v1.msgpack"]))[0] == 1009


async def test_web_pages_of_others_and_foreign_hosts_are_refused(daemon):
    port = daemon.endpoint["port"]
    for origin in ("http://evil.test", "null", f"http://127.0.0.1:{port + 1}"):
        assert (await closed_with(daemon.url, subprotocols=["npc.v1.json"], origin=origin))[0] == 4403
    own = f"http://localhost:{port}"
    async with connect(daemon.url, subprotocols=["npc.v1.json"], origin=own) as socket_:
        await socket_.send(json.dumps({**HELLO, "token": daemon.token}))
        assert json.loads(await socket_.recv())["type"] == "welcome"
    for host in (b"Host: evil.test\r\n", b"Host: localhost\r\nHost: evil.test\r\n", b""):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\n" + host + b"\r\n")
        assert b" 421 " in await reader.readline()
        writer.close()
        await writer.wait_closed()
    with pytest.raises(InvalidStatus, match="404"):
        await connect(daemon.url.replace("/v1", "/other"), subprotocols=["npc.v1.json"])


def test_plain_http(daemon):
    import urllib.request

    address = f"http://127.0.0.1:{daemon.endpoint['port']}"
    with urllib.request.urlopen(f"{address}/healthz") as response:
        assert json.load(response)["status"] == "ok"
    with urllib.request.urlopen(address) as response:
        assert b"npc-runtime" in response.read()
        assert "default-src 'none'" in response.headers["Content-Security-Policy"]


async def test_metrics_count_what_was_said(daemon):
    before = await asyncio.to_thread(read_metrics, daemon)
    async with play(daemon) as game:
        await game.send(type="generate", batch=1, lines=[line(1, "marta"), line(2, "nobody")])
        end = next(m for m in await game.until("batch.end") if m["type"] == "line.end")
        long = {"trim": "none", "max_tokens": 500, "min_tokens": 500}
        await game.send(type="generate", batch=2, lines=[line(3, "marta", sampling=long)])
        await game.until("line.start")
    for _ in range(100):
        after = await asyncio.to_thread(read_metrics, daemon)
        told = {name: after[name] - before.get(name, 0.0) for name in after}
        if told.get('npc_runtime_lines_total{persona="marta",reason="disconnected"}'):
            break
        await asyncio.sleep(50 * MS)
    reason = end["reason"]
    assert told[f'npc_runtime_lines_total{{persona="marta",reason="{reason}"}}'] == 1
    assert told['npc_runtime_lines_total{persona="marta",reason="disconnected"}'] == 1
    assert told['npc_runtime_lines_rejected_total{code="persona_unknown"}'] == 1
    assert told["npc_runtime_line_tokens_sum"] == end["usage"]["completion"] < told["npc_runtime_tokens_total"]
    assert told["npc_runtime_first_text_seconds_count"] == 1
    assert told['npc_runtime_connections_opened_total{subprotocol="npc.v1.msgpack"}'] == 1


def read_metrics(daemon):
    """Every sample by its name and labels, as Prometheus reads them."""
    import urllib.request

    with urllib.request.urlopen(f"http://127.0.0.1:{daemon.endpoint['port']}/metrics") as response:
        samples = [text.rsplit(" ", 1) for text in response.read().decode().splitlines() if not text.startswith("#")]
    return {name: float(value) for name, value in samples}


async def test_vanishing_clients_leave_nothing_behind(daemon):
    long = {"trim": "none", "max_tokens": 500, "min_tokens": 500}
    for _ in range(5):
        async with play(daemon) as game:
            await game.send(type="generate", batch=1, lines=[line(n, sampling=long) for n in range(4)])
            await game.until("line.start")
            game.socket.transport.abort()
    async with await Client.connect(daemon.url, token=daemon.token) as client:
        for _ in range(100):
            status = await client.status()
            if status["active"] == 0 and status["connections"] == 1:
                break
            await asyncio.sleep(50 * MS)
        assert (status["active"], status["queued"], status["kv_used"], status["connections"]) == (
            0,
            0,
            0.0,
            1,
        )


async def test_a_batch_that_nobody_reads_does_not_hold_up_the_clients_end(daemon, monkeypatch):
    monkeypatch.setattr("npc_runtime.batch.MAX_BATCH_EVENTS", 2)
    async with asyncio.timeout(5_000 * MS):
        async with await Client.connect(daemon.url, token=daemon.token) as client:
            await client.generate([line(n) for n in range(8)])
            await asyncio.sleep(1_000 * MS)


async def test_a_lost_connection_ends_a_batch_with_the_reason(daemon):
    async with await Client.connect(daemon.url, token=daemon.token) as client:
        batch = await client.generate([line(1, sampling={"trim": "none", "max_tokens": 500, "min_tokens": 500})])
        events = aiter(batch)
        assert type(await anext(events)).__name__ == "LineStart"
        client._socket.transport.abort()
        with pytest.raises(DisconnectedError, match="lost"):
            [event async for event in events]


async def test_a_failed_generate_leaves_its_id_free(daemon):
    async with await Client.connect(daemon.url, token=daemon.token) as client:
        with pytest.raises(ValueError, match="at least 1"):
            await client.generate([], batch="b")
        batch = await client.generate([line(1)], batch="b")
        assert [type(event).__name__ async for event in batch][-1] == "BatchEnd"
        assert [event async for event in batch] == []


async def test_the_python_client_says_what_is_wrong(daemon):
    with pytest.raises(DisconnectedError, match=r"4401.*token is wrong"):
        await Client.connect(daemon.url, token="wrong")
    with pytest.raises(DisconnectedError, match="No daemon answers"):
        await Client.connect("ws://127.0.0.1:9/v1")
    async with await Client.connect(daemon.url, token=daemon.token, json_frames=True) as client:
        with pytest.raises(RequestError, match="no persona 'nobody'"):
            await client.say("nobody", "Hello.")
        assert (await client.say("odo", "Hello.")).reason == "stop"
