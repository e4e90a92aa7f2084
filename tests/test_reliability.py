"""Against a real daemon: nonsense on the wire, clients that vanish, hours of play, and a kill in mid-line.

CI runs a short form; `make soak` (NPC_SOAK=1) the long one: 100,000 frames, 1,000 vanished clients, ten minutes.
"""

import asyncio
import json
import os
import random
import shutil
import time

import msgpack
import psutil
import pytest
from conftest import MS
from game import line, play
from websockets.exceptions import ConnectionClosed

from npc_runtime.client import Client
from npc_runtime.errors import DisconnectedError
from npc_runtime.persona import shipped_personas

IS_LONG = os.environ.get("NPC_SOAK") == "1"
NUM_FRAMES = 100_000 if IS_LONG else 8_000
NUM_VANISHED = 1_000 if IS_LONG else 60
SOAK_S = 600.0 if IS_LONG else 25.0
NUM_STREAMS = 32
MAX_GROWTH = 48 << 20  # bytes of a process that has spoken before

LONG = {"trim": "none", "max_tokens": 300, "min_tokens": 300}


@pytest.fixture
def busy(make_daemon, tmp_path):
    """A daemon of its own, with personas that may be edited, and little room: all of it is soon in use."""
    folder = tmp_path / "personas"
    shutil.copytree(shipped_personas(), folder)
    return make_daemon("--personas", str(folder), "--kv-memory", "96"), folder


class Usage:
    """What the daemon's process holds, and what must be the same again afterwards."""

    def __init__(self, daemon):
        self.daemon, self.process = daemon, psutil.Process(daemon.process.pid)

    async def settled(self):
        """Wait until nothing runs; then the bytes, files and threads of the process."""
        async with await Client.connect(self.daemon.url, token=self.daemon.token) as client:
            for _ in range(400):
                status = await client.status()
                if (status["active"], status["queued"], status["kv_used"], status["connections"]) == (0, 0, 0.0, 1):
                    break
                await asyncio.sleep(50 * MS)
            assert (status["active"], status["queued"], status["kv_used"], status["connections"]) == (0, 0, 0.0, 1)
            return self.process.memory_info().rss, self.process.num_fds(), self.process.num_threads()


# -- nonsense ---------------------------------------------------------------------------------------------------


class Noise:
    """Frames that are almost messages."""

    def __init__(self, seed, as_json):
        self.chance, self.as_json = random.Random(seed), as_json

    def value(self, depth=0):
        chance = self.chance
        kinds = [
            lambda: None,
            lambda: chance.random() < 0.5,
            lambda: chance.choice([-1, 0, 7, 2**53, 2**63 - 1, -(2**63)]),
            lambda: chance.choice([0.5, 1e308, -1e-308]),
            lambda: chance.choice(["", "odo", "x" * 5_000, "\x00", "é🜁"]),
            lambda: [self.value(depth + 1) for _ in range(chance.randrange(4))] if depth < 6 else [],
            lambda: {chance.choice(["a", "type", "line", "text"]): self.value(depth + 1)} if depth < 6 else {},
        ]
        return chance.choice(kinds)()

    def document(self):
        """A message with fields that are missing, wrong or too many; none that would end the test."""
        chance = self.chance
        kinds = "generate cancel npc.open npc.close npc.history npc.snapshot npc.restore persona.list persona.get"
        kinds += " persona.validate warmup watch config status shutdown hello world.set nonsense"
        fields = "batch lines npc persona op messages state vars history doc personas on paused max_tokens_per_s all id"
        document = {name: self.value() for name in chance.sample(fields.split(), chance.randrange(5))}
        document["type"] = chance.choice(kinds.split())
        if document["type"] == "config":
            document["paused"] = chance.choice(["yes", 7, []])
        if document["type"] == "generate":
            document = {"batch": chance.randrange(9), "lines": [self.value() for _ in range(3)], **document}
        return document

    def frame(self):
        chance, kind = self.chance, self.chance.randrange(6)
        if kind == 0:
            noise = chance.randbytes(chance.randrange(1, 300))
            return noise.decode("latin-1") if self.as_json else noise
        document = self.document()
        frame = json.dumps(document) if self.as_json else msgpack.packb(document)
        if kind == 1:
            return frame[: chance.randrange(len(frame))] or frame
        if kind == 2:
            place = chance.randrange(len(frame))
            bit = chance.randbytes(1)
            return frame[:place] + (bit.decode("latin-1") if self.as_json else bit) + frame[place + 1 :]
        if kind == 3:
            deep = ("[" * 3_000) if self.as_json else b"\x91" * 3_000
            return deep + frame
        return frame


