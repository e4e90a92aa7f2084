"""Checks adapters against a base without loading its weights; for `npc-runtime persona check`."""

import torch

from npc_runtime.engine.embedded import OnProgress
from npc_runtime.engine.model import ModelShape, PageLayout
from npc_runtime.engine.peft_folder import load_peft_folder
from npc_runtime.engine.weights import read_config, resolve_base
from npc_runtime.errors import WireError
from npc_runtime.persona import Library

__all__ = ["check_adapters"]


def check_adapters(library: Library, base: str, on_progress: OnProgress) -> dict[str, str]:
    """Read every adapter; return a note per sound one and put the others into `library.problems`."""
    shape = ModelShape.from_config(read_config(resolve_base(base, on_progress)))
    layout = PageLayout.of(shape)
    notes = {}
    for persona in library:
        try:
            ranks = [
                load_peft_folder(persona.folder / ref.path, shape, layout, dtype=torch.bfloat16).rank
                for ref in persona.adapter
            ]
        except WireError as error:
            library.problems[persona.id] = error
            continue
        if ranks:
            notes[persona.id] = f"ok, adapter of rank {' + '.join(map(str, ranks))}"
    return notes
