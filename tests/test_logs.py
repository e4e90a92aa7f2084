"""What the log says, to whom, and that nobody can stop the daemon by not reading it."""

import asyncio
import json
import logging
import os
import subprocess
import sys
import threading
import time

import pytest
from conftest import MS

from npc_runtime.errors import StartupError
from npc_runtime.logs import FILE_BYTES, OLDER_FILES, Log, pairs

logger = logging.getLogger("npc_runtime.test")


@pytest.fixture
def log(tmp_path):
    own = Log()
    own._drop_stderr(own._stderr)  # which is the tests' own
    own.open_file(tmp_path / "logs" / "game.log", is_wanted=False)
    yield own
    own.close()


def lines(log):
    return log.path.read_text(encoding="utf-8").splitlines()


def test_a_line_has_time_level_and_message(log):
    logger.info("line %s", pairs(line=7, npc="odo", ms=41.25, adapter=None, reason="stop"))
    logger.warning("the king is dead")
    first, second = (line.split(" ", 3) for line in lines(log))
    assert first[2:] == ["INFO", "line line=7 npc=odo ms=41.2 reason=stop"]
    assert second[2:] == ["WARNING", "the king is dead"]
    time.strptime(f"{first[0]} {first[1].split('.')[0]}", "%Y-%m-%d %H:%M:%S")


def test_pairs_can_be_told_apart():
    assert pairs(a="", b="two words", c='say "hi"', d="x=y", e="back\\slash") == (
        r'a="" b="two words" c="say \"hi\"" d="x=y" e="back\\slash"'
    )
    assert pairs(text="x" * 1_000) == "text=" + "x" * 200 + "…"
    assert pairs() == ""


@pytest.mark.parametrize("text", ["a\nb", "a\r\nb", "\x1b[2J", "a\x85b", "a\u2028b", "a\x00b", "\ud800"])
def test_what_a_client_sends_makes_no_line_and_moves_no_cursor(log, text):
    logger.info("line %s of %s", pairs(line=text), text)
    (line,) = lines(log)
    assert line.isprintable()
    assert line.isascii()


def test_a_message_is_bounded(log):
    logger.info("x" * 100_000)
    assert len(lines(log)[0]) < 5_000


def test_the_token_is_never_shown(log):
    """Not by a message, an argument, a traceback; the same holds for stderr, whose lines are made alike."""
    log.hide("s3cret-token")
    logger.info("token %s and s3cret-token", "s3cret-token")
    try:
        raise ValueError("hello with s3cret-token")
    except ValueError:
        logger.exception("failed")
    text = log.path.read_text()
    assert "s3cret" not in text
    assert text.count("[secret]") == 4  # the traceback shows the line of code too
    assert "ValueError: hello with [secret]" in text


def test_only_the_owner_may_read_it(log):
    assert log.path.stat().st_mode & 0o777 == 0o600
    assert log.path.parent.stat().st_mode & 0o777 == 0o700


