"""A scene that one daemon speaks and records, and another one plays without a base: for a game's client the same."""

import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import MS, RunningDaemon, daemon_environment, start_daemon
from game import line, play
from test_readme import ROOT, blocks

from npc_runtime.client import Client
from npc_runtime.persona import shipped_personas
from npc_runtime.recording import Recording

TICK_S = 0.033
CROWD = ("brom", "marta", "odo", "thalindra", "vaskar", "odo", "brom", "marta")
LONG = {"trim": "none", "max_tokens": 120, "min_tokens": 120}


class Heard:
    """What a client heard of every line, and when."""

    def __init__(self):
        self.texts, self.times, self.ends, self.answers = {}, {}, {}, {}

    def take(self, message, at):
        match message["type"]:
            case "accepted":
                for item in message["items"]:
                    self.answers[item["line"]] = (item["status"], item.get("code"))
            case "delta":
                for item in message["items"]:
                    self.texts[item["line"]] = self.texts.get(item["line"], "") + item["text"]
                    self.times.setdefault(item["line"], []).append(at)
            case "line.end":
                self.ends[message["line"]] = message
                self.times.setdefault(message["line"], []).append(at)


async def say(game, heard, lines, *, cancels=None):
    """Send a batch and hear it out; `cancels` is a line to be cancelled once it has said something."""
    sent_at = time.monotonic()
    await game.send(type="generate", batch="b", lines=lines)
    while True:
        message = await game.receive()
        heard.take(message, time.monotonic() - sent_at)
        if cancels in heard.texts:
            await game.send(type="cancel", lines=[cancels])
            cancels = None
        if message["type"] == "batch.end":
            return message


async def play_scene(daemon):
    """Eight at once and one who is not there; an NPC, twice in turn and twice at once; a cancel; a deadline."""
    heard = Heard()
    async with play(daemon) as game:
        crowd = [line(f"c{n}", persona, f"The king is dead! {n // 7}") for n, persona in enumerate(CROWD)]
        await say(game, heard, [*crowd, line("nobody", "nobody")])
        await game.send(type="npc.open", npc="keeper", persona="odo", id=1)
        await game.until("reply")
        for n in range(2):
            await say(
                game, heard, [{"line": f"n{n}", "npc": "keeper", "input": {"speaker": "Mira", "text": "And you?"}}]
            )
        both = [{"line": f"t{n}", "npc": "keeper", "input": {"text": f"Is it late? {n}"}} for n in range(2)]
        await say(game, heard, both)
        await game.send(type="npc.history", npc="keeper", op="get", id=2)
        heard.history = (await game.until("reply"))[-1]["body"]["messages"]
        await say(game, heard, [line("cut", "brom", sampling=LONG)], cancels="cut")
        late = line("late", "odo", "Too late?", deadline_ms=0.001, sampling={"seed": 3})
        await say(game, heard, [late, line("silent", "marta", "Whole?", stream=False)])
    return heard


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A recording of the scene, what its client heard, and what must not be in it."""
    path = tmp_path_factory.mktemp("recording") / "scene.jsonl"
    daemon = start_daemon("--personas", str(shipped_personas()), "--record", str(path))
    assert daemon.endpoint, daemon.read_log()
    heard = asyncio.run(play_scene(daemon))
    assert daemon.stop() == 0
    daemon.process.stdout.close()
    daemon.log.close()
    return path, heard, daemon.token


@pytest.fixture
def replay(recorded, make_daemon):
    def start(*options, personas=None):
        folder = str(personas or shipped_personas())
        return make_daemon("--personas", folder, "--replay", str(recorded[0]), *options)

    return start


def test_the_recording_has_every_line_and_no_secret(recorded):
    path, heard, token = recorded
    text = path.read_text()
    assert token not in text
    recording = Recording.load(path)
    assert len(recording) == len(heard.ends) == 8 + 2 + 2 + 1 + 2
    assert recording.info.base.name == "smollm2-135m"
    for number, persona in enumerate(CROWD[:5]):
        take = recording.find(persona, "The king is dead! 0", 0)
        assert take.end.text == heard.ends[f"c{number}"]["text"]


async def test_the_scene_is_the_same(recorded, replay):
    """The same texts in the same pieces, and at the same times within a tick."""
    _, before, _ = recorded
    started = time.monotonic()
    daemon = replay()
    print(f"\nready after {time.monotonic() - started:.2f} s")
    after = await play_scene(daemon)
    assert after.answers == before.answers
    assert after.history == before.history
    cut = before.ends.pop("cut"), after.ends.pop("cut")
    assert [end["reason"] for end in cut] == ["cancelled", "cancelled"]
    assert before.texts["cut"].startswith(after.texts["cut"]) or after.texts["cut"].startswith(before.texts["cut"])
    for number, end in before.ends.items():
        again = after.ends[number]
        for field in ("text", "reason", "fallback", "usage", "error"):
            assert again.get(field) == end.get(field), number
        if number != "silent":
            assert after.texts.get(number) == before.texts.get(number)
    assert (before.ends["late"]["reason"], before.ends["late"]["fallback"]) == ("deadline", True)
    lags = [
        at - wanted
        for number in before.ends
        for wanted, at in zip(marks(before, number), marks(after, number), strict=True)
    ]
    print(f"lags: median {1000 * statistics.median(lags):.0f} ms, worst {1000 * max(map(abs, lags)):.0f} ms")
    assert abs(statistics.median(lags)) < TICK_S
    assert max(map(abs, lags)) < TICK_S + 400 * MS


def marks(heard, number):
    """When a line was first heard and when it ended; in between, as many texts as ticks allow."""
    return heard.times[number][0], heard.times[number][-1]


async def test_at_once(recorded, replay):
    daemon = replay("--replay-speed", "inf")
    started = time.monotonic()
    after = await play_scene(daemon)
    assert time.monotonic() - started < 1_500 * MS
    for number, end in recorded[1].ends.items():
        if number != "cut":
            assert after.ends[number]["text"] == end["text"]


SCRIPT = """
import os, sys
leave = os._exit

