"""Training: it learns, it goes on where it was stopped to the same bits, and it never damages what is there."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import MS
from test_training_lines import exchanges
from tiny import SIZES, make_model

from npc_runtime import adapter_folder, train
from npc_runtime.errors import PersonaInvalid, StartupError
from npc_runtime.persona import Persona
from npc_runtime.train import Recipe, train_persona

FILES = ("adapter_config.json", "adapter_model.safetensors", "training.json")
RECIPE = Recipe(epochs=3, batch_size=8)
NUM_STEPS = 9  # of 24 lines


@pytest.fixture(scope="module")
def base(base_folder, tmp_path_factory):
    """A tiny base with the embedded tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    LlamaForCausalLM(LlamaConfig(**{**SIZES, "vocab_size": 49152})).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((base_folder / name).read_bytes())
    return folder


@pytest.fixture
def folder(make_persona):
    folder = make_persona("guard", adapter="adapter")
    write_lines(folder, exchanges(0, 24))
    (folder / "heldout.jsonl").write_text(json.dumps(exchanges(50, 51)[0]))
    return folder


def write_lines(folder, lines):
    (folder / "lines.jsonl").write_text("\n".join(json.dumps(line) for line in lines))


class Stop(BaseException):
    """As Ctrl-C."""


def run(folder, base, *, stop_at=None, recipe=RECIPE, **options):
    """Train in this process, and be stopped after a step; returns what was said."""
    notes, steps = [], []

    def on_step(progress):
        steps.append(progress)
        if progress.step == stop_at:
            raise Stop

    train_persona(
        Persona.load(folder),
        base,
        base_name="tiny",
        recipe=recipe,
        on_step=on_step,
        on_note=notes.append,
        **options,
    )
    return notes, steps


def read(folder):
    return {name: (folder / "adapter" / name).read_bytes() for name in FILES}


@pytest.fixture
def whole(folder, base):
    """What a run comes to that nobody stops."""
    run(folder, base)
    return read(folder)


@pytest.fixture
def saves_often(monkeypatch):
    """After every step, instead of every ten seconds."""
    monkeypatch.setattr(train, "SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(train, "SAVE_SHARE", 0)


@pytest.mark.parametrize("stops", [[1], [3], [4], [2, 5, 8], [NUM_STEPS]])
def test_a_run_that_was_stopped_comes_to_the_same_bits(folder, base, whole, saves_often, stops):
    """In the first step, at the end of an epoch, in the middle of one, several times, and after the last step."""
    for stop in stops:
        with pytest.raises(Stop):
            run(folder, base, stop_at=stop)
    notes, steps = run(folder, base)
    assert "going on after step" in notes[-1]
    assert str(stops[-1]) in notes[-1] or stops[-1] == 1
    assert len(steps) <= NUM_STEPS - stops[-1] + 1
    assert read(folder) == whole
    assert sorted(path.name for path in folder.iterdir()) == ["adapter", "heldout.jsonl", "lines.jsonl", "persona.yaml"]


def test_a_run_that_was_killed_goes_on_from_its_last_epoch(folder, base, whole):
    """kill -9, wherever it is when its first state appears."""
    again = ("--base", str(base), "--epochs", "12")
    with command(folder, *again) as process:
        process.communicate(timeout=120_000 * MS)
    expected = read(folder)
    unfinished = folder / "adapter.unfinished"
    until = time.monotonic() + 120_000 * MS
    with command(folder, *again) as process:
        while not unfinished.exists() and time.monotonic() < until:
            time.sleep(1 * MS)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert unfinished.exists()
    assert read(folder) == expected, "what was there is there"
    (folder / "adapter" / "adapter_model.safetensors").unlink()
    with command(folder, *again) as process:
        _, said = process.communicate(timeout=120_000 * MS)
    assert "going on after step" in said
    assert read(folder) == expected


def command(folder, *options):
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "npc_runtime", "train", str(folder), *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ,
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: {"recipe": Recipe(epochs=3, batch_size=8, seed=1)}, "seed was 0 and is 1"),
        (lambda folder: {"recipe": Recipe(epochs=3, batch_size=8, rank=4)}, "rank was 8 and is 4"),
        (lambda folder: write_lines(folder, exchanges(1, 25)), "lines.jsonl, or the prompt changed"),
        (lambda folder: (folder / "heldout.jsonl").unlink(), "what is held out changed"),
        (lambda folder: (folder / "adapter.unfinished").write_bytes(b"no state") and None, "its file cannot be read"),
    ],
)
def test_a_run_that_is_another_one_starts_anew_and_says_why(folder, base, saves_often, change, said):
    with pytest.raises(Stop):
        run(folder, base, stop_at=4)
    options = change(folder) or {}
    notes, steps = run(folder, base, **options)
    assert any(note.startswith("starting anew") and said in note for note in notes), notes
    assert steps[0].step == 1
    unlike = read(folder)
    run(folder, base, **options)
    assert read(folder) == unlike


