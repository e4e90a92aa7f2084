"""Persona files are read strictly and rendered in a fixed order; a bad one never takes the others along."""

from pathlib import Path

import pytest

from npc_runtime.errors import PersonaInvalid, PersonaUnknown
from npc_runtime.persona import Library, Persona, find_problems, shipped_personas
from npc_runtime.prompt import Context


def guard(**fields):
    return Persona.model_validate(
        {"schema": 1, "id": "guard", "display_name": "Guard", "bio": "Watches the gate", **fields}
    )


def write(tmp_path, data):
    folder = tmp_path / "guard"
    folder.mkdir()
    (folder / "persona.yaml").write_bytes(data)
    return folder


# -- files ---------------------------------------------------------------------------------------------------


def test_the_shipped_personas_load():
    library = Library.load(shipped_personas())
    assert not library.problems
    assert {persona.id for persona in library} == {"brom", "marta", "odo", "thalindra", "vaskar"}
    assert {persona.id for persona in library if persona.adapter_name is None} == {"marta"}
    for persona in library:
        assert persona.fallback.timeout
        assert all((persona.folder / part.path).is_dir() for part in persona.adapter)


@pytest.mark.parametrize(
    ("spelled", "expected"),
    [
        (None, []),
        ("lora", [("lora", 1.0)]),
        ({"path": "lora", "scale": 0.5}, [("lora", 0.5)]),
        (["lora", {"path": "angry", "scale": -1}], [("lora", 1.0), ("angry", -1.0)]),
    ],
)
def test_spellings_of_adapter(make_persona, spelled, expected):
    persona = Persona.load(make_persona("guard", adapter=spelled))
    assert [(part.path, part.scale) for part in persona.adapter] == expected
    assert persona.adapter_name == ("guard" if expected else None)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"speach_style": "Short."}, "speach_style"),
        ({"sampling": {"temprature": 1.0}}, "sampling.temprature"),
        ({"adapter": {"path": "lora", "scal": 2}}, "adapter.0.scal"),
        ({"adapter": 7}, "adapter.0"),
        ({"adapter": ["lora"] * 9}, "adapter"),
        ({"examples": [{"player": "Hi", "npc": ""}]}, "examples.0.npc"),
        ({"limits": {"hard_tokens": 1_025}}, "limits.hard_tokens"),
        ({"sampling": {"temperature": float("nan")}}, "sampling.temperature"),
        ({"display_name": None}, "display_name"),
        ({"id": "other"}, "id 'other'"),
        ({"schema": 2}, "schema 2 is newer"),
        ({"schema": "one"}, "schema"),
        ({"bio": "   "}, "bio"),
        ({"fallback": {"timeout": ["x" * 40_000]}}, "fallback.timeout"),  # it has to fit a 32 KiB line.end
    ],
)
def test_a_wrong_field_is_named_with_its_file(make_persona, fields, named):
    folder = make_persona("guard", **fields)
    with pytest.raises(PersonaInvalid) as caught:
        Persona.load(folder)
    assert str(folder / "persona.yaml") in caught.value.message
    assert named in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"- schema\n- 1\n", id="a-list"),
        pytest.param(b"schema: [1\nid: guard", id="not-yaml"),
        pytest.param(b"schema: 1\nschema: 1\n", id="duplicate-key"),
        pytest.param(b"schema: 1\nid: *nobody\n", id="unknown-alias"),
        pytest.param(bytes(range(256)), id="binary"),
        pytest.param(b"\xff\xfe\x00\x00", id="utf-32"),
        pytest.param(b"schema: 1\nbio: 2026-99-99\n", id="impossible-date"),
        pytest.param(b"schema: 1\nbio: !!bool perhaps\n", id="impossible-bool"),
        pytest.param(b"schema: 1\nbio: !!int ''\n", id="empty-int"),
        pytest.param(b"schema: 1\nbio: !!python/object:os.system x\n", id="python-tag"),
        pytest.param(b"schema: 1\n? [a, b]\n: c\n", id="list-as-key"),
        pytest.param(b"schema: 1\nexamples: &loop [*loop]\n", id="endless"),
        pytest.param(b"a: " + b"[" * 1_000, id="deep"),
        pytest.param(b"# " + b"x" * 256 * 1024, id="too-large"),
    ],
)
def test_a_file_that_is_no_persona(tmp_path, data):
    folder = write(tmp_path, data)
    with pytest.raises(PersonaInvalid) as caught:
        Persona.load(folder)
    assert str(folder / "persona.yaml") in caught.value.message


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"bio": "\ud800"}, "bio"),
        ({"examples": [{"player": "\ud800", "npc": "x"}]}, "examples"),
        ({"fallback": {"timeout": ["\ud800"]}}, "fallback"),
        ({"adapter": "\ud800"}, "adapter"),
    ],
)
def test_half_a_surrogate_pair_is_refused(make_persona, fields, named):
    """It can never be sent. JSON is YAML: the fixture writes it escaped."""
    with pytest.raises(PersonaInvalid, match=named):
        Persona.load(make_persona("guard", **fields))


