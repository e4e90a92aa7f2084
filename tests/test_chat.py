"""`npc-runtime chat`: the conversation, the line that is cancelled, the pipe and the terminal."""

import asyncio
import io
import os
import subprocess
import sys
import time
from itertools import pairwise

import pytest
from conftest import MS
from rich.console import Console

from npc_runtime.chat import Reply, Talk, printable
from npc_runtime.chat_terminal import ChatTerminal, converse
from npc_runtime.client import RequestError
from npc_runtime.discovery import Endpoint, write_endpoint
from npc_runtime.errors import DisconnectedError, PersonaUnknown
from npc_runtime.protocol import ErrorInfo, LineEnd, Timing, Usage
from npc_runtime.running import Target

POSIX = pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="pty, and XDG_RUNTIME_DIR, which is Linux's")


def command(*arguments):
    return [sys.executable, "-P", "-m", "npc_runtime", "chat", *arguments]


def run(*arguments, said, **environment):
    settings = {"capture_output": True, "text": True, "timeout": 120, "env": {**os.environ, **environment}}
    return subprocess.run(command(*arguments), input=said, **settings)


def test_nothing_that_was_said_steers_the_terminal():
    assert printable("a\x1b[2Jb\r\x07\x9b\u202ec\td\né🜁") == "a\ufffd[2Jb\ufffd\ufffd\ufffd\ufffdc\td\né🜁"


async def remembered(talk):
    return [turn.content for turn in await talk._client.history("chat")]


async def test_the_npc_remembers_what_was_answered(daemon):
    talk = Talk(lambda: Target(daemon.url, daemon.token), "odo")
    assert (await talk.open()).display_name == "Odo"
    assert await talk.take_back() is None
    seen = []
    first = await talk.say("Hello", 1, seen.append)
    assert first.is_said
    assert first.text.startswith(seen[1])
    assert all(later.startswith(earlier) for earlier, later in pairwise(seen))
    second = await talk.say("What did you say?", 2, seen.append)
    assert second.end.seed == 2
    assert await remembered(talk) == ["Hello", first.text, "What did you say?", second.text]
    with pytest.raises(RequestError, match="empty"):
        await talk.say(" ", 3, seen.append)
    assert await talk.take_back() == " "
    assert len(await remembered(talk)) == 4
    await talk.close()


async def test_again_asks_the_same_and_forgets_the_first_answer(daemon):
    talk = Talk(lambda: Target(daemon.url, daemon.token), "odo")
    await talk.open()
    hello = await talk.say("Hello", 1, print)
    first = await talk.say("Who are you?", 2, print)
    assert await talk.take_back() == await talk.take_back() == "Who are you?"
    assert await remembered(talk) == ["Hello", hello.text]
    again = await talk.say("Who are you?", 2, print)
    assert (again.text, again.end.prompt_hash) == (first.text, first.end.prompt_hash)
    await talk.close()


async def test_a_lost_connection_is_made_again_and_nothing_is_forgotten(daemon):
    found = []

    def find():
        found.append(1)
        return Target(daemon.url, daemon.token)

    talk = Talk(find, "odo")
    await talk.open()
    first = await talk.say("Hello", 1, print)
    await talk.close()
    second = await talk.say("What did you say?", 2, print)
    assert await remembered(talk) == ["Hello", first.text, "What did you say?", second.text]
    await talk.close()
    await talk.take_back()
    assert await remembered(talk) == ["Hello", first.text]
    assert len(found) == 3
    await talk.close()
    talk = Talk(lambda: Target("ws://127.0.0.1:9/v1", None), "odo")
    with pytest.raises(DisconnectedError, match="No daemon answers"):
        await talk.open()


async def test_who_is_not_there_cannot_be_talked_to(daemon):
    talk = Talk(lambda: Target(daemon.url, daemon.token), "nobody")
    with pytest.raises(PersonaUnknown, match=r"no persona 'nobody'\. There are brom, marta, odo"):
        await talk.open()
    await talk.close()


