"""`npc-runtime persona …`: make, check, list and show persona files, and print what the model reads."""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from npc_runtime.card_commands import persona_export, persona_import
from npc_runtime.engine.embedded import EMBEDDED_BASE
from npc_runtime.errors import ContextOverflow, PersonaInvalid, StartupError
from npc_runtime.options import AsJson, Base, Personas, default_personas, prepare_process

if TYPE_CHECKING:
    from npc_runtime.engine.tokenizer import ChatTokenizer
    from npc_runtime.persona import Library, Persona
    from npc_runtime.prompt import Fitted, Message

__all__ = ["persona_app"]

persona_app = typer.Typer(help="Make, check, list, show, render, import and export personas.", no_args_is_help=True)
persona_app.command("import")(persona_import)
persona_app.command("export")(persona_export)

PersonaId = Annotated[str, typer.Argument(metavar="ID")]


@persona_app.command("new")
def persona_new(
    persona_id: Annotated[str, typer.Argument(metavar="ID", help="Small letters, digits, - and _.")],
    name: Annotated[str | None, typer.Option(help="What the game shows; default: the id.")] = None,
    personas: Annotated[Path, typer.Option(help="Folder of persona folders.")] = Path("personas"),
) -> None:
    """Write a persona file with a comment for every field, to be filled in; prints where it is."""
    from npc_runtime.document import DocumentError
    from npc_runtime.persona import FILE_NAME, Persona

    path = personas / persona_id / FILE_NAME
    form = (Path(__file__).parent / "new_persona.yaml").read_text(encoding="utf-8")
    shown = name or persona_id.replace("_", " ").replace("-", " ").title()
    text = form.replace("id: ID   ", f"id: {persona_id}").replace("persona render ID", f"persona render {persona_id}")
    text = text.replace("display_name: NAME", f"display_name: {json.dumps(shown, ensure_ascii=False)}")
    try:
        Persona.parse(text.encode(), path.parent)
    except (PersonaInvalid, DocumentError, UnicodeEncodeError) as error:
        raise StartupError(f"'{persona_id}' cannot be a persona: {error}", "Choose another id or name.") from error
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise StartupError(f"{path} exists already.", "Choose another id, or edit it.") from error
    except OSError as error:
        raise StartupError(f"{path} cannot be written: {error.strerror}.", "Choose another --personas.") from error
    typer.echo(str(path))


@persona_app.command("list")
def persona_list(personas: Personas = None, as_json: AsJson = False) -> None:
    """List the personas of a folder."""
    library = _load_library(personas)
    rows = [
        {"id": p.id, "display_name": p.display_name, "adapter": p.adapter_name, "tags": list(p.tags)} for p in library
    ]
    if as_json:
        typer.echo(json.dumps(rows, ensure_ascii=False))
        return
    for row in rows:
        tags = f"  [{', '.join(row['tags'])}]" if row["tags"] else ""
        typer.echo(f"{row['id']:<16} {row['display_name']:<20} {row['adapter'] or 'prompt only'}{tags}")
    for persona_id, problem in library.problems.items():
        typer.echo(f"{persona_id:<16} unusable: {problem}")


@persona_app.command("show")
def persona_show(persona_id: PersonaId, personas: Personas = None, as_json: AsJson = False) -> None:
    """Show everything that is said about a persona, with the values of fields that its file leaves out."""
    from npc_runtime.document_change import write_document

    prepare_process()
    persona = _load_library(personas).find(persona_id)
    fields = persona.model_dump(mode="json", by_alias=True)
    if as_json:
        typer.echo(json.dumps(fields, ensure_ascii=False))
        return
    typer.echo(
        write_document({name: value for name, value in fields.items() if _says_something(value)}).decode(), nl=False
    )
    if persona.asked_facts:
        typer.echo(f"Its knowledge depends on: {', '.join(persona.asked_facts)}", err=True)


@persona_app.command("check")
def persona_check(personas: Personas = None, base: Base = EMBEDDED_BASE) -> None:
    """Check every persona file and adapter against the base; exit status 1 if anything is wrong."""
    from npc_runtime.console import progress_bars, stderr
    from npc_runtime.loading import check_personas
    from npc_runtime.persona import find_problems

    prepare_process()
    folder = personas or default_personas()
    library = _load_library(folder)
    logging.disable(logging.WARNING)  # the table below says the same
    with progress_bars(stderr()) as report:
        notes = check_personas(library, base, report)
    for persona_id in sorted({*notes, *library.problems}):
        problem = library.problems.get(persona_id)
        found = find_problems(folder / persona_id) if isinstance(problem, PersonaInvalid) else []
        lines = [str(each) for each in found] or [str(problem or f"ok, {notes[persona_id]}")]
        for line in lines:
            typer.echo(f"{persona_id:<16} {line}")
    if library.problems:
        raise typer.Exit(1)


