"""A card's lorebook and what a persona knows: entries that are found by keys, and texts with a condition.

The fields of an entry are those of Character Card V2 (spec_v2.md, "CharacterBook") and V3 (SPEC_V3.md, "Lorebook
Fields", "Decorators"). A constant entry is always known; keys become a condition over what the player just said, which
is less than a card's `scan_depth` messages. An entry that a condition cannot say stays in the card, with a note.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from npc_runtime.card_text import Note, as_items, as_text, clean_line, clean_text, cut_text, make_id
from npc_runtime.condition import MAX_CHARS, ConditionError, parse_condition
from npc_runtime.schema import Knowledge

__all__ = ["EXTENSION", "Lore", "can_be_keys", "read_book", "strip_decorators", "write_book"]

EXTENSION = "npc-runtime"
"""Where in `extensions`, of a card or of an entry, this program keeps what cards have no field for."""
MAX_ENTRIES = 1_000
MAX_KEYS = 40  # more never fit into a condition
MAX_TEXT = 4_000
MAX_NOTES = 16_000
MAX_PRIORITY = 1_000_000

_DECORATOR = re.compile(r"^@@(@?)([A-Za-z_]+)[ \t]*(.*)$\n?", re.MULTILINE)
_FOLLOWED = frozenset({"activate", "dont_activate", "additional_keys", "exclude_keys"})
_PATTERN_KEY = re.compile(r"/.+/[a-z]*", re.DOTALL)  # a regular expression, where SillyTavern's users write one
_SAID = r'"(?:[^"\\]|\\.)*" in said'
_ANY_SAID = re.compile(rf"{_SAID}(?: or {_SAID})*")
_ALL_SAID = re.compile(rf"\(({_SAID}(?: or {_SAID})*)\) and \(({_SAID}(?: or {_SAID})*)\)")
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)" in said')


_KNOWN: Mapping[str, Any] = {"text": "", "when": "", "notes": "", "priority": 0}


class Lore(NamedTuple):
    """An entry that became knowledge: its position in the book, and the fields of a `Knowledge`."""

    place: int
    knowledge: dict[str, Any]


class _Unusable(ValueError):
    """An entry that cannot become knowledge; the text says why."""


def read_book(book: Any, notes: list[Note]) -> list[Lore]:
    """What a persona knows by a book, in the order in which the book has it said; adds to `notes`."""
    entries = _entries(book)
    if not entries:
        return []
    found: list[tuple[float, Lore]] = []
    taken: set[str] = set()
    if len(entries) > MAX_ENTRIES:
        notes.append(Note("character_book", "", f"{len(entries) - MAX_ENTRIES} entries are beyond {MAX_ENTRIES:,}"))
    for index, entry in enumerate(entries[:MAX_ENTRIES]):
        if not isinstance(entry, dict):
            continue
        label = clean_line(entry.get("name")) or clean_line(entry.get("comment")) or ", ".join(_keys(entry))
        label = f"character_book, entry {index + 1}" + (f" ({label[:60]})" if label else "")
        remarks: list[str] = []
        try:
            knowledge = _read_entry(entry, taken, remarks)
            found.append((_number(entry.get("insertion_order")), Lore(index, knowledge)))
            notes += [Note(label, f"knows {knowledge['id']}", "; ".join(remarks))] if remarks else []
        except _Unusable as error:
            notes.append(Note(label, "", str(error)))
    lore = [each for _, each in sorted(found, key=lambda pair: pair[0])]
    remark = f"{len(lore)} of {len(entries)} entries; keys are looked for in what the player says now"
    notes.append(Note("character_book", "knows" if lore else "", remark))
    return lore


def write_book(book: Any, was: Sequence[Lore], now: Sequence[Knowledge]) -> dict[str, Any]:
    """The book with what a persona knows now, where `was` is what it said; entries without a place stay."""
    old = {lore.knowledge["id"]: lore for lore in was}
    entries: dict[int, Any] = dict(enumerate(_entries(book)))
    kept = [knowledge.id for knowledge in now if knowledge.id in old]
    is_reordered = kept != [lore.knowledge["id"] for lore in was if lore.knowledge["id"] in set(kept)]
    for lore in was:
        if lore.knowledge["id"] not in kept:
            del entries[lore.place]
    free = len(entries) + len(was)
    for position, knowledge in enumerate(now):
        before = old.get(knowledge.id)
        index = before.place if before else free + position
        entries[index] = _write_entry(entries.get(index), before, knowledge)
        if is_reordered or before is None:
            entries[index]["insertion_order"] = position
    rest = book if isinstance(book, dict) else {"extensions": {}}
    return {**rest, "entries": [entries[index] for index in sorted(entries)]}


def can_be_keys(when: str) -> bool:
    """Whether an entry can say a condition, so that other tools follow it."""
    return not when.strip() or bool(_keys_of(when)[0])


def strip_decorators(content: str) -> str:
    """A text without the lines that V3 gives a meaning and V2 would show."""
    return _DECORATOR.sub("", content).strip("\n")


def _entries(book: Any) -> list[Any]:
    entries = book.get("entries") if isinstance(book, dict) else None
    if isinstance(entries, dict):  # as SillyTavern's own world files have it
        entries = list(entries.values())
    return entries if isinstance(entries, list) else []


def _read_entry(entry: Mapping[str, Any], taken: set[str], remarks: list[str]) -> dict[str, Any]:
    content = as_text(entry.get("content")).replace("\r\n", "\n")
    found = reversed(_DECORATOR.findall(content))  # of two with the same name the first counts
    decorators = {name.lower(): value.strip() for is_fallback, name, value in found if not is_fallback}
    text = clean_text(strip_decorators(content))
    if not text:
        raise _Unusable("has no text")
    if entry.get("enabled") in (False, "false"):
        raise _Unusable("is switched off")
    if "dont_activate" in decorators and "activate" not in decorators:
        raise _Unusable("is switched off (@@dont_activate)")
    is_constant = entry.get("constant") is True or "activate" in decorators
    when = "" if is_constant else _condition(entry, decorators, remarks)
    if len(text) > MAX_TEXT:
        remarks.append(f"{len(text):,} characters; the first {MAX_TEXT:,} are used")
    if others := sorted(f"@@{name}" for name in decorators if name not in _FOLLOWED):
        remarks.append(f"{', '.join(others)[:200]}: not followed")
    knowledge: dict[str, Any] = {"id": _own_id(_made_id(entry), taken), "text": cut_text(text, MAX_TEXT)}
    priority = entry.get("priority")
    is_priority = type(priority) is int and 0 < abs(priority) <= MAX_PRIORITY
    optional = {
        "when": when,
        "priority": priority if is_priority else None,
        "notes": cut_text(clean_text(entry.get("comment")), MAX_NOTES),
    }
    return knowledge | {name: value for name, value in optional.items() if value}


def _condition(entry: Mapping[str, Any], decorators: Mapping[str, str], remarks: list[str]) -> str:
    """The keys of an entry as a condition. Raises `_Unusable`."""
    keys, secondary = _keys(entry), _lines(entry.get("secondary_keys"))
    if not keys:
        return _own_condition(entry)
    if entry.get("use_regex") is True:
        raise _Unusable("its keys are regular expressions")
    plain = [key for key in keys if not _PATTERN_KEY.fullmatch(key)]
    if len(plain) < len(keys):
        remarks.append(f"{len(keys) - len(plain)} of {len(keys)} keys are regular expressions, which are not read")
    logic = extensions.get("selectiveLogic") if isinstance(extensions := entry.get("extensions"), dict) else None
    more = _second(secondary, logic) if entry.get("selective") is True and secondary else []
    more += [f"({_any_of(extra)})"] if (extra := _lines(decorators.get("additional_keys"))) else []
    more += [f"not ({_any_of(barred)})"] if (barred := _lines(decorators.get("exclude_keys"))) else []
    for num_used in range(min(len(plain), MAX_KEYS), 0, -1):
        first = _any_of(plain[:num_used])
        condition = " and ".join([f"({first})", *more]) if more else first
        if len(condition) <= MAX_CHARS:
            break
    else:
        raise _Unusable("its keys are regular expressions" if not plain else "its keys are too long for a condition")
    if num_used < len(plain):
        remarks.append(f"the first {num_used} of {len(plain)} keys are used; a condition has {MAX_CHARS} characters")
    if entry.get("case_sensitive") is True:
        remarks.append("large and small letters are not told apart")
    return condition


def _own_condition(entry: Mapping[str, Any]) -> str:
    """The condition that this program left in an entry without keys. Raises `_Unusable`."""
    extensions = entry.get("extensions")
    ours = extensions.get(EXTENSION) if isinstance(extensions, dict) else None
    when = ours.get("when") if isinstance(ours, dict) else None
    if not isinstance(when, str) or not when.strip():
        raise _Unusable("has no keys, so nothing ever calls it up")
    try:
        return parse_condition(when).text
    except ConditionError as error:
        raise _Unusable(f"its condition cannot be read: {error.what}") from error


def _second(keys: list[str], logic: Any) -> list[str]:
    """The condition of secondary keys; SillyTavern has four ways to mean them."""
    match logic:
        case 1:
            return [f"not ({_all_of(keys)})"]
        case 2:
            return [f"not ({_any_of(keys)})"]
        case 3:
            return [f"({_all_of(keys)})"]
    return [f"({_any_of(keys)})"]


def _any_of(keys: list[str]) -> str:
    return " or ".join(f"{_quote(key)} in said" for key in keys)


def _all_of(keys: list[str]) -> str:
    return " and ".join(f"{_quote(key)} in said" for key in keys)


def _quote(key: str) -> str:
    escaped = key.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _keys(entry: Mapping[str, Any]) -> list[str]:
    return _lines(entry.get("keys"))


def _lines(value: Any) -> list[str]:
    return [line for item in as_items(value) if (line := clean_line(item))]


def _number(value: Any) -> float:
    return max(-1e9, min(1e9, value)) if isinstance(value, (int, float)) else 0.0


def _made_id(entry: Mapping[str, Any]) -> str:
    """An id made from an entry's name, comment or first key."""
    label = as_text(entry.get("name")) or as_text(entry.get("comment")) or "".join(_keys(entry)[:1])
    return make_id(label, "lore")


