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

# A run of terminal marks and closing quotes, known to be over because something else follows: white space, or
# for CJK marks, which are written without it, anything. A line break ends a sentence by itself.
_END = re.compile(
    r"(?P<dots>\.{2,}|…)[\"'”’)\]]*(?=\s+(?P<next>\S))"
    r"|(?:(?<!\.)\.(?!\.)|[!?]+)[\"'”’)\]]*(?=\s)"
    r"|[。！？]+[」』”]*(?=[^。！？」』”])"
    r"|(?=\n)"
)


class LineText:
    """The text of one line while it is generated."""

    def __init__(self, decoder: Decoder, sampling: SamplingParams) -> None:
        self._incremental = IncrementalText(decoder)
        self._sampling = sampling
        self._trims = sampling.trim == "sentence"
        self._num_sent = 0
        self._num_tokens = 0
        self._floor = 0  # characters that min_tokens protects from any cut
        self.text = ""
        self.end: EndReason | None = None

    def push(self, token_id: int) -> str:
        """Add a sampled token; return the text that may be spoken now. `end` is set when the line is over."""
        self._num_tokens += 1
        self.text += self._incremental.push(token_id)
        if self._trims:
            self.text = self.text.lstrip()
        if self._num_tokens < self._sampling.min_tokens:
            self._floor = len(self.text)
        if self._cut_at_stop() | self._cut_at_sentence():
            return self.finish(EndReason.STOP)
        if self._num_tokens >= self._sampling.max_tokens or len(self.text) >= MAX_REPLY_CHARS:
            self.text = self.text[:MAX_REPLY_CHARS]
            return self.finish(EndReason.LENGTH)
        return self._release()

    def finish(self, reason: EndReason) -> str:
        """End the line; return what was still held. Only a length end drops an unfinished tail."""
        if self._trims and reason == EndReason.LENGTH:
            last = self._floor
            while (end := _sentence_end(self.text + " ", last)) is not None and end > last:
                last = end
            self.text = self.text[:last] or self.text
        if self._trims:
            self.text = self.text.rstrip()
        self.end = reason
        return self._release()

    def _cut_at_stop(self) -> bool:
        starts = [self.text.find(stop, max(self._floor - len(stop) + 1, 0)) for stop in self._sampling.stop]
        found = [start for start in starts if start >= 0]
        if found:
            self.text = self.text[: min(found)]
        return bool(found)

    def _cut_at_sentence(self) -> bool:
        words = list(re.finditer(r"\S+", self.text)) if self._trims else []
        if not words or len(words) < self._sampling.soft_words:
            return False
        soft = words[max(self._sampling.soft_words - 1, 0)].start()
        end = _sentence_end(self.text, max(soft, self._floor))
        if end is not None:
            self.text = self.text[:end]
        return end is not None

    def _release(self) -> str:
        sure = len(self.text) if self.end else len(self.text) - self._num_held()
        delta = self.text[self._num_sent : sure]
        self._num_sent = max(sure, self._num_sent)
        return delta

    def _num_held(self) -> int:
        """Characters at the end that may still be taken back."""
        held = 0
        for stop in self._sampling.stop:
            for size in range(min(len(stop) - 1, len(self.text)), held, -1):
                if self.text.endswith(stop[:size]):
                    held = size
                    break
        sure = self.text[: len(self.text) - held]
        return len(self.text) - (len(sure.rstrip()) if self._trims else len(sure))


def _sentence_end(text: str, start: int) -> int | None:
    """Where the first sentence that ends behind `start` ends; an ellipsis ends one only before a capital."""
    for match in _END.finditer(text, start):
        if match["dots"] is None or match["next"].isupper():
            return match.end()
    return None
