"""A persona as a character card: a new one, or the card that it came from with what changed since.

A field of the card is written only where the persona says something else than the card as `cards` reads it. So a card
that nobody touched comes back as it was, spelling, unknown fields and all, and an edit changes what it is about.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from npc_runtime.card_text import Note, write_dialogue
from npc_runtime.cards import CARD_FIELDS, OWN_FIELDS, PLACED, STRANGER, Card, CardReading
from npc_runtime.lorebook import EXTENSION, can_be_keys, strip_decorators, write_book
from npc_runtime.persona import Persona

__all__ = ["CardWriting", "convert_card", "write_card"]

_DEFAULTS: Mapping[str, Any] = {
    **dict.fromkeys(("name", "description", "personality", "scenario", "first_mes", "mes_example"), ""),
    **dict.fromkeys(("creator_notes", "system_prompt", "post_history_instructions"), ""),
    **{"alternate_greetings": [], "tags": [], "creator": "", "character_version": "", "extensions": {}},
}
_NAMES_OUTSIDE = {"creatorcomment": "creator_notes"}  # SillyTavern repeats fields outside of `data`


class CardWriting(NamedTuple):
    """A card, and a report on what other tools will not read in it."""

    document: dict[str, Any]
    notes: list[Note]


def write_card(
    persona: Persona, original: Card | None = None, *, version: int | None = None, now: int | None = None
) -> CardWriting:
    """Write a persona as a card of `version` 2 or 3; default: as `original`, else 3. `now` is the time in seconds."""
    version = version or (max(2, original.version) if original else 3)
    document = _start(original)
    data = document["data"]
    outside = {key: _NAMES_OUTSIDE.get(key, key) for key in document}
    repeated = {key: name for key, name in outside.items() if name in data and document[key] == data[name]}
    changed = _changes(persona, original)
    for name in changed:
        if name in _WRITERS:
            _WRITERS[name](data, persona, original.reading if original else None)
    if {"personality", *OWN_FIELDS} & set(changed):
        _write_own(data, persona)
    if changed and now is not None and version == 3:
        data |= {"modification_date": now} if original else {"creation_date": now, "modification_date": now}
    document |= {key: data[name] for key, name in repeated.items() if name in data}
    if original is None or original.version != version:
        document = convert_card(document, version)
    return CardWriting(document, _report(persona))


def convert_card(document: Mapping[str, Any], version: int) -> dict[str, Any]:
    """A card of V2 or V3 as the other. What only V3 has stays in a V2 card, where programs pass it over."""
    data = dict(document["data"])
    if version == 3:
        data.setdefault("group_only_greetings", [])
    book = data.get("character_book")
    if version == 2 and isinstance(book, dict) and isinstance(book.get("entries"), list):
        data["character_book"] = {**book, "entries": [_without_decorators(entry) for entry in book["entries"]]}
    return {**document, "spec": f"chara_card_v{version}", "spec_version": f"{version}.0", "data": data}


def _start(original: Card | None) -> dict[str, Any]:
    """What is written into: the original, a V1 card as one of V2, or an empty card."""
    if original is not None and original.version > 1:
        return copy.deepcopy(original.document)
    data = {**_DEFAULTS, **(original.document if original else {})}
    return {"spec": "chara_card_v2", "spec_version": "2.0", "data": copy.deepcopy(data)}


def _without_decorators(entry: Any) -> Any:
    if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
        return entry
    return {**entry, "content": strip_decorators(entry["content"])}


def _changes(persona: Persona, original: Card | None) -> list[str]:
    """The fields in which a persona differs from its card."""
    now = persona.model_dump(mode="json")
    if original is None:
        blank = Persona.model_validate({"schema": 1, "id": "x", "display_name": "x", "bio": STRANGER})
        was = {**blank.model_dump(mode="json"), "display_name": None}
    else:
        was = original.reading.persona(persona.id).model_dump(mode="json")
    return [name for name in CARD_FIELDS if now[name] != was[name]]


def _report(persona: Persona) -> list[Note]:
    said = persona.to_document()
    notes = [Note(name, f"extensions.{EXTENSION}", "other tools pass it over") for name in OWN_FIELDS if name in said]
    if persona.speech_style:
        notes[0] = Note("speech_style", f"personality, extensions.{EXTENSION}")
    if num := sum(1 for entry in persona.knows if not can_be_keys(entry.when)):
        notes.append(
            Note("knows", "character_book", f"{num} conditions that keys cannot say; other tools pass them over")
        )
    if persona.adapter:
        notes.append(Note("adapter", "", "a card cannot hold it; pass the persona's folder on instead"))
    return notes


def _write_name(data: dict[str, Any], persona: Persona, was: CardReading | None) -> None:
    data["nickname" if data.get("nickname") else "name"] = persona.display_name


def _write_personality(data: dict[str, Any], persona: Persona, was: CardReading | None) -> None:
    """Personality and speech style, which have one field between them."""
    data["personality"] = "\n".join(filter(None, (persona.personality, persona.speech_style)))


def _write_greetings(data: dict[str, Any], persona: Persona, was: CardReading | None) -> None:
    """The first of them, the others, and those which were for groups only and still are there."""
    for_groups = data.get("group_only_greetings")
    before = set(map(str, for_groups)) if isinstance(for_groups, list) else set()
    own = [text for text in persona.greetings if text not in before]
    data["first_mes"], data["alternate_greetings"] = (own[0] if own else ""), own[1:]
    if before:
        data["group_only_greetings"] = [text for text in persona.greetings if text in before]


def _write_examples(data: dict[str, Any], persona: Persona, was: CardReading | None) -> None:
    data["mes_example"] = write_dialogue([(example.player, example.npc) for example in persona.examples])


def _write_knowledge(data: dict[str, Any], persona: Persona, was: CardReading | None) -> None:
    data["character_book"] = write_book(data.get("character_book"), was.lore if was else [], persona.knows)


def _write_rest(data: dict[str, Any], persona: Persona, was: CardReading | None) -> None:
    """The field `card`: what is in it goes into the card, and what went out of it goes."""
    before = was.fields.get("card", {}) if was else {}
    _replace(data, before, {key: value for key, value in persona.card.items() if key not in (*PLACED, "extensions")})
    inner = persona.card.get("extensions")
    _replace(_extensions(data), before.get("extensions", {}), inner if isinstance(inner, dict) else {})


def _replace(values: dict[str, Any], before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for key in before:
        if key not in now and key != "extensions":
            values.pop(key, None)
            if key in _DEFAULTS:
                values[key] = copy.deepcopy(_DEFAULTS[key])
    values.update(copy.deepcopy(dict(now)))


def _write_own(data: dict[str, Any], persona: Persona) -> None:
    """What a card has no field for, where other programs leave it alone."""
    said = persona.to_document()
    own = {name: said[name] for name in OWN_FIELDS if name in said}
    extensions = _extensions(data)
    if own:
        extensions[EXTENSION] = own
    else:
        extensions.pop(EXTENSION, None)


def _extensions(data: dict[str, Any]) -> dict[str, Any]:
    value = data.get("extensions")
    data["extensions"] = value if isinstance(value, dict) else {}
    return data["extensions"]  # type: ignore[no-any-return]


def _text_writer(key: str, name: str) -> Callable[[dict[str, Any], Persona, CardReading | None], None]:
    def write(data: dict[str, Any], persona: Persona, was: CardReading | None) -> None:
        value = getattr(persona, name)
        data[key] = list(value) if isinstance(value, tuple) else value

    return write


_WRITERS: Mapping[str, Callable[[dict[str, Any], Persona, CardReading | None], None]] = {
    **{
        name: _text_writer(key, name)
        for key, name in PLACED.items()
        if key in ("description", "scenario", "creator_notes", "system_prompt", "post_history_instructions", "tags")
    },
    "display_name": _write_name,
    "personality": _write_personality,
    "speech_style": _write_personality,
    "greetings": _write_greetings,
    "examples": _write_examples,
    "knows": _write_knowledge,
    "card": _write_rest,
}