def look(status):
    heavy = {"torch", "numpy", "transformers", "triton", "numba", "safetensors", "huggingface_hub"}
    print("imported:", sorted(heavy & sys.modules.keys()), file=sys.stderr, flush=True)
    leave(status)

os._exit = look
from npc_runtime.cli import main
main()
"""


def test_nothing_that_computes_is_imported(recorded, tmp_path):
    """Not even when a line was spoken and a persona saved; and so it is there at once."""
    personas = tmp_path / "personas"
    write_persona(personas, "odo", adapter="nowhere")
    options = ["--port", "0", "--personas", str(personas), "--replay", str(recorded[0]), "--log-file", "-"]
    command = [sys.executable, "-P", "-c", SCRIPT, "serve", *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=daemon_environment(), **pipes) as process:
        started = time.monotonic()
        daemon = RunningDaemon(process, None, json.loads(process.stdout.readline()), "")
        assert daemon.endpoint["base"] == "smollm2-135m"
        said = asyncio.run(speak_and_save(daemon, personas))
        seconds = time.monotonic() - started
        process.terminate()
        _, err = process.communicate(timeout=5_000 * MS)
    assert said == recorded[1].ends["c2"]["text"]
    assert seconds < 5_000 * MS
    assert "imported: []" in err
    assert "Traceback" not in err


async def speak_and_save(daemon, personas):
    """A line of a persona whose adapter is missing; then its file changes, and the next line goes by that."""
    async with await Client.connect(daemon.url, token=daemon.token) as client:
        assert client.welcome.backend.startswith("replay of torch")
        assert client.welcome.base.context > 1_000
        assert [(persona.id, persona.error) for persona in client.welcome.personas] == [("odo", None)]
        end = await client.say("odo", "The king is dead! 0", sampling={"seed": 1})
        write_persona(personas, "odo", display_name="Old Odo", adapter="elsewhere")
        async with asyncio.timeout(5_000 * MS):
            event = await anext(client.notices())
            assert (event.kind, event.persona.display_name) == ("persona.changed", "Old Odo")
            assert event.persona.error is event.persona.stale is None
        return end.text


def write_persona(folder, persona_id, **fields):
    (folder / persona_id).mkdir(parents=True, exist_ok=True)
    document = {"schema": 1, "id": persona_id, "display_name": persona_id, "bio": "Somebody.", **fields}
    (folder / persona_id / "persona.yaml").write_text(json.dumps(document), encoding="utf-8")


async def test_everything_else_is_served_too(replay):
    """Questions, drafts, warmups, pages; what was never recorded says so, and long prompts are no trouble."""
    daemon = replay("--replay-speed", "inf")
    async with await Client.connect(daemon.url, token=daemon.token) as client:
        assert (await client.status())["personas"] == 5
        assert {item.status for item in await client.warmup(["odo", "marta"])} == {"ready"}
        assert await client.configure(paused=True) == {"max_tokens_per_s": None, "paused": True}
        waiting = asyncio.create_task(client.say("brom", "The king is dead! 0"))
        await asyncio.sleep(300 * MS)
        assert not waiting.done()
        await client.configure()
        assert (await waiting).reason in ("stop", "length")
        unknown = await client.say("odo", "x" * 8_000)
        assert (unknown.reason, unknown.error.code) == ("error", "invalid")
        assert "The recording has no line of odo" in unknown.error.message
    for page, what in (("", b"npc-runtime"), ("healthz", b'"ok"'), ("metrics", b"replay of torch")):
        with urllib.request.urlopen(f"http://127.0.0.1:{daemon.endpoint['port']}/{page}") as answer:
            assert what in answer.read()


def test_a_recording_may_be_recorded_again(recorded, replay, tmp_path):
    again = tmp_path / "again.jsonl"
    daemon = replay("--replay-speed", "inf", "--record", str(again))
    asyncio.run(play_scene(daemon))
    assert daemon.stop() == 0
    assert len(Recording.load(again)) == len(Recording.load(recorded[0]))
    assert Path(again).stat().st_size > 1_000


GAME = """#!{python} -P
import asyncio, json, sys
from npc_runtime.client import Client

