"""Text to token ids and back, in the base's own chat template."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from npc_runtime.engine.markers import find_markers, probe_template
from npc_runtime.errors import InvalidError, StartupError

__all__ = ["ChatTokenizer", "Decoder", "IncrementalText", "RenderedPrompt"]

logger = logging.getLogger(__name__)

# For a base without a chat template; the README mentions it.
PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}{% for m in messages %}"
    "{{ {'system': '', 'user': 'Player: ', 'assistant': 'Reply: '}[m['role']] }}"
    "{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}Reply:{% endif %}"
)


class Decoder(Protocol):
    """Turns token ids into text."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Decode without special tokens."""
        ...


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """A prompt as text and as token ids."""

    text: str
    token_ids: tuple[int, ...]


class ChatTokenizer:
    """The base's tokenizer and chat template. Thread-safe once made: nothing is written."""

    def __init__(self, folder: Path) -> None:
        """Load from a model folder. Raises `StartupError` if there is no usable tokenizer."""
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # transformers raises half a dozen unrelated types here
            raise StartupError(
                f"{folder}: the tokenizer cannot be loaded ({type(error).__name__}: {error}).",
                "The folder needs the tokenizer.json that was published with the model.",
            ) from error
        if not self._tokenizer.get_vocab():  # transformers makes an empty one where the files are missing
            raise StartupError(
                f"{folder} has no tokenizer.", "The folder needs the tokenizer.json that was published with the model."
            )
        if self._tokenizer.chat_template is None:
            logger.warning("%s has no chat template; a plain 'Player: / Reply:' form is used", folder)
            self._tokenizer.chat_template = PLAIN_TEMPLATE
        self.eos_ids = self._find_eos(folder)
        probe = probe_template(self._apply)
        self._has_system_role = probe is not None and probe.has_system_role
        if probe is None:
            probe = probe_template(lambda messages: self._apply(_fold_system(messages)))
        self._markers = find_markers(self._tokenizer, self._tokenizer.get_chat_template(), probe)
        self._added = {
            token_id: token for token_id, token in self._tokenizer.added_tokens_decoder.items() if token.content.strip()
        }
        self._normalizes = any(token.normalized for token in self._added.values())

    def render(self, messages: Sequence[dict[str, str]]) -> RenderedPrompt:
        """Render chat messages up to where the reply begins.

        Text of the player can never open a turn of its own: what marks a turn is taken apart inside message content
        before the template is applied. A template that knows no system role, or puts it behind the history, gets the
        system text in front of the first user message. Raises `InvalidError` for messages that the template refuses.
        """
        import jinja2

        clean = [{**message, "content": self._defuse(message["content"])} for message in messages]
        try:
            text = self._apply(clean if self._has_system_role else _fold_system(clean))
        except jinja2.TemplateError as error:
            raise InvalidError(
                f"The base's chat template does not take these messages ({error}).",
                "Let user and assistant turns alternate.",
            ) from error
        return RenderedPrompt(text, tuple(self._tokenizer.encode(text, add_special_tokens=False)))

    def encode_reply(self, text: str) -> list[int]:
        """Token ids of a reply and the end token behind it, as the model is to learn it."""
        return [*self._tokenizer.encode(self._defuse(text), add_special_tokens=False), self._tokenizer.eos_token_id]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Decode without special tokens and without cleaning spaces up."""
        text: str = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def _apply(self, messages: list[dict[str, str]]) -> str:
        # Qwen3 and SmolLM3 would think aloud in front of the player; other templates ignore the switch.
        text: str = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False, enable_thinking=False
        )
        return text

    def _defuse(self, text: str) -> str:
        """Take the markers in a text apart, also those that only the tokenizer's normalizer would make of it."""
        text = self._markers.take_apart(text)
        for _ in range(4 if self._normalizes else 0):
            encoding = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            pairs = zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
            spans = [span for token_id, span in pairs if token_id in self._added]
            if not spans:
                break
            for start, end in reversed(spans):
                text = f"{text[:start]} {' '.join(text[start:end]) if end - start > 1 else ''} {text[end:]}"
        return text

    def _find_eos(self, folder: Path) -> frozenset[int]:
        """Collect the end tokens of tokenizer, config and generation config; instruct models often have two."""
        found: set[int] = set()
        if self._tokenizer.eos_token_id is not None:
            found.add(self._tokenizer.eos_token_id)
        for name in ("config.json", "generation_config.json"):
            if (folder / name).is_file():
                value = _read_json(folder / name).get("eos_token_id")
                found.update(value if isinstance(value, list) else [] if value is None else [value])
        return frozenset(found)


class IncrementalText:
    """Decodes a growing list of tokens into whole characters, in constant time per token.

    Only a window behind the last emitted character is decoded: first without, then with the new tokens; the
    difference is new text, held back while it ends inside a character (U+FFFD).
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._ids: list[int] = []
        self._window = 0  # first token of the window
        self._read = 0  # tokens whose text was returned
        self._ahead = 0  # characters that were returned of tokens behind those; the last one ends inside a character

    def push(self, token_id: int) -> str:
        """Add a token; return the text that is now complete, often empty for pieces of a character."""
        self._ids.append(token_id)
        known = self._decoder.decode(self._ids[self._window : self._read])
        text = self._decoder.decode(self._ids[self._window :])[len(known) :]
        whole = text.rstrip("\ufffd")
        piece = whole[self._ahead :]
        if whole and whole == text:
            self._window, self._read, self._ahead = self._read, len(self._ids), 0
        else:
            self._ahead = max(self._ahead, len(whole))
        return piece


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(document, dict)
    except (OSError, ValueError, AssertionError) as error:
        raise StartupError(f"{path} cannot be read ({error}).", "Fetch the model again.") from error
    return document


def _fold_system(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """Move a leading system message into the first user message, or make it one if the NPC speaks first."""
    if len(messages) < 2 or messages[0]["role"] != "system":
        return messages
    system, first, *rest = messages
    if first["role"] != "user":
        return [{**system, "role": "user"}, first, *rest]
    return [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *rest]
