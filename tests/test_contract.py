"""The rules of the protocol, R1 to R11, each against a real daemon over a real socket, in both subprotocols."""

import asyncio
import json
import socket
import time

import pytest
from conftest import MS
from game import Game, deltas, line, play
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from npc_runtime.persona import shipped_personas
from npc_runtime.protocol import CAPS
from npc_runtime.wire_client import Config

LONG = {"trim": "none", "max_tokens": 500, "min_tokens": 500}
SOME = {"seed": 3, "max_tokens": 24}

both = pytest.mark.parametrize("subprotocol", ["npc.v1.msgpack", "npc.v1.json"])


def ends_of(messages):
    return {message["line"]: message for message in messages if message["type"] == "line.end"}


async def settle(game):
    """All messages up to the answer of a question: what comes later would be too late."""
    await game.send(type="status", id="settled")
    messages = await game.until("reply")
    while messages[-1]["re"] != "settled":
        messages += await game.until("reply")
    return messages


async def open_npc(game, npc, persona="odo", **fields):
    await game.send(type="npc.open", id=npc, npc=npc, persona=persona, **fields)
    return (await game.until("reply"))[-1]["body"]


def npc_line(number, npc, text="Hello there.", **fields):
    return {"line": number, "npc": npc, "input": {"text": text}, **fields}


@both
async def test_r1_every_accepted_line_ends_once_and_nothing_follows(daemon, subprotocol):
    async with play(daemon, subprotocol) as game:
        await open_npc(game, "n")
        lines = [
            line(1, sampling=SOME),
            line(2, sampling=LONG),
            line(3, sampling=LONG, deadline_ms=300.0),
            line(4, sampling=LONG, deadline_ms=0.001),
            npc_line(5, "n", sampling=LONG),
            npc_line(6, "n", sampling=LONG),
            npc_line(7, "n", sampling=LONG, deadline_ms=200.0),
            line(8, "nobody"),
        ]
        await game.send(type="generate", batch="b", lines=lines)
        messages = await game.until("line.start")
        await game.send(type="cancel", lines=[2, 5, 6])
        messages += await game.until("batch.end")
        messages += await settle(game)
    accepted = [item["line"] for item in messages[0]["items"] if item["status"] == "queued"]
    ended = [message["line"] for message in messages if message["type"] == "line.end"]
    assert sorted(ended) == sorted(accepted) == [1, 2, 3, 4, 5, 6, 7]
    reasons = {number: end["reason"] for number, end in ends_of(messages).items()}
    assert reasons.pop(1) in ("stop", "length")
    assert reasons == {2: "cancelled", 3: "deadline", 4: "deadline", 5: "cancelled", 6: "cancelled", 7: "deadline"}
    for number in accepted:
        about = [
            m["type"] for m in messages if m.get("line") == number or number in [i["line"] for i in m.get("items", [])]
        ]
        assert about[-1] == "line.end"
        assert deltas(messages, number) == "" or "line.start" in about


@both
async def test_r2_what_is_not_taken_is_said_and_nothing_degrades_silently(daemon, subprotocol):
    bad = [
        (line(2, sampling={"temprature": 1}), "invalid", "temprature"),
        (line(3, format={"kind": "text", "strict": True}), "invalid", "strict"),
        (line(4, history="maybe"), "invalid", "history"),
        (line(5, format={"kind": "json_schema", "value": {}}), "format_unsupported", "json_schema"),
        (line(6, emotions=["joy"]), "unsupported", "emotions"),
        (line(7, actions=["wave"]), "unsupported", "actions"),
        (npc_line(8, "nobody"), "npc_unknown", "nobody"),
        ({"line": 9, "persona": "odo"}, "invalid", "input"),
    ]
    async with play(daemon, subprotocol) as game:
        good = line(1, colour="blue", sampling=SOME)
        await game.send(type="generate", id=1, batch=1, mood="dark", lines=[good, *(each for each, _, _ in bad)])
        accepted, *rest = await game.until("batch.end")
        assert accepted["items"][0]["status"] == "queued"
        for item, (_, code, named) in zip(accepted["items"][1:], bad, strict=True):
            assert (item["status"], item["code"]) == ("rejected", code)
            assert named in item["message"]
            assert item["hint"]
        assert list(ends_of(rest)) == [1]
        for number, (message, code, named) in enumerate(
            [
                ({"type": "world.set", "scope": "a", "facts": {}}, "unsupported", "world.set"),
                ({"type": "train.start"}, "unsupported", "train.start"),
                ({"type": "generate", "batch": 2, "lines": [good], "mode": "turns"}, "unsupported", "turns"),
                ({"type": "generate", "batch": 2, "lines": [good], "mode": "chorus"}, "invalid", "mode"),
                ({"type": "config", "max_tokens": 3}, "invalid", "max_tokens"),
            ]
        ):
            await game.send(id=number, **message)
            error = await game.receive()
            assert (error["type"], error["re"], error["code"]) == ("error", number, code)
            assert named in error["message"]


