"""A character card as a persona: what of Character Card V1, V2 or V3 goes into which field, and what stays in the card.

The fields are those of spec_v1.md and spec_v2.md (github.com/malfoyslastname/character-card-spec-v2) and SPEC_V3.md
(github.com/kwaroran/character-card-spec-v3); like every tool that reads V3, and against one sentence of it, first_mes,
personality, scenario and the prompts count there too. Reading never fails on a value of the wrong kind, since real
cards have them, and never changes the card: what a persona cannot hold stays in it, with a note. `card_writer` goes
back.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from pydantic import ValidationError

from npc_runtime.card_text import (
    Note,
    as_items,
    as_text,
    clean_line,
    clean_text,
    cut_text,
    find_macros,
    is_plain,
    make_id,
    read_dialogue,
)
from npc_runtime.document import MAX_BYTES
from npc_runtime.errors import CardInvalid
from npc_runtime.lorebook import EXTENSION, Lore, read_book
from npc_runtime.persona import Persona
from npc_runtime.schema import MAX_TEXT

__all__ = ["CARD_FIELDS", "OWN_FIELDS", "PLACED", "STRANGER", "Card", "CardReading", "read_card"]

STRANGER = "Nobody knows much about this one."
"""The bio where a card has none; a persona cannot be without."""

PLACED = {
    "name": "display_name",
    "nickname": "display_name",
    "description": "bio",
    "personality": "personality",
    "scenario": "scenario",
    "first_mes": "greetings",
    "alternate_greetings": "greetings",
    "group_only_greetings": "greetings",
    "mes_example": "examples",
    "creator_notes": "notes",
    "system_prompt": "system_prompt",
    "post_history_instructions": "post_history_instructions",
    "tags": "tags",
    "character_book": "knows",
}
"""The fields of a card that have a place of their own in a persona. All others go to its field `card`."""

OWN_FIELDS = (
    *("speech_style", "goals", "never_says", "guardrails", "voice", "locale", "emotions", "actions"),
    *("fallback", "limits", "sampling", "format"),
)
"""The fields of a persona that a card has no field for; they travel in its `extensions`."""

CARD_FIELDS = (*dict.fromkeys(PLACED.values()), "card", *OWN_FIELDS)
"""The fields of a persona that a card may say something about: all but adapter and locked."""

MAX_FILE = MAX_BYTES * 3 // 4  # leaves a designer room to write
MAX_NAME, MAX_TAG, MAX_SAID = 200, 64, 2_000
MAX_TAGS, MAX_GREETINGS, MAX_EXAMPLES = 64, 64, 32
MAX_KEPT, MAX_KEPT_DEPTH = 4_000, 6  # of one value in `card`: characters of JSON; lists and objects in one another
MANY_WORDS = 400

_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_/.-]{0,63}")
_ESCAPED = re.compile(r"[\U00010000-\U0010ffff]")
_MARKS = ("description", "personality", "scenario", "first_mes", "mes_example")


@dataclass(frozen=True)
class Card:
    """A card's JSON. Raises `CardInvalid` if it is something else; `name` says where it came from."""

    document: dict[str, Any]
    name: str = field(default="the card", compare=False)

    def __post_init__(self) -> None:
        document = self.document
        if isinstance(document.get("data"), dict) and "name" in document["data"]:
            return
        is_v1 = "data" not in document and "name" in document and any(mark in document for mark in _MARKS)
        if is_v1:
            return
        if "entries" in document or document.get("spec") == "lorebook_v3":
            what, remedy = "is a lorebook, and no character card", "Name the card that it belongs to."
        elif str(document.get("spec", "")).startswith("chara_card"):
            what, remedy = "says that it is a character card, and has no data with a name", "Export it again."
        else:
            what = "is JSON, but no character card"
            remedy = "A card has a name and a description; V2 and V3 have them in 'data'."
        raise CardInvalid(f"{self.name} {what}.", remedy)

    @property
    def version(self) -> int:
        """1, 2 or 3. A spec that nobody knows yet is read as the newest."""
        if not isinstance(self.document.get("data"), dict):
            return 1
        spec = str(self.document.get("spec", ""))
        return 3 if spec.startswith("chara_card_v") and spec != "chara_card_v2" else 2

    @property
    def data(self) -> dict[str, Any]:
        """The object that has the fields."""
        return self.document if self.version == 1 else self.document["data"]

    @property
    def extensions(self) -> dict[str, Any]:
        """What programs keep for themselves."""
        value = self.data.get("extensions")
        return value if isinstance(value, dict) else {}

    @cached_property
    def reading(self) -> "CardReading":
        """What `read_card` makes of it."""
        return read_card(self)


