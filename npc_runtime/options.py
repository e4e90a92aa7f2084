"""What several commands share: their options, the process they run in, the folder of personas they mean."""

import io
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from npc_runtime.stopping import leave_when_asked

__all__ = ["AsJson", "Base", "Personas", "default_personas", "prepare_process"]

Base = Annotated[str, typer.Option(help="The embedded base's name, or a model folder.", metavar="NAME|PATH")]
Personas = Annotated[
    Path | None,
    typer.Option(help="Folder of persona folders; default ./personas if it exists, else the shipped ones."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


def prepare_process() -> None:
    """Keep the libraries quiet, offline (models come from folders, not from a hub) and modest; stdout in UTF-8."""
    from npc_kernels.openmp import sleep_while_waiting

    sleep_while_waiting()
    leave_when_asked()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def default_personas() -> Path:
    """The personas of the current folder, else the shipped ones."""
    from npc_runtime.persona import shipped_personas

    return Path("personas") if Path("personas").is_dir() else shipped_personas()
