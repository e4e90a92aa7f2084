"""A draft speaks as the loaded persona with its id would, or says why not; it never reads a file."""

import pytest

from npc_runtime import protocol as wire
from npc_runtime.draft import check_document, read_draft
from npc_runtime.errors import AdapterMissing, InvalidError, PersonaInvalid, WireError
from npc_runtime.line import resolve_sampling
from npc_runtime.persona import Library, Persona

DOCUMENT = {"schema": 1, "id": "guard", "display_name": "Guard", "bio": "Watches the gate."}
LORA = {"path": "lora", "scale": 0.5}


def library_of(*documents):
    personas = [Persona.model_validate(document) for document in documents]
    return Library({persona.id: persona for persona in personas}, {})


def test_a_draft_is_a_persona_like_any_other():
    draft = read_draft(
        {
            **DOCUMENT,
            "knows": [{"id": "war", "text": "There is war.", "when": "war"}],
            "limits": {"hard_tokens": 9},
            "fallback": {"timeout": ["Hm."]},
        },
        library_of(),
    )
    assert draft.prompt([], "Hi", facts={"war": True}).knowledge == ("There is war.",)
    assert resolve_sampling(wire.LineSampling(), draft, lambda: 3).max_tokens == 9
    assert (draft.adapter_name, draft.fallback.timeout) == (None, ("Hm.",))


@pytest.mark.parametrize(
    ("saved", "spelled", "expected"),
    [
        (None, None, None),
        ("lora", None, None),
        ("lora", "lora", "guard"),
        ("lora", [{"path": "lora", "scale": 1}], "guard"),
        (LORA, LORA, "guard"),
        ([LORA, "two"], [LORA, "two"], "guard"),
        (LORA, "lora", InvalidError),
        ("lora", "./lora", InvalidError),
        ("lora", "/etc", InvalidError),
        ([LORA, "two"], ["two", LORA], InvalidError),
        ("lora", ["lora", "lora"], InvalidError),
        (None, "lora", InvalidError),
    ],
)
def test_a_draft_has_the_adapters_of_the_loaded_persona_or_none(saved, spelled, expected):
    library = library_of({**DOCUMENT, "adapter": saved}, {**DOCUMENT, "id": "other", "adapter": spelled})
    document = {**DOCUMENT, "bio": "Another one.", "adapter": spelled}
    if expected is InvalidError:
        with pytest.raises(InvalidError, match=r"'guard' is loaded with\. Save it first"):
            read_draft(document, library)
    else:
        assert read_draft(document, library).adapter_name == expected


def test_a_draft_of_an_unknown_persona_with_an_adapter_is_to_be_saved():
    with pytest.raises(InvalidError, match="Save it first"):
        read_draft({**DOCUMENT, "adapter": "lora"}, library_of())


def test_what_keeps_the_loaded_persona_from_its_adapter_keeps_the_draft():
    library = library_of({**DOCUMENT, "adapter": "lora"})
    library.reject("guard", AdapterMissing("lora: there is no such folder.", "Put it there."))
    with pytest.raises(AdapterMissing):
        read_draft({**DOCUMENT, "adapter": "lora"}, library)
    assert read_draft(DOCUMENT, library).adapter_name is None


def test_a_draft_of_a_persona_that_was_edited_since_speaks_with_what_is_loaded():
    library = library_of({**DOCUMENT, "adapter": "lora"})
    library.object_to("guard", PersonaInvalid("persona.yaml: no.", "Mend it."))
    assert read_draft({**DOCUMENT, "adapter": "lora"}, library).adapter_name == "guard"


@pytest.mark.parametrize(
    ("document", "named"),
    [
        (None, "not a map"),
        ([DOCUMENT], "not a map"),
        ({}, "is missing"),
        ({**DOCUMENT, "bio": ""}, "bio"),
        ({**DOCUMENT, "bio": "\ud800"}, "bio: half of a character"),
        ({**DOCUMENT, "schema": 2}, "schema 2 is newer"),
        ({**DOCUMENT, "schema": True}, "schema"),
        ({**DOCUMENT, "id": "../guard"}, "id"),
        ({**DOCUMENT, "id": ["guard"]}, "id"),
        ({**DOCUMENT, "temper": 3}, "temper"),
        ({**DOCUMENT, "adapter": "//host/share"}, "adapter.0.path: a network path"),
        ({**DOCUMENT, "knows": [{"id": "a", "text": "b", "when": "a ="}]}, "knows.0.when"),
        ({**DOCUMENT, "card": {"a": b"b"}}, "card.a: bytes"),
    ],
)
def test_a_bad_draft_is_refused_with_the_field(document, named):
    with pytest.raises(PersonaInvalid) as caught:
        read_draft(document, library_of(DOCUMENT))
    assert named in caught.value.message
    assert caught.value.hint
    caught.value.message.encode()


def test_all_problems_of_a_draft_are_told_where_they_are():
    document = {
        **DOCUMENT,
        "bio": 7,
        "knows": [{"id": "a", "text": "b"}, {"id": "c", "text": "", "when": "(", "a/b~c": 1}],
        "adapter": {"path": "lora", "scal": 2},
        "actions": ["wave", "1"],
        "examples": [{"player": "Hi"}],
    }
    del document["display_name"]
    reading = check_document(document)
    assert [problem.field for problem in reading.problems] == [
        "/bio",
        "/knows/1/text",
        "/knows/1/when",
        "/knows/1/a~1b~0c",
        "/adapter/scal",
        "/actions/1",
        "/display_name",
        "/examples/0/npc",
    ]
    with pytest.raises(PersonaInvalid, match=r"7 more: persona\.validate"):
        reading.usable()


def test_a_draft_does_not_touch_the_disk(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError(arguments)

    library = library_of({**DOCUMENT, "adapter": "/etc/lora"})
    monkeypatch.setattr("io.open", refuse)
    monkeypatch.setattr("os.stat", refuse)
    assert read_draft({**DOCUMENT, "adapter": "/etc/lora"}, library).adapter_name == "guard"
    with pytest.raises(WireError):
        read_draft({**DOCUMENT, "adapter": "/etc/passwd"}, library)
