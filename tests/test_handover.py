"""A daemon whose device is lost: the next process is found where the first one was, and there is an end to it."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from conftest import MS, RUNTIME_FOLDER, RunningDaemon, daemon_environment, discard
from game import line, play
from websockets.exceptions import ConnectionClosed

from npc_runtime import computing, handover
from npc_runtime.daemon import run_daemon
from npc_runtime.daemon_process import DaemonProcess
from npc_runtime.discovery import Endpoint, write_endpoint
from npc_runtime.errors import EngineDied, StartupError
from npc_runtime.handover import Handover
from npc_runtime.logs import Log
from npc_runtime.persona import shipped_personas
from npc_runtime.project_lock import ProjectLock, is_held
from npc_runtime.settings import Settings

SCRIPT = """
import ctypes, os, pathlib, torch
from npc_runtime.engine import engine, faults, runner
from npc_runtime import handover

marker = pathlib.Path(MARKER)
is_broken = ALWAYS or not marker.exists()
marker.touch()
handover.MAX_REPLACEMENTS = 2

def fail(self, rows):
    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

def probe(device):
    raise faults.DeviceLost("it does not answer")

def hang(self, rows):
    while True:
        ctypes.CDLL(None).pause()  # in C, without Python's lock, as in a driver

if is_broken:
    runner.Runner.forward, engine.probe_device = hang if TICKS else fail, probe
    engine.TICK_S, engine.MAX_STEP_TICKS = 0.1, {"cpu": TICKS or 600}
handover.CAN_REPLACE = CAN_REPLACE
print("handed over" if handover.VARIABLE in os.environ else "started", file=__import__("sys").stderr, flush=True)

