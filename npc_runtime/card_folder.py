"""A persona's folder that came from a card: persona.yaml beside the card as it was and its picture.

`card.json` is the card as it came, which nobody edits: it is what an export starts from, so that nothing is lost that a
persona has no place for. `portrait.png` is the picture.
"""

import os
import time
from pathlib import Path
from typing import NamedTuple

from npc_runtime.card_files import MAX_JSON, parse_json, read_card_file, write_json, write_png
from npc_runtime.card_text import Note, make_id
from npc_runtime.card_writer import CardWriting, write_card
from npc_runtime.cards import CARD_FIELDS, OWN_FIELDS, Card
from npc_runtime.errors import CardInvalid, StartupError
from npc_runtime.persona import FILE_NAME, Persona
from npc_runtime.png import draw_portrait
from npc_runtime.whole_file import replace_file

__all__ = ["CARD_NAME", "PICTURE_NAME", "ImportedCard", "export_card", "import_card"]

CARD_NAME = "card.json"
PICTURE_NAME = "portrait.png"
LEFT_NAME = "card.charx"
MAX_PICTURE = 64 << 20
ONLY_V3 = "This card was made for Character Card V3. What only V3 can say is in this file's text 'ccv3'."


class ImportedCard(NamedTuple):
    """A persona that was written, where, and the report."""

    persona: Persona
    folder: Path
    notes: list[Note]


def import_card(path: Path, personas: Path, *, persona_id: str | None = None, force: bool = False) -> ImportedCard:
    """Write the persona folder of a card below `personas`.

    Without `persona_id` the id is made from the name, with a number behind it where that one is taken. With `force` a
    persona that is there is changed: what the card says is replaced, and adapter, sampling and all else kept. Raises
    `CardInvalid` about the card, `StartupError` about the folder, `PersonaInvalid` about a persona that is there.
    """
    file = read_card_file(path)
    card = Card(file.document, str(path))
    reading = card.reading
    folder = _choose(personas, persona_id, reading.persona_id, force)
    persona = reading.persona(folder.name)
    if (folder / FILE_NAME).exists():
        persona = _merge(Persona.load(folder), reading.fields)
    data = write_json(card.document)
    if len(data) > MAX_JSON:
        raise CardInvalid(f"{path}: the card has more than {MAX_JSON >> 20} MiB of JSON.", "Take pictures out of it.")
    notes = [*reading.notes]
    files = {CARD_NAME: data}
    if file.picture:
        files[PICTURE_NAME] = file.picture
        notes.append(Note("the picture", PICTURE_NAME))
    if file.others:
        files[LEFT_NAME] = path.read_bytes()
        notes.append(
            Note(", ".join(file.others)[:300], LEFT_NAME, "nothing reads it here; the file is kept as it came")
        )
    _write(folder, persona, files)
    return ImportedCard(Persona.load(folder), folder, notes)


def export_card(folder: Path, out: Path, *, as_v2: bool = False, now: int | None = None) -> CardWriting:
    """Write a persona as a card, `out` being a .json or .png file; returns it with a report.

    A PNG has the card as V2 and as V3, or as V2 only, and the persona's picture, or a drawn one. Raises `StartupError`,
    `PersonaInvalid`, and `CardInvalid` about the card that it came from.
    """
    kind = out.suffix.lower()
    if kind not in (".json", ".png"):
        raise StartupError(f"{out}: a card is a .json or a .png file.", "Name such a file.")
    persona = Persona.load(folder)
    original = _read_original(folder)
    now = int(time.time()) if now is None else now
    writing = write_card(persona, original, version=2 if as_v2 else None, now=now)
    if kind == ".json":
        _replace_file(out, write_json(writing.document))
        return writing
    cards = {"chara": write_card(persona, original, version=2, now=now).document}
    if not as_v2:
        cards["ccv3"] = write_card(persona, original, version=3, now=now).document
        if original and original.version == 3:  # SPEC_V3.md, "PNG/APNG", asks to say so in the V2 card
            data = cards["chara"]["data"]
            data["creator_notes"] = f"{data.get('creator_notes') or ''}\n\n{ONLY_V3}".strip()
    picture, note = _read_picture(folder, persona)
    _replace_file(out, write_png(picture, cards))
    return CardWriting(writing.document, [*writing.notes, note])


def _choose(personas: Path, persona_id: str | None, made: str, force: bool) -> Path:
    """The folder of a new persona, or with `force` of the one that is there."""
    if persona_id is not None and (make_id(persona_id, "") != persona_id):
        remedy = f"An id has small letters, digits, - and _, like '{make_id(persona_id, made)}'."
        raise StartupError(f"--id {persona_id[:80]} cannot be an id.", remedy)
    folder = personas / (persona_id or made)
    if force or not os.path.lexists(folder):
        return folder
    if persona_id is not None:
        raise StartupError(f"{folder} exists already.", "Choose another --id, or add --force to change that persona.")
    number = 2
    while os.path.lexists(folder := personas / f"{made}-{number}"):
        number += 1
    return folder


def _merge(old: Persona, fields: dict[str, object]) -> Persona:
    """A persona that is there, with the fields that cards speak of as the card has them, where it does."""
    from_card = {name for name in CARD_FIELDS if name in fields or name not in OWN_FIELDS}
    kept = {name: value for name, value in old.to_document().items() if name not in from_card}
    return Persona.model_validate({**kept, **fields})


def _write(folder: Path, persona: Persona, files: dict[str, bytes]) -> None:
    """Write all files: a new persona.yaml last, for only that makes the folder a persona; one that is there first,
    since it may not be writable.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if is_there := (folder / FILE_NAME).exists():
            persona.save(folder)
        for name, data in files.items():
            _replace_file(folder / name, data)
        if not is_there:
            persona.save(folder)
    except OSError as error:
        raise StartupError(f"{folder} cannot be written: {error.strerror}.", "Choose another --personas.") from error


def _read_original(folder: Path) -> Card | None:
    path = folder / CARD_NAME
    if not path.is_file():
        return None
    return Card(parse_json(_read(path, MAX_JSON), str(path)), str(path))


def _read_picture(folder: Path, persona: Persona) -> tuple[bytes, Note]:
    path = folder / PICTURE_NAME
    if path.is_file():
        return _read(path, MAX_PICTURE), Note(PICTURE_NAME, "the picture")
    return draw_portrait(persona.display_name), Note(
        "the picture", "a drawn one", f"put a {PICTURE_NAME} into {folder}"
    )


def _read(path: Path, max_bytes: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(max_bytes + 1)
    except OSError as error:
        raise CardInvalid(f"{path} cannot be read: {error.strerror}.", "Make it readable, or move it away.") from error


def _replace_file(path: Path, data: bytes) -> None:
    """Put a file in place at once."""
    try:
        replace_file(path, data)
    except OSError as error:
        raise StartupError(f"{path} cannot be written: {error.strerror}.", "Choose another place.") from error
