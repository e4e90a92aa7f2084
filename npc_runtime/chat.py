"""A conversation with one persona: what was said so far, and how the next line is spoken.

The daemon is told the whole conversation with every line. A line that failed or was cancelled leaves no trace in it.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from npc_runtime.client import Batch, Client, RequestError
from npc_runtime.errors import DisconnectedError, PersonaUnknown
from npc_runtime.protocol import Cancel, DeltaItem, LineEnd, PersonaInfo
from npc_runtime.running import Target

__all__ = ["Conversation", "Reply", "Talk", "printable"]

CANCEL_TIMEOUT_S = 5.0
MAX_MESSAGES = 256


@dataclass(slots=True)
class Conversation:
    """Turns that both sides remember, within the bounds of a request."""

    max_chars: int
    turns: list[dict[str, str]] = field(default_factory=list)
    _last: str | None = None  # the player's last words
    _is_last_kept: bool = False

    def ask(self, text: str) -> list[dict[str, str]]:
        """The messages of a line that answers `text`; the oldest exchanges are left out where they have no room."""
        self._last, self._is_last_kept = text, False
        begin, num_chars = len(self.turns), len(text)
        while begin >= 2 and len(self.turns) - begin + 3 <= MAX_MESSAGES:
            num_chars += sum(len(turn["content"]) for turn in self.turns[begin - 2 : begin])
            if num_chars > self.max_chars:
                break
            begin -= 2
        return [*self.turns[begin:], {"role": "user", "content": text}]

    def keep(self, reply: str) -> None:
        """Remember the answer to what was asked last."""
        assert self._last is not None
        self.turns += [{"role": "user", "content": self._last}, {"role": "assistant", "content": reply}]
        self._is_last_kept = True

    def take_back(self) -> str | None:
        """The player's last words, as if they had not been answered; None at the beginning."""
        if self._is_last_kept:
            del self.turns[-2:]
            self._is_last_kept = False
        return self._last


@dataclass(frozen=True, slots=True)
class Reply:
    """How a line ended; `end` is None if it was cancelled so early, or so late, that the daemon's word did not come."""

    text: str
    end: LineEnd | None
    note: str | None = None  # what the prompt had no room for

    @property
    def is_said(self) -> bool:
        """Whether the persona answered; otherwise `problem` says why not."""
        return self.end is not None and self.end.reason in ("stop", "length") and not self.end.fallback

    @property
    def is_cancelled(self) -> bool:
        """Whether the player did not want to hear it."""
        return self.end is None or self.end.reason == "cancelled"

    @property
    def problem(self) -> str:
        """Why there is no answer, in a few words."""
        if self.end is None or self.end.reason == "cancelled":
            return "cancelled"
        error = self.end.error
        return f"{error.message} {error.hint}".strip() if error else self.end.reason


class Talk:
    """The connection of a conversation; it is made again if it is lost."""

    def __init__(self, find: Callable[[], Target], persona: str) -> None:
        """`find` says where the daemon is, each time it is looked for."""
        self._find = find
        self._persona = persona
        self._client: Client | None = None
        self._num_lines = 0
        self.conversation = Conversation(max_chars=0)

    async def open(self) -> PersonaInfo:
        """Connect, and find the persona. Raises `NpcError` if it is not there or cannot speak."""
        client = await self._connect()
        personas = await client.personas()
        known = {persona.id: persona for persona in personas}
        found = known.get(self._persona)
        if found is None:
            raise PersonaUnknown(f"There is no persona '{self._persona}'.", f"There are {', '.join(sorted(known))}.")
        if found.error is not None:
            raise RequestError(found.error.code, found.error.message, found.error.hint)
        self.conversation.max_chars = client.welcome.limits["text_chars"]
        return found

    async def close(self) -> None:
        """Close the connection."""
        if self._client is not None:
            await self._client.close()

    async def say(self, text: str, seed: int | None, on_text: Callable[[str], None]) -> Reply:
        """Speak one line; `on_text` gets all of it that has come so far. A cancelled task cancels the line.

        Raises `RequestError` if the line is refused, `DisconnectedError` if the daemon is gone.
        """
        messages = self.conversation.ask(text)
        line = {"line": 1, "persona": self._persona, "messages": messages}
        line |= {} if seed is None else {"sampling": {"seed": seed}}
        try:
            reply = await self._speak(line, on_text)
        except DisconnectedError:  # a daemon that was started anew, or a laptop that slept
            await self._connect()
            reply = await self._speak(line, on_text)
        if reply.is_said:
            self.conversation.keep(reply.text)
        return reply

    async def _connect(self) -> Client:
        await self.close()
        target = self._find()
        self._client = await Client.connect(target.url, token=target.token, name="npc-runtime-chat")
        return self._client

    async def _speak(self, line: dict[str, Any], on_text: Callable[[str], None]) -> Reply:
        assert self._client is not None
        self._num_lines += 1
        batch_id, spoken = f"chat{self._num_lines}", _Spoken(on_text)
        try:
            batch = await self._client.generate([line], batch=batch_id)
            for item in batch.rejected:
                raise RequestError(item.code or "internal", item.message or "", item.hint or "")
            spoken.batch = batch
            await spoken.follow()
        except asyncio.CancelledError:
            await self._cancel(batch_id, spoken)
        return spoken.reply()

    async def _cancel(self, batch_id: str, spoken: "_Spoken") -> None:
        """End the line that is being spoken, and see it end; the task goes on as if nobody had cancelled it."""
        task = asyncio.current_task()
        assert task is not None
        assert self._client is not None
        task.uncancel()
        try:
            async with asyncio.timeout(CANCEL_TIMEOUT_S):
                await self._client.send(Cancel(batch=batch_id))
                await spoken.follow()
        except (TimeoutError, DisconnectedError):
            return  # the line is over for us


@dataclass(slots=True)
class _Spoken:
    """A line while it is spoken."""

    on_text: Callable[[str], None]
    batch: Batch | None = None
    text: str = ""
    end: LineEnd | None = None

    async def follow(self) -> None:
        """Take what comes until the line is over."""
        if self.batch is None:
            return
        async for event in self.batch:
            if isinstance(event, DeltaItem):
                self.text += event.text
                self.on_text(self.text)
            elif isinstance(event, LineEnd):
                self.end, self.text = event, event.text

    def reply(self) -> Reply:
        """What became of it."""
        accepted = self.batch.accepted if self.batch else None
        return Reply(self.text, self.end, accepted.items[0].message if accepted else None)


def printable(text: str) -> str:
    """Text for a terminal: what would steer it is shown as a box instead."""
    return "".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in text)
