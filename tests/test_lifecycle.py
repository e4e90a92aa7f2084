"""How a daemon starts, what it refuses to start with, and how it stops."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial

import pytest
from conftest import MS, RunningDaemon, daemon_environment, wait_until_loaded
from game import line, play
from tiny import make_adapter, make_model
from websockets.exceptions import ConnectionClosed

from npc_runtime.persona import shipped_personas


def test_a_client_that_does_not_read_cannot_delay_the_stop(make_daemon):
    """A frozen game: its socket is open, its loop stands still, and 20 lines stream at it."""
    daemon = make_daemon("--personas", str(shipped_personas()))
    code = f"""
import json, socket, time
from websockets.sync.client import connect
ws = connect({daemon.url!r}, subprotocols=["npc.v1.json"], compression=None).__enter__()
ws.send(json.dumps({{"type": "hello", "protocol": 1, "token": {daemon.token!r}}}))
ws.recv()
lines = [{{"line": n, "persona": "odo", "input": {{"text": "Hi."}}, "sampling": {{"trim": "none", "max_tokens": 500}}}}
         for n in range(20)]
ws.send(json.dumps({{"type": "generate", "batch": 1, "lines": lines}}))
ws.recv()
import os, signal
print("frozen", flush=True)
os.kill(os.getpid(), signal.SIGSTOP)
"""
    game = subprocess.Popen([sys.executable, "-P", "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert game.stdout.readline() == "frozen\n"
        time.sleep(300 * MS)
        started = time.monotonic()
        assert daemon.stop() == 0
        assert time.monotonic() - started < 2.0
    finally:
        game.kill()
        game.wait()
        game.stdout.close()
    assert "Traceback" not in daemon.read_log()


@pytest.fixture
def owner():
    """A process for which a daemon runs, which may be killed."""
    process = subprocess.Popen([sys.executable, "-P", "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize(
    ("number", "subprotocol"), [(signal.SIGINT, "npc.v1.json"), (signal.SIGTERM, "npc.v1.msgpack")]
)
def test_a_signal_ends_every_line_before_the_socket_closes(make_daemon, number, subprotocol):
    daemon = make_daemon("--personas", str(shipped_personas()))
    end = partial(daemon.process.send_signal, number)
    reason = asyncio.run(end_while_speaking(daemon, end, 2_000 * MS, subprotocol))
    assert reason == "the daemon was stopped"
    assert "Traceback" not in daemon.read_log()


def test_the_owner_takes_the_daemon_along(make_daemon, owner):
    daemon = make_daemon("--personas", str(shipped_personas()), "--owner-pid", str(owner.pid))
    reason = asyncio.run(end_while_speaking(daemon, owner.kill, 5_000 * MS))
    assert reason == "the process that owned the daemon is gone"
    assert not os.path.exists(os.path.join(daemon.runtime_folder, "npc-runtime", f"{daemon.project}.json"))


async def end_while_speaking(daemon, end, seconds, subprotocol="npc.v1.msgpack"):
    """Each of eight lines has its one end, then their batch, then the socket closes; all in so many seconds."""
    async with play(daemon, subprotocol) as game:
        long = {"trim": "none", "max_tokens": 500, "min_tokens": 500}
        await game.send(type="generate", batch=1, lines=[line(n, sampling=long) for n in range(8)])
        await game.until("delta")
        started = time.monotonic()
        end()
        messages = await game.until("batch.end")
        with pytest.raises(ConnectionClosed) as caught:
            await game.receive()
        assert time.monotonic() - started < seconds
        ends = [message for message in messages if message["type"] == "line.end"]
        assert sorted(message["line"] for message in ends) == list(range(8))
        assert {message["reason"] for message in ends} == {"cancelled"}
        assert all(message["text"] for message in ends), "what was said before stays"
        assert (messages[-1]["ok"], messages[-1]["failed"]) == (0, 8)
        assert caught.value.rcvd.code == 1012
        assert await asyncio.to_thread(daemon.process.wait, 5_000 * MS) == 0
        assert time.monotonic() - started < seconds
    return caught.value.rcvd.reason


def test_the_owner_is_watched_while_the_base_is_loaded(owner):
    command = [sys.executable, "-P", "-m", "npc_runtime", "serve", "--port", "0", "--project", "orphan"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": daemon_environment()}
    with subprocess.Popen([*command, "--owner-pid", str(owner.pid)], **pipes) as process:
        said = iter(process.stderr.readline, "")
        assert any("loading smollm2-135m" in line for line in said)
        owner.kill()
        started = time.monotonic()
        out, err = process.communicate(timeout=10_000 * MS)
        seconds = time.monotonic() - started
    assert "token" in json.loads(out)
    assert "Traceback" not in err
    assert (process.returncode, seconds < 5_000 * MS) == (0, True)


@pytest.mark.parametrize("before", [True, False])
def test_a_spawner_may_close_its_pipes(make_persona, tmp_path, before):
    """All three at any moment, before the first line too; the daemon speaks on, and its log has what happens."""
    make_persona("odo")
    options = ["--port", "0", "--personas", str(tmp_path / "personas"), "--project", "pipes"]
    pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    command = [sys.executable, "-P", "-m", "npc_runtime", "serve", *options]
    environment = daemon_environment(XDG_RUNTIME_DIR=str(tmp_path), XDG_STATE_HOME=str(tmp_path))
    process = subprocess.Popen(command, text=True, env=environment, **pipes)
    try:
        if not before:
            assert process.stdout.readline()
        for pipe in (process.stdin, process.stdout, process.stderr):
            pipe.close()
        path = tmp_path / "npc-runtime" / "pipes.json"
        while not path.exists():
            assert process.poll() is None
            time.sleep(20 * MS)
        running = RunningDaemon(process, None, json.loads(path.read_text()), "pipes")
        _, end = asyncio.run(speak_all(running, ["odo"]))
        assert end["ok"] == 1
        assert running.stop() == 0
    finally:
        process.kill()
        process.wait()
    log = (tmp_path / "npc-runtime" / "log" / "pipes.log").read_text()
    assert running.endpoint["log"] == str(tmp_path / "npc-runtime" / "log" / "pipes.log")
    assert " opened " in log
    assert " closed " in log
    assert "Traceback" not in log
    assert running.token not in log


def test_nobody_has_to_read_the_log(make_persona, tmp_path):
    """More than a pipe holds, while it loads."""
    make_persona("odo")
    for number in range(400):
        broken = tmp_path / "personas" / f"broken-{number}"
        broken.mkdir()
        (broken / "persona.yaml").write_text(f"schema: 1\n{'x' * 150}: {number}\n")
    options = ["--port", "0", "--personas", str(tmp_path / "personas"), "--project", "chatter"]
    command = [sys.executable, "-P", "-m", "npc_runtime", "serve", *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=daemon_environment(), **pipes) as process:
        endpoint = json.loads(process.stdout.readline())
        running = RunningDaemon(process, None, endpoint, "chatter")
        _, end = asyncio.run(speak_all(running, ["odo"]))
        assert end["ok"] == 1
        assert running.stop() == 0
    with open(endpoint["log"]) as file:
        assert sum("cannot be used" in line for line in file) == 400


def read_all(terminal, into):
    """Until its other side is closed, which Linux reports as an error."""
    with contextlib.suppress(OSError):
        while piece := os.read(terminal, 4096):
            into.extend(piece)


def test_the_first_line_goes_to_stdout_from_a_terminal_too(make_persona, tmp_path):
    """stderr is a terminal, so that progress bars are drawn; stdout is the spawner's pipe."""
    import pty

    make_persona("guard")
    ours, theirs = pty.openpty()
    options = ["--port", "0", "--personas", str(tmp_path / "personas")]
    command = [sys.executable, "-P", "-m", "npc_runtime", "serve", *options]
    environment = daemon_environment(XDG_RUNTIME_DIR=str(tmp_path))
    shown = bytearray()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, text=True, env=environment) as process:
        os.close(theirs)
        reader = threading.Thread(target=read_all, args=(ours, shown), daemon=True)  # a full terminal would block it
        reader.start()
        endpoint = json.loads(process.stdout.readline())
        wait_until_loaded(RunningDaemon(process, None, endpoint, ""))
        process.terminate()
        assert process.wait(10_000 * MS) == 0
    reader.join(10_000 * MS)
    os.close(ours)
    assert "loading smollm2-135m" in shown.decode()
    assert "token" not in shown.decode().split("Ctrl-C")[0].replace("token and port", "")


