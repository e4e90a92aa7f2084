"""What opens and closes turns in a base's prompts, and how to keep it out of what people write.

A turn begins at a special token (`<|im_start|>`) or at plain words that only the chat template should write (`[INST]`,
`### Response:`). Both are collected once: tokens from the tokenizer, words by rendering a dialogue of unlikely words
and looking at what stands between them. Text that came from a player, a persona file or a game gets spaces between
the letters of each of them.

Some templates take words out of a message (SmolLM3 its `/no_think`), and `<|im_/no_thinkstart|>` would become a
token by that; so whatever a template may take out is treated alike.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

__all__ = ["Markers", "Probe", "find_markers", "probe_template"]

_SYSTEM, _USER, _REPLY, _LAST = "qsystemq", "quserq", "qreplyq", "qlastq"
_ROLE = re.compile(r"[^\w\s].*|.*[^\w\s]", re.DOTALL)  # begins or ends with a sign: [INST], ### Human, USER:
_TAKING = re.compile(
    r"\b(?:replace|split|rsplit|[lr]?strip|partition|rpartition|removeprefix|removesuffix)\s*\(\s*"
    r"""(["'])((?:\\.|(?!\1).)+)\1""",
    re.DOTALL,
)

Apply = Callable[[list[dict[str, str]]], str]


class Probe:
    """What a template made of a dialogue of four known messages."""

    def __init__(self, text: str) -> None:
        self._text = text

    @property
    def has_system_role(self) -> bool:
        """Whether the system message comes first. Mistral's puts it behind the history, some drop it."""
        system, user = self._text.find(_SYSTEM), self._text.find(_USER)
        return 0 <= system < user

    @property
    def between(self) -> str:
        """What the template wrote itself, one run a line."""
        return re.sub("|".join((_SYSTEM, _USER, _REPLY, _LAST)), "\n", self._text)


def probe_template(apply: Apply) -> Probe | None:
    """Render a dialogue with a chat template; None if it refuses a system message.

    `apply` renders messages and raises what jinja2 raises.
    """
    import jinja2

    dialogue = [("user", _USER), ("assistant", _REPLY), ("user", _LAST)]
    messages = [{"role": role, "content": content} for role, content in [("system", _SYSTEM), *dialogue]]
    try:
        return Probe(apply(messages))
    except jinja2.TemplateError:
        return None


class Markers:
    """The markers of one base. Immutable."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = tuple(sorted({text for text in texts if text.strip()}, key=len, reverse=True))
        self._any = re.compile("|".join(map(re.escape, self.texts))) if self.texts else None

    def take_apart(self, text: str) -> str:
        """Space out every marker in a text; a marker of one character goes."""
        # A pass adds nothing but spaces, so a second one can find only markers with spaces in them.
        for _ in range(4):
            if self._any is None or not self._any.search(text):
                return text
            for marker in self.texts:
                if marker in text:
                    text = text.replace(marker, " ".join(marker) if len(marker) > 1 else " ")
        assert self._any is not None
        return self._any.sub(" ", text)


def find_markers(tokenizer: Any, template: str, probe: Probe | None) -> Markers:
    """Collect the markers of a transformers tokenizer and its chat template."""
    tokens = {token.content for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    words = set(_role_words(probe.between, tokens)) if probe else set()
    return Markers([*tokens, *words, *_taken_out(template)])


def _role_words(written: str, tokens: set[str]) -> Iterator[str]:
    """The plain words among what a template wrote that could be taken for a turn."""
    ends = "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True) if token.strip())
    for piece in re.split(f"{ends}|\n" if ends else "\n", written):
        if len(piece.strip()) > 2 and _ROLE.fullmatch(piece.strip()):
            yield piece.strip()
    # Two markers in one piece, as in "[INST] <<SYS>>", are markers each.
    yield from re.findall(r"\[/?[A-Z_]+\]|<</?[A-Z_]+>>|<\|?/?[a-z_]+\|?>", written)


def _taken_out(template: str) -> Iterator[str]:
    """The words that a template may take out of a message: arguments of `replace`, `split` and the like.

    They are looked for in the text, because templates have blocks that plain Jinja cannot parse (`generation`).
    """
    for _, argument in _TAKING.findall(template):
        word = argument.replace("\\n", "\n").replace("\\", "")
        if len(word) > 1:
            yield word
