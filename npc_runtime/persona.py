"""The persona file, the messages it turns a player's line into, and the folder of personas a daemon serves.

A persona is a folder `personas/<id>/` with `persona.yaml` in it. This module knows authored characters; it knows
nothing of tokens, models or sockets.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
)

from npc_runtime.errors import PersonaInvalid, PersonaUnknown, StartupError, WireError

__all__ = [
    "AdapterRef",
    "Context",
    "Document",
    "Example",
    "Fallback",
    "Library",
    "Limits",
    "Message",
    "Persona",
    "Sampling",
    "shipped_personas",
]

SCHEMA_VERSION = 1
MAX_FILE_BYTES = 256 * 1024

Message = dict[str, str]
"""A chat message: `role` (system, user, assistant) and `content`."""


class Document(BaseModel):
    """Part of a persona file; a key that the schema does not know is an error, so that a typo is found."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Example(Document):
    """One exchange that shows the voice; rendered as an earlier turn."""

    player: str = Field(min_length=1, max_length=2_000)
    npc: str = Field(min_length=1, max_length=2_000)


class AdapterRef(Document):
    """A LoRA folder in PEFT's format, relative to the persona's folder, and its strength."""

    path: str = Field(min_length=1, max_length=1_000)
    scale: float = Field(default=1.0, ge=-4.0, le=4.0)

    @field_validator("path")
    @classmethod
    def _is_local(cls, value: str) -> str:
        if value.startswith(("//", "\\\\")) or "\0" in value:  # Windows would log in to the share's host
            raise ValueError("a network path is not allowed")
        return value


class Sampling(Document):
    """How the persona's lines are sampled unless a line says otherwise."""

    temperature: float = Field(default=0.7, ge=0.0, le=5.0)
    top_p: float = Field(default=0.95, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=0, le=1_000_000)
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    repetition_penalty: float = Field(default=1.0, ge=0.1, le=5.0)
    stop: tuple[Annotated[str, Field(min_length=1, max_length=64)], ...] = Field(default=(), max_length=8)


class Limits(Document):
    """How long a line may be: it ends at the first sentence end after `soft_words`, and always at `hard_tokens`."""

    soft_words: int = Field(default=20, ge=1, le=1_000)
    hard_tokens: int = Field(default=60, ge=1, le=1_024)


FallbackLines = Annotated[tuple[Annotated[str, Field(min_length=1, max_length=1_000)], ...], Field(max_length=32)]


class Fallback(Document):
    """Authored lines for when nothing could be generated."""

    timeout: FallbackLines = ()
    refusal: FallbackLines = ()
    greeting: FallbackLines = ()
    busy: FallbackLines = ()