def test_a_signal_during_loading_is_quiet(make_persona, tmp_path):
    make_persona("guard")
    command = [sys.executable, "-P", "-m", "npc_runtime", "serve", "--port", "0", "--personas", str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=daemon_environment(), **pipes) as process:
        said = iter(process.stderr.readline, "")
        assert any("loading smollm2-135m" in line for line in said)
        process.terminate()
        out, err = process.communicate(timeout=2_000 * MS)
    assert process.returncode == 0, err
    assert json.loads(out)["base"] == "smollm2-135m"
    assert "Traceback" not in err


def test_a_busy_port_says_so(make_daemon, make_persona, tmp_path):
    make_persona("guard")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        daemon = make_daemon("--port", str(port), "--personas", str(tmp_path / "personas"))
    assert daemon.process.returncode == 1
    log = daemon.read_log().strip()
    assert f"127.0.0.1:{port}" in log
    assert "Traceback" not in log
    assert len(log.splitlines()) == 1


def test_broken_personas_do_not_take_the_daemon_along(make_daemon, make_persona, tmp_path):
    """Missing, foreign and damaged adapters and a damaged file: each is named when it is asked for."""
    make_persona("sound")
    make_persona("missing", adapter="adapter")
    foreign = make_persona("foreign", adapter="adapter")
    corrupt = make_persona("corrupt", adapter="adapter")
    make_persona("odd", temper=3)
    make_adapter(make_model("llama", tmp_path / "other"), foreign / "adapter", name="other-base")
    (corrupt / "adapter").mkdir()
    (corrupt / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8, "lora_alpha": 16}')
    (corrupt / "adapter" / "adapter_model.safetensors").write_bytes(b"\x00" * 5000)
    daemon = make_daemon("--personas", str(tmp_path / "personas"), "--no-auth")
    assert daemon.token is None
    items, end = asyncio.run(speak_all(daemon, ["sound", "missing", "foreign", "corrupt", "odd"]))
    assert [items[name].get("code") for name in ("missing", "foreign", "corrupt", "odd")] == [
        "adapter_missing",
        "adapter_incompatible",
        "adapter_incompatible",
        "persona_invalid",
    ]
    assert "other-base" in items["foreign"]["hint"]
    assert "temper" in items["odd"]["message"]
    assert (end["ok"], end["failed"]) == (1, 4)