from npc_runtime.cli import main
main()
"""


@pytest.fixture
def broken_daemon(tmp_path):
    """`npc-runtime serve` on a device that is lost at the first step: of the first process, or of every one."""
    running = []

    def start(*extra, always=False, ticks=None, can_replace=True, stderr=None):
        """With `ticks` the device does not fail but hang, and is given up after so many."""
        values = dict(MARKER=str(tmp_path / "marker"), ALWAYS=always, TICKS=ticks, CAN_REPLACE=can_replace)
        script = tmp_path / "broken.py"
        script.write_text("\n".join(f"{name} = {value!r}" for name, value in values.items()) + SCRIPT)
        options = ["--port", "0", "--personas", str(shipped_personas()), "--dtype", "float32", "--project", "broken"]
        options += extra
        log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115 - discard() closes it
        process = subprocess.Popen(
            [sys.executable, "-P", str(script), "serve", *options],
            stdout=subprocess.PIPE,
            stderr=stderr or log,
            text=True,
            env=daemon_environment(),
        )
        daemon = RunningDaemon(process, log, json.loads(process.stdout.readline()), "broken")
        running.append(daemon)
        return daemon

    yield start
    for daemon in running:
        discard(daemon)


def lock_path():
    return Path(RUNTIME_FOLDER.name, "npc-runtime", "broken.lock")


def runtime_file():
    path = os.path.join(RUNTIME_FOLDER.name, "npc-runtime", "broken.json")
    with contextlib.suppress(FileNotFoundError), open(path) as file:
        return json.load(file)


async def speak(daemon, count=1, waited=None):
    """A batch on a connection of its own: its ends, and the close that follows a failed one."""
    async with play(daemon) as game:
        if waited is not None:
            waited += [event["kind"] for event in game.waited]
        await game.send(type="generate", batch=1, lines=[line(n, sampling={"max_tokens": 8}) for n in range(count)])
        ends = [m for m in await game.until("batch.end") if m["type"] == "line.end"]
        if ends[0]["reason"] != "error":
            return ends, None
        with pytest.raises(ConnectionClosed) as caught:
            await game.until("nothing")
        return ends, caught.value.rcvd


async def test_a_client_reconnects_with_what_it_knows(broken_daemon):
    """Same port, same token, same process id; one line on stdout; and the new process stops like any other."""
    daemon = broken_daemon()
    ends, close = await speak(daemon, 12)
    assert [end["line"] for end in ends] == list(range(12))
    assert {end["reason"] for end in ends} == {"error"}
    assert all(end["error"]["retryable"] and "send the line again" in end["error"]["hint"] for end in ends)
    assert (close.code, close.reason) == (1012, "the daemon restarts; connect again")
    assert runtime_file() == daemon.endpoint, "it stays while nobody serves"
    ends, _ = await speak(daemon, waited=(waited := []))
    assert set(waited) == {"model.loading", "model.ready"}
    assert ends[0]["reason"] in ("stop", "length")
    assert runtime_file() == daemon.endpoint
    assert await asyncio.to_thread(daemon.stop) == 0
    assert daemon.process.stdout.read() == ""
    assert runtime_file() is None
    said = daemon.read_log().splitlines()
    assert (said.count("started"), said.count("handed over")) == (1, 1)


async def test_owner_lock_and_log_go_on(broken_daemon, tmp_path):
    """In the process that takes over: the project is never free, the owner is watched, and no line is logged twice."""
    with subprocess.Popen([sys.executable, "-P", "-c", "input()"], stdin=subprocess.PIPE) as owner:
        log = tmp_path / "own.log"
        options = ["--owner-pid", str(owner.pid), "--log-file", str(log)]
        daemon = broken_daemon(*options, stderr=subprocess.PIPE)
        daemon.process.stderr.close()
        await speak(daemon)
        assert is_held(lock_path())
        while log.read_text().count(" starts pid=") < 2:
            assert is_held(lock_path())
            await asyncio.sleep(10 * MS)
        ends, _ = await speak(daemon)
        assert ends[0]["reason"] in ("stop", "length")
        owner.kill()
        started = time.monotonic()
        assert await asyncio.to_thread(daemon.process.wait, 10_000 * MS) == 0
        assert time.monotonic() - started < 5_000 * MS
        owner.stdin.close()
    assert runtime_file() is None
    assert not lock_path().exists()
    said = [line.split(" ", 2)[2] for line in log.read_text().splitlines() if line[:2] == "20"]
    assert sum(line.startswith("INFO npc-runtime ") for line in said) == 2
    assert sum("the owner is gone" in line for line in said) == 1
    assert sum(" personas: ready after" in line for line in said) == 2


async def test_a_device_that_hangs_is_left_with_the_process(broken_daemon):
    """Its thread is stuck for good; the new process has none such, on the same port and under the same id."""
    daemon = broken_daemon(always=False, ticks=10)
    ends, close = await speak(daemon, 12)
    assert [end["line"] for end in ends] == list(range(12))
    assert {(end["reason"], end["error"]["retryable"]) for end in ends} == {("error", True)}
    assert close.code == 1012
    ends, _ = await speak(daemon)
    assert ends[0]["reason"] in ("stop", "length")
    assert runtime_file() == daemon.endpoint
    assert await asyncio.to_thread(daemon.stop) == 0
    assert "a step does not come back" in daemon.read_log()
    assert "in hang" in daemon.read_log()


async def test_a_device_that_hangs_ends_the_daemon_where_there_is_no_exec(broken_daemon):
    daemon = broken_daemon(always=True, ticks=10, can_replace=False)
    ends, _ = await speak(daemon)
    assert ends[0]["reason"] == "error"
    assert await asyncio.to_thread(daemon.process.wait, 10_000 * MS) == 1
    assert daemon.read_log().splitlines()[-1].startswith("npc-runtime: The engine thread died.")
    assert runtime_file() is None


async def test_a_daemon_that_hangs_can_be_stopped(broken_daemon):
    """Before anybody has noticed that it hangs."""
    daemon = broken_daemon(always=True, ticks=10_000)
    async with play(daemon) as game:
        await game.send(type="generate", batch=1, lines=[line(0, sampling={"max_tokens": 8})])
        await game.until("accepted")
        await asyncio.sleep(200 * MS)
        assert await asyncio.to_thread(daemon.stop) == 0
    assert runtime_file() is None


async def test_a_device_that_always_fails_ends_the_daemon(broken_daemon):
    daemon = broken_daemon(always=True)
    for _ in range(3):
        ends, close = await speak(daemon)
        assert ends[0]["reason"] == "error"
        assert close.code == 1012
    assert close.reason == "the daemon was stopped"
    assert await asyncio.to_thread(daemon.process.wait, 10_000 * MS) == 1
    assert daemon.process.stdout.read() == ""
    last = daemon.read_log().splitlines()[-1]
    assert last.startswith("npc-runtime: The engine thread died, and so it did in the 2 processes before this one.")
    assert runtime_file() is None
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", daemon.endpoint["port"])):
        pass


async def test_who_asks_it_to_stop_meanwhile_is_obeyed(broken_daemon):
    daemon = broken_daemon()
    await speak(daemon)
    daemon.process.send_signal(signal.SIGTERM)
    status = await asyncio.to_thread(daemon.process.wait, 30_000 * MS)
    assert status in (0, -signal.SIGTERM), daemon.read_log()
    assert "Traceback" not in daemon.read_log().partition("a new process takes over")[2]


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            torch.AcceleratorError("CUDA error: unspecified launch failure\nhints"),
            StartupError,
            "unspecified launch failure.",
        ),
        (RuntimeError("a defect"), RuntimeError, "a defect"),
    ],
)
def test_a_device_that_fails_while_the_base_is_loaded_is_said(bound, monkeypatch, tmp_path, error, kind, message):
    """By a process that took over: clients must not be sent on to a port that nobody serves."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    path = write_endpoint("broken", Endpoint(4780, os.getpid(), "t", 1, "base"))

    def fail(*_):
        assert path.exists()
        raise error

    monkeypatch.setattr(computing, "_load", fail)
    settings = Settings("base", tmp_path, "127.0.0.1", 0, "auto", None, True)
    process = DaemonProcess("broken", Log(), taken=Handover(bound, "t", (1.0,)))
    try:
        with pytest.raises(kind, match=message):
            run_daemon(settings, process, lambda: contextlib.nullcontext(print))
    finally:
        process.log.close()
    assert not path.exists()


