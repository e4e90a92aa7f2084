"""The exchanges that a persona's author wrote: `lines.jsonl` for training, `heldout.jsonl` kept apart from it."""

import json
from dataclasses import dataclass
from typing import Literal

from npc_runtime.errors import PersonaInvalid
from npc_runtime.persona import Persona

__all__ = ["Authored", "Exchange", "read_authored", "read_exchanges"]

FileName = Literal["lines.jsonl", "heldout.jsonl"]


@dataclass(frozen=True, slots=True)
class Exchange:
    """What a player says and what the character answers."""

    player: str
    npc: str


@dataclass(frozen=True, slots=True)
class Authored:
    """A persona's own words; either may be empty."""

    lines: tuple[Exchange, ...]
    heldout: tuple[Exchange, ...]

    @property
    def replies(self) -> list[str]:
        """Everything the character says."""
        return [exchange.npc for exchange in (*self.lines, *self.heldout)]


def read_authored(persona: Persona) -> Authored:
    """Both files of a persona. Raises `PersonaInvalid` naming file and line."""
    return Authored(read_exchanges(persona, "lines.jsonl"), read_exchanges(persona, "heldout.jsonl"))


def read_exchanges(persona: Persona, name: FileName) -> tuple[Exchange, ...]:
    """One file, empty if it is not there. Raises `PersonaInvalid` naming file and line."""
    path = persona.folder / name
    if not path.is_file():
        return ()
    exchanges = []
    try:
        for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if text.strip():
                exchanges.append(_parse(text, f"{path}, line {number}"))
    except (OSError, UnicodeDecodeError) as error:
        raise PersonaInvalid(f"{path} cannot be read ({error}).", "Save it as UTF-8.") from error
    return tuple(exchanges)


def _parse(text: str, place: str) -> Exchange:
    try:
        line = json.loads(text)
        player, npc = line["player"], line["npc"]
        if not (isinstance(player, str) and isinstance(npc, str) and player.strip() and npc.strip()):
            raise TypeError("player and npc have to be text, and not empty")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise PersonaInvalid(f"{place}: {error!r}.", 'Write {"player": "…", "npc": "…"}.') from error
    return Exchange(player, npc)
