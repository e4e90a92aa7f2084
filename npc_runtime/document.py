"""A YAML file that people write: its values with the line of each, and changes that leave the rest as it was.

Only plain YAML is read: no tags, no anchors and aliases, bounded size, depth and number of values, so that reading
costs no more than the file is large. This module knows nothing of personas.
"""

import io
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Any

__all__ = ["Document", "DocumentError", "Path", "change_document", "read_document", "write_document"]

MAX_BYTES = 256 * 1024
MAX_DEPTH = 12
MAX_VALUES = 20_000
MAX_NUMBER_CHARS = 32

Path = tuple[str | int, ...]
"""Where a value stands: keys and positions, from the outermost in."""

_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_WORDS = {"": None, "~": None, "null": None, "true": True, "false": False}
_ESCAPED = re.compile(r"[^\n\x20-\x7e\xa0-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]|[\u2028\u2029]|\n\Z")
_HALF = re.compile(r"[\ud800-\udfff]")  # of a surrogate pair; it can never be sent
_PLAIN = re.compile(r"\w[^?]*\Z")  # ruamel reads fewer texts without quotes than it writes
_NO_BLOCK = re.compile(r"[ \t]\n|\A\s|[^\S\n]\Z")  # what a block text does not give back
_COMMENT = re.compile(r"#|$")  # at the start of a line


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
    text = _decode(data)
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


def change_document(data: bytes, wanted: Mapping[str, Any], changed: Collection[str]) -> bytes:
    """Write the `changed` fields of a file as `wanted` has them; one that `wanted` lacks goes.

    Fields that did not change keep every byte, and those that did keep the comments and quotes of what stayed.
    A new field goes behind the ones that stand before it in `wanted`. Raises `DocumentError` if `data` is no YAML.
    """
    before = read_document(data).value
    expected = {key: value for key, value in before.items() if key not in changed}
    expected |= {key: wanted[key] for key in changed if key in wanted}
    text = _decode(data)
    blocks = _blocks(text)
    for apply in (_merge, lambda old, new: _spell(new)):  # the second loses comments, where ruamel stumbles over them
        dumped = _change(text, blocks, wanted, changed, apply)
        result = _encode(_splice(blocks, dumped, changed, text) if blocks else dumped, data)
        if _says(result, expected):
            return result
    return write_document(expected)


def _change(
    text: str,
    blocks: "dict[str, _Block] | None",
    wanted: Mapping[str, Any],
    changed: Collection[str],
    apply: Callable[[Any, Any], Any],
) -> str:
    """Let ruamel write the file with its changes; the fields alone where `_splice` puts back what is between them."""
    yaml = _round_trip(text)
    # ruamel would take what stands between two fields for part of the first.
    tree = yaml.load("".join(block.body for block in blocks.values()) if blocks else text)
    order = list(wanted)
    for key in sorted(changed, key=lambda key: order.index(key) if key in order else -1):
        if key not in wanted:
            tree.pop(key, None)
        elif key in tree:
            tree[key] = apply(tree[key], wanted[key])
        else:
            ahead = set(order[: order.index(key)])
            position = max((at + 1 for at, other in enumerate(tree) if other in ahead), default=0)
            tree.insert(position, key, _spell(wanted[key]))
    return _dump(tree, text)


def _says(data: bytes, expected: Any) -> bool:
    try:
        return bool(read_document(data).value == expected)
    except DocumentError:
        return False


def write_document(value: Mapping[str, Any]) -> bytes:
    """Write a new file."""
    return _dump(_spell(value), "").encode()


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
        if text is not None and _HALF.search(text):
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
    return text if event.style else _resolve(text)  # a style: quoted, or a block


def _resolve(text: str) -> Any:
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


