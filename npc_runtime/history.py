"""One NPC's conversation: earlier turns, oldest first, within bounds.

It knows nothing of personas or tokens; what of it fits a prompt is decided where the prompt is made.
"""

from collections.abc import Iterable, Sequence

from npc_runtime.prompt import Message

__all__ = ["MAX_HISTORY_CHARS", "MAX_HISTORY_MESSAGES", "History"]

MAX_HISTORY_MESSAGES = 1_000
MAX_HISTORY_CHARS = 64_000
"""Code points; several times what the context of a base that runs beside a game holds."""


class History:
    """What was said, as chat messages. `epoch` counts the times that somebody changed it by hand."""

    def __init__(self, messages: Iterable[Message] = ()) -> None:
        self._messages = list(messages)
        self.epoch = 0
        self._trim()

    @property
    def messages(self) -> Sequence[Message]:
        """All turns, oldest first."""
        return tuple(self._messages)

    def __len__(self) -> int:
        return len(self._messages)

    def remember(self, said: str, reply: str) -> None:
        """Add an exchange that took place."""
        self._messages += [{"role": "user", "content": said}, {"role": "assistant", "content": reply}]
        self._trim()

    def set(self, messages: Iterable[Message]) -> None:
        """Put these turns in place of all others."""
        self._messages = list(messages)
        self.epoch += 1
        self._trim()

    def append(self, messages: Iterable[Message]) -> None:
        """Add turns that took place elsewhere, a cut scene perhaps."""
        self.set([*self._messages, *messages])

    def pop(self) -> list[Message]:
        """Take back the last exchange: the player's last turn and what followed it; returns what went."""
        players = [at for at, turn in enumerate(self._messages) if turn["role"] == "user"]
        at = players[-1] if players else 0
        gone = self._messages[at:]
        self.set(self._messages[:at])
        return gone

    def _trim(self) -> None:
        """Forget the oldest turns, a quarter at once: a prompt that begins differently finds nothing cached."""
        if self._is_within(1.0):
            return
        while self._messages and not self._is_within(0.75):
            del self._messages[0]
        while self._messages and self._messages[0]["role"] != "user":
            del self._messages[0]

    def _is_within(self, share: float) -> bool:
        num_chars = sum(len(turn["content"]) for turn in self._messages)
        return len(self._messages) <= share * MAX_HISTORY_MESSAGES and num_chars <= share * MAX_HISTORY_CHARS
