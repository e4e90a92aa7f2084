"""Import makes a persona's folder and says what went where; export gives the card back, as JSON and in a picture."""

import json

import pytest
from typer.testing import CliRunner

from npc_runtime.card_files import parse_card_file, read_card_file, write_json, write_png
from npc_runtime.card_folder import ONLY_V3, export_card, import_card
from npc_runtime.errors import CardInvalid, PersonaInvalid, StartupError
from npc_runtime.persona import Library, Persona, shipped_personas
from npc_runtime.persona_commands import persona_app
from npc_runtime.png import draw_portrait, find_text, read_chunks, text_chunk, write_chunks

DATA = {
    "name": "Élodie",
    "description": "{{char}} knows <USER>.\r\n",
    "first_mes": "Bonjour.",
    "extensions": {"fav": True, "odd key!": [None]},
    "character_book": {"entries": [{"keys": ["/re/"], "content": "Kept."}], "extensions": {}},
}
V2 = {"spec": "chara_card_v2", "spec_version": "2.0", "data": DATA}
V3 = {"spec": "chara_card_v3", "spec_version": "3.0", "data": {**DATA, "group_only_greetings": []}}
PICTURE = draw_portrait("her own face")


@pytest.fixture
def cards(tmp_path):
    """A card in every wrapping."""
    (tmp_path / "v2.json").write_bytes(write_json(V2))
    (tmp_path / "v3.json").write_bytes(write_json(V3))
    (tmp_path / "v3.png").write_bytes(write_png(PICTURE, {"chara": V2, "ccv3": V3}))
    return tmp_path


@pytest.mark.parametrize("name", ["v2.json", "v3.json", "v3.png"])
@pytest.mark.parametrize("out", ["out.json", "out.png"])
def test_a_card_comes_back(cards, name, out):
    imported = import_card(cards / name, cards / "personas")
    assert imported.persona.id == "elodie"
    assert imported.folder == cards / "personas" / "elodie"
    assert [persona.id for persona in Library.load(cards / "personas")] == ["elodie"]
    export_card(imported.folder, cards / out)
    before, after = read_card_file(cards / name), read_card_file(cards / out)
    if out.endswith(".json"):
        assert after.document == before.document
    else:
        assert after.document == V3
        assert after.picture == (before.picture or draw_portrait("Élodie"))


def test_a_picture_has_the_card_for_old_and_new_readers(cards):
    folder = import_card(cards / "v3.json", cards / "personas").folder
    _, notes = export_card(folder, cards / "out.png")
    assert any(note.place == "a drawn one" for note in notes)
    chunks = read_chunks((cards / "out.png").read_bytes())
    assert find_text(chunks, "ccv3", max_bytes=9_999)
    only_old = write_chunks(chunk for chunk in chunks if chunk.keyword != "ccv3")
    document = parse_card_file(only_old, "x").document
    assert document["spec"] == "chara_card_v2"
    assert document["data"]["creator_notes"] == ONLY_V3
    export_card(folder, cards / "out.png", as_v2=True)
    assert find_text(read_chunks((cards / "out.png").read_bytes()), "ccv3", max_bytes=9_999) is None
    assert read_card_file(cards / "out.png").document["data"] == V3["data"]


def test_texts_of_other_programs_stay_in_the_picture(cards):
    *chunks, end = read_chunks(PICTURE)
    asset = text_chunk("chara-ext-asset_:1", b"AAAA")
    (cards / "a.png").write_bytes(write_png(write_chunks([*chunks, asset, end]), {"ccv3": V3}))
    folder = import_card(cards / "a.png", cards / "personas").folder
    export_card(folder, cards / "out.png")
    assert find_text(read_chunks((cards / "out.png").read_bytes()), "chara-ext-asset_:1", max_bytes=9) == b"AAAA"


def test_ids_do_not_collide(cards):
    personas = cards / "personas"
    made = [import_card(cards / "v2.json", personas).persona.id for _ in range(3)]
    assert made == ["elodie", "elodie-2", "elodie-3"]
    assert import_card(cards / "v2.json", personas, persona_id="her").persona.id == "her"
    with pytest.raises(StartupError, match="exists already"):
        import_card(cards / "v2.json", personas, persona_id="her")
    with pytest.raises(StartupError, match="like 'e-lodie'"):
        import_card(cards / "v2.json", personas, persona_id="E lodie")
    with pytest.raises(StartupError, match="cannot be an id"):
        import_card(cards / "v2.json", personas, persona_id="../up")


