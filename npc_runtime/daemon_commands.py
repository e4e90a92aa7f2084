"""`npc-runtime chat` and `top`, for the daemon that runs, and `npc-runtime doctor`, before one does."""

import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from npc_runtime.engine.embedded import EMBEDDED_BASE
from npc_runtime.errors import StartupError
from npc_runtime.options import (
    DEFAULT_PORT,
    AsJson,
    Base,
    Personas,
    Project,
    Token,
    Url,
    default_personas,
    prepare_process,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from npc_runtime.running import Target

__all__ = ["chat", "doctor", "top"]

Seed = Annotated[int | None, typer.Option(min=0, max=2**53 - 1, help="Of the first answer; others get random ones.")]


def chat(
    persona: Annotated[str, typer.Argument(metavar="PERSONA", help="Its id; `persona list` has them.")],
    project: Project = None,
    url: Url = None,
    token: Token = None,
    npc: Annotated[str, typer.Option(metavar="ID", help="Id of the NPC that is opened for it.")] = "chat",
    personas: Personas = None,
    base: Base = EMBEDDED_BASE,
    seed: Seed = None,
    stats: Annotated[bool, typer.Option("--stats", help="Times, tokens and seed after every answer.")] = False,
) -> None:
    """Talk to a persona: through the daemon that runs, or one with --base that is started for it.

    In a pipe every line is answered by one on stdout; the exit status is 1 if one could not be.
    """
    import asyncio
    from contextlib import AsyncExitStack

    from rich.console import Console

    from npc_runtime.chat import Talk
    from npc_runtime.chat_terminal import ChatTerminal, converse
    from npc_runtime.console import stderr
    from npc_runtime.own_daemon import own_daemon
    from npc_runtime.running import Target, find_daemon

    prepare_process()
    folder = personas or default_personas()
    find = partial(find_daemon, project, folder, url=url, token=token)
    options = None if url or _is_running(find) else _prepare_daemon(persona, folder, base)
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        try:
            if options is not None:
                stderr().print(f"no daemon is running; starting one with {base} …")
                endpoint = runner.run(stack.enter_async_context(own_daemon(options)))
                find = partial(Target, f"ws://127.0.0.1:{endpoint.port}/v1", endpoint.token)
            talk = Talk(find, persona, npc)
            stack.push_async_callback(talk.close)
            name = runner.run(talk.open()).display_name
            terminal = ChatTerminal(name, out=Console(highlight=False), chatter=stderr(), has_stats=stats)
            is_well = converse(runner, talk, terminal, seed)
        finally:
            runner.run(stack.aclose())
    if not is_well:
        raise typer.Exit(1)


def top(
    project: Project = None,
    url: Url = None,
    token: Token = None,
    personas: Personas = None,
    once: Annotated[bool, typer.Option("--once", help="Show how it is now, and leave.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout, a line a second.")] = False,
) -> None:
    """Watch the running daemon: lines, speed, memory; Ctrl-C leaves. In a pipe as with --once."""
    import asyncio
    from contextlib import suppress

    from rich.console import Console

    from npc_runtime.console import stderr
    from npc_runtime.running import find_daemon
    from npc_runtime.top import Picture, take_snapshot

    prepare_process()
    find = partial(find_daemon, project, personas or default_personas(), url=url, token=token)
    console = Console(highlight=False)
    with suppress(KeyboardInterrupt):
        if as_json and not once:
            asyncio.run(_print_snapshots(find, stderr()))
        elif console.is_terminal and not once:
            asyncio.run(_draw_snapshots(find, console))
        else:
            snapshot = asyncio.run(take_snapshot(find()))
            picture = Picture()
            picture.take(snapshot)
            if as_json:
                typer.echo(snapshot.to_json())
            else:
                console.print(picture.draw())


def doctor(
    base: Base = EMBEDDED_BASE,
    personas: Personas = None,
    project: Project = None,
    as_json: AsJson = False,
) -> None:
    """Say what is installed, what would compute, what would be slow or wrong, and what to do.

    The exit status is 1 if the daemon would not start, or a persona could not speak.
    """
    from rich.console import Console

    from npc_runtime.console import stderr
    from npc_runtime.doctor.examination import Subject, examine_all, show

    prepare_process()
    logging.disable(logging.WARNING)  # the findings say the same
    with stderr().status("looking …"):
        report = examine_all(Subject(base, personas or default_personas(), project, DEFAULT_PORT))
    if as_json:
        typer.echo(report.to_json())
    else:
        show(report, Console(highlight=False))
    if not report.is_well:
        raise typer.Exit(1)


async def _print_snapshots(find: "Callable[[], Target]", chatter: "Console") -> None:
    from npc_runtime.top import watch

    async for snapshot in watch(find, lambda note: chatter.print(note) if note else None):
        typer.echo(snapshot.to_json())


async def _draw_snapshots(find: "Callable[[], Target]", console: "Console") -> None:
    from rich.live import Live

    from npc_runtime.top import Picture, watch

    picture = Picture()
    with Live(console=console, auto_refresh=False, redirect_stdout=False) as live:

        def note(text: str) -> None:
            picture.note = text
            live.update(picture.draw(), refresh=True)

        async for snapshot in watch(find, note):
            picture.take(snapshot)
            live.update(picture.draw(), refresh=True)


def _is_running(find: "Callable[[], Target]") -> bool:
    """Whether a daemon is there; a runtime file may be left of one that was killed."""
    from npc_runtime.running import ask_health

    try:
        return ask_health(find()).state != "gone"
    except StartupError:
        return False


def _prepare_daemon(persona: str, folder: Path, base: str) -> list[str]:
    """The options of a daemon for a persona, once it is sure that there is one, and a base."""
    from npc_runtime.console import progress_bars, stderr
    from npc_runtime.engine.bases import resolve_base
    from npc_runtime.own_daemon import serve_options
    from npc_runtime.persona import Library

    Library.load(folder).find(persona)
    with progress_bars(stderr()) as report:
        resolve_base(base, report)
    return serve_options(base=base, personas=folder, command="chat")
