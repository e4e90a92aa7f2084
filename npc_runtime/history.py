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

    @property
    def num_chars(self) -> int:
        """Code points of all turns."""
        return sum(len(turn["content"]) for turn in self._messages)

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
        """Forget the oldest turns, a quarter at once: a prompt that begins differently finds nothing cached.

        What is left begins with a turn of the player, if there is one.
        """
        num_left, num_chars = len(self._messages), self.num_chars
        if num_left <= MAX_HISTORY_MESSAGES and num_chars <= MAX_HISTORY_CHARS:
            return
        at = 0
        while num_left > 0.75 * MAX_HISTORY_MESSAGES or num_chars > 0.75 * MAX_HISTORY_CHARS:
            num_chars -= len(self._messages[at]["content"])
            num_left, at = num_left - 1, at + 1
        players = (index for index in range(at, len(self._messages)) if self._messages[index]["role"] == "user")
        del self._messages[: next(players, at)]