FULL = b"""\
# A whole one.
schema: 1
id: guard
display_name: 'Guard'   # quoted
tags: [town, night]
locale: en-GB
bio: |
  Watches the gate.

  Has for years.
personality: Tired.
scenario: The gate
goals: [sleep]
knows:
  # always
  - {id: gate, text: The gate is old}
  - id: dragon
    text: The dragon is dead.
    when: quest.dragon == "dead"   # act two
    priority: 2
    notes: see act two
never_says: [okay]
guardrails: {avoid: [dice], stay_in_character: yes please}
greetings: ["Halt!"]
examples:
  - player: Hi
    npc: Hm.
adapter: {path: lora, scale: 0.5}
format: {kind: choice, value: ["yes", "no"]}
emotions: [neutral, angry]
actions: [wave, {name: open_gate, description: opens it}]
fallback: {timeout: [Hm.], refusal: ["No."], greeting: [Evening.], busy: [Wait.]}
voice: {id: deep, description: low, pitch: 0.8, rate: 1.1}
system_prompt: "{{original}} Be brief."
post_history_instructions: Stay calm.
notes: For act one.
card: {creator: somebody, extensions: {depth: [1, {a: b}]}}
locked: [display_name]
"""
WHOLE = FULL.replace(b"yes please", b"true")


def test_every_field_is_read():
    persona = Persona.parse(WHOLE, Path("guard"))
    assert set(persona.to_document()) == {
        field.alias or name
        for name, field in Persona.model_fields.items()
        if name not in ("sampling", "limits", "speech_style")
    }
    assert persona.knows[1].condition.names == {"quest.dragon"}
    assert persona.asked_facts == ["quest.dragon"]
    assert [(action.name, action.description) for action in persona.actions] == [
        ("wave", ""),
        ("open_gate", "opens it"),
    ]


def test_all_problems_are_told_at_once_with_line_field_and_remedy(tmp_path):
    data = (
        FULL.replace(b"speech", b"x").replace(b"id: guard", b"id: Guard").replace(b"quest.dragon ==", b"quest.dragon =")
    )
    data = (
        data.replace(b"personality:", b"personalty:").replace(b"goals: [sleep]", b"goals: sleep").replace(b"deep", b"7")
    )
    folder = write(tmp_path, data + b"greting: x\n")
    problems = find_problems(folder)
    lines = data.decode().splitlines()
    expected = {
        "id Guard": ("id:", "small letters"),
        "personalty": ("personalty", "Did you mean 'personality'?"),
        "goals": ("goals", "with '- ' in front"),
        "knows.1.when": ("    when", "Write == to compare."),
        "guardrails.stay_in_character": ("guardrails", "Correct"),
        "voice.id": ("voice", "Put it in quotes."),
    }
    told = {str(problem): problem for problem in problems}
    for field, (start, remedy) in expected.items():
        number = next(at for at, line in enumerate(lines, 1) if line.startswith(start))
        where = f"{folder / 'persona.yaml'}, line {number}: {field.split()[0]}"
        assert any(text.startswith(where) and remedy in text for text in told), (where, list(told))
    assert any("greting" in text and "Did you mean 'greetings'?" in text for text in told)
    assert "column 14" in "".join(told)
    with pytest.raises(PersonaInvalid, match="more: npc-runtime persona check"):
        Persona.load(folder)


