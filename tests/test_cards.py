"""Cards become personas and come back as they were, whatever real cards and 10,000 unreal ones have in them."""

import base64
import copy
import json
import random
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from npc_runtime.card_files import parse_card_file, write_json, write_png
from npc_runtime.card_writer import convert_card, write_card
from npc_runtime.cards import STRANGER, Card
from npc_runtime.errors import CardInvalid
from npc_runtime.persona import Persona
from npc_runtime.png import draw_portrait, read_chunks, text_chunk, write_chunks

DATA = {
    "name": "Odo",
    "description": "The innkeeper. {{char}} fears <USER>.\r\n",
    "personality": "Nervous.",
    "scenario": "A tavern at night.",
    "first_mes": "Oh! Do come in.",
    "mes_example": "<START>\n{{user}}: Hi.\n{{char}}: Oh dear.\n<START>\nOdo: Alone.",
    "creator_notes": "For act one.",
    "system_prompt": "{{original}} Be brief.",
    "post_history_instructions": "Stay Odo.",
    "alternate_greetings": ["You again?"],
    "tags": ["tavern", "nervous"],
    "creator": "Ann",
    "character_version": "1.2",
    "extensions": {"talkativeness": "0.5", "depth_prompt": {"prompt": "", "depth": 4}, "x y": [1, {"deep": None}]},
    "character_book": {
        "extensions": {},
        "scan_depth": 50,
        "entries": [
            {"keys": ["king"], "content": "He owes.", "extensions": {}, "enabled": True, "insertion_order": 1, "id": 1},
            {"keys": ["/x/"], "content": "Kept.", "extensions": {}, "enabled": True, "insertion_order": 2},
        ],
    },
}
V2 = {"spec": "chara_card_v2", "spec_version": "2.0", "data": DATA}
V3 = {
    "spec": "chara_card_v3",
    "spec_version": "3.0",
    "data": {
        **DATA,
        "nickname": "Odo the Meek",
        "group_only_greetings": ["Everybody, welcome."],
        "assets": [{"type": "icon", "uri": "ccdefault:", "name": "main", "ext": "png"}],
        "source": ["https://example.org/odo"],
        "creation_date": 0,
        "creator_notes_multilingual": {"de": "Für Akt eins."},
    },
}
V1 = {key: DATA[key] for key in ("name", "description", "personality", "scenario", "first_mes", "mes_example")}


def persona_of(document):
    reading = Card(document).reading
    return reading.persona(reading.persona_id)


def noted(document):
    return {note.field: (note.place, note.remark) for note in Card(document).reading.notes}


# -- what goes where -----------------------------------------------------------------------------------------


def test_every_field_has_its_place():
    persona = persona_of(V3)
    assert persona.id == "odo-the-meek"
    assert persona.display_name == "Odo the Meek"
    assert persona.bio == "The innkeeper. {{char}} fears {{user}}."
    assert persona.greetings == ("Oh! Do come in.", "You again?", "Everybody, welcome.")
    assert [(example.player, example.npc) for example in persona.examples] == [("Hi.", "Oh dear.")]
    assert [(entry.id, entry.when) for entry in persona.knows] == [("king", '"king" in said')]
    assert persona.tags == ("tavern", "nervous")
    assert persona.notes == "For act one."
    assert persona.card["creator"] == "Ann"
    assert persona.card["extensions"] == {"talkativeness": "0.5", "depth_prompt": {"prompt": "", "depth": 4}}
    assert persona.card["assets"] == V3["data"]["assets"]


def test_a_prompt_has_the_names_and_not_the_macros():
    (system, *_), said = (
        persona_of(V3).messages([], "Is the king here?")[:-1],
        persona_of(V3).messages([], "The king?")[-1],
    )
    assert "Odo the Meek fears the player." in system["content"]
    assert "He owes." in said["content"]
    assert "{{" not in json.dumps(persona_of(V3).messages([], "The king?"))


