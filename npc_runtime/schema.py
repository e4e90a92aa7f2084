"""The parts of a persona file and their bounds, and what to do about a value that does not fit."""

from collections.abc import Iterator
from difflib import get_close_matches
from types import UnionType
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    PrivateAttr,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from npc_runtime.condition import Condition, ConditionError, parse_condition

__all__ = [
    "Action",
    "AdapterRef",
    "Example",
    "Fallback",
    "Format",
    "Guardrails",
    "Knowledge",
    "Limits",
    "Part",
    "Phrases",
    "Sampling",
    "Text",
    "Voice",
    "find_reason",
    "find_remedy",
]

MAX_TEXT = 16_000
ID = r"^[a-z0-9][a-z0-9_-]{0,63}$"


def _require_words(value: str) -> str:
    if not value.strip():
        raise PydanticCustomError("empty", "is empty", {"remedy": "Write something, or remove the field."})
    return value


Text = Annotated[str, Field(max_length=MAX_TEXT)]
Phrase = Annotated[str, Field(min_length=1, max_length=500), AfterValidator(_require_words)]
Phrases = Annotated[tuple[Phrase, ...], Field(max_length=64)]
Spoken = Annotated[str, Field(min_length=1, max_length=1_000)]
FallbackLines = Annotated[tuple[Spoken, ...], Field(max_length=32)]


class Part(BaseModel):
    """Part of a persona file; a key that the schema does not know is an error, so that a typo is found."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Example(Part):
    """One exchange that shows the voice; rendered as an earlier turn."""

    player: str = Field(min_length=1, max_length=2_000)
    npc: str = Field(min_length=1, max_length=2_000)


class Knowledge(Part):
    """Something the character knows: always, or `when` a condition over the game's facts holds.

    Of what holds in a turn the highest `priority` is said first, and left out last.
    """

    id: str = Field(pattern=ID)
    text: str = Field(min_length=1, max_length=4_000)
    when: Annotated[str, BeforeValidator(lambda value: str(value).lower() if isinstance(value, bool) else value)] = ""
    priority: int = Field(default=0, ge=-1_000_000, le=1_000_000)
    notes: Text = ""
    _condition: Condition | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _read_condition(self) -> Self:
        if self.when.strip():
            self._condition = parse_condition(self.when)
        return self

    @field_validator("when")
    @classmethod
    def _is_readable(cls, value: str) -> str:
        try:
            if value.strip():
                parse_condition(value)
        except ConditionError as error:
            raise PydanticCustomError("condition", "{what}", {"what": error.what, "remedy": error.remedy}) from error
        return value

    @property
    def condition(self) -> Condition | None:
        """When it is known; None: always."""
        return self._condition


class AdapterRef(Part):
    """A LoRA folder in PEFT's format, relative to the persona's folder, and its strength."""

    path: str = Field(min_length=1, max_length=1_000)
    scale: float = Field(default=1.0, ge=-4.0, le=4.0)

    @field_validator("path")
    @classmethod
    def _is_local(cls, value: str) -> str:
        if value.startswith(("//", "\\\\")) or "\0" in value:  # Windows would log in to the share's host
            raise ValueError("a network path is not allowed")
        return value


class Sampling(Part):
    """How the persona's lines are sampled unless a line says otherwise."""

    temperature: float = Field(default=0.7, ge=0.0, le=5.0)
    top_p: float = Field(default=0.95, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=0, le=1_000_000)
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    repetition_penalty: float = Field(default=1.0, ge=0.1, le=5.0)
    stop: tuple[Annotated[str, Field(min_length=1, max_length=64)], ...] = Field(default=(), max_length=8)


class Limits(Part):
    """How long a line may be: it ends at the first sentence end after `soft_words`, and always at `hard_tokens`.

    Of the knowledge that depends on facts a prompt has at most `knowledge_words`.
    """

    soft_words: int = Field(default=20, ge=1, le=1_000)
    hard_tokens: int = Field(default=60, ge=1, le=1_024)
    knowledge_words: int = Field(default=300, ge=0, le=10_000)