@pytest.mark.parametrize(
    ("fields", "remedy"),
    [
        ({"speach_style": "Short."}, "Did you mean 'speech_style'?"),
        ({"sampling": {"temprature": 1.0}}, "Did you mean 'temperature'?"),
        ({"knows": [{"id": "a", "txt": "b"}]}, "Did you mean 'text'?"),
        ({"adapter": {"path": "lora", "scal": 2}}, "Did you mean 'scale'?"),
        ({"fallback": {"xyzzy": []}}, "Fields here are: busy, greeting, refusal, timeout."),
        ({"knows": [{"id": "a", "text": "b"}] * 2}, "Give every entry its own id."),
        ({"knows": [{"id": "a", "text": "b", "when": "(" * 99}]}, "The limit is 16."),
        ({"locked": ["nothing"]}, "Name fields of this file"),
        ({"format": {"kind": "choice"}}, "Write value: [one, two]."),
        ({"format": {"kind": "poem"}}, "Write 'text', 'choice', 'regex' or 'json_schema'."),
        ({"bio": 7}, "Put it in quotes."),
        ({"bio": None}, "Write a text behind the colon"),
        ({"goals": ["  "]}, "Write something"),
        ({"tags": ["x" * 65]}, "Shorten it to 64."),
        ({"bio": "x" * 16_001}, "Shorten it to 16000."),
        ({"adapter": "//host/share"}, "Correct this field."),
        ({"card": {"a": [[[[[[[[[[[[1]]]]]]]]]]]]}}, "The limit is 12."),
    ],
)
def test_remedies(make_persona, fields, remedy):
    with pytest.raises(PersonaInvalid) as caught:
        Persona.load(make_persona("guard", **fields))
    assert remedy in caught.value.hint


def test_a_missing_field_is_to_be_added(tmp_path):
    with pytest.raises(PersonaInvalid, match=r"bio: is missing\. Add the line 'bio: …'"):
        Persona.load(write(tmp_path, b"schema: 1\nid: guard\ndisplay_name: x\n"))


# -- saving --------------------------------------------------------------------------------------------------


def change(folder, **fields):
    document = {**Persona.load(folder).to_document(), **fields}
    return Persona.model_validate(document)


def test_what_did_not_change_is_not_touched(tmp_path):
    folder = write(tmp_path, WHOLE)
    Persona.load(folder).save(folder)
    assert (folder / "persona.yaml").read_bytes() == WHOLE


@pytest.mark.parametrize(
    ("fields", "before", "after"),
    [
        ({"personality": "Wide awake"}, b"personality: Tired.", b"personality: Wide awake"),
        ({"adapter": "lora"}, b"adapter: {path: lora, scale: 0.5}", b"adapter: lora"),
        ({"emotions": ["neutral"]}, b"emotions: [neutral, angry]", b"emotions: [neutral]"),
        ({"bio": "One line."}, b"bio: |\n  Watches the gate.\n\n  Has for years.\n", b"bio: |-\n  One line.\n"),
        ({"notes": "yes"}, b"notes: For act one.", b"notes: yes"),
        ({"system_prompt": "x: y"}, b'"{{original}} Be brief."', b'"x: y"'),
    ],
)
def test_a_change_is_all_that_changes(tmp_path, fields, before, after):
    folder = write(tmp_path, WHOLE)
    wanted = change(folder, **fields)
    wanted.save(folder)
    assert (folder / "persona.yaml").read_bytes() == WHOLE.replace(before, after)
    assert Persona.load(folder).to_document() == wanted.to_document()
    assert [path.name for path in folder.iterdir()] == ["persona.yaml"]


def test_fields_come_and_go(tmp_path):
    folder = write(tmp_path, WHOLE)
    document = {**Persona.load(folder).to_document(), "speech_style": "Short.", "limits": {"soft_words": 9}}
    del document["voice"], document["goals"]
    wanted = Persona.model_validate({key: document[key] for key in sorted(document)})
    wanted.save(folder)
    text = (folder / "persona.yaml").read_text()
    assert Persona.load(folder).to_document() == wanted.to_document()
    assert text.index("personality:") < text.index("speech_style: Short.") < text.index("scenario:")
    assert "voice:" not in text
    assert "# act two" in text


def test_defaults_that_the_file_leaves_out_stay_out(tmp_path):
    folder = write(tmp_path, b"schema: 1\nid: guard\ndisplay_name: G\nbio: B\n")
    full = Persona.load(folder).model_dump(mode="json", by_alias=True)
    Persona.model_validate({**full, "bio": "C"}).save(folder)
    assert (folder / "persona.yaml").read_bytes() == b"schema: 1\nid: guard\ndisplay_name: G\nbio: C\n"


def test_a_locked_field_is_not_changed(tmp_path):
    folder = write(tmp_path, WHOLE)
    with pytest.raises(PersonaInvalid, match=r"line 4: 'display_name' is locked\. Take it off"):
        change(folder, display_name="Bert").save(folder)
    assert (folder / "persona.yaml").read_bytes() == WHOLE
    change(folder, locked=[]).save(folder)
    change(folder, display_name="Bert").save(folder)
    assert Persona.load(folder).display_name == "Bert"


