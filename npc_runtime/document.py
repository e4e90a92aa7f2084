"""A YAML file that people write: its values with the line of each.

Only plain YAML is read: no tags, no anchors and aliases, bounded size, depth and number of values, so that reading
costs no more than the file is large. This module knows nothing of personas.
"""

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Document", "DocumentError", "Path", "decode_text", "read_document", "resolve_scalar"]

MAX_BYTES = 256 * 1024
MAX_DEPTH = 12
MAX_VALUES = 20_000
MAX_NUMBER_CHARS = 32
HALF = re.compile(r"[\ud800-\udfff]")  # of a surrogate pair; it can never be sent

Path = tuple[str | int, ...]
"""Where a value stands: keys and positions, from the outermost in."""

_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_WORDS = {"": None, "~": None, "null": None, "true": True, "false": False}


class DocumentError(ValueError):
    """A file that is no plain YAML; `line` counts from 1, None where it is the file as a whole."""

    def __init__(self, what: str, remedy: str, line: int | None = None) -> None:
        super().__init__(f"{what}. {remedy}")
        self.what = what
        self.remedy = remedy
        self.line = line


@dataclass(frozen=True, slots=True)
class Document:
    """What a file says; `lines` has the line, from 1, of every value."""

    value: Any
    lines: Mapping[Path, int] = field(repr=False)

    def line_of(self, path: Path) -> int:
        """The line of a value, or of the innermost one around it that is there."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)


def read_document(data: bytes) -> Document:
    """Read a file. Raises `DocumentError`, and nothing else whatever the bytes are."""
    text = decode_text(data)
    reader = _Reader()
    try:
        from ruamel.yaml import YAML

        for event in YAML(typ="safe", pure=True).parse(io.StringIO(text)):
            reader.take(event)
    except DocumentError:
        raise
    except Exception as error:  # besides YAMLError, the scanner lets a few accidents through
        raise _explain(error, text) from error
    return Document(reader.value, reader.lines)


class _Reader:
    """Builds values from the parser's events, in the types of YAML 1.2's core schema."""

    def __init__(self) -> None:
        self.value: Any = None
        self.lines: dict[Path, int] = {}
        self._open: list[_Open] = []
        self._num_documents = 0

    def take(self, event: Any) -> None:
        kind = type(event).__name__
        line = event.start_mark.line + 1
        if kind == "DocumentStartEvent":
            self._num_documents += 1
            if self._num_documents > 1:
                raise DocumentError("there is a second document", "Remove the line ---.", line)
        if kind not in ("AliasEvent", "ScalarEvent", "MappingStartEvent", "SequenceStartEvent"):
            if kind in ("MappingEndEvent", "SequenceEndEvent"):
                self._open.pop()
            return
        if kind == "AliasEvent" or event.anchor is not None:
            raise DocumentError("& and * (anchors and aliases) are not read", "Write the text out, or quote it.", line)
        if event.tag is not None:
            raise DocumentError(f"the tag {str(event.tag)[:40]} is not read", "Remove it, or quote the text.", line)
        if kind == "ScalarEvent":
            self._place(_scalar(event), line, text=event.value)
            return
        value: Any = {} if kind == "MappingStartEvent" else []
        path = self._place(value, line)
        if len(self._open) >= MAX_DEPTH:
            raise DocumentError("lists and maps are nested too deeply", f"The limit is {MAX_DEPTH}.", line)
        self._open.append(_Open(value, path))

    def _place(self, value: Any, line: int, *, text: str | None = None) -> Path:
        """Put a value where the file has it; returns its path."""
        if len(self.lines) >= MAX_VALUES:
            raise DocumentError("the file has too many values", f"The limit is {MAX_VALUES}.", line)
        if text is not None and HALF.search(text):
            names = [str(each) for each in (*self._open[-1].path, self._open[-1].key)] if self._open else []
            raise DocumentError(f"{'.'.join(names)}: half of a character", "Write the character itself.", line)
        if not self._open:
            self.value = value
            self.lines[()] = line
            return ()
        around = self._open[-1]
        if isinstance(around.value, list):
            around.value.append(value)
            path = (*around.path, len(around.value) - 1)
            self.lines[path] = line
            return path
        if around.key is None:
            if text is None:
                raise DocumentError("the name of a field is a list or a map", "Write name: value.", line)
            key = text
            if key in around.value:
                first = self.lines[(*around.path, key)]
                raise DocumentError(f"'{key[:64]}' is already there, on line {first}", "Keep one of them.", line)
            around.key = key
            self.lines[(*around.path, key)] = line
            return around.path
        path = (*around.path, around.key)
        around.value[around.key] = value
        around.key = None
        return path


@dataclass(slots=True)
class _Open:
    """A list or map whose end is still to come."""

    value: Any
    path: Path
    key: str | None = None  # of a map: the name whose value comes next


def _scalar(event: Any) -> Any:
    text: str = event.value
    return text if event.style else resolve_scalar(text)  # a style: quoted, or a block


def resolve_scalar(text: str) -> Any:
    """What a text means that stands without quotes."""
    lower = text.lower()
    if lower in _WORDS and text in (lower, lower.title(), lower.upper()):
        return _WORDS[lower]
    if len(text) <= MAX_NUMBER_CHARS:
        if _INT.fullmatch(text):
            return int(text, {"0x": 16, "0o": 8}.get(text[:2], 10))
        if _FLOAT.fullmatch(text):
            return float(text)
    return text


def decode_text(data: bytes) -> str:
    """The text of a file, with plain line ends. Raises `DocumentError`."""
    if len(data) > MAX_BYTES:
        raise DocumentError(f"the file is larger than {MAX_BYTES // 1024} KiB", "Shorten it.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DocumentError("this is not UTF-8 text", "Save the file as UTF-8.", line) from error
    return text.replace("\r\n", "\n")


def _explain(error: Exception, text: str) -> DocumentError:
    """What the YAML parser found, in one line."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    line = None if mark is None else mark.line + 1
    if isinstance(position := getattr(error, "position", None), int):  # a character that YAML does not allow
        line = text.count("\n", 0, position) + 1
    what = str(getattr(error, "problem", None) or getattr(error, "reason", None) or error)
    what = " ".join(what.split())[:200] or type(error).__name__
    remedy = "Look at the indentation and the quotes here; text with ': ', ' #' or quotes in it stands in quotes."
    if "\\t" in what or "tab" in what:
        remedy = "Indent with spaces, not with tabs."
    return DocumentError(f"this is not YAML: {what}", remedy, line)
