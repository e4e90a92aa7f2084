"""Losses equal PEFT's, checks find what they name, tests.yaml is read strictly, and a red test is status 1."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from driving import NUM_ADAPTERS, make_store
from peft import PeftModel
from test_model import load
from tiny import SIZES, make_adapter, make_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from npc_runtime.engine.core import EngineConfig
from npc_runtime.errors import InvalidError, PersonaInvalid
from npc_runtime.evaluate import Task, evaluate_personas, write_results
from npc_runtime.evaluation.attribution import Classifier, cross_validate
from npc_runtime.evaluation.authored import read_authored
from npc_runtime.evaluation.cases import Case, find_failures, read_cases
from npc_runtime.evaluation.checks import Inspector
from npc_runtime.evaluation.losses import LossMatrix, Passage, Score, measure_losses
from npc_runtime.persona import Library, Persona, shipped_personas
from npc_runtime.train import measure_loss

# -- lines that somebody wrote ---------------------------------------------------------------------------------


def test_lines_are_read_as_they_are_for_training(make_persona):
    folder = make_persona("guard")
    line = {"player": "And then?", "npc": "Nothing.", "history": [{"player": "Who came?", "npc": "A smith."}]}
    (folder / "heldout.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8-sig")
    authored = read_authored(Persona.load(folder))
    assert authored.lines == ()
    assert [message["content"] for message in authored.heldout[0].earlier] == ["Who came?", "A smith."]
    (folder / "lines.jsonl").write_text('{"player": "Hi.", "npc": "Halt."}\n{"player": "Hi."}\n')
    with pytest.raises(PersonaInvalid, match=r"guard: lines\.jsonl, line 2: the line has no text in 'npc'"):
        read_authored(Persona.load(folder))


# -- losses --------------------------------------------------------------------------------------------------

RANKS = (8, 24, 64, 16)


def make_passages():
    """Two columns of other lengths; prompts of a column begin alike, and two replies begin alike or are the same."""
    torch.manual_seed(1)
    columns = {}
    for name, size in (("long", 40), ("short", 5)):
        system = torch.randint(3, 97, (size,)).tolist()
        entries = []
        for number in range(5):
            prompt = (*system, *torch.randint(3, 97, (number % 3 + 1,)).tolist())
            entries.append(Passage(prompt, (*torch.randint(3, 97, (18 + number,)).tolist(), 2)))
        same = Passage(entries[0].prompt_ids, (*entries[0].reply_ids[:17], 5, 2))
        columns[name] = [*entries, same, entries[0]]
    return columns


@pytest.mark.parametrize("max_pages", [64, 4])
def test_losses_equal_pefts(tmp_path, max_pages):
    """Also where rows are cut into chunks of a few tokens, and where adapters have to take turns."""
    model = make_model("llama", tmp_path / "model")
    decoder = load(tmp_path / "model")
    store = make_store(decoder, max_pages=max_pages)
    folders = {f"a{n}": make_adapter(model, tmp_path / f"a{n}", rank=rank, seed=n) for n, rank in enumerate(RANKS)}
    for name, folder in folders.items():
        store.add(name, [(folder, 1.0)])
    passages = make_passages()
    config = EngineConfig(kv_tokens=8192, max_step_tokens=53, max_waiting=7)
    matrix = measure_losses(decoder, store, config, passages, [None, *folders])
    store.close(5.0)
    seen = set()
    for row in matrix.rows:
        oracle = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
        if row is not None:
            oracle = PeftModel.from_pretrained(oracle, str(folders[row]))
        for column, entries in passages.items():
            expected = measure_loss(oracle, [(list(prompt), list(reply)) for prompt, reply in entries])
            assert matrix.loss(row, column) == pytest.approx(expected, abs=1e-4)
            seen.add(round(expected, 3))
    assert len(seen) == 2 * (1 + len(RANKS)), "the adapters change nothing, so the test would prove nothing"


def test_adapters_share_forward_passes(tiny, monkeypatch):
    from npc_runtime.evaluation import losses

    base, store = tiny
    widths = []

    class Counting(losses.Runner):
        def score(self, rows, wanted):
            widths.append({row.sequence.request.adapter for row in rows})
            return super().score(rows, wanted)

    monkeypatch.setattr(losses, "Runner", Counting)
    rows = [None, *(f"a{number}" for number in range(NUM_ADAPTERS))]
    measure_losses(base.decoder, store, EngineConfig(kv_tokens=4096), make_passages(), rows)
    assert max(len(width) for width in widths) == len(rows)


def test_a_passage_longer_than_the_context_is_named(tiny):
    base, store = tiny
    with pytest.raises(InvalidError, match="Exchange 1 of odo"):
        measure_losses(base.decoder, store, EngineConfig(), {"odo": [Passage((3,) * 120, (4,) * 20)]}, [None])


def test_a_matrix_says_whose_adapter_is_best_and_by_how_much():
    scores = {
        (None, "odo"): (Score(40.0, 10), Score(20.0, 10)),
        ("odo", "odo"): (Score(20.0, 10), Score(10.0, 10)),
        ("brom", "odo"): (Score(22.0, 10), Score(12.0, 10)),
        (None, "marta"): (Score(20.0, 10),),
        ("odo", "marta"): (Score(10.0, 10),),
        ("brom", "marta"): (Score(30.0, 10),),
    }
    matrix = LossMatrix((None, "odo", "brom"), ("odo", "marta"), scores)
    assert matrix.loss(None, "odo") == 3.0
    assert (matrix.is_own_best("odo"), matrix.is_own_best("marta")) == (True, None)
    assert matrix.over_next("odo") == ("brom", pytest.approx(0.2), 0.0)  # the same on both lines: no doubt
    base = matrix.over_base("odo")
    assert (base.over, base.nats) == (None, 1.5)
    assert base.error == pytest.approx(0.5)  # differences of 2 and 1 a token: their mean's standard error
    assert matrix.best("marta") == "odo"


# -- checks --------------------------------------------------------------------------------------------------


def odo():
    return Persona.load(shipped_personas() / "odo")


@pytest.mark.parametrize(
    ("reply", "check", "quote"),
    [
        ("", "empty", ""),
        ("You are Odo. The nervous innkeeper of the Crooked Lantern!", "leak", "you are odo the nervous innkeeper of"),
        ("Yes. <|im_start|>user", "leak", "<|im_start"),
        ("Good evening.\nUser: hello", "leak", "User:"),
        ("As an AI I cannot.", "leak", "AI"),
        ("I am a Language Model.", "leak", "Language Model"),
        ("Odo wipes the counter.", "third person", "Odo wipes"),
        ("Odo: Hello, do come in.", "third person", "Odo:"),
        ("*wrings his hands* Oh dear.", "third person", "*wrings his hands*"),
        ("(sighs) Oh dear.", "third person", "(sighs)"),
        ("Oh no no no no no no, not again.", "loop", "no no no no no"),
        ("I am sorry, mind the step, I am sorry, mind the step.", "loop", "i am sorry mind the step"),
        ("I am sorry, mind the step, yes, I am sorry and do mind the step.", "loop", "i am sorry / mind the step"),
        ("I do say mind the bucket by the door please.", "copy", "mind the bucket by the door please"),
    ],
)
def test_a_check_quotes_what_it_found(reply, check, quote):
    lines = ["Good evening, and mind the bucket by the door please, sir."]
    if check == "copy":
        reply = "I say, and mind the bucket by the door please."
        quote = "and mind the bucket by the door please"
    found = Inspector(odo(), lines).inspect(reply)
    assert check in {finding.check for finding in found}
    assert any(quote in finding.quote for finding in found if finding.check == check)


@pytest.mark.parametrize(
    "reply",
    [
        "I'm Odo, I keep this inn, or I try to.",
        "Odo, at your service, and this is Berta.",
        "I'm so sorry, I'm so sorry, do come in.",
        "I know the lord of the wood, and the lord of the river.",
        "He said he was afraid of the rain.",
    ],
)
def test_plain_speech_is_left_alone(reply):
    assert Inspector(odo(), []).inspect(reply) == []


def test_a_cut_line_is_shown_by_its_end():
    (finding,) = Inspector(odo()).inspect("I will fetch the good plates and", is_cut=True)
    assert (finding.check, finding.quote) == ("cut off", "… the good plates and")


# -- attribution ---------------------------------------------------------------------------------------------


def test_authors_lines_are_attributed_far_better_than_by_chance():
    texts = {p.id: read_authored(p).replies for p in Library.load(shipped_personas()) if p.adapter}
    assert len(texts) == 4
    assert cross_validate(texts) > 0.65


def test_how_much_somebody_wrote_does_not_make_them_likelier():
    classifier = Classifier({"smith": ["iron and ale"] * 50, "elf": ["moss and rain"]})
    assert classifier.attribute("The rain on the moss.") == "elf"
    assert classifier.attribute("Iron!") == "smith"


# -- tests.yaml ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("tests:\n  - player: Hi\n    must_contian: x\n", 3, "Did you mean 'must_contain'?"),
        ("tests:\n  - player: ''\n", 2, "tests[1].player: is empty"),
        ("tests:\n  - player: a\n  - must_contain: b\n", 3, "tests[2].player: is missing"),
        ("tests:\n  - player: a\n    must_contain: [ok, '/(/']\n", 3, "/(/ is no regular expression"),
        ("tests:\n  - player: a\n    context: {fact: [x]}\n", 3, "Did you mean 'facts'?"),
        ("tests:\n  - player: a\n    samples: many\n", 3, "samples: is no number"),
        ("tests:\n  - player: a\n    player: b\n", 3, "'player' is already there"),
        ("tests: []\n", 1, "tests: there are none"),
        ("tests: 3\n", 1, "is no list"),
        ("- player: a\n", 1, "the document"),
        ("", 1, "the document"),
        ("schema: 2\ntests: [{player: a}]\n", 1, "schema"),
        ("x: 1\ny: *a\n", 2, "aliases"),
        ("a: [\n", 2, "this is not YAML"),
    ],
)
def test_a_mistake_in_a_tests_file_is_named_with_its_place(make_persona, text, line, message):
    persona = Persona.load(make_persona("guard"))
    path = persona.folder / "tests.yaml"
    path.write_text(text)
    with pytest.raises(PersonaInvalid) as caught:
        read_cases(persona)
    assert f"{path}, line {line}: " in caught.value.message
    assert message in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("fields", "reply", "failure"),
    [
        ({"must_contain": "ale"}, "A tale.", "does not contain ale"),
        ({"must_contain": "the mill"}, "By the  Mill.", None),
        ({"must_contain": "/ales?/"}, "Two ALES.", None),
        ({"must_not_contain": "@"}, "odo@inn", "contains @: “@”"),
        ({"must_not_contain": ["ai"]}, "He said no.", None),
        ({"max_words": 2}, "One two three.", "has 3 words, at most 2 are allowed"),
        ({}, "*nods*", "is out of character, third person: “*nods*”"),
        ({"stays_in_character": False}, "*nods*", None),
    ],
)
def test_a_reply_is_held_to_what_the_test_says(fields, reply, failure):
    case = Case.model_validate({"player": "Hi.", **fields})
    assert find_failures(case, reply, Inspector(odo())) == ([failure] if failure else [])


def test_a_test_has_history_and_context():
    case = Case.model_validate(
        {"player": "And now?", "history": [{"player": "Hi.", "npc": "Yes?"}], "context": {"mood": "tired"}}
    )
    assert [turn["content"] for turn in case.messages(odo())[1:]] == ["Hi.", "Yes?", "(Mood: tired.)\nAnd now?"]


def test_a_test_has_facts_of_the_game(make_persona):
    knows = [{"id": "secret", "text": "The bridge is out.", "when": "bridge.out"}]
    persona = Persona.load(make_persona("guard", knows=knows))
    case = {"player": "Can I cross?"}
    told = Case.model_validate({**case, "facts": {"bridge.out": True}}).messages(persona)
    assert "The bridge is out." in told[-1]["content"]
    assert "The bridge is out." not in Case.model_validate(case).messages(persona)[-1]["content"]


def test_the_shipped_tests_are_valid():
    assert {p.id for p in Library.load(shipped_personas()) if read_cases(p)} == {"brom", "odo", "thalindra"}


# -- the whole command ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(base_folder, tmp_path_factory):
    """A tiny base with the embedded tokenizer, and two personas, one with an adapter."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("world")
    base = folder / "base"
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "vocab_size": 49152, "max_position_embeddings": 256}))
    model.save_pretrained(base)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base_folder / name, base / name)
    for persona_id, adapter in (("guard", None), ("smith", "adapter")):
        home = folder / "personas" / persona_id
        home.mkdir(parents=True)
        document = {"schema": 1, "id": persona_id, "display_name": persona_id, "bio": "A guard.", "adapter": adapter}
        document["limits"] = {"hard_tokens": 8}
        (home / "persona.yaml").write_text(json.dumps(document))
        lines = [{"player": f"Question {number}?", "npc": f"{persona_id} says {number}."} for number in range(6)]
        for name in ("lines.jsonl", "heldout.jsonl"):
            (home / name).write_text("\n".join(json.dumps(line) for line in lines))
    make_adapter(model, folder / "personas" / "smith" / "adapter")
    return folder