@persona_app.command("render")
def persona_render(
    persona_id: PersonaId,
    text: Annotated[str, typer.Option(help="What the player says.")],
    speaker: Annotated[str | None, typer.Option(help="Who says it.")] = None,
    fact: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="A fact of the game, like quest.dragon=dead; may be repeated."),
    ] = None,
    scene: Annotated[str | None, typer.Option(help="Context of this turn.")] = None,
    mood: Annotated[str | None, typer.Option(help="Context of this turn.")] = None,
    nearby: Annotated[list[str] | None, typer.Option(help="Context of this turn; may be repeated.")] = None,
    note: Annotated[list[str] | None, typer.Option(help="A statement true in this turn; may be repeated.")] = None,
    history: Annotated[
        Path | None, typer.Option(help='Earlier turns, oldest first, one {"player": …, "npc": …} a line.')
    ] = None,
    room: Annotated[
        int | None, typer.Option(min=1, help="Tokens of prompt and reply together; default: the base's context.")
    ] = None,
    personas: Personas = None,
    base: Base = EMBEDDED_BASE,
    as_json: AsJson = False,
) -> None:
    """Print the exact prompt of a line, the tokens of each part, and what had to be left out."""
    from npc_runtime.console import progress_bars, stderr
    from npc_runtime.engine.bases import resolve_base
    from npc_runtime.engine.tokenizer import ChatTokenizer
    from npc_runtime.loading import find_context
    from npc_runtime.prompt import Context, fit_prompt

    prepare_process()
    persona = _load_library(personas).find(persona_id)
    context = Context(scene=scene, mood=mood, nearby=tuple(nearby or ()), facts=tuple(note or ()))
    facts = dict(_read_fact(each) for each in fact or ())
    prompt = persona.prompt(_read_history(history), text, speaker=speaker, context=context, facts=facts)
    with progress_bars(stderr()) as report:
        folder = resolve_base(base, report)
        tokenizer = ChatTokenizer(folder)
    size = room or find_context(folder)
    fitted = fit_prompt(
        prompt, lambda messages: tokenizer.render(messages).token_ids, size - persona.limits.hard_tokens
    )
    report_body = _describe(fitted, tokenizer)
    if as_json:
        body = {"persona": persona.id, "prompt": tokenizer.render(fitted.prompt.messages).text}
        typer.echo(json.dumps({**body, "token_ids": list(fitted.token_ids), **report_body}, ensure_ascii=False))
    else:
        typer.echo(tokenizer.render(fitted.prompt.messages).text)
        _print_report(persona, report_body)
    if len(fitted.token_ids) + persona.limits.hard_tokens > size:
        raise ContextOverflow(
            f"{len(fitted.token_ids)} tokens and a reply of {persona.limits.hard_tokens} do not fit into {size}.",
            "Shorten the persona, or lower limits.hard_tokens.",
        )


def _describe(fitted: "Fitted", tokenizer: "ChatTokenizer") -> dict[str, Any]:
    from npc_runtime.prompt import count_parts

    parts = count_parts(fitted.prompt, lambda messages: len(tokenizer.render(messages).token_ids))
    left_out = {
        "messages": fitted.num_dropped,
        "knowledge": [*fitted.dropped_knowledge, *fitted.prompt.omitted],
    }
    return {"tokens": {**parts, "total": len(fitted.token_ids)}, "left_out": left_out}


def _print_report(persona: "Persona", report: dict[str, Any]) -> None:
    for name, number in report["tokens"].items():
        typer.echo(f"{number:>6} {name}", err=True)
    left_out = report["left_out"]
    typer.echo(
        f"left out: {left_out['messages']} earlier messages, {len(left_out['knowledge'])} of knowledge", err=True
    )
    for text in left_out["knowledge"]:
        typer.echo(f"       {text}", err=True)
    if persona.asked_facts:
        typer.echo(f"its knowledge depends on: {', '.join(persona.asked_facts)}", err=True)


def _read_fact(text: str) -> tuple[str, Any]:
    name, sign, value = text.partition("=")
    if not sign or not name.strip():
        raise StartupError(f"--fact {text[:80]}: a fact is NAME=VALUE.", "For example --fact quest.dragon=dead.")
    try:
        return name.strip(), json.loads(value)
    except (ValueError, RecursionError):
        return name.strip(), value.strip()


def _read_history(path: Path | None) -> "list[Message]":
    if path is None:
        return []
    turns = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        for line in filter(str.strip, lines):
            pair = json.loads(line)
            turns += [
                {"role": "user", "content": str(pair["player"])},
                {"role": "assistant", "content": str(pair["npc"])},
            ]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise StartupError(
            f"--history {path} cannot be read ({type(error).__name__}: {error}).",
            'One line each: {"player": "…", "npc": "…"}.',
        ) from error
    return turns


def _says_something(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_says_something, value.values()))
    return value not in ("", None, [])


def _load_library(personas: Path | None) -> "Library":
    from npc_runtime.persona import Library

    return Library.load(personas or default_personas())
