"""The commands as a user types them."""

import json
import os
import subprocess
import sys

import pytest
import torch
from tiny import SIZES


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


def test_training_lowers_the_loss_and_the_result_is_used(make_persona, tmp_path, float_base):
    """A tiny base with the embedded tokenizer: train through the command, then check the adapter."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    base = tmp_path / "base"
    LlamaForCausalLM(LlamaConfig(**{**SIZES, "vocab_size": 49152})).save_pretrained(base)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).write_bytes((float_base.info.folder / name).read_bytes())
    persona = make_persona("guard", adapter="adapter")
    lines = "\n".join(json.dumps({"player": f"Question {n}?", "npc": "Halt. The gate is shut."}) for n in range(24))
    (persona / "lines.jsonl").write_text(lines)
    (persona / "heldout.jsonl").write_text(lines.splitlines()[0])
    done = run("train", str(persona), "--base", str(base), "--epochs", "6")
    assert done.returncode == 0, done.stderr
    losses = [float(line.split("held-out ")[1].split()[0]) for line in done.stdout.splitlines()]
    assert losses[-1] < losses[0] - 0.1
    log = json.loads((persona / "adapter" / "training.json").read_text())
    assert [round(epoch["heldout"], 3) for epoch in log["epochs"]] == losses
    checked = run("persona", "check", "--personas", str(tmp_path / "personas"), "--base", str(base))
    assert "ok, adapter of rank 8" in checked.stdout
    config = json.loads((persona / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base"
