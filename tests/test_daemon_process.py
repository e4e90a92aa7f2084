"""A daemon's process before and without anything that computes: owner, lock, log, and every way to end."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import MS

from npc_runtime.daemon_process import LogOptions, run_process
from npc_runtime.discovery import Endpoint, read_endpoint, write_endpoint

pytestmark = pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="XDG_RUNTIME_DIR is Linux's")

DAEMON = """
import json, logging, os, signal, sys, time
from npc_runtime.daemon_process import LogOptions, run_process
from npc_runtime.discovery import Endpoint, write_endpoint
from npc_runtime.stopping import leave_when_asked

options = json.loads(sys.argv[1])
leave_when_asked()

def announce(process):
    write_endpoint(process.project, Endpoint(4711, os.getpid(), "secret", 1, "base"))
    print("serves", flush=True)
    process.log.settle()

def serve(process):
    BODY

os._exit(run_process(serve, project=options["project"], owner_pid=options.get("owner"), log=LogOptions()))
"""


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


@pytest.fixture
def start(tmp_path):
    running = []

    def start_one(body="announce(process); time.sleep(60)", waits=True, **options):
        code = DAEMON.replace("BODY", body)
        command = [sys.executable, "-P", "-c", code, json.dumps({"project": "game", **options})]
        pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
        process = subprocess.Popen(command, text=True, **pipes)
        running.append(process)
        if waits:
            assert process.stdout.readline() == "serves\n", process.stderr.read()
        return process

    yield start_one
    for process in running:
        process.kill()
        process.communicate()


@pytest.fixture
def owner():
    process = subprocess.Popen([sys.executable, "-P", "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


def read_log(tmp_path):
    return (tmp_path / "npc-runtime" / "log" / "game.log").read_text()


def test_the_second_is_told_who_holds_the_project(start, tmp_path):
    first = start()
    started = time.monotonic()
    second = start(waits=False)
    out, err = second.communicate(timeout=5_000 * MS)
    assert time.monotonic() - started < 2_000 * MS
    assert (second.returncode, out) == (1, "")
    assert len(err.splitlines()) == 1
    for part in ("npc-runtime: ", "project 'game'", f"process {first.pid}", "port 4711", "since 20", "--project"):
        assert part in err
    assert str(second.pid) not in read_log(tmp_path), "it leaves the first one's log alone"
    assert read_endpoint("game").pid == first.pid
    start(project="other")


def test_one_that_loads_holds_it_too(start):
    first = start("print('serves', flush=True); time.sleep(60)")
    _, err = start(waits=False).communicate(timeout=5_000 * MS)
    assert f"process {first.pid}, still loading" in err


def test_of_two_at_once_one_serves(start):
    both = [start(waits=False) for _ in range(2)]
    until = time.monotonic() + 10_000 * MS
    while not (ended := [process for process in both if process.poll() is not None]) and time.monotonic() < until:
        time.sleep(20 * MS)
    (loser,) = ended
    assert loser.returncode == 1
    (winner,) = [process for process in both if process is not loser]
    assert winner.stdout.readline() == "serves\n"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_what_ended_leaves_the_project_free(start, number):
    """Killed, it leaves its files; nobody is fooled by them, and the next one takes over without a word."""
    first = start()
    first.send_signal(number)
    assert first.wait(2_000 * MS) == (-number if number == signal.SIGKILL else 0)
    assert read_endpoint("game") is None
    second = start()
    assert read_endpoint("game").pid == second.pid


def test_what_was_left_behind_is_removed_before_anything_is_loaded(start):
    """By one of a process id that somebody has again: clients that come now must not be sent to its port."""
    write_endpoint("game", Endpoint(1, os.getpid(), "old", 1, "base"))
    start("print('serves', flush=True); time.sleep(60)")
    assert read_endpoint("game") is None


def test_without_a_folder_for_it_there_is_no_lock_but_a_warning(capfd, monkeypatch, tmp_path):
    (tmp_path / "npc-runtime").write_text("a file")
    served = []
    assert run_process(lambda process: served.append(process.lock), project="game", log=LogOptions("-")) == 0
    assert served == [None]
    assert "a second daemon would not be noticed" in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_it_ends_with_its_owner(start, owner, tmp_path, number):
    """Whatever ended that; the owner here stays a zombie until it is waited for."""
    daemon = start(owner=owner.pid)
    owner.send_signal(number)
    started = time.monotonic()
    assert daemon.wait(5_000 * MS) == 0
    assert time.monotonic() - started < 2_500 * MS
    assert read_log(tmp_path).count("WARNING the owner is gone pid=") == 1
    assert "stopped: the process that owned the daemon is gone" in read_log(tmp_path)
    assert not list((tmp_path / "npc-runtime").glob("*.lock"))


@pytest.mark.parametrize(
    "body",
    [
        "signal.signal(signal.SIGTERM, lambda *_: None); announce(process); time.sleep(60); time.sleep(60)",
        "import ctypes; libc = ctypes.CDLL(None); announce(process); [libc.sleep(60) for _ in iter(int, 1)]",
        "announce(process)\n    try:\n        time.sleep(60)\n    finally:\n        time.sleep(60)",
    ],
)
def test_what_does_not_stop_is_ended_with_its_owner(start, owner, body):
    daemon = start(body, owner=owner.pid)
    owner.kill()
    started = time.monotonic()
    assert daemon.wait(10_000 * MS) in (0, 1)
    assert time.monotonic() - started < 5_000 * MS


def test_it_outlives_others(start, owner):
    daemon = start(owner=os.getpid())
    owner.kill()
    time.sleep(1_300 * MS)
    assert daemon.poll() is None


def test_an_owner_that_is_gone_is_said(start, owner):
    owner.kill()
    daemon = start(waits=False, owner=owner.pid)
    out, err = daemon.communicate(timeout=5_000 * MS)
    assert (daemon.returncode, out) == (1, "")
    assert err.startswith(f"npc-runtime: The owner, process {owner.pid}, is not running.")
    assert len(err.splitlines()) == 1


def test_without_any_streams(tmp_path):
    """As a spawner without a window starts it."""
    body = "import socket; assert socket.socket().fileno() > 2; announce(process); logging.warning('%s', sys.stdout)"
    command = [sys.executable, "-P", "-c", DAEMON.replace("BODY", body), '{"project": "game"}']
    shell = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command]
    assert subprocess.run(shell, timeout=10_000 * MS).returncode == 0
    assert read_log(tmp_path).endswith("WARNING None\n")


def test_an_error_at_the_start_is_a_line_on_stderr_and_in_the_log(start, tmp_path):
    daemon = start(
        "from npc_runtime.errors import StartupError; raise StartupError('No base.', 'Name one.')", waits=False
    )
    _, err = daemon.communicate(timeout=5_000 * MS)
    assert daemon.returncode == 1
    assert err == "npc-runtime: No base. Name one.\n"
    assert read_log(tmp_path).endswith("ERROR No base. Name one.\n")


@pytest.mark.parametrize("before", ["", "announce(process); "])
def test_a_defect_is_in_the_log(start, tmp_path, before):
    daemon = start(before + "raise KeyError('what?')", waits=False)
    _, err = daemon.communicate(timeout=5_000 * MS)
    assert daemon.returncode == 1
    text = read_log(tmp_path)
    assert "CRITICAL the daemon ends by a defect" in text
    assert text.endswith("KeyError: 'what?'\n")
    assert text.count("Traceback") == 1
    assert err.count("Traceback") == (0 if before else 1)


def test_a_crash_is_in_the_log(start, tmp_path):
    daemon = start("announce(process); import ctypes; ctypes.string_at(0)")
    assert daemon.wait(5_000 * MS) == -signal.SIGSEGV
    assert "Fatal Python error: Segmentation fault" in read_log(tmp_path)


def test_the_log_can_be_elsewhere(tmp_path, capfd):
    path = tmp_path / "deep" / "er" / "a.log"
    assert run_process(lambda process: None, project="game", log=LogOptions(str(path))) == 0
    assert " starts pid=" in path.read_text()
    assert run_process(lambda process: None, project="game", log=LogOptions(str(tmp_path))) == 1
    assert f"npc-runtime: The log file {tmp_path} cannot be written" in capfd.readouterr().err