async def test_a_cancelled_task_cancels_the_line_and_no_more(make_persona, make_daemon, tmp_path):
    make_persona("bard", limits={"soft_words": 400, "hard_tokens": 900})
    daemon = make_daemon("--personas", str(tmp_path / "personas"), "--project", "bard")
    talk = Talk(lambda: Target(daemon.url, daemon.token), "bard")
    await talk.open()
    has_begun = asyncio.Event()
    line = asyncio.create_task(talk.say("Sing!", 1, lambda text: text and has_begun.set()))
    await has_begun.wait()
    line.cancel()
    reply = await line
    assert reply.is_cancelled
    assert reply.problem == "cancelled"
    assert (reply.end.reason, reply.end.text) == ("cancelled", reply.text)
    assert await remembered(talk) == []
    early = asyncio.create_task(talk.say("Sing!", 1, print))
    await asyncio.sleep(0)
    early.cancel()
    assert (await early).is_cancelled
    async with asyncio.timeout(3_000 * MS):  # it would speak for ten seconds
        while (await talk._client.status())["active"]:
            await asyncio.sleep(20 * MS)
    await talk.close()


def line_end(reason, text="", *, fallback=False, error=None):
    timing = Timing(queue_ms=0.0, total_ms=1.0, tokens_per_s=1.0, batch_avg=1.0)
    usage = Usage(prompt=1, completion=1)
    settings = {"usage": usage, "timing": timing, "seed": 7, "prompt_hash": "", "fallback": fallback, "error": error}
    return LineEnd(line=1, reason=reason, text=text, **settings)


FAILED = ErrorInfo(code="out_of_memory", message="There was no memory.", hint="Send fewer lines.")


@pytest.mark.parametrize(
    ("end", "is_said", "problem"),
    [
        (line_end("stop", "Good day."), True, "stop"),
        (line_end("length", "Good"), True, "length"),
        (None, False, "cancelled"),
        (line_end("cancelled", "Go"), False, "cancelled"),
        (line_end("error", "Not now.", fallback=True, error=FAILED), False, "There was no memory. Send fewer lines."),
        (line_end("deadline"), False, "deadline"),
    ],
)
def test_a_reply_says_why_there_is_none(end, is_said, problem):
    reply = Reply(end.text if end else "", end)
    assert (reply.is_said, reply.problem) == (is_said, problem)


class ScriptedTalk:
    """Answers what it was given."""

    def __init__(self, *replies):
        self.replies, self.asked = list(replies), []

    async def say(self, text, seed, on_text):
        self.asked.append((text, seed))
        on_text("…")
        return self.replies.pop(0)

    async def take_back(self):
        return self.asked[-1][0] if self.asked else None


@pytest.mark.parametrize(
    ("said", "replies", "asked", "is_well"),
    [
        ("a\n\n b \n", ["stop", "stop"], [("a", 3), ("b", None)], True),
        ("/again\na\n/again\n/seed 5\n/again\n", ["stop"] * 3, [("a", 3), ("a", None), ("a", 5)], True),
        ("a\n/quit\nb\n", ["stop"], [("a", 3)], True),
        ("a\nb\n", ["error", "stop"], [("a", 3), ("b", None)], False),
        ("a\nb\n", ["cancelled", "stop"], [("a", 3), ("b", None)], True),
        ("/seed x\n/seed\n/help\n", [], [], True),
    ],
)
def test_what_is_typed_becomes_lines_and_commands(said, replies, asked, is_well, monkeypatch):
    talk = ScriptedTalk(*(Reply("Hm.", line_end(reason, "Hm.")) for reason in replies))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(said.encode())))
    out, chatter = (Console(file=io.StringIO()) for _ in range(2))
    terminal = ChatTerminal("Odo", out=out, chatter=chatter, has_stats=True)
    with asyncio.Runner() as runner:
        assert converse(runner, talk, terminal, 3) is is_well
    assert talk.asked == asked
    assert out.file.getvalue() == "Hm.\n" * len(asked)
    assert ("another answer" in chatter.file.getvalue()) == ("/seed x" in said)
    assert chatter.file.getvalue().count("seed 7") == len(asked)