@both
async def test_r3_deltas_are_whole_characters_and_the_end_has_the_text(daemon, subprotocol):
    async with play(daemon, subprotocol, want={"tick_ms": 0}) as game:
        texts = ["Þú! “Naïve” 你好 🜁", "Say 水 and 🙂 please.", "Hello."]
        sampling = {"temperature": 1.5, "max_tokens": 40, "seed": 1}
        await game.send(
            type="generate", batch=1, lines=[line(n, text=t, sampling=sampling) for n, t in enumerate(texts)]
        )
        messages = await game.until("batch.end")
        for number, end in ends_of(messages).items():
            assert deltas(messages, number).startswith(end["text"])
            assert "�" not in end["text"]
        await game.send(type="generate", batch=2, lines=[line(1, sampling={"trim": "none", "max_tokens": 30})])
        messages = await game.until("batch.end")
        assert deltas(messages, 1) == ends_of(messages)[1]["text"]


@both
async def test_r4_one_delta_frame_a_tick_and_the_first_text_at_once(daemon, subprotocol):
    async with play(daemon, subprotocol, want={"tick_ms": 1000}) as game:
        sampling = {**LONG, "max_tokens": 60, "min_tokens": 60}
        await game.send(type="generate", batch=1, lines=[line(n, text=f"{n}?", sampling=sampling) for n in range(4)])
        messages = await game.until("batch.end")
    frames = [message for message in messages if message["type"] == "delta"]
    first = {item["line"]: at for at, frame in reversed(list(enumerate(frames))) for item in frame["items"]}
    assert len(first) == 4
    for number, at in first.items():
        assert [item["seq"] for item in frames[at]["items"] if item["line"] == number] == [0]
        ttft = ends_of(messages)[number]["timing"]["ttft_ms"]
        assert ttft < ends_of(messages)[number]["timing"]["total_ms"]
    ticks = ends_of(messages)[0]["timing"]["total_ms"] / 1000
    assert len(frames) <= 4 + ticks + 4, "a first frame, one a tick, and one in front of an end"


@both
async def test_r5_large_replies_come_in_parts_and_large_frames_are_refused(daemon, subprotocol):
    turns = [{"role": role, "content": f"{n} {'é🜁' * 400}"} for n in range(30) for role in ("user", "assistant")]
    async with play(daemon, subprotocol) as game:  # which checks the size of every frame
        await open_npc(game, "n", history=turns)
        await game.send(type="npc.history", id=1, npc="n", op="get")
        parts = [await game.receive()]
        assert parts[0]["parts"] > 3
        parts += [await game.receive() for _ in range(parts[0]["parts"] - 1)]
        assert [part["part"] for part in parts] == list(range(parts[0]["parts"]))
        assert json.loads("".join(part["data"] for part in parts)) == {"npc": "n", "messages": turns}
        await game.send(type="status", id=2, filler="x" * (1 << 20))
        with pytest.raises(ConnectionClosed) as caught:
            await game.receive()
    assert caught.value.rcvd.code == 1009
    async with play(daemon, subprotocol, want={"max_frame": 1 << 20}) as game:
        game.max_frame = 1 << 20
        await open_npc(game, "n", history=turns)
        await game.send(type="npc.history", id=1, npc="n", op="get")
        assert (await game.receive())["body"]["messages"] == turns