def test_the_report_names_what_has_no_place():
    notes = noted(V3)
    assert notes["description"] == ("bio", "")
    assert notes["extensions.x y"] == ("", "too large for the persona file")
    assert notes["character_book, entry 2 (/x/)"] == ("", "its keys are regular expressions")
    assert "1 turns are not" in notes["mes_example"][1]
    assert noted({**V3, "fav": True})["fav"] == ("", "stands beside 'data'")
    assert noted({**V3, "spec": "chara_card_v4"})["spec"][1].endswith("read as V3")
    macro = {**V2, "data": {**DATA, "scenario": "It is {{time}}."}}
    assert noted(macro)["{{time}}"] == ("", "not a macro here; the model reads it as it stands")
    named = {key.partition(",")[0] for key in notes}
    for key in V3["data"]:
        assert any(name.startswith(key) for name in named) or any(key in note for note in notes), key


def test_what_is_too_long_is_cut_and_said():
    long = {
        **V2,
        "data": {**DATA, "description": "A sentence. " * 2_000, "mes_example": "{{user}}: a\n{{char}}: b\n" * 40},
    }
    assert len(persona_of(long).bio) <= 16_000
    assert noted(long)["description"][1] == "23,999 characters; the first 15,995 are used"
    assert noted(long)["mes_example"][1] == "8 exchanges are too long or too many"
    assert write_card(persona_of(long), Card(long)).document == long


def test_a_giant_card_makes_a_file_that_can_be_read(tmp_path):
    book = {"entries": [{"keys": ["k"], "content": "é\n" * 1_999, "name": f"e{n}"} for n in range(1_100)]}
    giant = {**V2, "data": {**DATA, "character_book": book, "alternate_greetings": ["ö" * 15_000] * 8}}
    persona = persona_of(giant)
    persona.save(tmp_path / persona.id)
    assert Persona.load(tmp_path / persona.id).model_dump() == persona.model_dump()
    assert 100_000 < (tmp_path / "odo" / "persona.yaml").stat().st_size < 200_000
    assert noted(giant)["character_book"] == ("knows", "cut, so that the file stays below 192 KiB")
    assert write_card(persona, Card(giant)).document == giant


@pytest.mark.parametrize(
    ("document", "told"),
    [
        ({}, "is JSON, but no character card"),
        ({"name": "Odo"}, "is JSON, but no character card"),
        ({"name": "npm", "version": "1.0.0"}, "is JSON, but no character card"),
        ({"entries": {}, "name": "World"}, "is a lorebook"),
        ({"spec": "lorebook_v3", "data": {"entries": []}}, "is a lorebook"),
        ({"spec": "chara_card_v2", "data": {}}, "has no data with a name"),
        ({"spec": "chara_card_v2", "data": []}, "has no data with a name"),
    ],
)
def test_what_is_no_card_is_refused(document, told):
    with pytest.raises(CardInvalid, match=told) as caught:
        Card(document, "x.json")
    assert str(caught.value).startswith("x.json ")
    assert caught.value.hint


def test_slips_of_real_cards():
    data = {"name": 7, "description": None, "tags": "a, b", "alternate_greetings": "One, two.", "first_mes": 3}
    persona = persona_of({"data": {**data, "extensions": [], "character_book": [], "mes_example": {}}})
    assert (persona.display_name, persona.bio, persona.tags) == ("7", STRANGER, ("a", "b"))
    assert persona.greetings == ("One, two.",)


# -- back again ----------------------------------------------------------------------------------------------

PIECES = [
    "{{char}}",
    "{{user}}: ",
    "<START>\n",
    "<BOT>",
    "Odo: ",
    "\r\n",
    "\n",
    " ",
    '"',
    "\\",
    "@@depth 4\n",
    "- ",
    "#",
    ": ",
]
texts = st.lists(st.sampled_from(PIECES) | st.text(st.characters(), max_size=12), max_size=8).map("".join)
numbers = st.integers(-(10**40), 10**40) | st.floats(allow_nan=False, allow_infinity=False)
leaves = st.none() | st.booleans() | numbers | texts
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=6
)
maps = st.dictionaries(texts, values, max_size=4)
some = st.lists(texts, max_size=3)


