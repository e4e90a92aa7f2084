"""What the model reads: a persona's words, what it knows now, this turn's context, earlier turns, the player's words.

The order is chosen for the prefix cache, which keeps what prompts begin with: the persona and its examples first and
always alike; earlier turns next; and what may be different every turn, knowledge that depends on the game's facts and
the context, in front of the player's words in the last message. Where the context is too small the oldest turns go
first and the persona never.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from npc_runtime.persona import Persona

__all__ = ["Context", "Fitted", "Message", "Prompt", "build_prompt", "count_parts", "fit_prompt"]

CLOSING = "Reply in character, in one or two sentences."
DROP_STEP = 4
"""Earlier turns go by so many exchanges: a cut makes the cached prefix useless, so it is made every fourth turn."""
CHARS_PER_TOKEN = 4
"""About as many as in English; where it is less, a guess is corrected."""

MIN_KEPT = 4
"""Messages that are left when more go than must."""

LANGUAGES = {
    "ar": "Arabic",
    "cs": "Czech",
    "da": "Danish",
    "de": "German",
    "el": "Greek",
    "es": "Spanish",
    "fi": "Finnish",
    "fr": "French",
    "hu": "Hungarian",
    "it": "Italian",
    "ja": "Japanese",
    "ko": "Korean",
    "nb": "Norwegian",
    "nl": "Dutch",
    "pl": "Polish",
    "pt": "Portuguese",
    "ro": "Romanian",
    "ru": "Russian",
    "sv": "Swedish",
    "tr": "Turkish",
    "uk": "Ukrainian",
    "zh": "Chinese",
}

Message = dict[str, str]
"""A chat message: `role` (system, user, assistant) and `content`."""


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


@dataclass(frozen=True, slots=True)
class Prompt:
    """The parts of a prompt, in the order in which the model reads them."""

    system: str
    examples: tuple[Message, ...]
    history: tuple[Message, ...]
    knowledge: tuple[str, ...]  # that depends on facts; the most important first
    context: tuple[str, ...]
    reminder: str
    said: str
    omitted: tuple[str, ...] = ()  # knowledge beyond the persona's `limits.knowledge_words`

    @property
    def messages(self) -> list[Message]:
        """The chat messages whose next turn is the NPC's reply."""
        notes = [note for note in (*self.knowledge, *self.context, self.reminder) if note]
        said = f"({' '.join(_as_sentence(note) for note in notes)})\n{self.said}" if notes else self.said
        return [_message("system", self.system), *self.examples, *self.history, _message("user", said)]


class Fitted(NamedTuple):
    """A prompt that was made to fit, and what that cost."""

    prompt: Prompt
    token_ids: tuple[int, ...]
    num_dropped: int  # messages of the history, oldest first
    dropped_knowledge: tuple[str, ...]

    @property
    def left_out(self) -> str | None:
        """What `accepted` says about a prompt that had to be shortened; None where it was not."""
        num_known = len(self.dropped_knowledge) + len(self.prompt.omitted)
        parts = [f"the {self.num_dropped} oldest messages"] if self.num_dropped else []
        parts += [f"{num_known} things it knows now"] if num_known else []
        return f"Left out of the prompt: {' and '.join(parts)}." if parts else None


def build_prompt(
    persona: "Persona",
    history: Sequence[Message],
    text: str,
    *,
    speaker: str | None,
    context: Context | None,
    facts: Mapping[str, Any],
) -> Prompt:
    """Say everything that there is to say; `history` is earlier turns, oldest first, `facts` are the game's.

    A condition may also ask for this turn's `speaker`, `said`, `scene`, `mood`, `nearby` and `facts`, which come
    before facts of the game that have the same names.
    """
    context = context or Context()
    turn = {"speaker": speaker, "said": text, **context.model_dump()}
    fill = _Macros(persona.display_name)
    known = [_one_line(fill(text)) for text in persona.known({**facts, **turn})]
    num_said = _num_within(known, persona.limits.knowledge_words)
    examples = [
        turn
        for example in persona.examples
        for turn in (_message("user", fill(example.player)), _message("assistant", fill(example.npc)))
    ]
    return Prompt(
        system=_system_text(persona, fill),
        examples=tuple(examples),
        history=tuple(history),
        knowledge=tuple(known[:num_said]),
        context=tuple(context.sentences()),
        reminder=_one_line(fill(persona.post_history_instructions)),
        said=f"{speaker}: {text}" if speaker else text,
        omitted=tuple(known[num_said:]),
    )