@both
async def test_r6_a_slow_reader_loses_its_lines_and_nobody_waits_for_it(daemon, subprotocol):
    turns = [{"role": "user", "content": "x" * 8_000}] * 8
    small = socket.socket()
    small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
    small.connect(("127.0.0.1", daemon.endpoint["port"]))
    options = dict(sock=small, subprotocols=[subprotocol], compression=None, max_queue=1, close_timeout=1)
    async with connect(daemon.url, **options) as slow_socket, play(daemon, subprotocol) as quick:
        slow = Game(slow_socket, subprotocol)
        await slow.send(type="hello", protocol=1, token=daemon.token)
        assert (await slow.receive())["type"] == "welcome"
        await open_npc(slow, "n", history=turns)
        await slow.send(
            type="generate", batch="slow", lines=[line(1, sampling={**LONG, "max_tokens": 1_000, "min_tokens": 1_000})]
        )
        for number in range(40):
            await slow.send(type="npc.history", id=number, npc="n", op="get")
        started = time.monotonic()
        while time.monotonic() - started < 7_000 * MS:
            await quick.send(type="generate", batch=1, lines=[line(1, sampling={**SOME, "max_tokens": 4})])
            end = ends_of(await quick.until("batch.end"))[1]
            assert end["reason"] in ("stop", "length")
        messages = await slow.until("batch.end")
    end = ends_of(messages)[1]
    assert (end["reason"], end["error"]["code"], end["error"]["retryable"]) == ("overload", "overload", True)
    assert [m["kind"] for m in messages if m["type"] == "event" and "adapter" not in m] == ["overload"]
    assert [m["type"] for m in messages].count("line.end") == 1


@both
async def test_r7_a_lost_connection_cancels_and_its_npcs_wait_for_resume(daemon, subprotocol):
    async with play(daemon, subprotocol) as game:
        session = game.welcome["session"]
        assert game.welcome["resumed"] is False
        await open_npc(game, "n", vars={"day": 3})
        await game.send(type="generate", batch=1, lines=[npc_line(1, "n", sampling=SOME)])
        said = ends_of(await game.until("batch.end"))[1]["text"]
        await game.send(type="generate", batch=2, lines=[npc_line(2, "n", sampling=LONG), line(3, sampling=LONG)])
        await game.until("line.start")
        game.socket.transport.abort()
    async with play(daemon, subprotocol, resume=session) as game:
        assert (game.welcome["resumed"], game.welcome["session"]) == (True, session)
        await game.send(type="npc.history", id=1, npc="n", op="get")
        messages = await game.until("reply")
        assert [m["type"] for m in messages] == ["reply"], "of the lost lines nothing is said"
        assert [turn["content"] for turn in messages[0]["body"]["messages"]] == ["Hello there.", said]
        for _ in range(100):
            await game.send(type="status", id=2)
            status = (await game.until("reply"))[-1]["body"]
            if status["active"] + status["queued"] == 0:
                break
            await asyncio.sleep(20 * MS)
        assert (status["active"], status["queued"]) == (0, 0)


@both
async def test_r8_cancel_is_idempotent_and_leaves_the_neighbours(daemon, subprotocol):
    async with play(daemon, subprotocol) as game:
        kept = line("kept", "brom", sampling=SOME)
        await game.send(type="generate", batch="alone", lines=[kept])
        alone = ends_of(await game.until("batch.end"))["kept"]["text"]
        await open_npc(game, "n")
        for selector in ({"lines": ["gone", "never"]}, {"batch": "b"}, {"npc": "n"}, {"all": True}):
            gone = npc_line("gone", "n", sampling=LONG) if "npc" in selector else line("gone", sampling=LONG)
            await game.send(type="generate", batch="a", lines=[kept])
            await game.until("line.start")
            await game.send(type="generate", batch="b", lines=[gone])
            await game.until("line.start")
            for _ in range(3):
                await game.send(type="cancel", **selector)
            messages = [*await game.until("batch.end"), *await game.until("batch.end"), *await settle(game)]
            ends = ends_of(messages)
            assert ends["gone"]["reason"] == "cancelled"
            assert ends["gone"]["usage"]["completion"] < 100
            if "all" not in selector:
                assert ends["kept"]["text"] == alone
            assert len([m for m in messages if m["type"] == "line.end"]) == 2
            assert not [m for m in messages if m["type"] == "error"]


@both
async def test_r9_what_caps_list_is_served(daemon, subprotocol):
    async with play(daemon, subprotocol) as game:
        assert game.welcome["protocol"] == 1
        assert game.welcome["caps"] == list(CAPS)
        types = [cap for cap in CAPS if cap not in FEATURES]
        for number, kind in enumerate(types):
            await game.send(type=kind, id=number)
            answers = [m for m in await settle(game) if m.get("re") == number]
            assert [m.get("code") for m in answers] not in (["unsupported"], ["internal"]), kind


FEATURES = {"persona.changed", "resume", "draft", "fallback", "trim", "deadline", "context", "stats"}