@pytest.mark.parametrize("subprotocol", ["npc.v1.msgpack", "npc.v1.json"])
async def test_nonsense_is_answered_or_closed_with_a_code(busy, subprotocol):
    daemon, _ = busy
    usage = Usage(daemon)
    noise = Noise(11, subprotocol == "npc.v1.json")
    num_sent, num_answers, codes, closed_with = 0, 0, set(), []
    while num_sent < NUM_FRAMES // 2:
        async with play(daemon, subprotocol) as game:
            try:
                for _ in range(500):
                    for _ in range(50):
                        await game.socket.send(noise.frame())
                    num_sent += 50
                    await game.send(type="status", id="sync")
                    message = None
                    while message is None or message.get("re") != "sync":
                        message = await game.receive()
                        num_answers += 1
                        codes |= {message["code"]} if message["type"] == "error" else set()
                    if num_sent >= NUM_FRAMES // 2:
                        break
            except ConnectionClosed as error:
                closed_with.append(error.rcvd and error.rcvd.code)
    assert num_answers > num_sent / 2
    assert set(closed_with) <= {1000, 4400}
    assert codes <= {"protocol", "invalid", "unsupported", "npc_unknown", "persona_unknown", "auth", "overload"}
    assert {"protocol", "invalid", "unsupported"} <= codes
    await usage.settled()
    async with play(daemon, subprotocol) as game:
        await game.send(type="generate", batch=1, lines=[line(1)])
        assert (await game.until("batch.end"))[-1]["ok"] == 1
    assert "Traceback" not in daemon.read_log()


# -- clients that vanish ----------------------------------------------------------------------------------------


async def test_vanishing_clients_leave_nothing(busy):
    daemon, _ = busy
    usage, chance = Usage(daemon), random.Random(3)

    async def vanish(number):
        async with play(daemon, chance.choice(["npc.v1.msgpack", "npc.v1.json"])) as game:
            await game.send(type="npc.open", npc="n", persona="brom")
            lines = [line(n, chance.choice(["odo", "marta", "vaskar"]), sampling=LONG) for n in range(3)]
            lines += [{"line": n, "npc": "n", "input": {"text": f"{number}?"}, "sampling": LONG} for n in (3, 4)]
            await game.send(type="generate", batch=1, lines=lines)
            await game.until(chance.choice(["reply", "accepted", "line.start", "delta"]))
            game.socket.transport.abort()

    async def vanish_many(count):
        for number in range(0, count, 4):
            await asyncio.gather(*(vanish(number + n) for n in range(4)))

    await vanish_many(32)
    before = await usage.settled()
    await vanish_many(NUM_VANISHED)
    after = await usage.settled()
    assert after[0] - before[0] < MAX_GROWTH
    assert after[1:] == before[1:]
    assert "Traceback" not in daemon.read_log()


# -- a long evening ---------------------------------------------------------------------------------------------


