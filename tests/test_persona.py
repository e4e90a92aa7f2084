"""Persona files are read strictly and rendered in a fixed order; a bad one never takes the others along."""

import pytest

from npc_runtime.errors import PersonaInvalid, PersonaUnknown
from npc_runtime.persona import Library, Persona, shipped_personas
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