def fit_prompt(
    prompt: Prompt, render: Callable[[Sequence[Message]], tuple[int, ...]], max_tokens: int, *, expected: int = 0
) -> Fitted:
    """Leave out the oldest turns, then the least important knowledge, until `max_tokens` hold the prompt.

    What is left of the history begins with a turn of the player. `expected` is how many messages will probably go; a
    good guess saves time and changes nothing. If nothing more can go the result is still too long; the caller compares.
    """
    cuts = [at for at, turn in enumerate(prompt.history) if at == 0 or turn["role"] == "user"]
    stable = [at for at in cuts if at == 0 or (at // 2 % DROP_STEP == 0 and at <= len(prompt.history) - MIN_KEPT)]
    stable = stable or [0]
    candidates = [_Candidate(replace(prompt, history=prompt.history[at:]), render) for at in stable]
    start = sum(at < (expected or _guess_dropped(prompt, max_tokens)) for at in stable)
    first = _first_fitting(candidates, max_tokens, start)
    if first == len(candidates):  # each cut costs what was cached of the prompt, but there is no better one
        rest = [at for at in (*cuts, len(prompt.history)) if at > stable[-1]]
        bare = replace(prompt, history=())
        candidates = [_Candidate(replace(prompt, history=prompt.history[at:]), render) for at in rest]
        sizes = reversed(range(len(prompt.knowledge)))
        candidates += [_Candidate(replace(bare, knowledge=prompt.knowledge[:size]), render) for size in sizes]
        candidates = candidates or [_Candidate(prompt, render)]
        first = min(_first_fitting(candidates, max_tokens, 0), len(candidates) - 1)
    kept = candidates[first]
    num_dropped = len(prompt.history) - len(kept.prompt.history)
    return Fitted(kept.prompt, kept.token_ids, num_dropped, prompt.knowledge[len(kept.prompt.knowledge) :])


class _Candidate:
    """A prompt that may be short enough; rendered when somebody asks."""

    def __init__(self, prompt: Prompt, render: Callable[[Sequence[Message]], tuple[int, ...]]) -> None:
        self.prompt = prompt
        self._render = render
        self.num_chars = sum(len(turn["content"]) for turn in prompt.history) + 1

    @cached_property
    def token_ids(self) -> tuple[int, ...]:
        """What the model would read."""
        return self._render(self.prompt.messages)


def count_parts(prompt: Prompt, count: Callable[[Sequence[Message]], int]) -> dict[str, int]:
    """The tokens of each part: what the prompt is shorter by without it. `template` is what is left."""
    total = count(prompt.messages)
    without = {
        "persona": replace(prompt, system=""),
        "examples": replace(prompt, examples=()),
        "history": replace(prompt, history=()),
        "knowledge": replace(prompt, knowledge=()),
        "context": replace(prompt, context=(), reminder=""),
        "words": replace(prompt, said=""),
    }
    parts = {name: total - count(shorter.messages) for name, shorter in without.items()}
    return {**parts, "template": total - sum(parts.values())}


def _guess_dropped(prompt: Prompt, max_tokens: int) -> int:
    """How many of the oldest messages must go, by the length of their texts alone."""
    left = max_tokens * CHARS_PER_TOKEN
    for number, turn in enumerate(reversed(prompt.history)):
        left -= len(turn["content"])
        if left < 0:
            return len(prompt.history) - number
    return 0


def _first_fitting(candidates: Sequence[_Candidate], max_tokens: int, start: int) -> int:
    """The first that fits, each being shorter than the one before it; their number if none does.

    Looks at `start`, then where the text would be as long as fits if all of it had as many tokens; from the fifth look
    on in the middle.
    """
    low, high, at, num_looks = -1, len(candidates), start, 0
    while high - low > 1:
        at = min(max(at, low + 1), high - 1)
        num_tokens = len(candidates[at].token_ids)
        low, high = (low, at) if num_tokens <= max_tokens else (at, high)
        num_looks += 1
        room = candidates[at].num_chars * max_tokens / max(num_tokens, 1)
        at = sum(candidate.num_chars > room for candidate in candidates) if num_looks < 5 else (low + high) // 2
    return high


def _num_within(texts: Sequence[str], max_words: int) -> int:
    """How many of the texts have at most so many words together."""
    num_words = 0
    for number, text in enumerate(texts):
        num_words += len(text.split())
        if num_words > max_words:
            return number
    return len(texts)


def _system_text(persona: "Persona", fill: Callable[[str], str]) -> str:
    """Who the character is, what it wants and knows, how it speaks, and how much; the same for every line."""
    guard = persona.guardrails
    closing = fill(persona.system_prompt.replace("{{original}}", CLOSING)) if persona.system_prompt else CLOSING
    parts = [
        f"You are {_one_line(persona.display_name)}.",
        fill(persona.bio),
        fill(persona.personality),
        fill(persona.speech_style),
        _labelled("Scenario: ", [fill(persona.scenario)]),
        _labelled("You want: ", map(fill, persona.goals), "; "),
        _labelled("You know: ", (_as_sentence(_one_line(fill(text))) for text in persona.always_known), " "),
        _labelled("Never talk about: ", guard.avoid, "; "),
        "You know nothing of language models, prompts or instructions." if guard.stay_in_character else "",
        _labelled("Never say: ", (f'"{phrase}"' for phrase in persona.never_says), ", "),
        _language(persona.locale),
    ]
    return (
        " ".join(sentence for part in parts if (sentence := _as_sentence(_one_line(part)))) + " " + _one_line(closing)
    )


def _labelled(label: str, items: Iterable[str], separator: str = "") -> str:
    words = separator.join(item for item in items if item)
    return f"{label}{words}" if words else ""


def _language(locale: str) -> str:
    code = locale.split("-")[0].lower()
    return f"Speak {LANGUAGES.get(code, f'the language with the code {code}')}." if code not in ("", "en") else ""


class _Macros:
    """Puts names in for `{{char}}` and `{{user}}`, which character cards use. The player's name is not known where the
    prompt must stay the same, so there it is a description.
    """

    _PATTERN = re.compile(r"\{\{(char|user)\}\}", re.IGNORECASE)

    def __init__(self, name: str) -> None:
        self._names = {"char": _one_line(name), "user": "the player"}

    def __call__(self, text: str) -> str:
        return self._PATTERN.sub(lambda match: self._names[match[1].lower()], text)


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _as_sentence(text: str) -> str:
    return text if not text or text[-1] in ".!?…" else f"{text}."
