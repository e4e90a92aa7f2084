"""A daemon from its first line to `welcome`: clients that come while it loads, and what they hear if it does not."""

import asyncio
import contextlib
import itertools
import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from conftest import MS, PROJECT_NUMBERS, RunningDaemon, daemon_environment, wait_until_loaded
from game import line, play
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from npc_runtime.client import Client
from npc_runtime.errors import DisconnectedError
from npc_runtime.persona import shipped_personas
from npc_runtime.running import Target, ask_health

LOADER = """
import hashlib, sys, time, types
from npc_runtime import protocol as wire
from npc_runtime.errors import StartupError
from npc_runtime.recording import Recording
from npc_runtime.replay import replay_voice
from npc_runtime.stage import DaemonInfo

INFO = DaemonInfo("1", "cpu", "none", wire.BaseModelInfo(name="x", sha256="", context=64))

def load_voice(settings, library, server, on_progress):
    try:
        BODY
    finally:
        print("cleaned up", file=sys.stderr, flush=True)
    return replay_voice(Recording(INFO, []), on_step=server.on_step, speed=1.0)

computing = types.ModuleType("npc_runtime.computing")
computing.load_voice = load_voice
sys.modules["npc_runtime.computing"] = computing

from npc_runtime.cli import main
main()
"""
"""The daemon, with something else in place of what loads the base."""

SLOW = "[(on_progress('loading x', n / 40), time.sleep(0.05)) for n in range(41)]"
STUCK = "on_progress('loading x', 0.25); time.sleep(60)"
NATIVE = "on_progress('loading x', 0.25); hashlib.pbkdf2_hmac('sha256', b'', b'', 8_000_000)"
"""Some seconds that no signal interrupts."""


@pytest.fixture
def load(tmp_path):
    """Start a daemon that loads like this."""
    running = []

    def start(body, *options, stderr=subprocess.PIPE):
        script = tmp_path / "slow.py"
        script.write_text(LOADER.replace("BODY", body))
        project = f"startup-{next(PROJECT_NUMBERS)}"
        own = ["--port", "0", "--personas", str(shipped_personas()), "--project", project]
        process = subprocess.Popen(
            [sys.executable, "-P", str(script), "serve", *own, *options],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=daemon_environment(),
        )
        running.append(process)
        return RunningDaemon(process, None, json.loads(process.stdout.readline()), project)

    yield start
    for process in running:
        process.kill()
        process.communicate()


async def wait_in(daemon):
    """A client that says hello and waits, and what it has heard."""
    socket_ = await connect(daemon.url, subprotocols=["npc.v1.json"], compression=None)
    await socket_.send(json.dumps({"type": "hello", "protocol": 1, "token": daemon.token}))
    return socket_, json.loads(await socket_.recv())


async def closed_with(socket_):
    try:
        while True:
            message = json.loads(await asyncio.wait_for(socket_.recv(), 10_000 * MS))
            assert (message["type"], message.get("kind")) == ("event", "model.loading")
    except ConnectionClosed as closed:
        return closed.rcvd.code, closed.rcvd.reason


@pytest.mark.parametrize("subprotocol", ["npc.v1.json", "npc.v1.msgpack"])
async def test_who_comes_while_it_loads_is_told_and_then_welcomed(load, subprotocol):
    daemon = load(SLOW)
    assert daemon.endpoint["base"] == "smollm2-135m"
    started = time.monotonic()
    async with play(daemon, subprotocol) as game:
        seconds = time.monotonic() - started
        kinds = [event["kind"] for event in game.waited]
        shares = [event["progress"] for event in game.waited[:-1]]
        assert kinds == ["model.loading"] * (len(kinds) - 1) + ["model.ready"]
        assert shares == sorted(shares)
        assert len(set(shares)) > 4
        assert len(shares) <= 2 + 4 * seconds, "four a second at most"
        assert "loading x" in {event["message"] for event in game.waited[:-1]}
        assert game.welcome["base"]["name"] == "x"
        await game.send(type="generate", batch=1, lines=[line(1)])
        assert (await game.until("batch.end"))[-1]["failed"] == 1
    async with play(daemon) as game:
        assert game.waited == []