async def test_an_evening_of_play_is_accounted_for_and_memory_is_flat(busy):
    """Thirty-two streams; some lines are cancelled, some late, personas are saved meanwhile."""
    daemon, folder = busy
    usage, chance = Usage(daemon), random.Random(5)
    counts = {"sent": 0, "ended": 0, "reasons": {}}
    rss = []

    async def play_on(client, stream, until):
        npc = f"npc {stream}"
        persona = ["odo", "brom", "marta", "vaskar", "thalindra"][stream % 5]
        await client.open_npc(npc, persona)
        while time.monotonic() < until:
            number = counts["sent"] = counts["sent"] + 1
            fields = {"sampling": {"max_tokens": chance.randrange(4, 24)}}
            fields |= {"deadline_ms": 400.0} if chance.random() < 0.1 else {}
            who = {"npc": npc} if chance.random() < 0.7 else {"persona": persona}
            batch = await client.generate([{"line": number, **who, "input": {"text": f"And {number}?"}, **fields}])
            assert not batch.rejected
            if chance.random() < 0.2:
                await asyncio.sleep(chance.random() * 200 * MS)
                await batch.cancel()
            ends = [event async for event in batch if type(event).__name__ == "LineEnd"]
            assert [end.line for end in ends] == [number]
            counts["ended"] += 1
            counts["reasons"][ends[0].reason] = counts["reasons"].get(ends[0].reason, 0) + 1

    async def edit(until):
        while time.monotonic() < until:
            path = folder / chance.choice(["odo", "brom", "marta"]) / "persona.yaml"
            text = path.read_text(encoding="utf-8")
            path.write_text(
                text.rstrip() + f"\n# edited {chance.randrange(1000)}\n" if len(text) < 9_000 else text[:-20]
            )
            await asyncio.sleep(2.0)
            rss.append(usage.process.memory_info().rss)

    async def evening(seconds):
        until = time.monotonic() + seconds
        async with (
            await Client.connect(daemon.url, token=daemon.token) as one,
            await Client.connect(daemon.url, token=daemon.token, json_frames=True) as two,
        ):
            players = [play_on((one, two)[n % 2], n, until) for n in range(NUM_STREAMS)]
            await asyncio.gather(*players, edit(until))

    await evening(min(SOAK_S / 3, 60.0))
    before = await usage.settled()
    await evening(SOAK_S)
    after = await usage.settled()
    print(f"{counts}; {before} -> {after}; {[each >> 20 for each in rss]} MiB")
    assert counts["sent"] == counts["ended"] > 50
    assert {"stop", "length", "cancelled"} <= counts["reasons"].keys() <= {"stop", "length", "cancelled", "deadline"}
    assert after[0] - before[0] < MAX_GROWTH
    assert after[1] == before[1]
    assert after[2] <= before[2] + 2, "a pool starts a thread when all others are busy, and keeps it"
    assert "Traceback" not in daemon.read_log()


# -- a kill -----------------------------------------------------------------------------------------------------


async def test_a_daemon_that_is_killed_in_mid_line(busy, make_daemon):
    """The client hears of it at once; a new daemon brings back what was snapshotted."""
    daemon, folder = busy
    async with await Client.connect(daemon.url, token=daemon.token) as client:
        await client.open_npc("smith", "brom")
        first = await client.talk("smith", "Is the sword ready?", sampling={"seed": 4})
        state = await client.snapshot("smith")
        batch = await client.generate([{"line": 1, "npc": "smith", "input": {"text": "And?"}, "sampling": LONG}])
        events = aiter(batch)
        assert type(await anext(events)).__name__ == "LineStart"
        daemon.process.kill()
        killed_at = time.monotonic()
        with pytest.raises(DisconnectedError):
            [event async for event in events]
        assert time.monotonic() - killed_at < 1.0
    await asyncio.to_thread(daemon.process.wait)
    again = await asyncio.to_thread(make_daemon, "--personas", str(folder))
    async with await Client.connect(again.url, token=again.token) as client:
        await client.restore("smith", state)
        turns = [turn.content for turn in await client.history("smith")]
        assert turns == ["Is the sword ready?", first.text]
        assert (await client.talk("smith", "And?")).text
