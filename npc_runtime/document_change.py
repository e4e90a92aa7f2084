"""Changes to a YAML file that leave the rest as it was: every byte of the fields that did not change, and comments.

ruamel writes what changed; what stands between is put back from the file. This module knows nothing of personas.
"""

import io
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from npc_runtime.document import DocumentError, decode_text, read_document, resolve_scalar

__all__ = ["change_document", "write_document"]

MAX_COMPARED = 1_000
"""Items of a list; comparing takes up to the square of that."""

_ESCAPED = re.compile(r"[^\n\x20-\x7e\xa0-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]|[\u2028\u2029]|\n\Z")
_PLAIN = re.compile(r"\w[^?]*\Z")  # ruamel reads fewer texts without quotes than it writes
_NO_BLOCK = re.compile(r"[ \t]\n|\A\s|[^\S\n]\Z")  # what a block text does not give back
_COMMENT = re.compile(r"#|$")  # at the start of a line


def change_document(data: bytes, wanted: Mapping[str, Any], changed: Collection[str]) -> bytes:
    """Write the `changed` fields of a file as `wanted` has them; one that `wanted` lacks goes.

    Fields that did not change keep every byte, and those that did keep the comments and quotes of what stayed.
    A new field goes behind the ones that stand before it in `wanted`. Raises `DocumentError` if `data` is no YAML.
    """
    before = read_document(data).value
    expected = {key: value for key, value in before.items() if key not in changed}
    expected |= {key: wanted[key] for key in changed if key in wanted}
    text = decode_text(data)
    ways = ((_load, _merge), (_load, _anew), (lambda *_: _spell(before), _anew))  # each loses more comments
    for load, apply in ways:
        blocks = _blocks(text)
        try:
            dumped = _change(load(text, blocks), text, wanted, changed, apply)
        except Exception:  # ruamel stumbles over texts that we read: << that is no merging, dates that are none
            continue
        result = _encode(_splice(blocks, dumped, changed, text) if blocks else dumped, data)
        if _says(result, expected):
            return result
    return write_document(expected)


def _load(text: str, blocks: "dict[str, _Block] | None") -> Any:
    """The file as ruamel has it; the fields alone where `_splice` puts back what is between them."""
    # ruamel would take what stands between two fields for part of the first.
    return _round_trip(text).load("".join(block.body for block in blocks.values()) if blocks else text)


def _change(
    tree: Any,
    text: str,
    wanted: Mapping[str, Any],
    changed: Collection[str],
    apply: Callable[[Any, Any], Any],
) -> str:
    """Let ruamel write the file with its changes."""
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


def _round_trip(text: str) -> Any:
    """ruamel's reader and writer that keeps comments and quotes, set to the indentation of a file."""
    from ruamel.yaml import YAML

    yaml = YAML(typ="rt", pure=True)
    yaml.preserve_quotes = True
    yaml.allow_unicode = True
    yaml.width = 4096  # a line break is where the author put one
    is_flush = re.search(r"^\w+:[^\n]*\n(?:[ \t]*(?:#[^\n]*)?\n)*- ", text, re.MULTILINE) is not None
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
    if isinstance(value, str) and (
        resolve_scalar(value) is not value or _ESCAPED.search(value) or not _PLAIN.match(value)
    ):
        return DoubleQuotedScalarString(value)
    return value


def _anew(old: Any, new: Any) -> Any:
    return _spell(new)


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
    for start, end, new_start, new_end in reversed(_differences(was, will)):
        common = min(end - start, new_end - new_start)
        for at in reversed(range(start + common, end)):
            del old[at]
        for at in reversed(range(new_start + common, new_end)):
            old.insert(start + common, moved[will[at]] if will[at] in moved else _spell(new[at]))
        for step in range(common):
            old[start + step] = _merge(old[start + step], new[new_start + step])
    return old


def _differences(was: list[str], will: list[str]) -> list[tuple[int, int, int, int]]:
    """The stretches that differ: start and end, before and after; one if looking for more would take long."""
    shorter = min(len(was), len(will))
    head = next((at for at in range(shorter) if was[at] != will[at]), shorter)
    tail = next((at for at in range(shorter - head) if was[-1 - at] != will[-1 - at]), shorter - head)
    before, after = was[head : len(was) - tail], will[head : len(will) - tail]
    counts = Counter(after)
    if max(len(before), len(after)) > MAX_COMPARED or sum(counts[item] for item in before) > 2 * MAX_COMPARED:
        return [(head, len(was) - tail, head, len(will) - tail)]
    codes = SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
    return [(head + a, head + b, head + c, head + d) for action, a, b, c, d in codes if action != "equal"]


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


def _encode(text: str, like: bytes) -> bytes:
    """With the byte order mark and the line ends of the file that it replaces."""
    is_windows = b"\r\n" in like
    data = (text.replace("\n", "\r\n") if is_windows else text).encode()
    return b"\xef\xbb\xbf" + data if like.startswith(b"\xef\xbb\xbf") else data
