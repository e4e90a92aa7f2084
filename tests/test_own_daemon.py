"""A daemon of a command's own: out of reach of the terminal's signals, and gone when the command is."""

import os
import sys

import pytest
from conftest import MS

from npc_runtime.client import Client
from npc_runtime.errors import StartupError
from npc_runtime.own_daemon import own_daemon, serve_options
from npc_runtime.running import Target, ask_health


@pytest.fixture(autouse=True)
def runtime_folder(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))


@pytest.mark.skipif(sys.platform == "win32", reason="process groups are another thing there")
async def test_it_answers_until_the_command_is_over(make_persona, tmp_path):
    make_persona("guard")
    options = serve_options(
        base="smollm2-135m", personas=tmp_path / "personas", command="own", dtype="float32", threads=1
    )
    async with own_daemon(options) as endpoint:
        target = Target(f"ws://127.0.0.1:{endpoint.port}/v1", endpoint.token)
        async with await Client.connect(target.url, token=target.token) as client:  # waits for the base
            assert (await client.say("guard", "Hello.", max_tokens=3)).usage.completion > 0
        assert ask_health(target, timeout_s=5_000 * MS).state == "well"
        assert os.getpgid(endpoint.pid) != os.getpgid(0)  # Ctrl-C goes to the terminal's group
    assert ask_health(target).state == "gone"
    with pytest.raises(ProcessLookupError):
        os.kill(endpoint.pid, 0)


async def test_why_it_does_not_start_is_told(tmp_path):
    (tmp_path / "base").mkdir()
    options = serve_options(base=str(tmp_path / "base"), personas=tmp_path, command="own")
    with pytest.raises(StartupError, match=r"did not start:\n[^$]*has no config\.json"):
        async with own_daemon(options):
            pass
