"""Placeholder until the branch personas is merged."""

from typing import Any

from npc_runtime.errors import UnsupportedError
from npc_runtime.persona import Library, Persona

__all__ = ["read_draft"]


def read_draft(doc: Any, library: Library) -> Persona:
    """Stands in."""
    raise UnsupportedError("'draft' is not served yet.", "")
