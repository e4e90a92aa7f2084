"""What several commands share: their options, the process they run in, the folder of personas they mean."""

import io
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from npc_runtime.engine.hub import stay_offline
from npc_runtime.stopping import leave_when_asked

__all__ = [
    "DEFAULT_PORT",
    "AsJson",
    "Base",
    "Personas",
    "Project",
    "Token",
    "Url",
    "default_personas",
    "prepare_process",
]

DEFAULT_PORT = 4780

Base = Annotated[
    str,
    typer.Option(
        metavar="NAME|PATH|ORG/NAME",
        help="The embedded base's name, a model folder, or a model of the Hugging Face hub, with @REVISION if need be.",
    ),
]
Personas = Annotated[
    Path | None,
    typer.Option(help="Folder of persona folders; default ./personas if it exists, else the shipped ones."),
]
Project = Annotated[str | None, typer.Option(help="Name of the runtime file; default from --personas.")]
Url = Annotated[str | None, typer.Option(help="The daemon; default: what the project's runtime file says.")]
Token = Annotated[str | None, typer.Option(help="Its token, with --url.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


def prepare_process() -> None:
    """Keep the libraries quiet, offline (but for a base that is asked for by name) and modest; stdout in UTF-8."""
    from npc_kernels.openmp import sleep_while_waiting

    sleep_while_waiting()
    leave_when_asked()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")
    stay_offline()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def default_personas() -> Path:
    """The personas of the current folder, else the shipped ones."""
    from npc_runtime.persona import shipped_personas

    return Path("personas") if Path("personas").is_dir() else shipped_personas()
