"""An independent client for tests: it shares no code with ours but the names on the wire."""

import asyncio
import json

import msgpack
from conftest import MS
from websockets.asyncio.client import connect


class Game:
    """An independent client: frames in, maps out."""

    def __init__(self, socket_, subprotocol):
        self.socket = socket_
        self.is_json = subprotocol == "npc.v1.json"
        self.max_frame = 32 * 1024

    async def send(self, **message):
        await self.socket.send(json.dumps(message) if self.is_json else msgpack.packb(message))

    async def receive(self):
        frame = await asyncio.wait_for(self.socket.recv(), 30_000 * MS)
        assert isinstance(frame, str) == self.is_json
        assert len(frame if isinstance(frame, bytes) else frame.encode()) <= self.max_frame
        return json.loads(frame) if self.is_json else msgpack.unpackb(frame)

    async def until(self, kind):
        messages = []
        while not messages or messages[-1]["type"] != kind:
            messages.append(await self.receive())
        return messages


class play:
    """Connect, say hello with the right token, and expect welcome, once the base is loaded."""

    def __init__(self, daemon, subprotocol="npc.v1.msgpack", **hello):
        self.daemon, self.subprotocol = daemon, subprotocol
        self.hello = {"type": "hello", "protocol": 1, "token": daemon.token, **hello}

    async def __aenter__(self):
        # A process that takes over the port of another one has to start before it answers.
        options = dict(compression=None, open_timeout=30_000 * MS)
        self.socket = await connect(self.daemon.url, subprotocols=[self.subprotocol], **options)
        game = Game(self.socket, self.subprotocol)
        await game.send(**self.hello)
        *game.waited, game.welcome = await game.until("welcome")
        assert {message["type"] for message in game.waited} <= {"event"}
        return game

    async def __aexit__(self, *_):
        await self.socket.close()


def line(number, persona="odo", text="Hello there.", **fields):
    return {"line": number, "persona": persona, "input": {"text": text}, **fields}


def deltas(messages, number):
    items = [item for m in messages if m["type"] == "delta" for item in m["items"] if item["line"] == number]
    assert [item["seq"] for item in items] == list(range(len(items)))
    return "".join(item["text"] for item in items)
