"""What authors write in cards: texts with macros, example dialogue, names; read leniently, said in the persona's terms.

The macros `{{char}}` and `{{user}}` stay as they are, because a persona's prompt knows them; their older spellings
`<BOT>` and `<USER>` (Character Card V1, spec_v1.md, "Fields") become them. Comments (`{{// …}}` and its like: V3,
"Curly Braced Syntaxes") go, since nobody is to read them in a prompt. This module knows nothing of files or personas.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

__all__ = [
    "Dialogue",
    "Note",
    "as_items",
    "as_text",
    "clean_line",
    "clean_text",
    "cut_text",
    "find_macros",
    "is_plain",
    "make_id",
    "read_dialogue",
    "write_dialogue",
]

_LINE_END = re.compile(r"\r\n?|[\x85\u2028\u2029]")
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\ufffe\uffff]")
_HALVES = re.compile(r"[\ud800-\udfff]")  # half of a character: where a tool cut an emoji in two
_COMMENT = re.compile(r"\{\{(?://|hidden_key:|comment:)[^{}]*\}\}", re.IGNORECASE)
_OLD_MACRO = re.compile(r"<(bot|char|user)>", re.IGNORECASE)
_MACRO = re.compile(r"\{\{([^{}]{1,100})\}\}")
_KNOWN_MACROS = frozenset({"char", "user"})
_START = re.compile(r"<START>", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?…。！？]['\"”’)*]*\s|\n")
_ID = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_OF_WINDOWS = re.compile(r"con|prn|aux|nul|com\d|lpt\d")


class Note(NamedTuple):
    """One line of a report: a field, where it went, and what there is to know."""

    field: str
    place: str  # empty: it has no place of its own
    remark: str = ""

    def __str__(self) -> str:
        remark = f": {self.remark}" if self.remark else ""
        return f"{self.field} → {self.place}{remark}" if self.place else f"{self.field}{remark}"


class Dialogue(NamedTuple):
    """Example dialogue: exchanges of the player's words and the character's, and how much is none."""

    exchanges: list[tuple[str, str]]
    num_other: int  # turns and texts that are not half of an exchange


def as_text(value: Any) -> str:
    """A field that should be text; tools write numbers and null there too."""
    if isinstance(value, str):
        return value
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return str(value) if is_number else ""


def as_items(value: Any) -> list[str]:
    """A field that should be a list of texts, empty ones left out; tools write one text with commas there too."""
    if isinstance(value, str):
        value = value.split(",")
    return [text for item in value if (text := as_text(item)).strip()] if isinstance(value, list) else []


def clean_text(value: Any) -> str:
    """A text as a persona file has it: plain line ends, no control characters, today's macros, nothing around."""
    text = _LINE_END.sub("\n", as_text(value))
    text = _HALVES.sub("\ufffd", _UNPRINTABLE.sub("", text))
    text = _OLD_MACRO.sub(lambda match: "{{user}}" if match[1].lower() == "user" else "{{char}}", text)
    text = _COMMENT.sub("", text)
    return "\n".join(line.rstrip() for line in text.split("\n")).strip()


def clean_line(value: Any) -> str:
    """As `clean_text`, in one line."""
    return " ".join(clean_text(value).split())


def cut_text(text: str, max_chars: int) -> str:
    """As many whole sentences as fit, or words where one sentence is too long."""
    if len(text) <= max_chars:
        return text
    head = text[:max_chars]
    ends = [match.end() for match in _SENTENCE_END.finditer(head)]
    at = ends[-1] if ends and ends[-1] > max_chars // 2 else head.rfind(" ")
    return head[: at if at > 0 else max_chars].strip()


def find_macros(text: str) -> set[str]:
    """The macros in a text that a prompt leaves as they stand."""
    found = (match[1].strip() for match in _MACRO.finditer(text))
    return {"{{" + name + "}}" for name in found if name.lower() not in _KNOWN_MACROS}


def is_plain(text: str) -> bool:
    """Whether a text has only what every text file can hold."""
    return not (_UNPRINTABLE.search(text) or _HALVES.search(text) or _LINE_END.search(text))


def make_id(text: str, default: str) -> str:
    """An id made from a name: small letters without accents, digits, - and _."""
    if not _ID.fullmatch(text):
        plain = unicodedata.normalize("NFKD", text[:200]).encode("ascii", "ignore").decode().lower()
        text = re.sub(r"[^a-z0-9_]+", "-", plain).strip("-_")[:48].rstrip("-_") or default
    return f"{text}-npc" if _OF_WINDOWS.fullmatch(text) else text


def read_dialogue(text: str, names: Iterable[str]) -> Dialogue:
    """Read example dialogue: blocks behind `<START>`, lines of `{{user}}: …` and of `{{char}}: …` or a name in `names`.

    What follows a line without a name in front belongs to it. (V1, spec_v1.md, "mes_example".)
    """
    whose = {"{{user}}": "user", "{{char}}": "char", **{name.lower(): "char" for name in names if name}}
    exchanges: list[tuple[str, str]] = []
    num_other = 0
    for block in _START.split(text):
        turns = _read_turns(block, whose)
        at = 0
        while at < len(turns):
            pair = turns[at : at + 2]
            if [speaker for speaker, _ in pair] == ["user", "char"] and all(said for _, said in pair):
                exchanges.append((pair[0][1], pair[1][1]))
                at += 2
            else:
                num_other += 1
                at += 1
    return Dialogue(exchanges, num_other)


def write_dialogue(exchanges: Sequence[tuple[str, str]]) -> str:
    """Write what `read_dialogue` reads."""
    return "\n".join(f"<START>\n{{{{user}}}}: {said}\n{{{{char}}}}: {reply}" for said, reply in exchanges)


def _read_turns(block: str, whose: dict[str, str]) -> list[tuple[str, str]]:
    """Who says what in a block; "" says what stands before the first name. Lines of the same speaker are one turn."""
    turns: list[tuple[str, list[str]]] = []
    for line in block.split("\n"):
        name, colon, rest = line.partition(":")
        speaker = whose.get(name.strip().lower()) if colon else None
        if speaker and not (turns and turns[-1][0] == speaker):
            turns.append((speaker, [rest]))
        elif turns:
            turns[-1][1].append(rest.strip() if speaker else line)
        elif line.strip():
            turns.append(("", [line]))
    return [(speaker, "\n".join(lines).strip()) for speaker, lines in turns]
