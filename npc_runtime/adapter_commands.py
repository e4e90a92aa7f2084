"""`npc-runtime adapter …`: check, import and merge adapters. Nothing heavy is imported before a command runs."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from npc_runtime.engine.embedded import EMBEDDED_BASE
from npc_runtime.errors import InvalidError, StartupError
from npc_runtime.options import AsJson
from npc_runtime.options import Base as BaseName

if TYPE_CHECKING:
    from npc_runtime.adapter_import import Base

__all__ = ["StoredAs", "adapter_app", "check", "import_", "merge"]

adapter_app = typer.Typer(help="Check, import and merge adapters.", no_args_is_help=True)


class StoredAs(StrEnum):
    """What merged weights are stored in."""

    BASE = "base"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


MaxRank = Annotated[int, typer.Option("--max-adapter-rank", min=1, max=128, help="Ranks above it are refused.")]
Source = Annotated[Path, typer.Argument(metavar="PATH", help="A PEFT folder, or a .nemo file.")]


@adapter_app.command()
def check(path: Source, base: BaseName = EMBEDDED_BASE, max_rank: MaxRank = 64, as_json: AsJson = False) -> None:
    """Say what an adapter is and whether it fits the base; exit status 1 if it cannot be used."""
    from npc_runtime.adapter_import import check_adapter

    report = check_adapter(path, _find_base(base), max_rank=max_rank)
    typer.echo(report.to_json() if as_json else f"{report.to_text()}\nok")


@adapter_app.command("import")
def import_(
    source: Source,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write, such as personas/odo/adapter.")],
    base: BaseName = EMBEDDED_BASE,
    max_rank: MaxRank = 64,
    force: Annotated[bool, typer.Option("--force", help="Replace the adapter that is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a checked adapter as a PEFT folder in safetensors, from a .nemo file or another PEFT folder."""
    from npc_runtime.adapter_import import import_adapter

    found = _find_base(base)
    with _room_for(out):
        report = import_adapter(source, out, found, max_rank=max_rank, overwrites=force)
    typer.echo(report.to_json() if as_json else f"{report.to_text()}\nwritten to {out}")


@adapter_app.command()
def merge(
    adapters: Annotated[list[Path], typer.Argument(metavar="PATH", help="PEFT folders or .nemo files.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The model folder to write, for --base.")],
    base: BaseName = EMBEDDED_BASE,
    scale: Annotated[list[float] | None, typer.Option(help="Strength of an adapter; once for each, in order.")] = None,
    dtype: Annotated[
        StoredAs, typer.Option(help="What to store the weights in; base: as the base is.")
    ] = StoredAs.BASE,
    max_rank: MaxRank = 64,
    as_json: AsJson = False,
) -> None:
    """Write base and adapters as one ordinary model folder, for a daemon with a single persona."""
    from npc_runtime.adapter_import import open_adapter
    from npc_runtime.console import progress_bars, stderr
    from npc_runtime.engine.merged import write_merged

    if scale and len(scale) != len(adapters):
        raise InvalidError(f"{len(adapters)} adapters and {len(scale)} --scale.", "Give one for each, or none.")
    found = _find_base(base)
    with ExitStack() as opened, progress_bars(stderr()) as report:
        read = [
            opened.enter_context(open_adapter(path, found, max_rank=max_rank, scale=factor))
            for path, factor in zip(adapters, scale or [1.0] * len(adapters), strict=True)
        ]
        result = write_merged(
            found.info, read, out, dtype=dtype.value, on_progress=lambda fraction: report("merging", fraction)
        )
    if as_json:
        typer.echo(json.dumps({"base": found.info.name, "folder": str(out), **asdict(result)}))
    else:
        typer.echo(f"{result.num_merged} linears merged, {result.num_bytes / 1e6:,.0f} MB in {out}")


def _find_base(name: str) -> "Base":
    from npc_runtime.adapter_import import Base
    from npc_runtime.console import progress_bars, stderr
    from npc_runtime.engine.bases import resolve_base

    with progress_bars(stderr()) as report:
        return Base.of(name, resolve_base(name, report))


@contextmanager
def _room_for(out: Path) -> Iterator[None]:
    """Turn what the system says of writing into an error of one line."""
    try:
        yield
    except OSError as error:
        raise StartupError(f"{out} cannot be written ({error}).", "Choose another folder, or make room.") from error
