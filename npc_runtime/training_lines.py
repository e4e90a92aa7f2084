"""The lines a persona is trained on: read, judged, and parted into those it learns and those that are held out.

`lines.jsonl`, and `heldout.jsonl` if there is one, have one exchange a line: `player`, `npc`, and if it is not the
first of a conversation `history`, a list of earlier exchanges. Other keys are the author's own. Everything that is
wrong is said at once, with file and line number. This module knows nothing of models; what a reply takes of the
model's tokens is asked of the caller.
"""

import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from npc_runtime.errors import PersonaInvalid
from npc_runtime.persona import Persona
from npc_runtime.prompt import Message

__all__ = ["HELDOUT", "LINES", "TrainingLine", "TrainingSet", "read_lines", "read_training_set"]

LINES, HELDOUT = "lines.jsonl", "heldout.jsonl"

MIN_LINES = 20
"""Fewer teach nothing but themselves; a hundred are better (`personas/README.md`)."""

HELDOUT_SHARE = 8
"""Every eighth line is held out where the author keeps none back."""

MAX_BYTES = 16 << 20
MAX_SHOWN = 30  # problems in one message

RUN = 5  # letters
SHORT = 20
"""A reply of fewer letters ("Halt!") may be said again, to another question."""
TOO_ALIKE = 0.8
"""Replies are near duplicates if four fifths of the runs of five letters that occur in either occur in both.

In a reply of twenty words that is one other word. Cases, spaces and signs do not count. A pair so much alike must share
one of its rarest runs, so only lines that do are compared: four thousand lines take a second.
"""


@dataclass(frozen=True, slots=True)
class TrainingLine:
    """One exchange, and where it stands."""

    file: str
    number: int
    player: str
    npc: str
    history: tuple[tuple[str, str], ...] = ()  # (player, npc), the oldest first

    @property
    def earlier(self) -> list[Message]:
        """The history as chat messages."""
        return [
            {"role": role, "content": text}
            for exchange in self.history
            for role, text in zip(("user", "assistant"), exchange, strict=True)
        ]

    @property
    def letters(self) -> str:
        """What duplicates are found by: the reply, or of a short one the whole exchange."""
        reply = _letters(self.npc)
        return reply if len(reply) >= SHORT else f"{_letters(self.player)} {reply}"


class TrainingSet(NamedTuple):
    """What is learned, and what is held out to tell when to stop."""

    train: list[TrainingLine]
    heldout: list[TrainingLine]
    was_split: bool  # there is no heldout.jsonl


def read_training_set(persona: Persona, count_tokens: Callable[[str], int]) -> TrainingSet:
    """Read and judge a persona's lines. Raises `PersonaInvalid` with everything that is wrong with them."""
    problems: list[str] = []
    train = read_lines(persona.folder / LINES, problems)
    has_heldout = (persona.folder / HELDOUT).is_file()
    heldout = read_lines(persona.folder / HELDOUT, problems) if has_heldout else []
    if len(train) < MIN_LINES and not problems:
        problems.append(f"{LINES} has {len(train)} lines; at least {MIN_LINES} are needed, 100 to 200 are better")
    if has_heldout and not heldout and not problems:
        problems.append(f"{HELDOUT} has no lines; write 12 to 16, or remove it to have some of {LINES} held out")
    lines = [*train, *heldout]
    problems += _too_long(lines, persona.limits.hard_tokens, count_tokens)
    problems += _duplicates(lines)
    if problems:
        raise _refuse(persona.folder, problems)
    if not has_heldout:
        train, heldout = _split(train)
    return TrainingSet(train, heldout, not has_heldout)


def _refuse(folder: Path, problems: list[str]) -> PersonaInvalid:
    shown = [f"\n  {problem}" for problem in problems[:MAX_SHOWN]]
    if len(problems) > MAX_SHOWN:
        shown.append(f"\n  … and {len(problems) - MAX_SHOWN} more")
    return PersonaInvalid(
        f"The lines in {folder} cannot be trained on:{''.join(shown)}\n", "Correct them, all at once."
    )