@both
async def test_r10_errors_are_never_inside_a_text(daemon, subprotocol):
    async with play(daemon, subprotocol) as game:
        lines = [line(n, sampling=LONG, deadline_ms=0.001, fallback=n == 1) for n in (1, 2)]
        await game.send(type="generate", batch=1, lines=lines)
        ends = ends_of(await game.until("batch.end"))
    assert ends[2]["text"] == ""
    assert ends[2]["fallback"] is False
    assert ends[1]["fallback"] is True
    assert "boiling over" in ends[1]["text"], "one of Odo's own lines for it"


@both
async def test_r11_lines_of_an_npc_take_turns_and_different_npcs_do_not(daemon, subprotocol):
    async with play(daemon, subprotocol) as game:
        await open_npc(game, "a")
        await open_npc(game, "b", "brom")
        lines = [npc_line(n, npc, f"What about {n}?", sampling=SOME) for n, npc in enumerate("aabba")]
        await game.send(type="generate", batch=1, lines=lines)
        messages = await game.until("batch.end")
        order = [(m["type"], m["line"]) for m in messages if m["type"] in ("line.start", "line.end")]
        for earlier, later in ((0, 1), (1, 4), (2, 3)):
            assert order.index(("line.end", earlier)) < order.index(("line.start", later))
        starts = {m["line"]: m for m in messages if m["type"] == "line.start"}
        assert (starts[0]["batch_size"], starts[2]["batch_size"]) == (2, 2)
        assert (starts[0]["npc"], starts[2]["npc"]) == ("a", "b")
        ends = ends_of(messages)
        await game.send(type="npc.history", id=1, npc="a", op="get")
        history = (await game.receive())["body"]["messages"]
        said = [turn for n in (0, 1, 4) for turn in (f"What about {n}?", ends[n]["text"])]
        assert [turn["content"] for turn in history] == said
        await game.send(type="npc.open", npc="copy", persona="odo", history=history[:4])
        await game.until("reply")
        await game.send(type="generate", batch=2, lines=[npc_line(9, "copy", "What about 4?", sampling=SOME)])
        assert ends_of(await game.until("batch.end"))[9]["prompt_hash"] == ends[4]["prompt_hash"]


# -- what else a client may ask ---------------------------------------------------------------------------------


@both
async def test_a_game_can_take_the_device_back(daemon, subprotocol):
    assert Config.model_fields.keys() == {"id", "type", "max_tokens_per_s", "paused"}
    async with play(daemon, subprotocol) as game, play(daemon, subprotocol) as other:
        await game.send(type="config", id=1, paused=True)
        assert (await game.receive())["body"] == {"max_tokens_per_s": None, "paused": True}
        await other.send(type="generate", batch=1, lines=[line(1, sampling=SOME)])
        await other.until("accepted")
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(other.socket.recv(), 300 * MS)
        await other.send(type="config", id=2, max_tokens_per_s=20.0)
        assert (await other.until("reply"))[-1]["body"] == {"max_tokens_per_s": 20.0, "paused": True}
        await game.socket.close()
        end = ends_of(await other.until("batch.end"))[1]
        assert end["timing"]["tokens_per_s"] < 30


@both
async def test_stats_come_once_a_second_to_who_asked(daemon, subprotocol):
    async with play(daemon, subprotocol, want={"stats": True}) as game, play(daemon, subprotocol) as other:
        first, second = (await game.until("stats"))[-1], (await game.until("stats"))[-1]
        await other.send(type="status", id=1)
        body = (await other.receive())["body"]
    assert 0.8 < second["uptime_s"] - first["uptime_s"] < 3.0
    assert {name for name, value in body.items() if value is not None} <= set(second)
    assert second["connections"] == 2
    assert second["memory"]["process"] > 100


@both
async def test_a_watcher_hears_what_others_say(daemon, subprotocol):
    async with play(daemon, subprotocol, client={"name": "editor"}) as editor, play(daemon, subprotocol) as game:
        await editor.send(type="watch", id=1, on=True)
        assert (await editor.receive())["body"] == {"on": True}
        await game.send(type="generate", batch=1, lines=[line(7, sampling=SOME)])
        said = ends_of(await game.until("batch.end"))[7]
        heard = []
        while not heard or heard[-1]["type"] != "line.end":
            watched = await editor.receive()
            assert (watched["type"], len(watched["session"])) == ("watched", 8)
            assert game.welcome["session"] not in str(watched), "who knows it can resume it"
            heard.append(watched["message"])
        assert heard[-1] == said
        assert deltas(heard, 7).startswith(said["text"])
        await editor.send(type="watch", id=2, on=False)
        await editor.receive()
        await game.send(type="generate", batch=1, lines=[line(8, sampling=SOME)])
        await game.until("batch.end")
        assert [m["type"] for m in await settle(editor)] == ["reply"]


