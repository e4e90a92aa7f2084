"""When a line ends and what of it is said: stop strings, sentence trimming, the reply's size bound. No torch.

Text is released only when nothing that may still follow can take it back: a possible beginning of a stop
string, or white space that may turn out to be the end, is held.
"""

import re

from npc_runtime.engine.core import EndReason, SamplingParams
from npc_runtime.engine.tokenizer import Decoder, IncrementalText

__all__ = ["MAX_REPLY_CHARS", "LineText"]

MAX_REPLY_CHARS = 4_000
"""Longest reply in code points. With every character escaped (6 bytes) it still fits a 32 KiB frame."""

# A run of terminal marks with closing quotes, then white space; CJK marks need none. An ellipsis ends a
# sentence only if a capital follows.
_SENTENCE_END = re.compile(
    r"(?:(?<!\.)\.(?!\.)|[!?]+|(?:\.{2,}|…)(?=[\"'”’)\]]*\s+[^\W\d_a-z]))[\"'”’)\]]*(?=\s)|[。！？]+[」』”]*|(?=\n)"
)


class LineText:
    """The text of one line while it is generated."""

    def __init__(self, decoder: Decoder, sampling: SamplingParams) -> None:
        self._incremental = IncrementalText(decoder)
        self._sampling = sampling
        self._trims = sampling.trim == "sentence"
        self._num_sent = 0
        self._num_tokens = 0
        self.text = ""
        self.end: EndReason | None = None

    def push(self, token_id: int) -> str:
        """Add a sampled token; return the text that may be spoken now. `end` is set when the line is over."""
        self._num_tokens += 1
        self.text += self._incremental.push(token_id)
        if self._trims:
            self.text = self.text.lstrip()
        if self._num_tokens >= self._sampling.min_tokens and (self._cut_at_stop() or self._cut_at_sentence()):
            self.end = EndReason.STOP
        elif self._num_tokens >= self._sampling.max_tokens:
            self.finish(EndReason.LENGTH)
        elif len(self.text) >= MAX_REPLY_CHARS:
            self.text = self.text[:MAX_REPLY_CHARS]
            self.finish(EndReason.LENGTH)
        return self._release()

    def finish(self, reason: EndReason) -> str:
        """End the line from outside; return what was still held. Only a length end drops an unfinished tail."""
        if self._trims and reason == EndReason.LENGTH:
            *_, last = [0, *(match.end() for match in _SENTENCE_END.finditer(self.text + " "))]
            self.text = self.text[:last] or self.text
        if self._trims:
            self.text = self.text.rstrip()
        self.end = reason
        return self._release()

    def _cut_at_stop(self) -> bool:
        found = [self.text.find(stop) for stop in self._sampling.stop if stop in self.text]
        if found:
            self.text = self.text[: min(found)]
            self.text = self.text.rstrip() if self._trims else self.text
        return bool(found)

    def _cut_at_sentence(self) -> bool:
        if not self._trims:
            return False
        words = list(re.finditer(r"\S+", self.text))
        if len(words) < self._sampling.soft_words or not words:
            return False
        match = _SENTENCE_END.search(self.text, words[max(self._sampling.soft_words - 1, 0)].start())
        if match is None:
            return False
        self.text = self.text[: match.end()].rstrip()
        return True

    def _release(self) -> str:
        sure = len(self.text) if self.end else len(self.text) - self._num_held()
        delta = self.text[self._num_sent : sure]
        self._num_sent = max(sure, self._num_sent)
        return delta

    def _num_held(self) -> int:
        """Characters at the end that may still be taken back."""
        held = len(self.text) - len(self.text.rstrip()) if self._trims else 0
        for stop in self._sampling.stop:
            for size in range(min(len(stop) - 1, len(self.text)), held, -1):
                if self.text.endswith(stop[:size]):
                    held = size
                    break
        return held
