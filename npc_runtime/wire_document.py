"""A persona's document as it travels between a client and the daemon, and what a client may send.

A number that JavaScript or msgpack cannot hold travels as text, and comes back as the number that it was.
"""

import math
from typing import Any

from npc_runtime.document import HALF, MAX_BYTES, MAX_DEPTH, MAX_VALUES, Path
from npc_runtime.problems import Problem

__all__ = ["find_unusable", "from_wire", "to_wire"]

MAX_INT = 2**53
"""Beyond it a double has not every integer, and JavaScript reads JSON's numbers as doubles."""


def to_wire(value: Any) -> Any:
    """What a file says, in values that every client reads as they are."""
    if isinstance(value, dict):
        return {key: to_wire(item) for key, item in value.items()}
    if isinstance(value, list):
        return [to_wire(item) for item in value]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return str(value) if is_number and not _is_common(value) else value


def from_wire(value: Any, old: Any) -> Any:
    """What a client sent, with the numbers of the file's `old` values where `to_wire` made texts of them."""
    if isinstance(value, dict):
        before = old if isinstance(old, dict) else {}
        return {key: from_wire(item, before.get(key)) for key, item in value.items()}
    if isinstance(value, list):
        earlier = old if isinstance(old, list) else []
        return [from_wire(item, earlier[at] if at < len(earlier) else None) for at, item in enumerate(value)]
    return old if isinstance(value, str) and not isinstance(old, str) and value == to_wire(old) else value


def find_unusable(document: Any) -> Problem | None:
    """The first thing in a client's document that a file cannot hold; None if there is nothing."""
    waiting: list[tuple[Path, Any]] = [((), document)]
    num_values = num_bytes = 0
    while waiting:
        path, value = waiting.pop()
        num_values += 1
        texts = [value, *(value if isinstance(value, dict) else ())]
        what = _objection(path, value) or next(filter(None, map(_bad_text, texts[1:])), None)
        if what is None:
            num_bytes += sum(len(text.encode()) for text in texts if isinstance(text, str))
            what = _excess(num_values, num_bytes)
        if what is not None:
            return Problem(path, f"{_name(path)}: {what[0]}", what[1])
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        waiting += reversed([((*path, key), item) for key, item in items])
    return None


def _objection(path: Path, value: Any) -> tuple[str, str] | None:
    """What is wrong with one value by itself, and what to do about it."""
    if isinstance(value, (dict, list)):
        if len(path) >= MAX_DEPTH:
            return "lists and maps are nested too deeply", f"The limit is {MAX_DEPTH}."
        return None
    if value is None or isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        return None if _is_common(value) else ("this number is too large", "Write it as text.")
    if not isinstance(value, str):
        return f"{type(value).__name__} is nothing that a file has", "Send text, numbers, true, false, lists and maps."
    return _bad_text(value)


def _bad_text(text: Any) -> tuple[str, str] | None:
    if not isinstance(text, str):
        return "the name of a field is not text", "Send it as text."
    return ("half of a character", "Write the character itself.") if HALF.search(text) else None


def _excess(num_values: int, num_bytes: int) -> tuple[str, str] | None:
    if num_values > MAX_VALUES:
        return "the document has too many values", f"The limit is {MAX_VALUES}."
    if num_bytes > MAX_BYTES:
        return f"the document is larger than {MAX_BYTES // 1024} KiB", "Shorten it."
    return None


def _is_common(number: float) -> bool:
    return abs(number) <= MAX_INT if isinstance(number, int) else math.isfinite(number)


def _name(path: Path) -> str:
    return ".".join(str(part)[:64] for part in path) or "the document"