@both
async def test_a_snapshot_restores_in_another_process_to_the_same_prompt(daemon, make_daemon, subprotocol):
    other = make_daemon("--personas", str(shipped_personas()), "--dtype", "float32")
    asked = npc_line("last", "n", "And?", sampling=SOME)
    async with play(daemon, subprotocol) as game, play(other, subprotocol) as later:
        await open_npc(game, "n")
        await game.send(
            type="generate", batch=1, lines=[npc_line(n, "n", f"What about {n}?", sampling=SOME) for n in (1, 2)]
        )
        await game.until("batch.end")
        await game.send(type="npc.snapshot", id=1, npc="n")
        state = (await game.receive())["body"]["state"]
        await later.send(type="npc.restore", id=1, npc="n", state=state)
        assert (await later.receive())["body"] == {"npc": "n", "persona": "odo", "num_messages": 4}
        for each in (game, later):
            await each.send(type="generate", batch=2, lines=[asked])
        ends = [ends_of(await each.until("batch.end"))["last"] for each in (game, later)]
    assert ends[0]["prompt_hash"] == ends[1]["prompt_hash"]
    assert ends[0]["text"] == ends[1]["text"]


@both
async def test_adapters_that_come_and_go_are_told(make_daemon, subprotocol):
    """Four adapters, room for fewer."""
    daemon = make_daemon("--personas", str(shipped_personas()), "--adapter-memory", "24")
    async with play(daemon, subprotocol) as game:
        for persona in ("odo", "brom", "vaskar", "thalindra"):
            await game.send(type="warmup", id=persona, personas=[persona])
            await game.until("reply")
        await game.send(
            type="generate", batch=1, lines=[line(n, p, sampling=SOME) for n, p in enumerate(["odo", "brom"])]
        )
        messages = [*await game.until("batch.end"), *await settle(game)]
        async with play(daemon, subprotocol) as late:
            await late.send(type="warmup", id=1, personas=["odo", "brom", "vaskar", "thalindra"])
            told = await late.until("reply")
        told += messages
    kinds = {(message["kind"], message["adapter"]) for message in told if message["type"] == "event"}
    assert {kind for kind, _ in kinds} == {"adapter.loaded", "adapter.evicted"}
    assert {adapter for _, adapter in kinds} <= {"odo", "brom", "vaskar", "thalindra"}


@both
async def test_a_persona_is_written_tried_saved_and_spoken(make_daemon, make_persona, tmp_path, subprotocol):
    """As an editor does it: a draft, what is wrong with it, the file, the reload, the trash."""
    make_persona("guard")
    daemon = make_daemon("--personas", str(tmp_path / "personas"))
    doc = {"schema": 1, "id": "cook", "display_name": "Cook", "bio": "A cook who is proud of one soup."}
    async with play(daemon, subprotocol) as game:

        async def ask(kind, **fields):
            await game.send(type=kind, id=1, **fields)
            messages = await game.until("reply")
            return messages[-1]["body"]

        draft = {"line": 1, "draft": doc, "input": {"text": "What is for dinner?"}, "sampling": SOME}
        await game.send(type="generate", batch=1, lines=[draft, {**draft, "line": 2, "draft": {**doc, "bio": 7}}])
        messages = await game.until("batch.end")
        assert [item.get("code") for item in messages[0]["items"]] == [None, "persona_invalid"]
        assert ends_of(messages)[1]["text"]
        assert (await ask("persona.validate", doc={**doc, "mood": 7}))["ok"] is False
        etag = (await ask("persona.put", persona="cook", doc=doc))["etag"]
        while not any(m["type"] == "event" and m["persona"]["id"] == "cook" for m in messages):
            messages.append(await game.receive())
        assert (await ask("persona.get", persona="cook"))["doc"] == doc
        await game.send(type="persona.put", id=2, persona="cook", doc=doc, etag="of another file")
        assert (await game.until("error"))[-1]["code"] == "invalid"
        await game.send(type="generate", batch=2, lines=[line(1, "cook", "Hello.", sampling=SOME)])
        assert (await game.until("batch.end"))[-1]["ok"] == 1
        assert len(etag) >= 8
        await ask("persona.delete", persona="cook")
        assert not (tmp_path / "personas" / "cook").exists()
        await game.send(type="persona.get", id=3, persona="../guard")
        assert (await game.until("error"))[-1]["code"] in ("invalid", "persona_unknown")