@pytest.fixture
def bound():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        yield sock


def leave(monkeypatch, sock, **changes):
    passed = {"pid": os.getpid(), "token": "t", "replaced_at": [1.0], "lock_fd": None, **changes}
    if "fd" not in passed:
        passed["fd"] = os.dup(sock.fileno())
    monkeypatch.setenv(handover.VARIABLE, json.dumps(passed))
    return passed


def test_what_was_passed_on_is_taken_once(bound, monkeypatch):
    passed = leave(monkeypatch, bound)
    os.set_inheritable(passed["fd"], True)
    taken = Handover.take()
    assert (taken.token, taken.replaced_at) == ("t", (1.0,))
    assert taken.sock.getsockname() == bound.getsockname()
    assert not taken.sock.get_inheritable(), "nor do the daemon's own children get it"
    assert handover.VARIABLE not in os.environ
    assert Handover.take() is None
    taken.sock.close()


def test_the_lock_is_passed_on(bound, monkeypatch, tmp_path):
    lock = ProjectLock.take(tmp_path / "game.lock")
    os.set_inheritable(lock.fd, True)
    leave(monkeypatch, bound, lock_fd=lock.fd)
    taken = Handover.take()
    assert taken.lock_fd == lock.fd
    assert not os.get_inheritable(lock.fd)
    taken.sock.close()
    successor = Handover(bound, "t", (), lock.fd).successor()
    assert successor.lock_fd == lock.fd
    successor.sock.close()
    lock.release()


@pytest.mark.parametrize("changes", [{"pid": 1}, {"fd": 9_999}, {"fd": "x"}, {"replaced_at": 3}, {"lock_fd": 9_999}])
def test_what_is_not_for_this_process_is_left_alone(bound, monkeypatch, changes):
    own = leave(monkeypatch, bound)["fd"]
    leave(monkeypatch, bound, **{"fd": own, **changes})
    assert Handover.take() is None
    assert handover.VARIABLE not in os.environ
    os.close(own)


@pytest.mark.parametrize("text", ["", "no json", "[]", "{}", "null"])
def test_nonsense_in_the_environment_is_ignored(monkeypatch, text):
    monkeypatch.setenv(handover.VARIABLE, text)
    assert Handover.take() is None


def test_processes_are_replaced_so_many_times(bound):
    """Those of the day before do not count."""
    replaced_at = (time.monotonic() - 86_400, time.monotonic() - 86_000)
    for _ in range(handover.MAX_REPLACEMENTS):
        successor = Handover(bound, "t", replaced_at).successor()
        with successor.sock as sock:
            assert (sock.getsockname(), successor.token) == (bound.getsockname(), "t")
        replaced_at = successor.replaced_at
    with pytest.raises(EngineDied, match="processes before this one"):
        Handover(bound, "t", replaced_at).successor()


def test_without_exec_the_daemon_stops(bound, monkeypatch):
    monkeypatch.setattr(handover, "CAN_REPLACE", False)
    with pytest.raises(EngineDied, match=r"died. The log above"):
        Handover(bound, "t").successor()