def read_lines(path: Path, problems: list[str]) -> list[TrainingLine]:
    """One file; whatever is wrong with it is added to the problems."""
    try:
        data = path.read_bytes()
        if len(data) > MAX_BYTES:
            raise ValueError(f"has more than {MAX_BYTES >> 20} MiB")
        rows = data.decode("utf-8-sig").split("\n")  # not splitlines: a text may hold U+2028
    except FileNotFoundError:
        problems.append(f'{path.name} is missing; it needs one {{"player": "…", "npc": "…"}} a line')
        return []
    except (OSError, ValueError) as error:
        problems.append(f"{path.name} cannot be read ({error}); save it as UTF-8")
        return []
    lines = []
    for number, row in enumerate(rows, 1):
        if not row.strip():
            continue
        try:
            lines.append(_parse(path.name, number, row))
        except (ValueError, RecursionError) as error:
            problems.append(f"{path.name}, line {number}: {error}")
    return lines


def _parse(file: str, number: int, row: str) -> TrainingLine:
    """Read one line. Raises `ValueError` with what is wrong and what to do."""
    try:
        document = json.loads(row)
    except json.JSONDecodeError as error:
        raise ValueError(
            f'is no JSON ({error.msg} at column {error.colno}); write {{"player": "…", "npc": "…"}}'
        ) from error
    player, npc = _exchange(document, "the line")
    earlier = document.get("history") or []
    if not isinstance(earlier, list):
        raise ValueError("'history' is no list; it holds exchanges like the line itself, the oldest first")
    history = tuple(_exchange(entry, f"entry {place} of 'history'") for place, entry in enumerate(earlier, 1))
    return TrainingLine(file, number, player, npc, history)


def _exchange(document: Any, what: str) -> tuple[str, str]:
    if not isinstance(document, dict):
        raise ValueError(f"{what} is no map of player and npc")
    texts = []
    for key in ("player", "npc"):
        text = document.get(key)
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{what} has no text in '{key}'; write one, or remove the line")
        texts.append(text.strip())
    return texts[0], texts[1]


def _too_long(lines: list[TrainingLine], max_tokens: int, count_tokens: Callable[[str], int]) -> Iterator[str]:
    for line in lines:
        num_tokens = count_tokens(line.npc)
        if num_tokens > max_tokens:
            yield (
                f"{line.file}, line {line.number}: the reply has {num_tokens} tokens, and this persona is cut off at "
                f"{max_tokens}; shorten it, or raise limits.hard_tokens"
            )


def _duplicates(lines: list[TrainingLine]) -> Iterator[str]:
    """Say of every line that repeats an earlier one which that is; of lines held out, those that are also learned."""
    runs = [_runs(line.letters) for line in lines]
    counts = Counter(run for found in runs for run in found)
    by_run: defaultdict[str, list[int]] = defaultdict(list)
    for number, (line, found) in enumerate(zip(lines, runs, strict=True)):
        rarest = sorted(found, key=lambda run: (counts[run], run))
        rarest = rarest[: len(found) - math.ceil(TOO_ALIKE * len(found)) + 1]
        candidates = sorted({other for run in rarest for other in by_run[run]})
        twin = next((lines[other] for other in candidates if _likeness(runs[other], found) >= TOO_ALIKE), None)
        for run in rarest:
            by_run[run].append(number)
        if twin is None:
            continue
        is_exact = twin.letters == line.letters
        advice = "remove it" if is_exact else "say it otherwise, or remove it"
        if line.file != twin.file:
            advice += ": a loss on lines that were learned tells nothing"
        says = "repeats" if is_exact else "is nearly the same as"
        yield f"{line.file}, line {line.number}: the reply {says} {twin.file}, line {twin.number}; {advice}"


def _likeness(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / len(one | other)


def _letters(text: str) -> str:
    return "".join(character for character in text.casefold() if character.isalnum())


def _runs(letters: str) -> frozenset[str]:
    return frozenset(letters[start : start + RUN] for start in range(max(len(letters) - RUN + 1, 1)))


def _split(lines: list[TrainingLine]) -> tuple[list[TrainingLine], list[TrainingLine]]:
    """Hold an eighth out, chosen by what the lines say: new lines or another order change little of it."""
    ranked = sorted(lines, key=lambda line: hashlib.sha256(f"{line.player}\n{line.npc}".encode()).digest())
    chosen = set(ranked[: max(len(lines) // HELDOUT_SHARE, 2)])
    return [line for line in lines if line not in chosen], [line for line in lines if line in chosen]
