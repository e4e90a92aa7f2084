"""What is told of a line: that it began, its text as it is spoken, and how it ended. No torch, no clock."""

from npc_runtime.engine.core import Ended, EndReason, Request, Sequence, Spoken, Started
from npc_runtime.engine.ending import LineText
from npc_runtime.engine.tokenizer import ChatTokenizer
from npc_runtime.errors import InternalError, WireError

__all__ = ["Speech", "overflow_of"]


class Speech:
    """The texts of the lines that have not ended."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, LineText] = {}

    @property
    def ids(self) -> list[int]:
        """The lines that have a text here."""
        return list(self._texts)

    @property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end a line by themselves."""
        return self._tokenizer.eos_ids

    def take(self, request: Request) -> None:
        """Keep a text for this line, until `end`."""
        self._texts[request.id] = LineText(self._tokenizer, request.sampling)

    def start(self, sequence: Sequence, now: float, num_rows: int) -> Started:
        """The line gets its first forward pass, with so many rows."""
        sequence.started_at = now
        return Started(sequence.request.id, 1000 * (now - sequence.request.arrival), num_rows)

    def say(self, sequence: Sequence, token: int, now: float) -> list[Spoken]:
        """Add a sampled token to its line; the end token itself is counted but not said."""
        text = self._texts[sequence.request.id]
        sequence.output_ids.append(token)
        delta = text.finish(EndReason.STOP) if token in self.eos_ids else text.push(token)
        if delta and sequence.first_text_at is None:
            sequence.first_text_at = now
        return [Spoken(sequence.request.id, delta)] if delta else []

    def why_over(self, sequence: Sequence) -> EndReason | None:
        """Why the last token was the line's last one; None if it was not."""
        return self._texts[sequence.request.id].end

    def end(self, sequence: Sequence, reason: EndReason, error: WireError | None, now: float) -> Ended:
        """Close the text of a line."""
        request = sequence.request
        text = self._texts.pop(request.id)
        if text.end is None:
            text.finish(reason)
        started, first = sequence.started_at, sequence.first_text_at
        seconds = now - started if started is not None else 0.0
        return Ended(
            request_id=request.id,
            reason=reason,
            text=text.text,
            num_prompt=len(request.prompt_ids),
            num_cached=sequence.num_cached,
            num_completion=len(sequence.output_ids),
            queue_ms=1000 * ((started if started is not None else now) - request.arrival),
            first_text_ms=None if first is None else 1000 * (first - request.arrival),
            total_ms=1000 * (now - request.arrival),
            tokens_per_s=len(sequence.output_ids) / seconds if seconds > 0 else 0.0,
            batch_avg=sequence.sum_rows / sequence.num_steps if sequence.num_steps else 0.0,
            error=error,
        )


def overflow_of(sequence: Sequence) -> InternalError:
    """What is told of a line whose logits are not finite."""
    adapter = sequence.request.adapter
    what = f"the adapter of {adapter}" if adapter else "the base"
    return InternalError(f"The numbers of {what} overflowed.", "It is damaged or diverged in training; replace it.")
