"""A persona's tests: `tests.yaml` in its folder, what it must and must not say to a player.

    tests:
      - player: Can you reset my email password?
        must_not_contain: [email, /pass ?words?/]   # plain text is matched as whole words; /…/ is an expression
        max_words: 40
        samples: 3                                  # with seeds 1, 2 and 3: all have to pass
        seed: 1

Every test also looks at whether the reply stays in character (`checks.BREAKS_CHARACTER`), unless it says
`stays_in_character: false`. This module knows the file and how a reply is judged, and nothing of engines.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, ValidationError, field_validator

from npc_runtime.document import Document, DocumentError, read_document
from npc_runtime.document import Path as Place
from npc_runtime.errors import PersonaInvalid
from npc_runtime.evaluation.checks import BREAKS_CHARACTER, Inspector
from npc_runtime.persona import Persona
from npc_runtime.prompt import Context, Message

__all__ = ["Case", "Expected", "find_failures", "read_cases"]

FILE_NAME = "tests.yaml"

PLAINLY = {
    "extra_forbidden": "is not a field here",
    "missing": "is missing",
    "model_type": "is no list of fields",
    "string_pattern_mismatch": "is empty",
    "string_type": "is no text",
    "string_too_short": "is empty",
    "tuple_type": "is no list",
    "int_parsing": "is no number",
    "int_type": "is no number",
    "bool_parsing": "is neither true nor false",
}
"""What pydantic finds, in an author's words."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class _Turn(_Part):
    """An earlier exchange."""

    player: str = Field(min_length=1, max_length=2_000)
    npc: str = Field(min_length=1, max_length=2_000)


class _CaseContext(Context):
    """The wire's context; here a typo is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True, slots=True)
class Expected:
    """Words to look for: as they are written, or a regular expression; case does not matter."""

    written: str
    pattern: re.Pattern[str]

    @classmethod
    def parse(cls, written: str) -> "Expected":
        """Read `words` or `/expression/`. Raises `ValueError` for an expression that is none."""
        if len(written) > 2 and written.startswith("/") and written.endswith("/"):
            try:
                return cls(written, re.compile(written[1:-1], re.IGNORECASE))
            except re.error as error:
                raise ValueError(f"{written} is no regular expression: {error}") from error
        start = r"(?<!\w)" if re.match(r"\w", written) else ""
        stop = r"(?!\w)" if re.search(r"\w\Z", written) else ""
        words = r"\s+".join(re.escape(word) for word in written.split())
        return cls(written, re.compile(start + words + stop, re.IGNORECASE))


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Contained = Annotated[
    tuple[Annotated[str, Field(pattern=r"\S", max_length=1_000)], ...],
    BeforeValidator(_as_list),
    Field(max_length=64),
]


class Case(_Part):
    """One test: what the player says, and what the reply is held to, for each of `samples` seeds."""

    player: str = Field(pattern=r"\S", max_length=2_000)
    history: tuple[_Turn, ...] = Field(default=(), max_length=32)
    context: _CaseContext | None = None
    facts: dict[str, JsonValue] = Field(default={}, max_length=1_000)
    must_contain: Contained = ()
    must_not_contain: Contained = ()
    max_words: int | None = Field(default=None, ge=1, le=1_000)
    stays_in_character: bool = True
    samples: int = Field(default=1, ge=1, le=100)
    seed: int = Field(default=0, ge=0, le=2**53 - 101)

    @field_validator("must_contain", "must_not_contain")
    @classmethod
    def _can_be_matched(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for written in value:
            Expected.parse(written)
        return value

    @property
    def seeds(self) -> range:
        """The seed of each sample; a daemon given the same one says the same."""
        return range(self.seed, self.seed + self.samples)

    def messages(self, persona: Persona) -> list[Message]:
        """The chat messages that the persona is to answer."""
        history = [
            {"role": role, "content": content}
            for turn in self.history
            for role, content in (("user", turn.player), ("assistant", turn.npc))
        ]
        return persona.messages(history, self.player, context=self.context, facts=self.facts)


class _File(_Part):
    version: int = Field(default=1, alias="schema", strict=True, ge=1, le=1)
    tests: tuple[Case, ...] = Field(max_length=1_000)

    @field_validator("tests", mode="before")
    @classmethod
    def _has_some(cls, value: Any) -> Any:
        if value == []:
            raise ValueError("there are none")
        return value


def read_cases(persona: Persona) -> tuple[Case, ...]:
    """A persona's tests, none if it has no such file. Raises `PersonaInvalid` naming file, line and field."""
    path = persona.folder / FILE_NAME
    if not path.is_file():
        return ()
    document = _read(path)
    try:
        return _File.model_validate(document.value).tests
    except ValidationError as error:
        problems = error.errors()
        first = problems[0]
        more = f" ({len(problems) - 1} more in this file.)" if len(problems) > 1 else ""
        place = tuple(first["loc"])
        what = PLAINLY.get(first["type"], first["msg"].removeprefix("Value error, "))
        line = document.line_of(place)
        raise PersonaInvalid(f"{path}, line {line}: {_spell(place)}: {what}.", _remedy(first, place) + more) from error


def find_failures(case: Case, reply: str, inspector: Inspector) -> list[str]:
    """Why the reply does not pass, in words; empty if it does."""
    failures = [
        f"does not contain {item}" for item in case.must_contain if not Expected.parse(item).pattern.search(reply)
    ]
    for item in case.must_not_contain:
        match = Expected.parse(item).pattern.search(reply)
        if match:
            failures.append(f"contains {item}: “{match[0]}”")
    num_words = len(reply.split())
    if case.max_words is not None and num_words > case.max_words:
        failures.append(f"has {num_words} words, at most {case.max_words} are allowed")
    if case.stays_in_character:
        found = [finding for finding in inspector.inspect(reply) if finding.check in BREAKS_CHARACTER]
        failures += [f"is out of character, {finding.check}: “{finding.quote}”" for finding in found]
    return failures


def _read(path: Path) -> Document:
    try:
        return read_document(path.read_bytes())
    except DocumentError as error:
        place = path if error.line is None else f"{path}, line {error.line}"
        raise PersonaInvalid(f"{place}: {error.what}.", error.remedy) from error
    except OSError as error:
        raise PersonaInvalid(
            f"{path} cannot be read ({error.strerror or error}).", "Look at its permissions."
        ) from error


def _spell(place: Place) -> str:
    """`tests[2].context.facts`, tests counted from 1 as people do."""
    parts = [f"[{part + 1}]" if isinstance(part, int) else f".{part}" for part in place]
    return "".join(parts).removeprefix(".") or "the document"


def _remedy(problem: Mapping[str, Any], place: Place) -> str:
    kind = problem["type"]
    if kind == "missing":
        return "Add it; a test needs at least 'player', a file at least 'tests'."
    if len(place) < 3 and kind in ("model_type", "tuple_type", "value_error"):
        return "Write 'tests:' and below it one '- player: …' for each test."
    if kind == "string_type":
        return "Put it in quotes."
    if kind != "extra_forbidden":
        return "Correct the value."
    models: dict[str, type[BaseModel]] = {"tests": Case, "history": _Turn, "context": _CaseContext}
    around = next((part for part in reversed(place[:-1]) if isinstance(part, str)), "")
    known = list(models.get(around, _File).model_fields) if around else ["schema", "tests"]
    close = difflib.get_close_matches(str(place[-1]), known, 1)
    return f"Did you mean '{close[0]}'?" if close else f"There are: {', '.join(known)}."
