"""What is wrong with a persona's document: each problem with its place, its line in the file, and what to do about it.

The words are the same for a file and for a document that a client sent, which has no lines. This module knows the
checks' errors and no persona.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from npc_runtime.document import DocumentError, Path
from npc_runtime.errors import PersonaInvalid
from npc_runtime.schema import find_reason, find_remedy

__all__ = ["MAX_PROBLEMS", "LineOf", "Problem", "find_place", "problem_of", "problems_of"]

MAX_PROBLEMS = 50
MAX_NAME = 64
"""Characters of a field's name that are repeated: it may be as long as the document."""

LineOf = Callable[[Path], int | None]
"""The line of a value in its file."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong."""

    path: Path  # where it stands in the document; (): the document as a whole
    what: str  # names the field; without a full stop
    remedy: str
    line: int | None = None

    @property
    def field(self) -> str:
        """Its place as a JSON pointer (RFC 6901): `/knows/3/when`."""
        return "".join("/" + str(part)[:MAX_NAME].replace("~", "~0").replace("/", "~1") for part in self.path)

    def error(self, file: object = None) -> PersonaInvalid:
        """The same as an exception, naming the file if there is one."""
        line = f", line {self.line}" if self.line else ""
        where = f"{file}{line}: " if file else ""
        return PersonaInvalid(_sendable(f"{where}{self.what}."), _sendable(self.remedy))

    def to_wire(self) -> dict[str, Any]:
        """The same as an entry of a reply."""
        line = {"line": self.line} if self.line else {}
        told = {"field": self.field, "message": f"{self.what}.", "hint": self.remedy}
        return {**{name: _sendable(text) for name, text in told.items()}, **line}


def problems_of(error: ValidationError, fields: Any, model: type[BaseModel], line_of: LineOf) -> list[Problem]:
    """What pydantic found in the fields of a document, `model` being what they were to be."""
    problems = []
    for each in error.errors(include_url=False)[:MAX_PROBLEMS]:
        name = ".".join(str(part)[:MAX_NAME] for part in each["loc"]) or "the document"
        place = find_place(each["loc"], fields, is_missing=each["type"] == "missing")
        what = f"{name}: {find_reason(each).removesuffix('.')}"
        problems.append(Problem(place, what, find_remedy(each, model), line_of(place)))
    return problems


def problem_of(error: DocumentError) -> Problem:
    """What keeps a file from being read at all."""
    return Problem((), error.what, error.remedy, error.line)


def find_place(loc: Path, fields: Any, *, is_missing: bool = False) -> Path:
    """Where in the fields stands what the schema has at `loc`: several values have a shorter spelling in a file."""
    place: list[str | int] = []
    value = fields
    for step in loc:
        if _has(value, step):
            value = value[step]
            place.append(step)
        elif not (isinstance(step, int) and place == ["adapter"]):  # one may be written without the list around it
            break
    return (*place, loc[-1]) if is_missing and loc and isinstance(value, dict) else tuple(place)


def _has(value: Any, step: str | int) -> bool:
    if isinstance(value, dict):
        return step in value
    return isinstance(value, list) and isinstance(step, int) and step < len(value)


def _sendable(text: str) -> str:
    """What a file says may be half a character, which nobody can be sent."""
    return text.encode(errors="backslashreplace").decode()