def test_a_pipe_gets_plain_lines(daemon):
    said = "Hello\n\n/seed 4\nWho are you?\n/again\n/seed 4\n/again\n/nonsense\n"
    done = run("odo", "--url", daemon.url, "--token", daemon.token, "--seed", "3", said=said)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    assert lines[1] == lines[3] != lines[2]
    assert "\x1b" not in done.stdout + done.stderr
    assert "Odo" not in done.stdout
    assert "/again" in done.stderr  # the help, for what is no command
    stats = run("odo", "--url", daemon.url, "--token", daemon.token, "--seed", "3", "--stats", said="Hello\n")
    assert stats.stdout.splitlines() == lines[:1]
    assert "first text" in stats.stderr
    assert "seed 3" in stats.stderr


def test_a_line_that_cannot_be_spoken_fails_the_pipe(daemon):
    done = run("odo", "--url", daemon.url, "--token", daemon.token, said="x" * 9_000 + "\nHello\n")
    assert done.returncode == 1
    assert "9000 characters" in done.stderr
    assert len(done.stdout.splitlines()) == 1


@POSIX
def test_a_daemon_is_started_where_none_is_and_stopped_at_the_end(tmp_path, monkeypatch):
    """The runtime file of one that was killed does not count."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    tmp_path.chmod(0o700)
    write_endpoint("game", Endpoint(port=9, pid=1, token="x", protocol=1, base="x"))
    done = run("odo", "--project", "game", said="Hello\n")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert "starting one with smollm2-135m" in done.stderr
    assert [path.name for path in (tmp_path / "npc-runtime").iterdir()] == ["game.json"]
    nobody = run("nobody", "--project", "game", said="Hello\n")
    assert nobody.returncode == 1
    assert "There is no persona 'nobody'" in nobody.stderr
    assert "starting" not in nobody.stderr


class Terminal:
    """A process that believes it has a terminal."""

    def __init__(self, arguments, **environment):
        import pty

        ours, theirs = pty.openpty()
        self.file = os.fdopen(ours, "r+b", buffering=0)
        settings = {"stdin": theirs, "stdout": theirs, "stderr": theirs, "start_new_session": True}
        code = (
            "import os, sys, fcntl as f, termios as t; f.ioctl(0, t.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
        )
        wrapped = [sys.executable, "-c", code, *arguments]
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", **environment}
        self.process = subprocess.Popen(wrapped, env=environment, **settings)
        os.close(theirs)
        self.seen = ""

    def type(self, text):
        self.file.write(text.encode())

    def wait_for(self, text):
        import select

        give_up = time.monotonic() + 30_000 * MS
        while text not in self.seen:
            assert time.monotonic() < give_up, self.seen
            if select.select([self.file], [], [], 0.1)[0]:
                self.seen += self.file.read(4096).decode(errors="replace")
        before, _, self.seen = self.seen.partition(text)
        return before

    def close(self):
        self.process.kill()
        self.process.wait()
        self.file.close()


@POSIX
def test_ctrl_c_cancels_the_line_and_then_leaves(make_persona, make_daemon, tmp_path):
    make_persona("bard", limits={"soft_words": 400, "hard_tokens": 900})
    daemon = make_daemon("--personas", str(tmp_path / "personas"), "--project", "bard")
    terminal = Terminal(command("bard", "--url", daemon.url, "--token", daemon.token))
    try:
        terminal.wait_for("> ")
        terminal.type("Sing!\n")
        terminal.wait_for("Bard: ")
        terminal.wait_for("▌")
        terminal.type("\x03")
        terminal.wait_for("[cancelled]")
        terminal.wait_for("> ")
        terminal.type("/again\n")
        terminal.wait_for("Bard: ")
        terminal.type("\x03")
        time.sleep(50 * MS)  # two of the same signal at once are one
        terminal.type("\x03")
        assert terminal.process.wait(10_000 * MS) == 0
    finally:
        terminal.close()
    assert daemon.process.poll() is None


@POSIX
def test_ctrl_d_leaves(daemon):
    terminal = Terminal(command("odo", "--url", daemon.url, "--token", daemon.token))
    try:
        terminal.wait_for("> ")
        terminal.type("Hello\n")
        terminal.wait_for("Odo: ")
        terminal.wait_for("> ")
        terminal.type("\x04")
        assert terminal.process.wait(10_000 * MS) == 0
    finally:
        terminal.close()
