"""Fixtures: the embedded base, tiny random models, the oracle (transformers + PEFT), and a daemon process."""

import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from npc_kernels.openmp import sleep_while_waiting

from npc_runtime.running import Target, ask_health

sleep_while_waiting()  # as the daemon does, before anybody imports torch
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

MS = float(os.environ.get("NPC_TEST_MS", "0.001"))
"""Seconds in a test's millisecond; raise it on a slow machine."""

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell's background job; daemons would inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)


RUNTIME_FOLDER = tempfile.TemporaryDirectory(prefix="npc-tests-")
"""Where the tests' daemons write their runtime files and logs, instead of the user's own folders."""

PROJECT_NUMBERS = itertools.count(1)


def daemon_environment(**changes):
    folders = {"XDG_RUNTIME_DIR": RUNTIME_FOLDER.name, "XDG_STATE_HOME": RUNTIME_FOLDER.name}
    return {**os.environ, **folders, **changes}


@pytest.fixture(scope="session")
def base_folder():
    from npc_runtime.engine.embedded import ensure_embedded_base

    return ensure_embedded_base(lambda label, fraction: None)


@pytest.fixture(scope="session")
def float_base():
    """The embedded base in float32, loaded once."""
    from npc_runtime.loading import load_base

    return load_base("smollm2-135m", "float32", lambda label, fraction: None)


@dataclass
class RunningDaemon:
    process: subprocess.Popen
    log: tempfile._TemporaryFileWrapper
    endpoint: dict
    project: str

    @property
    def url(self):
        return f"ws://127.0.0.1:{self.endpoint['port']}/v1"

    @property
    def token(self):
        return self.endpoint["token"]

    @property
    def runtime_folder(self):
        return RUNTIME_FOLDER.name

    def read_log(self):
        self.log.seek(0)
        return self.log.read()

    def stop(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        return self.process.wait(10_000 * MS)


def start_daemon(*options, env=None, cwd=None, waits=True):
    """Of a project of its own, unless one is given: a second daemon for a project is refused.

    Returns when it has loaded its base, or has ended; with `waits=False` when its first line is out.
    """
    if "--project" not in options:
        options = (*options, "--project", f"test-{next(PROJECT_NUMBERS)}")
    log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115 - discard() closes it
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "npc_runtime", "serve", "--port", "0", *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        env=daemon_environment(**(env or {})),
        cwd=cwd,
    )
    line = process.stdout.readline()
    daemon = RunningDaemon(process, log, json.loads(line) if line else {}, options[options.index("--project") + 1])
    if not line:
        process.wait(10_000 * MS)
    elif waits:
        wait_until_loaded(daemon)
    return daemon


def wait_until_loaded(daemon):
    target = Target(daemon.url, None)
    while daemon.process.poll() is None and ask_health(target).state != "well":
        time.sleep(50 * MS)


def discard(daemon):
    if daemon.process.poll() is None:
        daemon.process.kill()
    daemon.process.wait()
    daemon.process.stdout.close()
    daemon.log.close()


@pytest.fixture
def make_daemon():
    """Start daemons with any options; all are gone after the test."""
    started = []

    def make(*options, **settings):
        started.append(start_daemon(*options, **settings))
        return started[-1]

    yield make
    for daemon in started:
        discard(daemon)


@pytest.fixture(scope="session")
def daemon():
    """One daemon with the shipped personas, in float32, for all tests that only talk to it."""
    from npc_runtime.persona import shipped_personas

    running = start_daemon("--personas", str(shipped_personas()), "--dtype", "float32", "--project", "pytest")
    assert running.endpoint, running.read_log()
    yield running
    discard(running)


@pytest.fixture
def make_persona(tmp_path):
    """Write a persona folder below tmp_path/personas."""

    def make(persona_id, folder=None, **fields):
        folder = Path(folder or tmp_path / "personas") / persona_id
        folder.mkdir(parents=True)
        document = {
            "schema": 1,
            "id": persona_id,
            "display_name": persona_id.title(),
            "bio": "A guard.",
            **fields,
        }
        (folder / "persona.yaml").write_text(json.dumps(document), encoding="utf-8")
        return folder

    return make


@pytest.fixture
def tiny(tmp_path):
    """A tiny random base, and a store of eight adapters of mixed ranks."""
    from driving import NUM_ADAPTERS, TinyBase, make_store
    from test_model import load
    from tiny import make_adapter, make_model

    model = make_model("llama", tmp_path / "model")
    decoder = load(tmp_path / "model")
    store = make_store(decoder)
    for number in range(NUM_ADAPTERS):
        rank = (8, 16, 24, 64)[number % 4]
        store.add(f"a{number}", [(make_adapter(model, tmp_path / f"a{number}", rank=rank, seed=number), 1.0)])
    return TinyBase(decoder), store