def _decode(data: bytes) -> str:
    if len(data) > MAX_BYTES:
        raise DocumentError(f"the file is larger than {MAX_BYTES // 1024} KiB", "Shorten it.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DocumentError("this is not UTF-8 text", "Save the file as UTF-8.", line) from error
    return text.replace("\r\n", "\n")


def _encode(text: str, like: bytes) -> bytes:
    """With the byte order mark and the line ends of the file that it replaces."""
    is_windows = b"\r\n" in like
    data = (text.replace("\n", "\r\n") if is_windows else text).encode()
    return b"\xef\xbb\xbf" + data if like.startswith(b"\xef\xbb\xbf") else data


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


def _round_trip(text: str) -> Any:
    """ruamel's reader and writer that keeps comments and quotes, set to the indentation of a file."""
    from ruamel.yaml import YAML

    yaml = YAML(typ="rt", pure=True)
    yaml.preserve_quotes = True
    yaml.allow_unicode = True
    yaml.width = 4096  # a line break is where the author put one
    is_flush = re.search(r"^\w+:[^\n]*\n(?:\s*(?:#[^\n]*)?\n)*- ", text, re.MULTILINE) is not None
    yaml.indent(mapping=2, sequence=2 if is_flush else 4, offset=0 if is_flush else 2)
    return yaml


def _dump(tree: Any, like: str) -> str:
    stream = io.StringIO()
    _round_trip(like).dump(tree, stream)
    return stream.getvalue()


def _spell(value: Any) -> Any:
    """A new value as ruamel writes it: text of several lines as a block."""
    from ruamel.yaml.comments import CommentedMap
    from ruamel.yaml.scalarstring import DoubleQuotedScalarString, LiteralScalarString

    if isinstance(value, Mapping):
        return CommentedMap((_spell(key), _spell(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return [_spell(item) for item in value]
    if isinstance(value, str) and "\n" in value and not (_NO_BLOCK.search(value) or _ESCAPED.search(value)):
        return LiteralScalarString(value)
    if isinstance(value, str) and (_resolve(value) is not value or _ESCAPED.search(value) or not _PLAIN.match(value)):
        return DoubleQuotedScalarString(value)
    return value


def _merge(old: Any, new: Any) -> Any:
    """`new`, in the place of `old`: what is equal stays the node that it is, with its comments."""
    if isinstance(new, (Mapping, list, tuple)) and not new:
        return _spell(new)
    if isinstance(old, dict) and isinstance(new, Mapping):
        for key in [key for key in old if key not in new]:
            del old[key]
        for key, value in new.items():
            old[key] = _merge(old[key], value) if key in old else _spell(value)
        return old
    if isinstance(old, list) and isinstance(new, (list, tuple)):
        return _merge_list(old, list(new))
    if isinstance(old, str) and isinstance(new, str):
        return old if old == new else _quoted_like(old, new)
    return old if type(old) is type(new) and old == new else _spell(new)


def _merge_list(old: list[Any], new: Sequence[Any]) -> list[Any]:
    """Keep the items that are equal or stand at the same place; insert and delete around them."""
    was, will = [repr(_plain(item)) for item in old], [repr(item) for item in new]
    moved = {key: item for key, item in zip(was, old, strict=True) if isinstance(item, dict)}
    matcher = SequenceMatcher(None, was, will, autojunk=False)
    for action, start, end, new_start, new_end in reversed(matcher.get_opcodes()):
        if action == "equal":
            continue
        common = min(end - start, new_end - new_start)
        for at in reversed(range(start + common, end)):
            del old[at]
        for at in reversed(range(new_start + common, new_end)):
            old.insert(start + common, moved[will[at]] if will[at] in moved else _spell(new[at]))
        for step in range(common):
            old[start + step] = _merge(old[start + step], new[new_start + step])
    return old


def _plain(value: Any) -> Any:
    """A value without what ruamel knows about it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, str) else value


def _quoted_like(old: str, new: str) -> Any:
    from ruamel.yaml.scalarstring import DoubleQuotedScalarString, SingleQuotedScalarString

    spelled = _spell(new)
    is_quoted = isinstance(old, (DoubleQuotedScalarString, SingleQuotedScalarString))
    return type(old)(new) if is_quoted and type(spelled) is str else spelled


@dataclass(slots=True)
class _Block:
    """One field of a file: the comment right above it, its lines, and empty lines and comments behind them."""

    lead: str = ""
    body: str = ""
    tail: str = ""


def _splice(old: dict[str, _Block], after: str, changed: Collection[str], before: str) -> str:
    """`after`, with every field that did not change as it stood `before`, and all comments between fields."""
    new = _blocks(after)
    if new is None:
        return after
    last = ""
    for key, block in old.items():  # a field that goes leaves the comments behind it
        if key in new:
            last = key
        else:
            old[last].tail += block.tail
    pieces = [old[""].tail]
    for key, block in list(new.items())[1:]:
        kept = old.get(key)
        if kept is None:
            pieces.append(block.body)
        else:
            body = block.body if key in changed else kept.body
            pieces += [kept.lead, body, kept.tail]
    whole = [piece if piece.endswith("\n") or not piece else piece + "\n" for piece in pieces]
    text = "".join(whole)
    return text if before.endswith("\n") or after[-1:] != "\n" else text.rstrip("\n")


def _blocks(text: str) -> dict[str, _Block] | None:
    """Cut a file into its fields; "" has what stands before the first. None if it is not one field under another."""
    blocks, current = {"": _Block()}, ""
    loose: list[str] = []  # empty lines and comments: whose they are is known at the next line
    for line in re.findall(r"[^\n]*\n|[^\n]+", text):
        match = re.match(r"([\w.-]+)[ \t]*:(?=\s|$)", line)
        if _COMMENT.match(line):
            loose.append(line)
        elif match:
            at = len(loose)
            while at and loose[at - 1].startswith("#"):
                at -= 1
            blocks[current].tail = "".join(loose[:at])
            current = match[1]
            if current in blocks:
                return None
            blocks[current] = _Block("".join(loose[at:]), line)
            loose = []
        elif current and (line[0] in " \t-" or not line.strip()):
            blocks[current].body += "".join(loose) + line
            loose = []
        else:
            return None
    blocks[current].tail = "".join(loose)
    return blocks if len(blocks) > 1 else None