class Context(BaseModel):
    """What is true for this turn only; goes in front of the player's words, so that what precedes stays cached."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    facts: tuple[Annotated[str, Field(max_length=1_000)], ...] = Field(default=(), max_length=32)
    scene: str | None = Field(default=None, max_length=2_000)
    mood: str | None = Field(default=None, max_length=200)
    nearby: tuple[Annotated[str, Field(max_length=200)], ...] = Field(default=(), max_length=32)

    def sentences(self) -> list[str]:
        """The context in words, one statement each."""
        said = [f"Scene: {self.scene}"] if self.scene else []
        said += [f"Mood: {self.mood}"] if self.mood else []
        said += [f"Nearby: {', '.join(self.nearby)}"] if self.nearby else []
        return said + list(self.facts)


def _as_adapters(value: Any) -> Any:
    """Read the three spellings of `adapter`: a path, one `{path, scale}`, or a list of either."""
    entries = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    return tuple({"path": entry} if isinstance(entry, str) else entry for entry in entries)


class Persona(Document):
    """An authored character."""

    version: int = Field(alias="schema", strict=True, ge=1, le=SCHEMA_VERSION)
    id: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")
    display_name: str = Field(min_length=1, max_length=200)
    bio: str = Field(min_length=1, max_length=4_000)
    speech_style: str = Field(default="", max_length=2_000)
    examples: tuple[Example, ...] = Field(default=(), max_length=32)
    adapter: Annotated[tuple[AdapterRef, ...], BeforeValidator(_as_adapters)] = Field(default=(), max_length=8)
    sampling: Sampling = Sampling()
    limits: Limits = Limits()
    fallback: Fallback = Fallback()
    _folder: Path = PrivateAttr(default=Path())

    @field_validator("bio", "speech_style", "display_name", mode="before")
    @classmethod
    def _strip(cls, value: Any) -> Any:
        return " ".join(value.split()) if isinstance(value, str) else value

    @property
    def folder(self) -> Path:
        """Where it was read from; adapter paths are relative to it."""
        return self._folder

    @property
    def adapter_name(self) -> str | None:
        """The adapter's name in the engine and in reports: the persona's id, or None for a prompt-only persona."""
        return self.id if self.adapter else None

    def messages(
        self, history: list[Message], text: str, *, speaker: str | None = None, context: Context | None = None
    ) -> list[Message]:
        """The chat messages whose next turn is the NPC's reply to `text`; `history` is earlier turns, oldest first."""
        said = f"{speaker}: {text}" if speaker else text
        if context and (notes := context.sentences()):
            said = f"({' '.join(_as_sentence(note) for note in notes)})\n{said}"
        turns = [
            turn
            for example in self.examples
            for turn in (_message("user", example.player), _message("assistant", example.npc))
        ]
        return [_message("system", self.system_prompt()), *turns, *history, _message("user", said)]

    def system_prompt(self) -> str:
        """Who the character is, how it speaks, and how much."""
        parts = [f"You are {self.display_name}.", _as_sentence(self.bio), _as_sentence(self.speech_style)]
        return " ".join(part for part in [*parts, "Reply in character, in one or two sentences."] if part)

    @classmethod
    def load(cls, folder: Path) -> "Persona":
        """Read `folder/persona.yaml`. Raises `PersonaInvalid` naming file and field."""
        path = folder / "persona.yaml"
        document = _read_yaml(path)
        version = document.get("schema")
        if type(version) is int and version > SCHEMA_VERSION:
            raise PersonaInvalid(
                f"{path}: schema {version} is newer than this program reads ({SCHEMA_VERSION}).",
                "Update npc-runtime, or save the persona for the older schema.",
            )
        try:
            persona = cls.model_validate(document)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "the document"
            is_typo = first["type"] == "extra_forbidden"
            what = "is not a field of a persona file" if is_typo else first["msg"].removeprefix("Value error, ")
            raise PersonaInvalid(f"{path}: {field}: {what}.", "Correct this field.") from error
        if persona.id != folder.name:
            raise PersonaInvalid(
                f"{path}: id '{persona.id}' is not the folder's name '{folder.name}'.", "Rename one of them."
            )
        persona._folder = folder
        return persona


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
        for path in sorted(path for path in folder.iterdir() if os.path.lexists(path / "persona.yaml")):
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


def shipped_personas() -> Path:
    """The folder of the personas that come with the program."""
    installed = Path(__file__).parent / "personas"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "personas"


def _read_yaml(path: Path) -> dict[str, Any]:
    from ruamel.yaml import YAML

    try:
        data = path.read_bytes()
        if len(data) > MAX_FILE_BYTES:
            raise PersonaInvalid(f"{path} is larger than {MAX_FILE_BYTES // 1024} KiB.", "Shorten it.")
        document = YAML(typ="safe", pure=True).load(data.decode("utf-8"))
    except PersonaInvalid:
        raise
    except Exception as error:  # besides YAMLError, ruamel's constructors raise whatever a bad tag provokes
        reason = " ".join(str(error).split())[:300]
        raise PersonaInvalid(f"{path} cannot be read: {reason}.", "Correct the file.") from error
    if not isinstance(document, dict):
        raise PersonaInvalid(f"{path} is not a mapping of fields.", "Start it with 'schema: 1'.")
    return {str(key): value for key, value in document.items()}


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _as_sentence(text: str) -> str:
    return text if not text or text[-1] in ".!?…" else f"{text}."
