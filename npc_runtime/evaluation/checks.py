"""What can be told of a reply from its words alone: leaks, third person, loops, copies, its length.

All are word lists and counts: a finding is worth a look and no proof, none found is no proof either. Each finding
quotes what was found.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from npc_runtime.persona import Persona

__all__ = ["BREAKS_CHARACTER", "CHECKS", "Check", "Finding", "Inspector", "words_of"]

Check = Literal["empty", "leak", "third person", "loop", "copy", "cut off"]

CHECKS: tuple[Check, ...] = get_args(Check)
BREAKS_CHARACTER: tuple[Check, ...] = ("empty", "leak", "third person", "loop")
"""What `stays_in_character` of a test looks at: a copy or a cut line may well be in character."""

LEAK_WORDS, COPY_WORDS = 6, 8
"""So many words in a row of the system prompt, or of a training line, are no accident."""

MAX_AGAIN = 4
"""So many words in a row may be said again, once: "the lord of the wood, the lord of the river" is speech."""

_MARKER = re.compile(r"<\|\w*|\|>|\[/?INST\]|</?s>|</?(?:start|end)_of_turn>|</?think>|<<SYS>>")
_ROLE = re.compile(r"^\s*(?:system|user|assistant|player|reply|npc)\s*:", re.IGNORECASE | re.MULTILINE)
_MACHINE = re.compile(
    r"\bA\.?I\b|(?i:\b(?:language model|system prompt|as an assistant|chat ?bot|artificial intelligence|smollm\d*"
    r"|chat ?gpt|openai|hugging ?face|role-?play(?:ing)?|in character)\b)"
)
_STAGE = re.compile(r"\*[^*\n]+\*|^\s*\([^)\n]*\)|^\s*\[[^\]\n]*\]", re.MULTILINE)
# Behind a name: a verb of the third person. Words in -s that are none would be found in speech to oneself.
_VERB = r"(?:is|was|has|had|does|did|will|would|can|could|says?|said|went|took|came|stood|sat|gave|\w{2,}ed"
_VERB += r"|(?!(?:this|his|always|perhaps|yes|thus|its|as|us)\b)\w+s)\b"


@dataclass(frozen=True, slots=True)
class Finding:
    """Something wrong with a reply, and the words that show it."""

    check: Check
    quote: str


class Inspector:
    """Knows what a persona must not give away: its prompt, its name in the third person, its training lines."""

    def __init__(self, persona: Persona, training_lines: Iterable[str] = ()) -> None:
        system = persona.messages([], "Hello.")[0]["content"]
        self._prompt = _runs(words_of(system), LEAK_WORDS)
        self._copied = {run for line in training_lines for run in _runs(words_of(line), COPY_WORDS)}
        names = {persona.display_name, *persona.display_name.split()}
        spelled = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True) if len(name) > 2)
        label = rf"^\s*(?:{spelled})\s*:"
        self._third_person = re.compile(rf"\b(?:{spelled})\s+(?:\w+ly\s+)?{_VERB}|{label}") if spelled else None

    def inspect(self, reply: str, *, is_cut: bool = False) -> list[Finding]:
        """Everything found; `is_cut`: the reply did not end by itself."""
        words = words_of(reply)
        found: list[tuple[Check, str | None]] = [
            ("empty", None if words else reply),
            ("leak", _first(_MARKER, reply) or _first(_ROLE, reply) or _first(_MACHINE, reply)),
            ("leak", _shared(words, self._prompt, LEAK_WORDS)),
            ("third person", _first(_STAGE, reply) or _first(self._third_person, reply)),
            ("loop", _loop(words)),
            ("copy", _shared(words, self._copied, COPY_WORDS)),
            ("cut off", _last_words(reply) if is_cut else None),
        ]
        return [Finding(check, quote) for check, quote in found if quote is not None]


def words_of(text: str) -> list[str]:
    """Lower-case words; "don't" is one."""
    return re.findall(r"\w+(?:['’]\w+)*", text.lower())


def _runs(words: list[str], size: int) -> set[tuple[str, ...]]:
    return {tuple(words[start : start + size]) for start in range(len(words) - size + 1)}


def _shared(words: list[str], runs: set[tuple[str, ...]], size: int) -> str | None:
    """The longest stretch of words all of whose runs of `size` are in `runs`."""
    best: list[str] = []
    start = 0
    for stop in range(size, len(words) + 1):
        if tuple(words[stop - size : stop]) not in runs:
            start = stop - size + 1
        elif stop - start > len(best):
            best = words[start:stop]
    return " ".join(best) or None


def _loop(words: list[str]) -> str | None:
    """What is said again, if that is two stretches of three words or more, or one of more than `MAX_AGAIN`."""
    seen: set[tuple[str, ...]] = set()
    again: list[list[str]] = []
    end = 0  # of the last stretch
    for start in range(len(words) - 2):
        run = tuple(words[start : start + 3])
        if run in seen and start + 2 == end:
            again[-1].append(run[-1])
            end += 1
        elif run in seen:
            again.append(list(run))
            end = start + 3
        seen.add(run)
    is_loop = len(again) > 1 or any(len(stretch) > MAX_AGAIN for stretch in again)
    return " / ".join(" ".join(stretch) for stretch in again) if is_loop else None


def _first(pattern: re.Pattern[str] | None, text: str) -> str | None:
    match = pattern.search(text) if pattern is not None else None
    return match[0].strip() if match else None


def _last_words(text: str) -> str:
    return "… " + " ".join(text.split()[-4:])
