"""What the model reads: a persona's words, what it knows now, this turn's context, earlier turns, the player's words.

The order is chosen for the prefix cache, which keeps what prompts begin with: the persona and its examples first and
always alike; earlier turns next; and what may be different every turn, knowledge that depends on the game's facts and
the context, in front of the player's words in the last message. Where the context is too small the oldest turns go
first and the persona never.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from npc_runtime.persona import Persona

__all__ = ["Context", "Fitted", "Message", "Prompt", "build_prompt", "count_parts", "fit_prompt"]

CLOSING = "Reply in character, in one or two sentences."
DROP_STEP = 4
"""Earlier turns go by so many exchanges: a cut makes the cached prefix useless, so it is made every fourth turn."""
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


def fit_prompt(prompt: Prompt, render: Callable[[Sequence[Message]], tuple[int, ...]], max_tokens: int) -> Fitted:
    """Leave out the oldest turns, then the least important knowledge, until `max_tokens` hold the prompt.

    What is left of the history begins with a turn of the player. If nothing more can go the result is still too long;
    the caller compares.
    """
    token_ids = render(prompt.messages)
    if len(token_ids) <= max_tokens:
        return Fitted(prompt, token_ids, 0, ())
    history, knowledge = prompt.history, prompt.knowledge
    cuts = [at for at, turn in enumerate(history) if at and turn["role"] == "user"] + [len(history)] * bool(history)
    shorter: list[Prompt] = [replace(prompt, history=history[cut:]) for cut in cuts]
    bare = shorter[-1] if shorter else prompt
    shorter += [replace(bare, knowledge=knowledge[:size]) for size in reversed(range(len(knowledge)))]
    if not shorter:
        return Fitted(prompt, token_ids, 0, ())
    first = _first_fitting(shorter, lambda candidate: len(render(candidate.messages)) <= max_tokens)
    if first < len(cuts):
        first = _stable_cut(cuts, first)
    kept = shorter[first]
    num_dropped = len(history) - len(kept.history)
    return Fitted(kept, render(kept.messages), num_dropped, knowledge[len(kept.knowledge) :])


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


def _first_fitting(candidates: Sequence[Prompt], fits: Callable[[Prompt], bool]) -> int:
    """The first candidate that fits, each being shorter than the one before it; else the last."""
    low, high = 0, len(candidates) - 1
    while low < high:
        middle = (low + high) // 2
        if fits(candidates[middle]):
            high = middle
        else:
            low = middle + 1
    return low


def _stable_cut(cuts: Sequence[int], needed: int) -> int:
    """A later cut, the same for the next turns too; `needed` where that would leave too little."""
    for index in range(needed, len(cuts)):
        if cuts[index] // 2 % DROP_STEP == 0 and cuts[index] <= cuts[-1] - MIN_KEPT:
            return index
    return needed


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
