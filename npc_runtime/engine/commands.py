"""What may be asked of the engine thread, from any other. No torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from npc_runtime.engine.core import Request

if TYPE_CHECKING:
    from npc_runtime.engine.adapters import OnReplaced

__all__ = ["Cancel", "Command", "Configure", "Loaded", "Replace", "Submit"]


@dataclass(frozen=True, slots=True)
class Submit:
    """Queue these lines."""

    requests: tuple[Request, ...]


@dataclass(frozen=True, slots=True)
class Cancel:
    """End these lines, if they are not over."""

    ids: frozenset[int]


@dataclass(frozen=True, slots=True)
class Replace:
    """Use these files, with their scales, for an adapter."""

    name: str
    parts: tuple[tuple[Path, float], ...]
    on_done: "OnReplaced"


@dataclass(frozen=True, slots=True)
class Configure:
    """Go on so fast, or not at all."""

    max_tokens_per_s: float | None
    paused: bool


@dataclass(frozen=True, slots=True)
class Loaded:
    """See what the adapter store has done."""


Command = Submit | Cancel | Replace | Configure | Loaded | None
"""None: end every line, and the thread."""