async def test_nothing_moves_and_yet_it_is_told(load):
    """A download that hangs, a weight that takes long: no two seconds without a word."""
    daemon = load(STUCK)
    socket_, _ = await wait_in(daemon)
    async with socket_, asyncio.timeout(20_000 * MS):
        times = []
        while len(times) < 4:
            assert json.loads(await socket_.recv())["kind"] == "model.loading"
            times.append(time.monotonic())
        assert 1.0 < times[-1] - times[-2] < 2.0


async def test_what_is_asked_while_it_loads_is_refused_until_later(load):
    daemon = load(STUCK)
    socket_, _ = await wait_in(daemon)
    async with socket_:
        await socket_.send(json.dumps({"type": "status", "id": 7}))
        answers = (json.loads(await socket_.recv()) for _ in range(9))
        answer = await anext(answer async for answer in answers if answer["type"] == "error")
        assert (answer["re"], answer["code"], answer["retryable"]) == (7, "overload", True)
        assert "still being loaded" in answer["message"]


def test_healthz_says_that_it_loads(load):
    daemon = load(STUCK)
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"http://127.0.0.1:{daemon.endpoint['port']}/healthz")
    with caught.value as answer:
        assert answer.code == 503
        assert json.load(answer)["status"] == "loading"
    assert ask_health(Target(daemon.url, None)).state == "loading"
    with urllib.request.urlopen(f"http://127.0.0.1:{daemon.endpoint['port']}/metrics") as answer:
        assert b"npc_runtime_connections_opened_total" in answer.read()


@pytest.mark.parametrize(
    ("body", "reason", "said"),
    [
        ("time.sleep(1); raise StartupError('No room for it.', 'Make some.')", "No room for it.", "Make some."),
        ("time.sleep(1); raise StartupError('ö' * 200)", "ö" * 60, "ö" * 200),
        ("time.sleep(1); raise KeyError('what?')", "the daemon failed; its log says how", "KeyError: 'what?'"),
        ("time.sleep(1); raise MemoryError", "the daemon failed; its log says how", "MemoryError"),
    ],
)
async def test_who_waits_hears_why_nothing_comes_of_it(load, body, reason, said):
    daemon = load(body)
    socket_, first = await wait_in(daemon)
    assert first["kind"] == "model.loading"
    async with socket_:
        assert await closed_with(socket_) == (1011, reason)
    _, err = await asyncio.to_thread(daemon.process.communicate, timeout=5_000 * MS)
    assert daemon.process.returncode == 1
    assert said in err
    last = err.splitlines()[-1]
    assert last.startswith("npc-runtime: ") or "Error" in last
    assert ask_health(Target(daemon.url, None)).state == "gone"
    assert not Path(daemon.runtime_folder, "npc-runtime", f"{daemon.project}.json").exists()


async def test_the_python_client_says_why(load):
    daemon = load("time.sleep(1); raise StartupError('The base is broken.', 'Fetch it again.')")
    heard = []
    with pytest.raises(DisconnectedError, match=r"\(1011\): The base is broken\."):
        await Client.connect(daemon.url, token=daemon.token, on_loading=heard.append)
    assert heard[0].kind == "model.loading"


def test_the_error_is_on_stderr_though_the_first_line_is_out(load):
    """What a spawner that shows the daemon's stderr needs; nobody has to have read any of it before."""
    daemon = load("time.sleep(0.5); raise StartupError('The base is broken.', 'Fetch it again.')")
    assert daemon.process.wait(5_000 * MS) == 1
    assert daemon.process.stderr.read().endswith("npc-runtime: The base is broken. Fetch it again.\n")
    assert "ERROR The base is broken. Fetch it again." in Path(daemon.endpoint["log"]).read_text()