class CardReading(NamedTuple):
    """A card as the fields of a persona file, a report, and which entries of its book became knowledge."""

    fields: dict[str, Any]  # without schema and id
    notes: list[Note]
    lore: list[Lore]

    @property
    def persona_id(self) -> str:
        """An id made from the name."""
        return make_id(self.fields["display_name"], "character")

    def persona(self, persona_id: str) -> Persona:
        """The persona that the fields make."""
        return Persona.model_validate({"schema": 1, "id": persona_id, **self.fields})


def read_card(card: Card) -> CardReading:
    """Read a card; every field of the result is within the bounds of a persona file."""
    reader = _Reader(card)
    spec, version = as_text(card.document.get("spec")), as_text(card.document.get("spec_version"))
    if card.version > 1 and (spec, version) not in (("chara_card_v2", "2.0"), ("chara_card_v3", "3.0")):
        remark = f"'{spec[:40]}' '{version[:40]}' is not known, and read as V{card.version}"
        reader.notes.append(Note("spec", "", remark))
    reader.read_texts()
    reader.read_lists()
    reader.read_examples()
    lore = read_book(card.data.get("character_book"), reader.notes)
    reader.set("knows", [each.knowledge for each in lore])
    reader.read_own()
    reader.read_rest()
    reader.shrink()
    left = {entry["id"] for entry in reader.fields.get("knows", [])}
    reader.note_macros()
    return CardReading(reader.fields, reader.notes, [each for each in lore if each.knowledge["id"] in left])