async def main():
    where = json.load(open(sys.argv[sys.argv.index("--daemon") + 1]))
    async with await Client.connect(f"ws://127.0.0.1:{{where['port']}}/v1", token=where["token"]) as client:
        print((await client.say("odo", "The king is dead! 0")).text)

asyncio.run(main())
sys.exit(7)
"""


def test_the_docs_example_for_ci_runs(recorded, tmp_path):
    (code,) = blocks("sh", (ROOT / "docs" / "daemon.md").read_text(encoding="utf-8"))
    (tmp_path / "tavern.jsonl").write_bytes(recorded[0].read_bytes())
    (tmp_path / "game").write_text(GAME.format(python=sys.executable))
    (tmp_path / "npc-runtime").write_text(f'#!/bin/sh\nexec {sys.executable} -P -m npc_runtime "$@"\n')
    for name in ("game", "npc-runtime"):
        (tmp_path / name).chmod(0o755)
    env = daemon_environment(PATH=f"{tmp_path}:{os.environ['PATH']}")
    options = {"cwd": tmp_path, "env": env, "capture_output": True, "text": True, "timeout": 60}
    done = subprocess.run(["sh", "-c", code], **options)
    assert (done.returncode, done.stdout.strip()) == (7, recorded[1].ends["c2"]["text"]), done.stderr
    (tmp_path / "tavern.jsonl").unlink()
    (tmp_path / "where.json").unlink()
    done = subprocess.run(["sh", "-c", code], **options)
    assert done.returncode == 1
    assert "--replay tavern.jsonl" in done.stderr
