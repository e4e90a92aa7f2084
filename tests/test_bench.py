"""`npc-runtime bench`: finds the running daemon, measures it, and says what is wrong in one line."""

import json
import os
import subprocess
import sys

import pytest

from npc_runtime.bench import Report, Trace, measure, summarize
from npc_runtime.errors import DisconnectedError, InvalidError, NpcError
from npc_runtime.protocol import BaseModelInfo, LineEnd, Timing, Usage, Welcome
from npc_runtime.running import Target

QUICK = ("--npcs", "3", "--rounds", "2", "--max-tokens", "12")


def run(*arguments, runtime_folder):
    command = [sys.executable, "-P", "-m", "npc_runtime", "bench", *arguments]
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(runtime_folder)}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="XDG_RUNTIME_DIR is Linux's")
def test_the_running_daemon_is_found_and_measured(daemon):
    done = run("--project", "pytest", "--json", *QUICK, runtime_folder=daemon.runtime_folder)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    body = json.loads(done.stdout)
    assert (body["bench"], body["npcs"], body["rounds"], body["max_tokens"]) == ("daemon", 3, 2, 12)
    assert (body["personas"], body["adapters"]) == (3, 2)  # brom, odo and marta, who has none
    assert body["tokens"] == 3 * 2 * 12
    assert body["tokens_per_s"] > 0
    assert 0 < body["ttft_p50_ms"] <= body["ttft_p95_ms"]
    assert 0 < body["inter_token_p50_ms"] <= body["inter_token_p99_ms"]
    assert 0.5 < body["cached_share"] < 1  # the personas' own prompts
    assert body["base"] == "smollm2-135m"
    assert body["device"]
    assert body["backend"]
    assert "3 NPCs, 2 rounds" in done.stderr


def test_a_daemon_that_is_named_is_measured_for_people(daemon, tmp_path):
    done = run("--url", daemon.url, "--token", daemon.token, *QUICK, runtime_folder=tmp_path)
    assert done.returncode == 0, done.stderr
    for words in ("smollm2-135m on ", "3 NPCs at once", "tokens/s", "first text", "p95", "p99", "prefix cache"):
        assert words in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--project", "nobody"), "Start one: npc-runtime serve"),
        (("--url", "ws://127.0.0.1:9/v1"), "No daemon answers"),
    ],
)
def test_no_daemon_is_one_line_with_the_remedy(arguments, message, tmp_path):
    done = run(*arguments, runtime_folder=tmp_path)
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""


async def test_a_wrong_token_and_too_much_are_refused(daemon):
    settings = {"npcs": 2, "rounds": 1, "max_tokens": 4, "on_round": print}
    with pytest.raises(DisconnectedError, match="token is wrong"):
        await measure(Target(daemon.url, "wrong"), **settings)
    with pytest.raises(InvalidError, match="--npcs 65"):
        await measure(Target(daemon.url, daemon.token), **{**settings, "npcs": 65})


async def test_a_line_that_is_not_spoken_in_full_is_an_error(daemon, monkeypatch):
    monkeypatch.setattr("npc_runtime.bench.TEXTS", ("",))
    with pytest.raises(NpcError, match="empty"):
        await measure(Target(daemon.url, daemon.token), npcs=1, rounds=1, max_tokens=4, on_round=print)


def line_end(completion, *, prompt=40, cached=0):
    return LineEnd(
        line=1,
        reason="length",
        text="",
        usage=Usage(prompt=prompt, cached=cached, completion=completion),
        timing=Timing(queue_ms=0.0, total_ms=1.0, tokens_per_s=1.0, batch_avg=1.0),
        seed=0,
        prompt_hash="",
    )


def test_the_report_is_of_all_lines():
    welcome = Welcome(
        session="s1",
        protocol=1,
        version="0",
        device="cpu",
        backend="torch",
        base=BaseModelInfo(name="x", sha256="", context=1),
        caps=[],
        limits={},
        personas=[],
    )
    fast = Trace([0.1, 0.2, 0.3], line_end(100, cached=32))
    slow = Trace([0.5, 0.9], line_end(100))
    silent = Trace([], line_end(100, cached=10))
    played = [([fast, slow], 2.0), ([slow, fast], 1.0), ([fast, silent], 4.0)]
    report = summarize(welcome, played, personas=2, adapters=1, max_tokens=100)
    assert isinstance(report, Report)
    assert (report.tokens, report.tokens_per_s) == (600, 100.0)
    assert (report.ttft_p50_ms, report.ttft_p95_ms) == (100.0, 500.0)
    assert (report.inter_token_p50_ms, report.inter_token_p99_ms) == (100.0, 400.0)
    assert report.cached_share == round((3 * 32 + 10) / 240, 3)
    nothing = summarize(welcome, [([silent], 1.0)], personas=1, adapters=0, max_tokens=100)
    assert nothing.ttft_p50_ms is None
    assert "first text      p50 –" in nothing.to_text()