class _Reader:
    """Fills the fields of a persona from a card, and notes what happened to each field of the card."""

    def __init__(self, card: Card) -> None:
        self.card = card
        self.data = card.data
        self.fields: dict[str, Any] = {}
        self.notes: list[Note] = []

    def set(self, name: str, value: Any) -> None:
        """Set a field of the persona, unless there is nothing to say."""
        if value not in ("", [], {}):
            self.fields[name] = value

    def read_texts(self) -> None:
        """The fields of one text each."""
        name, nickname = clean_line(self.data.get("name")), clean_line(self.data.get("nickname"))
        self.fields["display_name"] = cut_text(nickname or name or "Nameless", MAX_NAME)
        used = "nickname" if nickname else "name"
        self.notes.append(Note(used, "display_name", "" if nickname or name else "empty; give it a name"))
        if nickname and name != nickname:
            self.notes.append(Note("name", "", "the nickname is what {{char}} means"))
        self.fields["bio"] = self._text("description") or self._stand_in()
        for key in ("personality", "scenario", "creator_notes", "system_prompt", "post_history_instructions"):
            self.set(PLACED[key], self._text(key))
        if "post_history_instructions" in self.fields:  # what it would stand for is empty here
            text = self.fields.pop("post_history_instructions").replace("{{original}}", "")
            self.set("post_history_instructions", text.strip())
        num_words = sum(len(self.fields.get(name, "").split()) for name in ("bio", "personality", "scenario"))
        if num_words > MANY_WORDS:
            remark = f"{num_words} words stand in front of every line; the fewer, the faster and the more to the point"
            self.notes.append(Note("description, personality, scenario", "", remark))

    def _text(self, key: str) -> str:
        text = clean_text(self.data.get(key))
        shorter = cut_text(text, MAX_TEXT)
        if text:
            is_cut = len(shorter) < len(text)
            remark = f"{len(text):,} characters; the first {len(shorter):,} are used" if is_cut else ""
            self.notes.append(Note(key, PLACED[key], remark))
        elif self.data.get(key) not in (None, "") and not isinstance(self.data[key], str):
            self.notes.append(Note(key, "", "is not text"))
        return shorter

    def _stand_in(self) -> str:
        self.notes.append(Note("description", "bio", "empty; write one"))
        return STRANGER

    def read_lists(self) -> None:
        """Greetings and tags."""
        for key, name, most in (
            *(
                (key, "greetings", MAX_GREETINGS)
                for key in ("first_mes", "alternate_greetings", "group_only_greetings")
            ),
            ("tags", "tags", MAX_TAGS),
        ):
            value = self.data.get(key)
            is_one = isinstance(value, str) and name == "greetings"
            read, size = (clean_text, MAX_TEXT) if name == "greetings" else (clean_line, MAX_TAG)
            texts = [text for item in ([value] if is_one else as_items(value)) if (text := read(item))]
            used = texts[: most - len(self.fields.get(name, ()))]
            self.set(name, [*self.fields.get(name, ()), *(cut_text(text, size) for text in used)])
            remarks = [f"{len(texts) - len(used)} beyond {most} are not used"] if len(used) < len(texts) else []
            remarks += ["too long, and cut"] if any(len(text) > size for text in used) else []
            if texts:
                self.notes.append(Note(key, name, "; ".join(remarks)))
            elif value not in (None, "", []):
                self.notes.append(Note(key, "", "is no list of texts"))

    def read_examples(self) -> None:
        """Example dialogue, as far as it is exchanges of the player and the character."""
        names = [clean_line(self.data.get("name")), self.fields["display_name"]]
        names += [name.split()[0] for name in names if name]
        text = clean_text(self.data.get("mes_example"))
        dialogue = read_dialogue(text, names)
        fitting = [pair for pair in dialogue.exchanges if max(map(len, pair)) <= MAX_SAID]
        used = fitting[:MAX_EXAMPLES]
        self.set("examples", [{"player": said, "npc": reply} for said, reply in used])
        remarks = []
        if dialogue.num_other:
            remarks.append(f"{dialogue.num_other} turns are not one of the player's and one of the character's")
        if len(used) < len(dialogue.exchanges):
            remarks.append(f"{len(dialogue.exchanges) - len(used)} exchanges are too long or too many")
        if text:
            self.notes.append(Note("mes_example", "examples" if used else "", "; ".join(remarks)))

    def read_own(self) -> None:
        """What this program left in `extensions` when it wrote the card."""
        own = self.card.extensions.get(EXTENSION)
        own = own if isinstance(own, dict) else {}
        for name in (name for name in OWN_FIELDS if name in own):
            where = f"extensions.{EXTENSION}.{name}"
            try:
                told = Persona.model_validate(
                    {"schema": 1, "id": "x", "display_name": "x", "bio": "x", name: own[name]}
                )
            except (ValidationError, RecursionError) as error:
                reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else "nested too deeply"
                self.notes.append(Note(where, "", f"cannot be used: {reason[:200]}"))
                continue
            value = told.to_document()[name]
            if _can_keep(value, MAX_FILE, depth=MAX_KEPT_DEPTH + 2):
                self.set(name, value)
                self.notes.append(Note(where, name))
        style = self.fields.get("speech_style", "")
        if style and self.fields.get("personality", "").endswith(style):  # which other tools were to see too
            self.set("personality", self.fields.pop("personality").removesuffix(style).strip())

    def read_rest(self) -> None:
        """All that has no place: into `card` where it is small and plain, so that it can be seen and changed there."""
        rest = {key: value for key, value in self.data.items() if key not in (*PLACED, "extensions")}
        if self.card.version == 1:
            rest = {key: value for key, value in rest.items() if key not in ("spec", "spec_version")}
        kept = self._keep(rest, "")
        extensions = {key: value for key, value in self.card.extensions.items() if key != EXTENSION}
        if inner := self._keep(extensions, "extensions."):
            kept["extensions"] = inner
        self.set("card", kept)
        around = sorted(set(self.card.document) - {"spec", "spec_version", "data", "creatorcomment", *PLACED})
        if self.card.version > 1 and around:
            self.notes.append(Note(", ".join(around)[:200], "", "stands beside 'data'"))

    def _keep(self, values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        kept: dict[str, Any] = {}
        for key, value in list(values.items())[:1_000]:
            if value in ("", [], {}, None):
                continue
            if len(kept) < 60 and _KEY.fullmatch(key) and _can_keep(value, MAX_KEPT, depth=MAX_KEPT_DEPTH):
                kept[key] = value
            else:
                self.notes.append(Note(f"{prefix}{clean_line(key)[:64]}", "", "too large for the persona file"))
        if kept:
            self.notes.append(Note(", ".join(f"{prefix}{key}" for key in kept)[:300], "card", "nothing reads it here"))
        return kept

    def shrink(self) -> None:
        """Leave out the end of whatever is largest until the persona file is small enough to be read."""
        before = {name: _size(value) for name, value in self.fields.items()}
        while _most_in_file(self.fields) > MAX_FILE:
            name = max(self.fields, key=lambda name: _size(self.fields[name]))
            value = self.fields[name]
            if isinstance(value, str):
                self.fields[name] = cut_text(value, len(value) * 3 // 4)
            elif isinstance(value, dict):
                value.pop(max(value, key=lambda key: _size(value[key])))
            else:
                self.fields[name] = value[: len(value) - max(1, len(value) // 4)]
        for name, size in before.items():
            if _size(self.fields[name]) < size:
                keys = ", ".join(key for key, place in PLACED.items() if place == name) or name
                self.notes.append(Note(keys, name, f"cut, so that the file stays below {MAX_FILE // 1024} KiB"))
            if self.fields[name] in ("", [], {}):
                del self.fields[name]

    def note_macros(self) -> None:
        """Name the macros that would reach the model as they stand."""
        known = {name: value for name, value in self.fields.items() if name not in ("notes", "card")}
        if "system_prompt" in known:
            known["system_prompt"] = known["system_prompt"].replace("{{original}}", "")
        if macros := sorted(find_macros(json.dumps(known, ensure_ascii=False))):
            self.notes.append(Note(", ".join(macros)[:300], "", "not a macro here; the model reads it as it stands"))


def _can_keep(value: Any, max_chars: int, *, depth: int) -> bool:
    """Whether a value can stand in a persona file and come back from there as it was."""
    if isinstance(value, str):
        return len(value) <= max_chars and is_plain(value)
    if isinstance(value, int):
        return abs(value) < 10**30
    if isinstance(value, dict):
        if not all(_KEY.fullmatch(key) for key in value):
            return False
        value = list(value.values())
    if isinstance(value, list):
        return (
            depth > 0
            and _size(value) <= max_chars
            and all(_can_keep(item, max_chars, depth=depth - 1) for item in value)
        )
    return True


def _most_in_file(fields: Mapping[str, Any]) -> int:
    """Bytes of a persona file at most: as JSON, an indentation for every line and value, and escaped characters."""
    text = json.dumps(fields, ensure_ascii=False)
    num_indented = text.count("\\n") + text.count(",") + text.count("{") + text.count("[")
    return len(text.encode()) + 8 * num_indented + 6 * len(_ESCAPED.findall(text))


def _size(value: Any) -> int:
    """Characters of a value as JSON."""
    return len(json.dumps(value, ensure_ascii=False))
