"""`npc-runtime top`: what it shows of any daemon, and how it gets over one that goes away."""

import io
import json
import os
import re
import signal
import subprocess
import sys

import pytest
from conftest import MS
from rich.console import Console

from npc_runtime.errors import DisconnectedError, StartupError
from npc_runtime.protocol import BaseModelInfo, Welcome
from npc_runtime.running import Target
from npc_runtime.top import Picture, Snapshot, sparkline, take_snapshot, watch

WELCOME = Welcome(
    session="s1",
    protocol=1,
    version="1.2.3",
    device="a card",
    backend="torch",
    base=BaseModelInfo(name="x-3b", sha256="", context=1),
    caps=[],
    limits={},
    personas=[],
)
STATUS = {
    "active": 3,
    "queued": 1,
    "tokens_per_s": 123.4,
    "tokens": 12_345,
    "forwards": 99,
    "kv_used": 0.5,
    "kv_cached": 0.25,
    "preempted": 2,
    "adapters": ["brom", "odo"],
    "personas": 5,
    "connections": 1,
    "memory": {"base": 6144.0, "kv_cache": 1024.0},
    "max_tokens_per_s": 40.0,
    "uptime_s": 3_900.0,
}


def drawn(picture, width=100):
    console = Console(width=width, file=io.StringIO(), legacy_windows=False)
    console.print(picture.draw())
    return console.file.getvalue()


def picture_of(*statuses):
    picture = Picture()
    for status in statuses:
        picture.take(Snapshot.of(WELCOME, status))
    return picture


def test_everything_has_its_place():
    text = drawn(picture_of(STATUS, {**STATUS, "tokens_per_s": 61.7}))
    for words in (
        "npc-runtime 1.2.3  x-3b on a card (torch), up 1 h 05 min",
        "3 active, 1 queued",
        "61.7  █▅",
        "at most 40 tokens/s",
        "██████████░░░░░░░░░░ 50% used, 25% holds known prompts",
        "2 on the device: brom, odo",
        "base 6,144 MiB, kv cache 1,024 MiB",
        "1 connected, 5 personas",
        "12,345 tokens, 99 forward passes, 2 preempted",
    ):
        assert words in text
    assert "paused" in drawn(picture_of({**STATUS, "paused": True}))


@pytest.mark.parametrize("missing", STATUS)
def test_a_daemon_of_another_version_may_leave_anything_out_or_add_to_it(missing):
    status = {name: value for name, value in STATUS.items() if name != missing}
    text = drawn(picture_of({**status, "more": [1]}))
    assert "npc-runtime 1.2.3" in text
    assert "None" not in text
    assert len(text.splitlines()) > 5


def test_nothing_is_known_of_a_daemon_that_says_nothing():
    assert drawn(picture_of({})).split() == ["npc-runtime", "1.2.3", "x-3b", "on", "a", "card", "(torch)"]


def test_many_adapters_and_a_narrow_terminal_are_no_trouble():
    text = drawn(picture_of({"adapters": [f"persona{number}" for number in range(40)]}), width=40)
    assert "and 28 more" in re.sub(r"\s+", " ", text)
    assert max(map(len, text.splitlines())) <= 40


def test_the_speed_of_a_minute():
    assert sparkline([]) == ""
    assert sparkline([0, 0]) == "▁▁"
    assert sparkline([0, 0.1, 50, 100]) == "▁▂▅█"
    picture = picture_of(*({"tokens_per_s": float(number)} for number in range(200)))
    assert len(drawn(picture).split("199.0")[1].strip()) == 60


def test_a_note_stands_below_what_was_seen_last():
    picture = picture_of(STATUS)
    picture.note = "It is gone."
    assert drawn(picture).splitlines()[-1].strip() == "It is gone."
    assert "3 active" in drawn(picture)
    assert drawn(Picture()).strip() == ""


async def test_a_running_daemon_is_asked(daemon):
    snapshot = await take_snapshot(Target(daemon.url, daemon.token))
    body = json.loads(snapshot.to_json())
    assert body["base"] == "smollm2-135m"
    assert body["connections"] >= 1
    assert body["active"] == 0


async def test_a_daemon_that_went_away_is_found_again(daemon):
    """It may come back on another port: where it is is asked again each time."""
    notes, places = [], [Target(daemon.url, daemon.token), None, Target(daemon.url, daemon.token)]

    def find():
        place = places.pop(0)
        if place is None:
            raise StartupError("No daemon is running.")
        return place

    seen = watch(find, notes.append, period_s=20 * MS)
    first = await anext(seen)
    await seen.ag_frame.f_locals["client"].close()
    second = await anext(seen)
    await seen.aclose()
    assert first.base == second.base == "smollm2-135m"
    assert notes[0] == notes[-1] == ""
    assert "Looking for it again" in notes[1]
    assert notes[2].startswith("No daemon is running.")


async def test_there_must_be_one_to_begin_with(daemon):
    with pytest.raises(DisconnectedError, match="token is wrong"):
        await anext(watch(lambda: Target(daemon.url, "wrong"), print))


def command(*arguments):
    return [sys.executable, "-P", "-m", "npc_runtime", "top", *arguments]


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="XDG_RUNTIME_DIR is Linux's")
def test_the_command_in_a_pipe(daemon):
    def run(*arguments):
        environment = {**os.environ, "XDG_RUNTIME_DIR": daemon.runtime_folder}
        return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=60, env=environment)

    for options in (("--project", "pytest", "--once"), ("--url", daemon.url, "--token", daemon.token)):
        shown = run(*options)
        assert shown.returncode == 0, shown.stderr
        assert "smollm2-135m" in shown.stdout
        assert "\x1b" not in shown.stdout
    one = run("--project", "pytest", "--once", "--json")
    assert len(one.stdout.splitlines()) == 1
    assert json.loads(one.stdout)["personas"] == 5
    none = run("--project", "nobody")
    assert none.returncode == 1
    assert len(none.stderr.splitlines()) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for one process there")
def test_json_comes_line_by_line_until_ctrl_c(daemon):
    options = ("--json", "--url", daemon.url, "--token", daemon.token)
    process = subprocess.Popen(command(*options), stdout=subprocess.PIPE, text=True)
    try:
        lines = [json.loads(process.stdout.readline()) for _ in range(2)]
        assert 0.5 < lines[1]["at"] - lines[0]["at"] < 10.0
        process.send_signal(signal.SIGINT)
        assert process.wait(10_000 * MS) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