def slips(right):
    """Mostly what a field should be, sometimes anything."""
    return st.integers(0, 9).flatmap(lambda number: values if number == 0 else right)


entries = st.fixed_dictionaries(
    {"keys": slips(some), "content": slips(texts), "extensions": slips(maps)},
    optional={
        **{key: slips(st.booleans()) for key in ("enabled", "constant", "selective", "use_regex", "case_sensitive")},
        **{key: slips(numbers) for key in ("insertion_order", "priority", "id")},
        **{key: slips(texts) for key in ("name", "comment", "position")},
        "secondary_keys": slips(some),
        "unknown": values,
    },
)
books = st.fixed_dictionaries(
    {"entries": slips(st.lists(slips(entries), max_size=4)), "extensions": slips(maps)}, optional={"scan_depth": values}
)
datas = st.fixed_dictionaries(
    {key: slips(texts) for key, value in DATA.items() if isinstance(value, str)}
    | {"alternate_greetings": slips(some), "tags": slips(some), "extensions": slips(maps)},
    optional={
        "character_book": slips(books),
        "nickname": slips(texts),
        "group_only_greetings": slips(some),
        "assets": slips(st.lists(maps, max_size=2)),
        "source": slips(some),
        "creation_date": slips(numbers),
        "creator_notes_multilingual": slips(maps),
        "unknown": values,
    },
)
specs = st.sampled_from([("chara_card_v2", "2.0"), ("chara_card_v3", "3.0"), ("chara_card_v3", "3.1")])


@st.composite
def cards(draw):
    data = draw(datas)
    spec, version = draw(specs)
    outside = {key: data[key] for key in draw(st.lists(st.sampled_from(sorted(data)), max_size=3))}
    return {"spec": spec, "spec_version": version, "data": data, **outside, **draw(st.just({}) | st.just({"fav": "x"}))}


examples = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@examples
@given(cards())
def test_a_card_comes_back_as_it_was(tmp_path_factory, document):
    before = json.dumps(document)
    folder = tmp_path_factory.mktemp("cards") / persona_of(document).id
    persona_of(document).save(folder)
    loaded = Persona.load(folder)
    assert loaded.model_dump() == persona_of(document).model_dump()
    assert json.dumps(write_card(loaded, Card(document), now=1).document) == before
    assert json.dumps(parse_card_file(write_json(document), "x").document) == before
    assert Card(document).reading.notes


@examples
@given(cards())
def test_conversion_loses_nothing(document):
    """To the other version and back, a persona is the same; decorators, which V2 does not know, apart."""
    persona = persona_of(document)
    for version in (2, 3):
        converted = write_card(persona, Card(document), version=version).document
        fields = persona_of(converted).model_dump(exclude={"card", "knows"})
        assert fields == persona.model_dump(exclude={"card", "knows"})
        assert {**document["data"], **converted["data"]}.keys() == converted["data"].keys()
        assert converted["data"].get("extensions") == document["data"].get("extensions")


def test_what_v2_has_in_v3_and_back():
    up = convert_card(V2, 3)
    assert up == {**V2, "spec": "chara_card_v3", "spec_version": "3.0", "data": {**DATA, "group_only_greetings": []}}
    down = convert_card(
        {**V3, "data": {**V3["data"], "character_book": {"entries": [{"content": "@@depth 1\nA."}, 3]}}}, 2
    )
    assert down["data"]["character_book"]["entries"] == [{"content": "A."}, 3]
    assert down["data"]["nickname"] == "Odo the Meek"


def test_a_v1_card_goes_out_as_v2():
    written = write_card(persona_of({**V1, "avatar": "none"}), Card({**V1, "avatar": "none"})).document
    assert written["spec"] == "chara_card_v2"
    assert written["data"] == {**written["data"], **V1, "avatar": "none", "tags": [], "extensions": {}}