async def speak_all(daemon, personas):
    async with play(daemon) as game:
        await game.send(type="generate", batch=1, lines=[line(name, name) for name in personas])
        messages = await game.until("batch.end")
    return {item["line"]: item for item in messages[0]["items"]}, messages[-1]


def test_no_auth_is_for_loopback_only(make_daemon):
    daemon = make_daemon("--host", "0.0.0.0", "--no-auth")
    assert daemon.process.returncode == 1
    assert "--no-auth is refused" in daemon.read_log()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such folder"),
        (lambda path: path.mkdir(), "has no config.json"),
        (lambda path: write_config(path, "GPTNeoXForCausalLM"), "GPTNeoXForCausalLM is not supported"),
        (lambda path: write_config(path, "LlamaForCausalLM"), "has no *.safetensors"),
        (lambda path: write_config(path, "LlamaForCausalLM", b"\x00" * 99), "cannot be read"),
        (lambda path: write_config(path, "LlamaForCausalLM", b"", hidden_size="x"), "cannot be read"),
        (
            lambda path: write_config(path, "Qwen3ForCausalLM", b"", quantization_config={"quant_method": "fp8"}),
            "quantized",
        ),
        (lambda path: make_model("llama", path), "tokenizer.json"),
    ],
)
def test_a_base_that_is_no_model_is_refused(make_daemon, base_folder, tmp_path, make, message):
    make(tmp_path / "base")
    if message == "cannot be read":
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / "base" / name).write_bytes((base_folder / name).read_bytes())
    daemon = make_daemon("--base", str(tmp_path / "base"), "--personas", str(shipped_personas()))
    assert daemon.process.returncode == 1
    assert message in daemon.read_log()
    assert "Traceback" not in daemon.read_log()


def write_config(path, architecture, weights=None, **fields):
    path.mkdir()
    config = {"architectures": [architecture], "model_type": "llama", **fields}
    (path / "config.json").write_text(json.dumps(config))
    if weights is not None:
        (path / "model.safetensors").write_bytes(weights)


def test_an_unused_gpu_is_said(make_daemon, tmp_path):
    """A machine with an NVIDIA driver (here: a stand-in on PATH) and a torch for the CPU."""
    import os

    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    daemon = make_daemon("--personas", str(shipped_personas()), env={"PATH": path})
    assert daemon.endpoint
    assert "download.pytorch.org/whl/cu" in daemon.read_log()
