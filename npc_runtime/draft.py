"""A persona that no file has yet: a client's document, checked as a file would be and spoken without being saved.

It never touches the disk. What a draft may speak with is what is loaded already: nobody but the author of a file
decides which adapters the daemon reads.
"""

from pathlib import Path
from typing import Any

from npc_runtime.errors import InvalidError, PersonaUnknown
from npc_runtime.persona import Library, Persona, Reading, read_fields
from npc_runtime.schema import AdapterRef
from npc_runtime.wire_document import find_unusable, from_wire

__all__ = ["check_document", "read_draft"]


def check_document(document: Any, folder: Path | None = None, old: Any = None) -> Reading:
    """Read a client's document: what `folder/persona.yaml` would say, where `old` stands now."""
    if problem := find_unusable(document):
        return Reading(None, None, [problem])
    return read_fields(from_wire(document, old), folder)


def read_draft(document: Any, library: Library) -> Persona:
    """The persona of an unsaved document, ready to speak, with the adapter of the loaded one with its id.

    Raises `PersonaInvalid`; and about other adapters than that one's `InvalidError`, or what is wrong with them.
    """
    draft = check_document(document).usable()
    if not draft.adapter or draft.adapter == _loaded_adapters(draft.id, library):
        return draft
    raise InvalidError(
        f"draft.adapter: these are not the adapters that '{draft.id}' is loaded with.",
        "Save it first (persona.put), or leave 'adapter' out to hear the prompt alone.",
    )


def _loaded_adapters(persona_id: str, library: Library) -> tuple[AdapterRef, ...]:
    try:
        return library.find(persona_id).adapter
    except PersonaUnknown:
        return ()