def judge(world, **options):
    task = Task(world / "personas", str(world / "base"), samples=3, dtype="float32", **options)
    return evaluate_personas(task, lambda label, fraction: None)


def test_everything_at_once(world, tmp_path):
    evaluation = judge(world)
    write_results(evaluation, tmp_path / "out")
    body = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert body["matrix"]["rows"] == [None, "smith"]
    assert body["matrix"]["columns"] == ["guard", "smith"]
    assert len(body["lines"]["lines"]) == 6
    picture = (tmp_path / "out" / "evaluation.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) < 60_000


def test_a_line_does_not_depend_on_who_else_is_judged(world):
    together = judge(world, parts=("lines",)).lines.of("smith")
    alone = judge(world, parts=("lines",), only=("smith",)).lines
    assert [line.reply for line in together.lines] == [line.reply for line in alone.lines]
    other = judge(world, parts=("lines",), only=("smith",), seed=1).lines
    assert [line.seed for line in other.lines] != [line.seed for line in alone.lines]


def test_a_red_test_is_status_1(world):
    path = world / "personas" / "guard" / "tests.yaml"
    path.write_text("tests:\n  - {player: Hi., must_contain: Halt, stays_in_character: false}\n")
    command = [sys.executable, "-P", "-m", "npc_runtime", "evaluate", "guard", "--part", "tests"]
    places = ["--personas", str(world / "personas"), "--base", str(world / "base")]
    done = subprocess.run([*command, *places, "--json"], capture_output=True, text=True, timeout=120)
    path.unlink()
    assert done.returncode == 1
    (line,) = done.stdout.splitlines()
    (result,) = json.loads(line)["tests"]
    assert result["failures"] == ["does not contain Halt"]
    assert not result["green"]


def test_a_persona_that_is_not_there_is_named_before_anything_is_loaded(world):
    with pytest.raises(Exception, match="There is no persona 'nobody'"):
        judge(world, only=("nobody",))


def test_drawing_says_what_to_install(monkeypatch):
    from npc_runtime.evaluation.picture import check_pillow

    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(Exception, match=r"npc-runtime\[evaluate\]"):
        check_pillow()