class Format(Part):
    """The form of a reply: free text, one of a list, a regular expression, or JSON of a schema."""

    kind: Literal["text", "choice", "regex", "json_schema"] = "text"
    value: JsonValue = None

    @model_validator(mode="after")
    def _has_its_value(self) -> Self:
        fits, remedy = {
            "text": (self.value is None, "Leave value out."),
            "choice": (_is_choice(self.value), "Write value: [one, two]."),
            "regex": (isinstance(self.value, str), "Write the expression in single quotes."),
            "json_schema": (isinstance(self.value, dict), "Write the schema as a map."),
        }[self.kind]
        if not fits:
            raise PydanticCustomError("format", "value does not fit kind {kind}", {"kind": self.kind, "remedy": remedy})
        return self


def _is_choice(value: Any) -> bool:
    return isinstance(value, list) and 0 < len(value) <= 64 and all(isinstance(item, str) and item for item in value)


class Action(Part):
    """Something the character can do in the game; a name alone may be written without the map around it."""

    name: str = Field(pattern=r"^[A-Za-z][A-Za-z0-9_.-]{0,63}$")
    description: str = Field(default="", max_length=500)


class Fallback(Part):
    """Authored lines for when nothing could be generated."""

    timeout: FallbackLines = ()
    refusal: FallbackLines = ()
    greeting: FallbackLines = ()
    busy: FallbackLines = ()


class Guardrails(Part):
    """Bounds of what the character talks about."""

    avoid: Phrases = ()
    stay_in_character: bool = False


class Voice(Part):
    """Hints for the game's own text-to-speech; the daemon makes no sound."""

    id: str = Field(default="", max_length=200)
    description: str = Field(default="", max_length=500)
    pitch: float = Field(default=1.0, ge=0.1, le=4.0)
    rate: float = Field(default=1.0, ge=0.1, le=4.0)


def find_reason(error: ErrorDetails) -> str:
    """What is wrong with a value, in pydantic's words where they are clear."""
    match error["type"]:
        case "extra_forbidden":
            return "is not a field of a persona file"
        case "missing":
            return "is missing"
        case "string_type" if error["input"] is None:
            return "has no text"
        case "string_type":
            return f"is not text but {_describe(error['input'])}"
        case "tuple_type" | "list_type":
            return f"is not a list but {_describe(error['input'])}"
        case "model_type" | "dict_type":
            return f"is not a map of fields but {_describe(error['input'])}"
    return error["msg"].removeprefix("Value error, ")[:300]


def find_remedy(error: ErrorDetails, model: type[BaseModel]) -> str:
    """What to do about a value that does not fit `model`."""
    given = error.get("ctx", {})
    if "remedy" in given:
        return str(given["remedy"])
    match error["type"]:
        case "extra_forbidden":
            fields = sorted(_fields_at(model, error["loc"][:-1]))
            near = get_close_matches(str(error["loc"][-1]), fields, n=1, cutoff=0.6)
            return f"Did you mean '{near[0]}'?" if near else f"Fields here are: {', '.join(fields)}."
        case "missing":
            return f"Add the line '{error['loc'][-1]}: …'."
        case "string_type" if not isinstance(error["input"], (dict, list, tuple, type(None))):
            return "Put it in quotes."
        case "string_type":
            return "Write a text behind the colon, or remove the field."
        case "tuple_type" | "list_type":
            return "Write one entry a line, each with '- ' in front."
        case "string_pattern_mismatch" if error["loc"][-1] == "id":
            return "An id has small letters, digits, - and _."
        case "string_too_long" | "too_long":
            return f"Shorten it to {given.get('max_length')}."
        case "literal_error":
            return f"Write {given.get('expected')}."
    return "Correct this field."


def _describe(value: Any) -> str:
    if isinstance(value, dict):
        return "a map"
    if isinstance(value, (list, tuple)):
        return "a list"
    return f"{'text' if isinstance(value, str) else 'nothing' if value is None else value!r}"[:60]


def _fields_at(model: type[BaseModel], path: tuple[str | int, ...]) -> set[str]:
    """The names of the fields that may stand at a path of a model."""
    models = [model]
    for step in path:
        if isinstance(step, int):
            continue
        fields = [field for each in models for name, field in each.model_fields.items() if step in (name, field.alias)]
        models = [inner for field in fields for inner in _models_in(field.annotation)]
    return {field.alias or name for each in models for name, field in each.model_fields.items()}


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Annotated, Union, UnionType, tuple):
        for argument in get_args(annotation):
            yield from _models_in(argument)
