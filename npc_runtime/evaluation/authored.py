"""The exchanges that a persona's author wrote: `lines.jsonl` for training, `heldout.jsonl` kept apart from it."""

from dataclasses import dataclass

from npc_runtime.errors import PersonaInvalid
from npc_runtime.persona import Persona
from npc_runtime.training_lines import HELDOUT, LINES, TrainingLine, read_lines

__all__ = ["Authored", "read_authored"]


@dataclass(frozen=True, slots=True)
class Authored:
    """A persona's own words; either may be empty."""

    lines: tuple[TrainingLine, ...]
    heldout: tuple[TrainingLine, ...]

    @property
    def replies(self) -> list[str]:
        """Everything the character says."""
        return [line.npc for line in (*self.lines, *self.heldout)]


def read_authored(persona: Persona) -> Authored:
    """Both files of a persona, empty if they are not there. Raises `PersonaInvalid` naming file and line."""
    problems: list[str] = []
    files = [persona.folder / name for name in (LINES, HELDOUT)]
    lines, heldout = (tuple(read_lines(path, problems)) if path.is_file() else () for path in files)
    if problems:
        raise PersonaInvalid(f"The lines in {persona.folder}: {problems[0]}.", "Correct the line, and save as UTF-8.")
    return Authored(lines, heldout)