def test_a_new_file_is_written(tmp_path):
    persona = Persona.parse(WHOLE, tmp_path / "guard")
    assert persona.save(tmp_path / "guard") == tmp_path / "guard" / "persona.yaml"
    assert Persona.load(tmp_path / "guard").to_document() == persona.to_document()


def test_a_wrong_file_can_be_saved_over(tmp_path):
    folder = write(tmp_path, b"# mine\nschema: 1\nid: guard\nbio: 7   # a number\nspeach_style: x\n")
    guard().save(folder)
    assert Persona.load(folder).to_document() == guard().to_document()
    assert (folder / "persona.yaml").read_bytes().startswith(b"# mine\nschema: 1\nid: guard\n")


@pytest.mark.parametrize("name", ["schema", "id", "display_name", "bio"])
def test_a_field_that_must_be_there_is_put_back(tmp_path, name):
    wanted = guard(bio="x", display_name="x")
    lines = [
        line for line in b"schema: 1 # a\nid: guard # b\ndisplay_name: x # c\nbio: x # d\n".splitlines(keepends=True)
    ]
    folder = write(tmp_path, b"".join(line for line in lines if not line.startswith(name.encode())))
    wanted.save(folder)
    assert Persona.load(folder).to_document() == wanted.to_document()
    assert (folder / "persona.yaml").read_bytes().count(b"#") == 3


# -- the library ---------------------------------------------------------------------------------------------


def test_a_bad_persona_does_not_affect_the_others(make_persona, tmp_path):
    make_persona("anna")
    make_persona("bert", bio=None)
    make_persona("carl")
    library = Library.load(tmp_path / "personas")
    assert [persona.id for persona in library] == ["anna", "carl"]
    assert len(library) == 2
    assert library.find("carl").display_name == "Carl"
    with pytest.raises(PersonaInvalid, match="bio"):
        library.find("bert")


def test_an_unknown_persona_is_answered_with_the_known_ones(make_persona, tmp_path):
    make_persona("anna")
    with pytest.raises(PersonaUnknown) as caught:
        Library.load(tmp_path / "personas").find("ana")
    assert "'ana'" in caught.value.message
    assert "anna" in caught.value.hint


def test_an_empty_folder_is_an_empty_library(tmp_path):
    with pytest.raises(PersonaUnknown, match="none"):
        Library.load(tmp_path).find("anna")


def test_asking_for_a_bad_persona_again_and_again_keeps_nothing(make_persona, tmp_path):
    """An exception that is raised once more grows its traceback, and with it the frames it keeps alive."""
    make_persona("bert", bio=None)
    library = Library.load(tmp_path / "personas")

    def num_frames():
        with pytest.raises(PersonaInvalid) as caught:
            library.find("bert")
        return len(caught.traceback)

    assert num_frames() == num_frames()


# -- what the model reads ------------------------------------------------------------------------------------


def test_messages_are_system_examples_history_and_the_line():
    persona = guard(
        bio="Watches\n  the gate",
        speech_style="Short!",
        examples=[{"player": "Who are you?", "npc": "The guard."}],
    )
    history = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hm."}]
    assert persona.messages(history, "Is it safe?") == [
        {
            "role": "system",
            "content": "You are Guard. Watches the gate. Short! Reply in character, in one or two sentences.",
        },
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": "The guard."},
        *history,
        {"role": "user", "content": "Is it safe?"},
    ]
    assert len(history) == 2


@pytest.mark.parametrize(
    ("speaker", "context", "expected"),
    [
        (None, None, "Hi"),
        ("Ada", None, "Ada: Hi"),
        (None, {}, "Hi"),
        (None, {"facts": ["It rains", "It is late."]}, "(It rains. It is late.)\nHi"),
        (
            "Ada",
            {"scene": "The gate", "mood": "tired", "nearby": ["a dog", "Bert"], "facts": ["War!"], "x": 1},
            "(Scene: The gate. Mood: tired. Nearby: a dog, Bert. War!)\nAda: Hi",
        ),
    ],
)
def test_speaker_and_context_stand_in_the_last_message_alone(speaker, context, expected):
    context = None if context is None else Context.model_validate(context)
    messages = guard().messages([], "Hi", speaker=speaker, context=context)
    assert messages[-1]["content"] == expected
    assert messages[:-1] == guard().messages([], "Hi")[:-1]
