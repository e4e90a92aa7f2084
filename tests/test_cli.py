"""The commands as a user types them."""

import json
import os
import subprocess
import sys

import pytest


def run(*arguments, cwd=None, timeout=120):
    command = [sys.executable, "-P", "-m", "npc_runtime", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=timeout, env=os.environ)


def test_demo_json_is_one_line_with_everything():
    done = run("demo", "--json")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    body = json.loads(done.stdout)
    lines, totals = body["lines"], body["totals"]
    assert {line["persona"]: line["adapter"] for line in lines} == {
        "brom": "brom",
        "marta": None,
        "odo": "odo",
        "thalindra": "thalindra",
        "vaskar": "vaskar",
    }
    for line in lines:
        assert line["batch_size"] == 5
        assert line["reason"] in ("stop", "length")
        assert line["text"]
        assert {"usage", "timing", "seed", "prompt_hash", "fallback", "actions"} <= line.keys()
    assert totals["ok"] == 5
    assert totals["tokens"] == sum(line["usage"]["completion"] for line in lines)
    assert totals["forwards"] == max(line["usage"]["completion"] for line in lines)


def test_demo_shows_a_table_and_what_to_try_next():
    done = run("demo", "--text", "A wolf is at the door!")
    assert done.returncode == 0, done.stderr
    for word in (
        "A wolf is at the door!",
        "Thalindra",
        "none (prompt only)",
        "tok/s",
        "batch",
        "What to try next",
    ):
        assert word in done.stdout


def test_demo_says_why_the_daemon_did_not_start(tmp_path):
    done = run("demo", "--base", str(tmp_path))
    assert done.returncode == 1
    assert "has no config.json" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("text", [" ", "a" * 8_001])
def test_demo_says_why_a_line_was_rejected(text):
    done = run("demo", "--text", text)
    assert done.returncode == 1
    assert "input.text" in done.stderr
    assert "Traceback" not in done.stderr


def test_output_is_utf8_whatever_the_locale(monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "cp1252")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "npc_runtime", "persona", "render", "odo", "--text", "你好 🜁", "--json"],
        capture_output=True,
    )
    assert "你好 🜁" in json.loads(done.stdout.decode("utf-8"))["prompt"]


def test_render_gives_the_prompt_the_daemon_uses(float_base):
    """The token ids are those of the chat template, applied by transformers alone."""
    from transformers import AutoTokenizer

    from npc_runtime.persona import Persona, shipped_personas

    done = run("persona", "render", "odo", "--text", "Hello <|im_end|> 2026", "--json")
    body = json.loads(done.stdout)
    assert done.returncode == 0
    tokenizer = AutoTokenizer.from_pretrained(float_base.info.folder)
    messages = Persona.load(shipped_personas() / "odo").messages([], "Hello < | i m _ e n d | > 2026")
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert body["token_ids"] == expected
    assert body["prompt"] == tokenizer.decode(expected)
    assert "innkeeper" in body["prompt"]


def test_personas_are_listed_and_checked(make_persona, tmp_path):
    make_persona("guard")
    make_persona("smith", adapter="adapter")
    folder = str(tmp_path / "personas")
    listed = json.loads(run("persona", "list", "--personas", folder, "--json").stdout)
    assert [(row["id"], row["adapter"]) for row in listed] == [("guard", None), ("smith", "smith")]
    checked = run("persona", "check", "--personas", folder)
    assert checked.returncode == 1
    assert "ok, prompt only" in checked.stdout
    assert "smith/adapter does not exist" in checked.stdout
    assert run("persona", "check").returncode == 0


def test_personas_of_the_current_folder_come_first(make_persona, tmp_path):
    make_persona("guard")
    assert run("persona", "list", cwd=tmp_path).stdout.split()[0] == "guard"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("persona", "render", "nobody", "--text", "Hi."), "There is no persona 'nobody'"),
        (("persona", "list", "--personas", "nowhere"), "no such folder"),
        (("train", "nowhere"), "persona.yaml cannot be read"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path):
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
