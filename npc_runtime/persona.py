"""The persona file and the folder of personas a daemon serves.

A persona is a folder `personas/<id>/` with `persona.yaml` in it. This module knows authored characters; it knows
nothing of tokens, models or sockets.
"""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

from pydantic import (
    BeforeValidator,
    Field,
    JsonValue,
    PrivateAttr,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from npc_runtime.document import DocumentError, read_document
from npc_runtime.document_change import change_document, write_document
from npc_runtime.errors import PersonaInvalid, PersonaUnknown, StartupError, WireError
from npc_runtime.problems import LineOf, Problem, problem_of, problems_of
from npc_runtime.prompt import Context, Message, Prompt, build_prompt
from npc_runtime.schema import (
    MAX_TEXT,
    Action,
    AdapterRef,
    Example,
    Fallback,
    Format,
    Guardrails,
    Knowledge,
    Limits,
    Part,
    Phrases,
    Sampling,
    Text,
    Voice,
)
from npc_runtime.whole_file import replace_file

__all__ = [
    "FILE_NAME",
    "Library",
    "Persona",
    "Reading",
    "find_problems",
    "is_text",
    "read_bytes",
    "read_fields",
    "read_file",
    "shipped_personas",
]

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
FILE_NAME = "persona.yaml"
MAX_READ = 1 << 20  # more than a document may have, so that too much is noticed and never held


def _as_adapters(value: Any) -> Any:
    """Read the three spellings of `adapter`: a path, one `{path, scale}`, or a list of either."""
    entries = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    return tuple({"path": entry} if isinstance(entry, str) else entry for entry in entries)


def _as_actions(value: Any) -> Any:
    """Read the two spellings of an action: its name, or a map."""
    if not isinstance(value, (list, tuple)):
        return value
    return tuple({"name": entry} if isinstance(entry, str) else entry for entry in value)


class Persona(Part):
    """An authored character."""

    version: int = Field(alias="schema", strict=True, ge=1, le=SCHEMA_VERSION)
    id: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")
    display_name: str = Field(min_length=1, max_length=200)
    tags: tuple[Annotated[str, Field(min_length=1, max_length=64)], ...] = Field(default=(), max_length=64)
    locale: str = Field(default="", pattern=r"^([A-Za-z]{2,3}(-[A-Za-z0-9]{2,8}){0,4})?$")
    bio: str = Field(min_length=1, max_length=MAX_TEXT)
    personality: Text = ""
    speech_style: Text = ""
    scenario: Text = ""
    goals: Phrases = ()
    knows: tuple[Knowledge, ...] = Field(default=(), max_length=1_000)
    never_says: Phrases = ()
    guardrails: Guardrails = Guardrails()
    greetings: tuple[Annotated[str, Field(min_length=1, max_length=MAX_TEXT)], ...] = Field(default=(), max_length=64)
    examples: tuple[Example, ...] = Field(default=(), max_length=32)
    adapter: Annotated[tuple[AdapterRef, ...], BeforeValidator(_as_adapters)] = Field(default=(), max_length=8)
    sampling: Sampling = Sampling()
    limits: Limits = Limits()
    format: Format = Format()
    emotions: tuple[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,31}$")], ...] = Field(default=(), max_length=32)
    actions: Annotated[tuple[Action, ...], BeforeValidator(_as_actions)] = Field(default=(), max_length=64)
    fallback: Fallback = Fallback()
    voice: Voice = Voice()
    system_prompt: Text = ""
    post_history_instructions: Text = ""
    notes: Text = ""
    card: dict[str, JsonValue] = Field(default={}, max_length=64)
    locked: tuple[str, ...] = Field(default=(), max_length=64)
    _folder: Path = PrivateAttr(default=Path())

    @field_validator("bio", "display_name", "personality", "speech_style", "scenario", mode="before")
    @classmethod
    def _strip(cls, value: Any) -> Any:
        return value.strip() if isinstance(value, str) else value

    @field_validator("knows")
    @classmethod
    def _have_their_own_ids(cls, value: tuple[Knowledge, ...]) -> tuple[Knowledge, ...]:
        seen: set[str] = set()
        for entry in value:
            if entry.id in seen:
                what = {"id": entry.id, "remedy": "Give every entry its own id."}
                raise PydanticCustomError("same_id", "two entries have the id '{id}'", what)
            seen.add(entry.id)
        return value

    @model_validator(mode="after")
    def _locks_exist(self) -> Self:
        names = {field.alias or name for name, field in type(self).model_fields.items()}
        for name in self.locked:
            if name not in names:
                what = {"name": name[:64], "remedy": "Name fields of this file, like bio."}
                raise PydanticCustomError("locked", "'locked' names '{name}', which is not a field", what)
        return self

    @field_serializer("adapter")
    def _spell_adapter(self, value: tuple[AdapterRef, ...]) -> Any:
        spelled = [ref.path if ref.scale == 1.0 else ref.model_dump() for ref in value]
        return spelled[0] if len(spelled) == 1 else spelled

    @field_serializer("actions")
    def _spell_actions(self, value: tuple[Action, ...]) -> list[Any]:
        return [action.model_dump() if action.description else action.name for action in value]

    @property
    def folder(self) -> Path:
        """Where it was read from; adapter paths are relative to it."""
        return self._folder

    @property
    def adapter_name(self) -> str | None:
        """The adapter's name in the engine and in reports: the persona's id, or None for a prompt-only persona."""
        return self.id if self.adapter else None

    @property
    def adapter_parts(self) -> list[tuple[Path, float]]:
        """Folders and scales of its adapters."""
        return [(self.folder / ref.path, ref.scale) for ref in self.adapter]

    @property
    def always_known(self) -> list[str]:
        """What it knows whatever the game's facts are."""
        return [entry.text for entry in self.knows if entry.condition is None]

    @property
    def asked_facts(self) -> list[str]:
        """The names of all facts that its conditions ask for."""
        return sorted({name for entry in self.knows if entry.condition for name in entry.condition.names})

    def known(self, facts: Mapping[str, Any]) -> list[str]:
        """What it knows because of these facts, the most important first."""
        held = [entry for entry in self.knows if entry.condition is not None and entry.condition.holds(facts)]
        return [entry.text for entry in sorted(held, key=lambda entry: -entry.priority)]

    def prompt(
        self,
        history: Sequence[Message],
        text: str,
        *,
        speaker: str | None = None,
        context: Context | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """Everything the model reads before it replies to `text`; `history` is earlier turns, oldest first."""
        return build_prompt(self, history, text, speaker=speaker, context=context, facts=facts or {})

    def messages(
        self,
        history: Sequence[Message],
        text: str,
        *,
        speaker: str | None = None,
        context: Context | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> list[Message]:
        """The chat messages of `prompt`."""
        return self.prompt(history, text, speaker=speaker, context=context, facts=facts).messages

    def to_document(self) -> dict[str, Any]:
        """The fields that were set, as they stand in a file, in the order of the schema."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)

    @classmethod
    def load(cls, folder: Path) -> "Persona":
        """Read `folder/persona.yaml`. Raises `PersonaInvalid` naming file, line and field of the first problem."""
        return cls.parse(read_bytes(folder), folder)

    @classmethod
    def parse(cls, data: bytes, folder: Path) -> "Persona":
        """Read what `folder/persona.yaml` would say. Raises as `load`."""
        return read_file(data, folder).usable(folder / FILE_NAME)

    def save(self, folder: Path) -> Path:
        """Write `folder/persona.yaml`: into a file that is there only what changed, its comments and order kept.

        Raises `PersonaInvalid` if the file locks a field that would change, or if it is no YAML.
        """
        path = folder / FILE_NAME
        data = self.to_file(path, read_bytes(folder) if path.is_file() else None)
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(path, data)
        return path

    def to_file(self, path: Path, old: bytes | None) -> bytes:
        """What `save` writes to `path`, where `old` is. Raises as `save`."""
        wanted = self.to_document()
        if old is None:
            return write_document(wanted)
        try:
            before = read_document(old)
        except DocumentError as error:
            raise problem_of(error).error(path) from error
        raw = before.value if isinstance(before.value, dict) else {}
        for problem in self.find_locked(raw, before.line_of):
            raise problem.error(path)
        return change_document(old, wanted, self.changed_fields(raw)) if raw else write_document(wanted)

    def changed_fields(self, raw: Mapping[str, Any]) -> set[str]:
        """The fields that say something else than those of a file."""
        wanted = self.to_document()
        return {key for key in {**raw, **wanted} if self._differs(key, raw, wanted)}

    def find_locked(self, raw: Mapping[str, Any], line_of: LineOf) -> list[Problem]:
        """The changes to fields that a file locks."""
        locked = raw["locked"] if isinstance(raw.get("locked"), list) else []
        return [
            Problem((name,), f"'{name}' is locked", "Take it off the list 'locked' first.", line_of((name,)))
            for name in sorted(self.changed_fields(raw))
            if name in locked
        ]

    def _differs(self, key: str, raw: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
        least = {"schema": 1, "id": "x", "display_name": "x", "bio": "x"}
        if key not in raw:
            default = type(self).model_validate(least).model_dump(mode="json", by_alias=True)
            return key in least or bool(wanted[key] != default.get(key))
        try:
            told = type(self).model_validate({**least, key: raw[key]})
        except ValidationError:
            return True
        return key not in wanted or bool(told.to_document()[key] != wanted[key])


class Library:
    """The personas of one folder that can speak; those that cannot are kept with the reason, in `problems`.

    `stale` has what is wrong with newer files of a persona that speaks as it was before.
    """

    def __init__(self, personas: Mapping[str, Persona], problems: Mapping[str, WireError]) -> None:
        self._personas = dict(personas)
        self.problems = dict(problems)
        self.stale: dict[str, WireError] = {}

    @property
    def authored(self) -> list[Persona]:
        """Every persona whose file could be read, whether it can speak or not."""
        return list(self._personas.values())

    @classmethod
    def load(cls, folder: Path) -> "Library":
        """Read every persona folder below `folder`; what is wrong with one goes to `problems`.

        Raises `StartupError` if `folder` is not there.
        """
        if not folder.is_dir():
            raise StartupError(f"--personas {folder}: there is no such folder.", "Name a folder of persona folders.")
        personas, problems = {}, {}
        for path in sorted(path for path in folder.iterdir() if os.path.lexists(path / FILE_NAME)):
            if not is_text(path.name):  # of an archive in another encoding: it can be neither sent nor asked for
                logger.warning("%r is no name for a persona's folder", path.name)
                continue
            try:
                personas[path.name] = Persona.load(path)
            except WireError as error:
                problems[path.name] = error
        return cls(personas, problems)

    def __iter__(self) -> Iterator[Persona]:
        return (persona for persona in self._personas.values() if persona.id not in self.problems)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def reject(self, persona_id: str, problem: WireError) -> None:
        """Keep the persona from speaking, with the reason that lines for it get."""
        self.problems[persona_id] = problem

    def put(self, persona: Persona) -> None:
        """Let a persona speak, in place of the one with its id if there is one."""
        self.remove(persona.id)
        self._personas[persona.id] = persona

    def remove(self, persona_id: str) -> None:
        """Forget a persona, if it is known."""
        for known in (self._personas, self.problems, self.stale):
            known.pop(persona_id, None)

    def object_to(self, persona_id: str, problem: WireError) -> None:
        """Note what is wrong with a persona's newest files: one that speaks stays as it is."""
        speaks = persona_id in self._personas and persona_id not in self.problems
        (self.stale if speaks else self.problems)[persona_id] = problem

    def name_of(self, persona_id: str) -> str:
        """The display name of a persona, usable or not."""
        return self._personas[persona_id].display_name if persona_id in self._personas else persona_id

    def find(self, persona_id: str) -> Persona:
        """Return a persona that can speak. Raises `PersonaUnknown`, or the problem that was found with it."""
        if persona_id in self.problems:
            problem = self.problems[persona_id]
            raise type(problem)(problem.message, problem.hint)  # a fresh one, or its traceback would grow
        if persona_id not in self._personas:
            known = ", ".join(sorted(persona.id for persona in self)[:20]) or "none"
            raise PersonaUnknown(f"There is no persona '{persona_id[:64]}'.", f"Loaded are: {known}.")
        return self._personas[persona_id]


class Reading(NamedTuple):
    """A document as far as it can be read: its fields if it is a map, a persona if they fit, and all problems."""

    fields: dict[str, Any] | None
    persona: Persona | None
    problems: list[Problem]

    def usable(self, file: Path | None = None) -> Persona:
        """The persona. Raises the first problem, and says how many more there are."""
        if self.persona is not None and not self.problems:
            return self.persona
        first, *more = self.problems
        tool = "npc-runtime persona check" if file else "persona.validate"
        error = first.error(file)
        raise PersonaInvalid(error.message, error.hint + (f" ({len(more)} more: {tool})" if more else ""))


def read_file(data: bytes, folder: Path) -> Reading:
    """Read what `folder/persona.yaml` says."""
    try:
        document = read_document(data)
    except DocumentError as error:
        return Reading(None, None, [problem_of(error)])
    return read_fields(document.value, folder, document.line_of)


def read_fields(fields: Any, folder: Path | None, line_of: LineOf = lambda path: None) -> Reading:
    """Read the fields of a document; the persona's id is to be the folder's name, if there is one."""
    if not isinstance(fields, dict):
        return Reading(None, None, [Problem((), "the document is not a map of fields", "Start it with 'schema: 1'.")])
    version = fields.get("schema")
    if type(version) is int and version > SCHEMA_VERSION:
        what = f"schema {version} is newer than this program reads ({SCHEMA_VERSION})"
        remedy = "Update npc-runtime, or save the persona for the older schema."
        return Reading(fields, None, [Problem(("schema",), what, remedy, line_of(("schema",)))])
    problems: list[Problem] = []
    if folder is not None and isinstance(fields.get("id"), str) and fields["id"] != folder.name:
        what = f"id '{fields['id'][:64]}' is not the folder's name '{folder.name}'"
        problems = [Problem(("id",), what, "Rename one of them.", line_of(("id",)))]
    persona = None
    try:
        persona = Persona.model_validate(fields)
        persona._folder = folder or Path()
    except ValidationError as error:
        problems += problems_of(error, fields, Persona, line_of)
    problems.sort(key=lambda problem: (problem.line or 0, "is missing" in problem.what))  # misspelled names come first
    return Reading(fields, persona, problems)


def read_bytes(folder: Path) -> bytes:
    """The bytes of `folder/persona.yaml`, or enough to see that they are too many. Raises `PersonaInvalid`."""
    path = folder / FILE_NAME
    try:
        with path.open("rb") as file:
            return file.read(MAX_READ)
    except OSError as error:
        reason = error.strerror or str(error)
        raise PersonaInvalid(f"{path} cannot be read: {reason}.", "Each persona is a folder with this file.") from error


def find_problems(folder: Path) -> list[PersonaInvalid]:
    """Everything that is wrong with `folder/persona.yaml`, in the order of the file."""
    try:
        data = read_bytes(folder)
    except PersonaInvalid as error:
        return [error]
    return [problem.error(folder / FILE_NAME) for problem in read_file(data, folder).problems]


def shipped_personas() -> Path:
    """The folder of the personas that come with the program."""
    installed = Path(__file__).parent / "personas"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "personas"


def is_text(name: str) -> bool:
    """Whether a file's name is one: on Linux it may be bytes that are no UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