@pytest.mark.parametrize("body", [STUCK, NATIVE], ids=["interruptible", "native"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_while_it_loads(load, body, number):
    """Clients hear of it in time also if the main thread cannot."""
    daemon = load(body)
    socket_, _ = await wait_in(daemon)
    async with socket_:
        await asyncio.sleep(600 * MS)
        started = time.monotonic()
        daemon.process.send_signal(number)
        assert await closed_with(socket_) == (1012, "the daemon was stopped")
        assert time.monotonic() - started < 2_000 * MS
    _, err = await asyncio.to_thread(daemon.process.communicate, timeout=30_000 * MS)
    if body == STUCK:
        assert time.monotonic() - started < 2_000 * MS
    assert daemon.process.returncode == 0
    assert "Traceback" not in err
    log = Path(daemon.endpoint["log"]).read_text()
    assert log.count("cleaned up") == 1
    assert log.splitlines()[-1].endswith("INFO stopped: the daemon was stopped")


@pytest.mark.parametrize("body", [STUCK, NATIVE.replace("8_000", "800_000")], ids=["interruptible", "native"])
async def test_the_owner_dies_while_it_loads(load, body):
    with subprocess.Popen([sys.executable, "-P", "-c", "input()"], stdin=subprocess.PIPE) as owner:
        daemon = load(body, "--owner-pid", str(owner.pid))
        socket_, _ = await wait_in(daemon)
        async with socket_:
            owner.kill()
            started = time.monotonic()
            assert await closed_with(socket_) == (1012, "the process that owned the daemon is gone")
            await asyncio.to_thread(daemon.process.wait, 10_000 * MS)
            assert time.monotonic() - started < 5_000 * MS
        owner.stdin.close()


def test_a_spawner_may_leave_while_it_loads(load):
    """Its pipes closed after the first line, or never read: the log says on what happened."""
    chatter = "[__import__('logging').getLogger('npc_runtime').info('x' * 900) for n in range(300)]; time.sleep(0.5)"
    for closes in (True, False):
        daemon = load(chatter)
        if closes:
            daemon.process.stdout.close()
            daemon.process.stderr.close()
        wait_until_loaded(daemon)
        assert daemon.stop() == 0
        assert Path(daemon.endpoint["log"]).read_text().count("x" * 900) == 300
        for pipe in (daemon.process.stdout, daemon.process.stderr):
            pipe.close()


async def test_many_come_and_go_while_it_loads(load):
    daemon = load(SLOW)
    gone = [await wait_in(daemon) for _ in range(5)]
    for socket_, _ in gone:
        socket_.transport.abort()
    async with contextlib.AsyncExitStack() as stack:
        games = [await stack.enter_async_context(play(daemon)) for _ in range(3)]
        assert len({game.welcome["session"] for game in games}) == 3
        await games[0].send(type="status", id=1)
        status = (await games[0].until("reply"))[-1]["body"]
        assert status["connections"] == 3


def test_what_is_wrong_at_first_sight_comes_before_the_first_line(make_daemon, tmp_path):
    taken = tmp_path / "taken"
    taken.touch()
    for options, message in [
        (["--personas", str(tmp_path / "none")], "no such folder"),
        (["--base", "a/b/c"], "no such folder"),
        (["--base", str(tmp_path)], "no config.json"),
        (["--allow-host", "a b"], "is no host name"),
        (["--record", str(taken)], "there already"),
        (["--record", str(tmp_path / "no" / "file")], "there is no folder"),
        (["--replay", str(taken)], "the file is empty"),
        (["--replay", str(tmp_path / "none")], "--replay"),
        (["--replay", str(taken), "--replay-speed", "0"], "is no speed"),
        (["--replay", str(taken), "--replay-speed", "nan"], "is no speed"),
    ]:
        daemon = make_daemon("--personas", str(shipped_personas()), *options)
        assert (daemon.process.returncode, daemon.endpoint) == (1, {}), options
        said = daemon.read_log().splitlines()
        assert message in said[-1]
        assert len(said) == 1


async def test_the_embedded_base_is_loaded_like_that(make_daemon):
    """For real: no client is left without a word for longer than two seconds, imports included."""
    started = time.monotonic()
    daemon = make_daemon("--personas", str(shipped_personas()), "--dtype", "float32", waits=False)
    first_line_s = time.monotonic() - started
    heard = [(time.monotonic(), None)]
    async with await Client.connect(
        daemon.url, token=daemon.token, on_loading=lambda event: heard.append((time.monotonic(), event))
    ) as client:
        loaded_s = time.monotonic() - started
        assert (await client.say("odo", "Hello.")).reason in ("stop", "length")
    print(f"\nfirst line {first_line_s:.2f} s, loaded {loaded_s:.2f} s")
    assert first_line_s < loaded_s
    gaps = [after[0] - before[0] for before, after in itertools.pairwise(heard)]
    assert max(gaps) < 4_000 * MS
    by_label = {}
    for _, event in heard[1:-1]:
        by_label.setdefault(event.message, []).append(event.progress)
    assert all(shares == sorted(shares) for shares in by_label.values())
    assert heard[-1][1].kind == "model.ready"