def _own_id(wanted: str, taken: set[str]) -> str:
    """An id that no other entry has."""
    own, number = wanted, 1
    while own in taken:
        number += 1
        own = f"{wanted[:56]}-{number}"
    taken.add(own)
    return own


def _write_entry(old: Any, before: Lore | None, now: Knowledge) -> dict[str, Any]:
    """An entry with what changed since `before`; all of it where there was none."""
    fresh = {"name": now.id, "extensions": {}, "enabled": True, "use_regex": False}
    entry = dict(old) if isinstance(old, dict) else fresh
    was = before.knowledge if before else {}
    if before and all(getattr(now, name) == was.get(name, default) for name, default in _KNOWN.items()):
        return entry
    if now.text != was.get("text"):
        entry["content"] = now.text
    if now.notes != was.get("notes", ""):
        entry["comment"] = now.notes
    if now.priority != was.get("priority", 0):
        entry["priority"] = now.priority
    if before is None or now.when != was.get("when", ""):
        _write_condition(entry, now.when)
    if _made_id(entry) != now.id:
        entry["name"] = now.id
    return entry


def _write_condition(entry: dict[str, Any], when: str) -> None:
    """A condition as keys, where keys can say it; else under `extensions`, where only this program finds it."""
    keys, secondary = _keys_of(when)
    entry |= {"keys": keys, "constant": not when.strip(), "use_regex": False}
    extensions = entry["extensions"] = dict(old) if isinstance(old := entry.get("extensions"), dict) else {}
    extensions.pop(EXTENSION, None)
    extensions.pop("selectiveLogic", None)
    entry["selective"] = bool(secondary)
    if secondary or "secondary_keys" in entry:
        entry["secondary_keys"] = secondary
    if when.strip() and not keys:
        extensions[EXTENSION] = {"when": when}


def _keys_of(when: str) -> tuple[list[str], list[str]]:
    """The keys and secondary keys that a condition is made of; none where it is something else."""
    if _ANY_SAID.fullmatch(when):
        return _unquote(when), []
    if match := _ALL_SAID.fullmatch(when):
        return _unquote(match[1]), _unquote(match[2])
    return [], []


def _unquote(condition: str) -> list[str]:
    return [re.sub(r"\\(.)", r"\1", match[1]) for match in _QUOTED.finditer(condition)]