@pytest.mark.parametrize("original", [V1, V2, V3])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("display_name", "Odo II"),
        ("bio", "Another man."),
        ("personality", "Bold."),
        ("speech_style", "Slow."),
        ("scenario", "A ship."),
        ("greetings", ["Everybody, welcome.", "New.", "Newer."]),
        ("examples", [{"player": "What?", "npc": "This:\nthat."}]),
        ("knows", [{"id": "king", "text": "He paid.", "when": "debt == 0"}, {"id": "b", "text": "B.", "notes": "n"}]),
        ("notes", ""),
        ("system_prompt", "Be Odo."),
        ("post_history_instructions", "End."),
        ("tags", ["new"]),
        ("card", {"creator": "Bob", "extensions": {"depth_prompt": {"prompt": "x"}}, "mine": [1]}),
        ("goals", ["to sleep"]),
        ("sampling", {"temperature": 0.2}),
        ("fallback", {"timeout": ["Hm."]}),
    ],
)
def test_an_edit_is_in_the_card_and_comes_back(original, field, value):
    card = Card(original)
    edited = Persona.model_validate({**persona_of(original).to_document(), field: value})
    before = copy.deepcopy(original)
    written = write_card(edited, card, now=1_700_000_000).document
    assert original == before
    again = Card(written).reading.persona(edited.id)
    assert sorted(again.greetings) == sorted(edited.greetings)  # those for groups only stand last
    assert again.model_dump(exclude={"greetings", "card"}) == edited.model_dump(exclude={"greetings", "card"})
    assert {key: item for key, item in again.card.items() if key != "modification_date"} == edited.card
    if field == "tags" and original is not V1:
        assert written["data"] == {**original["data"], "tags": ["new"], **_dated(original)}


def _dated(original):
    return {"modification_date": 1_700_000_000} if original is V3 else {}


def test_a_repeated_field_changes_with_the_one_in_data():
    repeated = {**V2, "scenario": DATA["scenario"], "creatorcomment": DATA["creator_notes"], "personality": "Other."}
    edited = Persona.model_validate({**persona_of(repeated).to_document(), "scenario": "A ship.", "notes": "None."})
    written = write_card(edited, Card(repeated)).document
    assert (written["scenario"], written["creatorcomment"], written["personality"]) == ("A ship.", "None.", "Other.")


words = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S"]), min_size=1, max_size=20)
said = words.filter(lambda text: ":" not in text and "<" not in text and "{" not in text)


@examples
@given(
    st.fixed_dictionaries(
        {"display_name": said, "bio": said},
        optional={
            **{name: said for name in ("personality", "speech_style", "scenario", "notes", "system_prompt")},
            "greetings": st.lists(said, max_size=3),
            "examples": st.lists(st.fixed_dictionaries({"player": said, "npc": said}), max_size=3),
            "tags": st.lists(said, max_size=3),
            "goals": st.lists(said, max_size=2),
            "limits": st.fixed_dictionaries({"soft_words": st.integers(1, 99)}),
            "actions": st.just(["wave", {"name": "sit", "description": "down"}]),
            "fallback": st.fixed_dictionaries({"busy": st.lists(said, max_size=2)}),
        },
    ),
    st.sampled_from([2, 3]),
)
def test_a_persona_of_ours_comes_back(fields, version):
    persona = Persona.model_validate({"schema": 1, "id": "x", **fields})
    written = write_card(persona, version=version, now=5)
    again = Card(written.document).reading.persona("x")
    assert again.model_dump(exclude={"card"}) == persona.model_dump(exclude={"card"})
    assert set(again.card) <= {"creation_date", "modification_date"}


