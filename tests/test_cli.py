"""The commands as a user types them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from npc_runtime.persona import Persona, shipped_personas


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


def test_all_problems_of_a_file_are_told_with_their_lines(tmp_path):
    folder = tmp_path / "personas" / "guard"
    folder.mkdir(parents=True)
    text = "schema: 1\nid: guard\ndisplay_name: G\nbio: B\ngoals: sleep\nspeach_style: x\n"
    (folder / "persona.yaml").write_text(text)
    done = run("persona", "check", "--personas", str(tmp_path / "personas"))
    assert done.returncode == 1
    first, second = done.stdout.splitlines()
    assert "persona.yaml, line 5: goals: is not a list" in first
    assert "persona.yaml, line 6: speach_style: is not a field" in second
    assert second.endswith("Did you mean 'speech_style'?")


def test_a_persona_too_long_for_the_base_is_told_before_anybody_speaks(make_persona, tmp_path):
    make_persona("bard", bio="word " * 3_000, examples=[{"player": "a " * 900, "npc": "b " * 900}] * 4)
    done = run("persona", "check", "--personas", str(tmp_path / "personas"))
    assert done.returncode == 1
    assert "tokens before anybody spoke" in done.stdout


def test_a_new_persona_is_valid_as_it_is_and_with_every_comment_taken_off(tmp_path):
    done = run("persona", "new", "old-guard", "--name", 'The "Guard"', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "personas" / "old-guard" / "persona.yaml"
    assert done.stdout.strip() == str(Path("personas") / "old-guard" / "persona.yaml")
    assert "ok, prompt only" in run("persona", "check", cwd=tmp_path).stdout
    assert Persona.load(path.parent).display_name == 'The "Guard"'
    text = path.read_text()
    # A comment that shows a field looks like one: `# name:`, or what is indented below it.
    shown = re.sub(r"^# (?=[a-z_]+:(?: |$)|  )", "", text, flags=re.MULTILINE)
    persona = Persona.parse(shown.encode(), path.parent)
    left_out = {"card", "system_prompt", "post_history_instructions", "format"}
    fields = {field.alias or name for name, field in Persona.model_fields.items()}
    assert set(persona.to_document()) == fields - left_out
    assert persona.asked_facts == ["day", "quest.dragon", "said"]
    again = run("persona", "new", "old-guard", cwd=tmp_path)
    assert again.returncode == 1
    assert "exists already" in again.stderr
    assert path.read_text() == text


@pytest.mark.parametrize("name", ["Guard", "../guard", "a b", "", "a" * 65])
def test_a_new_persona_needs_an_id(name, tmp_path):
    done = run("persona", "new", "--", name, cwd=tmp_path)
    assert done.returncode == 1
    assert "cannot be a persona" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_show_has_the_defaults_too():
    shown = json.loads(run("persona", "show", "odo", "--json").stdout)
    assert set(shown) == {field.alias or name for name, field in Persona.model_fields.items()}
    assert shown["sampling"]["temperature"] == 0.5
    assert shown["sampling"]["top_p"] == 0.95
    text = run("persona", "show", "odo").stdout
    assert Persona.parse(text.encode(), Path("odo")).limits.soft_words == 16
    assert "goals" not in text


def test_render_tells_the_tokens_of_each_part_and_what_was_left_out(make_persona, tmp_path):
    knows = [{"id": "dragon", "text": "The dragon is dead", "when": 'quest.dragon == "dead" and day > 2'}]
    make_persona("guard", knows=knows, limits={"hard_tokens": 20})
    history = tmp_path / "earlier.jsonl"
    history.write_text("\n".join(json.dumps({"player": f"Question {n}?", "npc": "Hm."}) for n in range(30)))
    options = [
        "--personas",
        str(tmp_path / "personas"),
        "--history",
        str(history),
        "--mood",
        "tired",
        "--speaker",
        "Ada",
    ]
    options += ["--fact", "quest.dragon=dead", "--fact", "day=3", "--room", "250"]
    done = run("persona", "render", "guard", "--text", "Well?", *options, "--json")
    assert done.returncode == 0, done.stderr
    body = json.loads(done.stdout)
    assert body["prompt"].endswith("(The dragon is dead. Mood: tired.)\nAda: Well?<|im_end|>\n<|im_start|>assistant\n")
    assert "You are Guard. A guard." in body["prompt"]
    tokens = body["tokens"]
    assert sum(tokens.values()) == 2 * tokens["total"] == 2 * len(body["token_ids"])
    assert all(tokens[part] > 0 for part in ("persona", "history", "knowledge", "context", "words", "template"))
    assert 0 < body["left_out"]["messages"] < 60
    assert tokens["total"] + 20 <= 250
    plain = run("persona", "render", "guard", "--text", "Well?", *options)
    assert plain.stdout == body["prompt"] + "\n"
    assert f"left out: {body['left_out']['messages']} earlier messages" in plain.stderr
    assert "depends on: day, quest.dragon" in plain.stderr


def test_personas_of_the_current_folder_come_first(make_persona, tmp_path):
    make_persona("guard")
    assert run("persona", "list", cwd=tmp_path).stdout.split()[0] == "guard"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("persona", "render", "nobody", "--text", "Hi."), "There is no persona 'nobody'"),
        (("persona", "list", "--personas", "nowhere"), "no such folder"),
        (("train", "nowhere"), "persona.yaml cannot be read"),
        (("persona", "show", "nobody"), "There is no persona 'nobody'"),
        (("persona", "render", "odo", "--text", "Hi", "--fact", "king"), "a fact is NAME=VALUE"),
        (("persona", "render", "odo", "--text", "Hi", "--history", "nowhere"), "--history nowhere cannot be read"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path):
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_render_of_what_does_not_fit_fails_behind_its_report():
    done = run("persona", "render", "odo", "--text", "Hi", "--room", "40")
    assert done.returncode == 1
    assert "innkeeper" in done.stdout
    assert "do not fit into 40" in done.stderr.splitlines()[-1]