def test_force_keeps_what_a_card_does_not_say(cards):
    folder = import_card(cards / "v2.json", cards / "personas").folder
    path = folder / "persona.yaml"
    path.write_text(
        path.read_text("utf-8") + "# ours\nsampling:\n  temperature: 0.2  # calm\nscenario: Old.\n", "utf-8"
    )
    (cards / "v2.json").write_bytes(write_json({**V2, "data": {**DATA, "description": "New."}}))
    persona = import_card(cards / "v2.json", cards / "personas", force=True).persona
    assert (persona.id, persona.bio, persona.scenario, persona.sampling.temperature) == ("elodie", "New.", "", 0.2)
    assert "temperature: 0.2  # calm" in path.read_text("utf-8")


def test_force_leaves_locked_fields_and_broken_files_alone(cards):
    folder = import_card(cards / "v2.json", cards / "personas").folder
    path = folder / "persona.yaml"
    text = path.read_text("utf-8")
    (cards / "new.json").write_bytes(write_json({**V2, "data": {**DATA, "description": "New."}}))
    for broken, told in ((text + "locked: [bio]\n", "'bio' is locked"), (text + "bio: again\n", "already there")):
        path.write_text(broken, "utf-8")
        with pytest.raises(PersonaInvalid, match=told):
            import_card(cards / "new.json", cards / "personas", persona_id="elodie", force=True)
        assert path.read_text("utf-8") == broken
        assert json.loads((folder / "card.json").read_bytes()) == V2


def test_an_edit_is_exported(cards):
    folder = import_card(cards / "v3.json", cards / "personas").folder
    persona = Persona.load(folder)
    persona.model_copy(update={"scenario": "A bridge."}).save(folder)
    export_card(folder, cards / "out.json", now=5)
    data = {**V3["data"], "scenario": "A bridge.", "modification_date": 5}
    assert read_card_file(cards / "out.json").document == {**V3, "data": data}


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("card.json", b"{", "card.json, line 1, column 2: this is not JSON"),
        ("card.json", b"{}", "card.json is JSON, but no character card"),
        ("portrait.png", b"?", "the picture: this is not a PNG file"),
    ],
)
def test_broken_files_in_the_folder_are_named(cards, name, data, told):
    folder = import_card(cards / "v3.png", cards / "personas").folder
    (folder / name).write_bytes(data)
    with pytest.raises(CardInvalid, match=told):
        export_card(folder, cards / "out.png")
    assert not (cards / "out.png").exists()


def test_places_that_cannot_be_written(cards):
    folder = import_card(cards / "v3.png", cards / "personas").folder
    for out, told in (("out.gif", "a .json or a .png file"), ("none/out.png", "cannot be written")):
        with pytest.raises(StartupError, match=told):
            export_card(folder, cards / out)
    (cards / "file").write_bytes(b"")
    with pytest.raises(StartupError, match="cannot be written"):
        import_card(cards / "v3.png", cards / "file")


# -- commands ------------------------------------------------------------------------------------------------


def call(*arguments):
    done = CliRunner().invoke(persona_app, list(map(str, arguments)))
    return done.exit_code, done.stdout, done.stderr, done.exception


def test_the_commands(cards):
    personas = cards / "personas"
    code, out, report, _ = call("import", cards / "v3.png", "--personas", personas)
    assert (code, out) == (0, f"{personas / 'elodie'}\n")
    assert "  description → bio\n" in report
    assert "  character_book, entry 1 (/re/) → stays in card.json  (its keys are regular expressions)\n" in report
    code, out, report, _ = call("import", cards / "v2.json", "--personas", personas, "--id", "e2", "--json")
    body = json.loads(out)
    assert (code, body["id"], body["folder"], report) == (0, "e2", str(personas / "e2"), "")
    assert {"field": "description", "place": "bio", "remark": ""} in body["report"]
    code, out, _, _ = call("export", "elodie", cards / "out.png", "--personas", personas)
    assert (code, out) == (0, f"{cards / 'out.png'}\n")
    code, out, _, _ = call("export", "e2", cards / "out.json", "--personas", personas, "--v2", "--json")
    assert (code, json.loads(out)["card"]) == (0, str(cards / "out.json"))
    assert read_card_file(cards / "out.json").document == V2


def test_a_shipped_persona_is_exported(tmp_path):
    code, _, report, _ = call("export", "odo", tmp_path / "odo.png")
    assert code == 0
    assert "adapter → not in the card" in report
    document = read_card_file(tmp_path / "odo.png").document
    assert document["data"]["name"] == "Odo"
    assert "Hurried and apologetic" in document["data"]["personality"]
    again = import_card(tmp_path / "odo.png", tmp_path).persona
    shipped = Persona.load(shipped_personas() / "odo")
    apart = {"card", "adapter", "locked"}
    assert again.model_dump(exclude=apart) == shipped.model_dump(exclude=apart)
    assert again.speech_style.startswith("Hurried")
    assert again.fallback.timeout


def test_a_persona_that_is_not_there(tmp_path):
    *_, error = call("export", "nobody", tmp_path / "x.png", "--personas", tmp_path)
    assert isinstance(error, StartupError)
    assert "no persona 'nobody'" in str(error)