def test_it_is_bounded(log):
    text = "x" * 3_900
    for _ in range((OLDER_FILES + 3) * FILE_BYTES // len(text)):
        logger.info(text)
    files = sorted(log.path.parent.iterdir())
    assert [path.name for path in files] == ["game.log", "game.log.1", "game.log.2"]
    assert all(path.stat().st_size <= FILE_BYTES and path.stat().st_mode & 0o777 == 0o600 for path in files)


def test_what_nobody_caught_is_in_it(log):
    def fail():
        raise ValueError("in a thread")

    async def fail_in_a_callback():
        asyncio.get_running_loop().call_soon(lambda: 1 / 0)
        await asyncio.sleep(0.01)

    thread = threading.Thread(target=fail, name="odd one")
    thread.start()
    thread.join()
    asyncio.run(fail_in_a_callback())
    sys.excepthook(KeyError, KeyError("at the end"), None)
    text = log.path.read_text()
    assert "CRITICAL thread odd one ended by an error" in text
    assert "ValueError: in a thread" in text
    assert "ZeroDivisionError" in text
    assert "KeyError: 'at the end'" in text


def test_what_libraries_have_to_say(log):
    logging.getLogger("websockets.server").info("connection open")
    logging.getLogger("watchfiles.main").info("3 changes detected")
    logging.getLogger("somebody").debug("details")
    logger.debug("details")
    assert lines(log) == []
    logging.getLogger("somebody").warning("heed")
    assert lines(log)[0].endswith("WARNING heed")


@pytest.mark.parametrize(("level", "count"), [("DEBUG", 3), ("INFO", 2), ("ERROR", 1)])
def test_levels_are_of_our_own_modules(tmp_path, level, count):
    log = Log(logging.getLevelNamesMapping()[level])
    log.open_file(tmp_path / "game.log", is_wanted=True)
    for say in (logger.debug, logger.info, logger.error, logging.getLogger("numba").debug):
        say("said")
    found = lines(log)
    log.close()
    assert len(found) == count


def test_after_close_all_is_as_before(tmp_path):
    before = (sys.excepthook, threading.excepthook, sys.unraisablehook, logging.getLogger().handlers[:])
    log = Log()
    log.open_file(tmp_path / "game.log", is_wanted=True)
    log.close()
    assert (sys.excepthook, threading.excepthook, sys.unraisablehook, logging.getLogger().handlers[:]) == before


@pytest.mark.skipif(os.name != "posix", reason="a folder in the place of a file")
def test_a_file_that_cannot_be_written(tmp_path, capfd):
    log = Log()
    (tmp_path / "folder").mkdir()
    log.open_file(tmp_path / "folder", is_wanted=False)
    assert log.path is None
    logger.info("on we go")
    with pytest.raises(StartupError, match=r"folder cannot be written .*--log-file"):
        log.open_file(tmp_path / "folder", is_wanted=True)
    log.close()
    said = capfd.readouterr().err.splitlines()
    assert f"The log file {tmp_path / 'folder'} cannot be written" in said[0]
    assert said[1].endswith("INFO on we go")


SPAWNED = """
import ctypes, json, logging, os, sys, threading, time
from pathlib import Path
from npc_runtime.logs import Log, fill_standard_files

fill_standard_files()
log = Log()
log.open_file(Path(sys.argv[1]), is_wanted=True)
logger = logging.getLogger("npc_runtime.test")

def say(count):
    started = time.monotonic()
    for number in range(count):
        logger.info("%d %s", number, "x" * 1_000)
    return time.monotonic() - started

"""


@pytest.fixture
def spawn(tmp_path):
    running = []

    def start(code, **pipes):
        command = [sys.executable, "-P", "-c", SPAWNED + code, str(tmp_path / "game.log")]
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **pipes))
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def test_a_full_pipe_stops_nobody(tmp_path, spawn):
    """Before the first line and after it, ours and a C library's; nobody reads stderr."""
    code = """
seconds = say(500)
log.settle()
ctypes.CDLL(None).write(2, b"c" * 100_000, 100_000)
logger.info("the last one")
print(json.dumps(seconds), flush=True)
log.close()
"""
    process = spawn(code, stderr=subprocess.PIPE)
    seconds = json.loads(process.stdout.readline())
    process.wait(10_000 * MS)
    assert seconds < 2_000 * MS
    text = (tmp_path / "game.log").read_text()
    assert sum(" INFO " in line for line in text.splitlines()) == 501
    assert "c" * 100_000 in text
    assert len(process.stderr.read()) >= 40_000


def test_a_pipe_that_was_closed_stops_nobody(tmp_path, spawn):
    code = """
print("ready", flush=True)
input()
say(3)
log.settle()
ctypes.CDLL(None).write(2, b"from C\\n", 7)
say(3)
log.close()
print("done", flush=True)
"""
    process = spawn(code, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == "ready\n"
    process.stderr.close()
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "done\n"
    assert process.wait(10_000 * MS) == 0
    text = (tmp_path / "game.log").read_text()
    assert text.count(" INFO ") == 6
    assert "from C\n" in text


def test_the_pipe_has_what_came_before_the_first_line(tmp_path, spawn):
    code = """
logger.info("before")
log.settle()
logger.info("after")
os.write(2, b"raw\\n")
log.close()
"""
    process = spawn(code, stderr=subprocess.PIPE)
    _, said = process.communicate(timeout=10_000 * MS)
    assert said.count("\n") == 1
    assert said.endswith("INFO before\n")
    assert [line.split()[-1] for line in (tmp_path / "game.log").read_text().splitlines()] == ["before", "after", "raw"]


def test_a_file_as_stderr_has_all_of_it(tmp_path, spawn):
    with (tmp_path / "err").open("w") as file:
        process = spawn("logger.info('before'); log.settle(); logger.info('after'); log.close()", stderr=file)
        process.communicate(timeout=10_000 * MS)
    assert (tmp_path / "err").read_text() == (tmp_path / "game.log").read_text()
    assert (tmp_path / "err").read_text().count("INFO") == 2


def test_the_log_itself_as_stderr_has_it_once(tmp_path, spawn):
    """As in a process that takes the place of another one; rotation takes stderr along."""
    with (tmp_path / "game.log").open("a") as file:
        code = "log.settle(); say(2_500); os.write(2, b'raw\\n'); log.close()"
        process = spawn(code, stderr=file)
        process.communicate(timeout=10_000 * MS)
    text = (tmp_path / "game.log").read_text()
    assert (tmp_path / "game.log.1").exists()
    assert text.splitlines()[-2].split()[3] == "2499"
    assert text.splitlines()[-1] == "raw"
    assert text.count(" 2499 ") == 1


def test_without_any_streams(tmp_path):
    """As a spawner without a window starts it; what the daemon opens must not become its stderr."""
    code = """
import socket
logger.info("here")
sock = socket.socket()
assert sock.fileno() > 2
log.settle()
say(1)
log.close()
"""
    command = [sys.executable, "-P", "-c", SPAWNED + code, str(tmp_path / "game.log")]
    shell = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command]
    assert subprocess.run(shell, timeout=10_000 * MS).returncode == 0
    assert (tmp_path / "game.log").read_text().count("INFO") == 2