def test_restart_ignores_what_was_stopped(folder, base, saves_often, whole):
    with pytest.raises(Stop):
        run(folder, base, stop_at=4)
    _, steps = run(folder, base, restart=True)
    assert steps[0].step == 1
    assert read(folder) == whole


def test_an_error_leaves_the_adapter_that_is_there(folder, base, whole, monkeypatch):
    def fail(*_, **__):
        raise OSError("the disk is full")

    monkeypatch.setattr(adapter_folder, "_write_json", fail)
    with pytest.raises(StartupError, match="cannot be written"):
        run(folder, base, recipe=Recipe(epochs=1, batch_size=8))
    assert read(folder) == whole


def test_numbers_that_are_none_are_refused(folder, base, whole):
    with pytest.raises(StartupError, match="never a number"):
        run(folder, base, recipe=Recipe(epochs=1, batch_size=8, learning_rate=float("inf")))
    assert read(folder) == whole


def test_the_best_epoch_is_kept(folder, base, monkeypatch, whole):
    """The second one if the held-out loss then rises; whatever it is, the training itself is the same."""

    def keep(*losses):
        left = list(losses)
        monkeypatch.setattr(train, "measure_loss", lambda *_: left.pop(0))
        run(folder, base)
        kept = [epoch["kept"] for epoch in json.loads((folder / "adapter" / "training.json").read_text())["epochs"]]
        return kept, read(folder)["adapter_model.safetensors"]

    last, second, again = keep(3.0, 2.0, 1.0), keep(3.0, 2.0, 4.0), keep(5.0, 1.0, 1.0)
    assert [kept for kept, _ in (last, second, again)] == [[True, True, True], [True, True, False], [True, True, False]]
    assert second[1] == again[1] != last[1]


def test_a_line_that_does_not_fit_is_named(folder, base):
    lines = exchanges(0, 24)
    lines[6]["history"] = [{"player": "word " * 150, "npc": "Yes."}]
    write_lines(folder, lines)
    with pytest.raises(PersonaInvalid, match=r"lines\.jsonl, line 7: prompt and reply have \d+ tokens"):
        run(folder, base)


def test_the_time_that_is_left_is_told(folder, base):
    _, steps = run(folder, base)
    assert [progress.step for progress in steps] == list(range(1, NUM_STEPS + 1))
    assert all(progress.num_steps == NUM_STEPS for progress in steps)
    assert steps[0].seconds_left > 0
    assert steps[-1].seconds_left == 0


def test_a_base_without_a_tokenizer_is_refused(folder, tmp_path):
    make_model("llama", tmp_path / "bare")
    with pytest.raises(StartupError, match="tokenizer"):
        run(folder, tmp_path / "bare")


def test_training_lowers_the_loss_and_the_result_is_used(folder, base, tmp_path):
    """Through the command, into a folder of the user's choice."""
    options = ["--base", str(base), "--epochs", "6", "--rank", "4", "--out", str(folder / "lora" / "v2")]
    process = subprocess.run(
        [sys.executable, "-P", "-m", "npc_runtime", "train", str(folder), *options],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ,
    )
    assert process.returncode == 0, process.stderr
    losses = [float(line.split("held-out ")[1].split()[0]) for line in process.stdout.splitlines()]
    assert losses[-1] < losses[0] - 0.1
    log = json.loads((folder / "lora" / "v2" / "training.json").read_text())
    assert [round(epoch["heldout"], 3) for epoch in log["epochs"]] == losses
    assert "left" in process.stderr
    assert "does not use it yet; add: adapter: lora/v2" in " ".join(process.stderr.split())
    document = json.loads((folder / "persona.yaml").read_text())
    (folder / "persona.yaml").write_text(json.dumps({**document, "adapter": "lora/v2"}))
    options = ["persona", "check", "--personas", str(tmp_path / "personas"), "--base", str(base)]
    checked = subprocess.run([sys.executable, "-P", "-m", "npc_runtime", *options], capture_output=True, text=True)
    assert "ok, adapter of rank 4" in checked.stdout
    config = json.loads((folder / "lora" / "v2" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"
