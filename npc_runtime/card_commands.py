"""`npc-runtime persona import` and `export`: character cards of role-play tools to persona folders and back."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from npc_runtime.errors import StartupError
from npc_runtime.options import AsJson, Personas, default_personas

if TYPE_CHECKING:
    from npc_runtime.card_text import Note

__all__ = ["persona_export", "persona_import"]


def persona_import(
    card: Annotated[Path, typer.Argument(metavar="CARD", help="A character card: .png, .json or .charx.")],
    personas: Annotated[Path, typer.Option(help="Folder of persona folders.")] = Path("personas"),
    persona_id: Annotated[str | None, typer.Option("--id", help="Default: made from the card's name.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Change the persona that is there; its adapter and sampling stay.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make a persona of a character card; prints where it is, and what of the card went where."""
    from npc_runtime.card_folder import import_card

    imported = import_card(card, personas, persona_id=persona_id, force=force)
    if as_json:
        body = {"id": imported.persona.id, "folder": str(imported.folder), "report": _rows(imported.notes)}
        typer.echo(json.dumps(body, ensure_ascii=False))
        return
    typer.echo(str(imported.folder))
    _print_report(imported.notes, "stays in card.json")


def persona_export(
    persona_id: Annotated[str, typer.Argument(metavar="ID")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The card to write: .json or .png.")],
    v2: Annotated[bool, typer.Option("--v2", help="Character Card V2, whatever it came from.")] = False,
    personas: Personas = None,
    as_json: AsJson = False,
) -> None:
    """Write a persona as a character card; prints where it is, and what other tools will not read in it."""
    from npc_runtime.card_folder import export_card
    from npc_runtime.persona import FILE_NAME

    folder = (personas or default_personas()) / persona_id
    if not (folder / FILE_NAME).is_file():
        raise StartupError(f"There is no persona '{persona_id[:64]}' in {folder.parent}.", "Name it with --personas.")
    writing = export_card(folder, out, as_v2=v2)
    if as_json:
        typer.echo(json.dumps({"card": str(out), "report": _rows(writing.notes)}, ensure_ascii=False))
        return
    typer.echo(str(out))
    _print_report(writing.notes, "not in the card")


def _rows(notes: "Sequence[Note]") -> list[dict[str, str]]:
    return [note._asdict() for note in notes]


def _print_report(notes: "Sequence[Note]", no_place: str) -> None:
    """What has a place first, then what has none."""
    for note in sorted(notes, key=lambda note: not note.place):
        remark = f"  ({note.remark})" if note.remark else ""
        typer.echo(f"  {note.field} → {note.place or no_place}{remark}", err=True)