def test_a_new_card_has_all_fields_and_says_what_others_pass_over():
    persona = Persona.model_validate(
        {"schema": 1, "id": "x", "display_name": "X", "bio": "B.", "speech_style": "Short.", "adapter": "adapter"}
    )
    document, notes = write_card(persona, now=5)
    assert document["spec"] == "chara_card_v3"
    assert set(DATA) - {"character_book"} | {"group_only_greetings", "creation_date"} <= set(document["data"])
    assert document["data"]["personality"] == "Short."
    assert [note.field for note in notes] == ["speech_style", "adapter"]


# -- fuzz ----------------------------------------------------------------------------------------------------

PICTURE = draw_portrait("Odo")
WILD = [
    None,
    True,
    0,
    -1,
    1e300,
    10**30,
    "",
    " ",
    "\0",
    "\ud83d",
    "{{",
    "<START>",
    "x" * 17_000,
    "\r\n" * 300,
    [],
    [[[[]]]],
]
WILD += [{}, {"": {}}, {"when": 1}, ["a"] * 90, [{}] * 90, {str(number): number for number in range(300)}]
MAX_PEAK = 4 << 20


def damage(data, chance):
    """Bytes with one to four things done to them."""
    data = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at, size = chance.randrange(len(data) + 1), chance.choice([1, 1, 2, 4, 40])
        match chance.randrange(5):
            case 0:
                data[at : at + size] = chance.randbytes(size)
            case 1:
                del data[at : at + size]
            case 2:
                data[at:at] = data[at : at + size] * chance.randint(1, 3)
            case 3:
                data[at : at + 1] = chance.choice(
                    [b'"', b"{", b"]", b"\\", b"\xff\xff\xff\xff", b"9" * 400, b"null", b"{{//"]
                )
            case 4:
                del data[chance.randrange(len(data) + 1) :]
    return bytes(data)


def derange(document, chance):
    """A card with one to four of its values replaced by wild ones."""
    document = copy.deepcopy(document)
    for _ in range(chance.randint(1, 4)):
        inner = document if chance.random() < 0.1 else document["data"]
        while isinstance(inner, dict) and inner:
            key = chance.choice(sorted(inner))
            below = inner[key][0] if isinstance(inner[key], list) and inner[key] else inner[key]
            if not isinstance(below, dict) or chance.random() < 0.3:
                inner[key] = copy.deepcopy(chance.choice(WILD))
                break
            inner = below
        if not isinstance(document.get("data"), dict):
            break
    return document


def in_png(data):
    *chunks, end = read_chunks(PICTURE)
    return write_chunks([*chunks, text_chunk("chara", base64.b64encode(data)), end])


def fuzzed(chance):
    """One file: damaged as it is, damaged inside of its wrapping, or whole with wild values."""
    seed = chance.choice([V2, V3])
    match chance.randrange(10):
        case 0 | 1 | 2:
            return damage(write_json(seed), chance)
        case 3 | 4:
            return damage(write_png(PICTURE, {"chara": V2, "ccv3": seed}), chance)
        case 5 | 6:
            return in_png(damage(json.dumps(seed).encode(), chance))
    return json.dumps(derange(seed, chance)).encode()


def read_back(data, *, is_traced):
    """What a file is read as: a persona's card, or the error; and the most memory that it took, if traced."""
    if is_traced:
        tracemalloc.start()
    try:
        card = Card(parse_card_file(data, "fuzz.png").document, "fuzz.png")
        assert card.reading.persona("x").bio
    except CardInvalid as error:
        card = error
    peak = tracemalloc.get_traced_memory()[1] if is_traced else 0
    tracemalloc.stop()
    return card, peak


def test_ten_thousand_fuzzed_cards():
    chance = random.Random(6)
    num_read = 0
    for number in range(10_000):
        found, peak = read_back(fuzzed(chance), is_traced=number % 20 == 0)
        assert peak < MAX_PEAK
        if isinstance(found, CardInvalid):
            assert found.message.startswith("fuzz.png")
            assert found.hint
            continue
        num_read += 1
        if num_read % 20 == 0 and found.version > 1:
            assert write_card(found.reading.persona("x"), found).document == found.document
    assert 2_500 < num_read < 7_500
