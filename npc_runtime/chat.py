"""A conversation with one persona: an NPC of its own in the daemon, which remembers what was said.

What was said is also kept here, for a daemon that was started anew.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from npc_runtime.client import Batch, Client, RequestError
from npc_runtime.errors import DisconnectedError, PersonaUnknown
from npc_runtime.protocol import Cancel, ChatTurn, DeltaItem, LineEnd, NpcHistory, PersonaInfo
from npc_runtime.running import Target

__all__ = ["Reply", "Talk", "printable"]

CANCEL_TIMEOUT_S = 5.0
MAX_TURNS = 100
"""Of those that are kept here: more than the context of a base that runs beside a game holds."""


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
    """One NPC and the connection that it is reached by, which is made again if it is lost."""

    def __init__(self, find: Callable[[], Target], persona: str, npc: str = "chat") -> None:
        """`find` says where the daemon is, each time it is looked for."""
        self._find = find
        self._persona = persona
        self._npc = npc
        self._client: Client | None = None
        self._num_lines = 0
        self._turns: list[ChatTurn] = []
        self._said: str | None = None  # by the player, last
        self._is_answered = False

    async def open(self) -> PersonaInfo:
        """Connect, and find the persona. Raises `NpcError` if it is not there or cannot speak."""
        client = await self._connect()
        known = {persona.id: persona for persona in await client.personas()}
        found = known.get(self._persona)
        if found is None:
            raise PersonaUnknown(f"There is no persona '{self._persona}'.", f"There are {', '.join(sorted(known))}.")
        if found.error is not None:
            raise RequestError(found.error.code, found.error.message, found.error.hint)
        await client.open_npc(self._npc, self._persona)
        return found

    async def close(self) -> None:
        """Close the connection."""
        if self._client is not None:
            await self._client.close()

    async def say(self, text: str, seed: int | None, on_text: Callable[[str], None]) -> Reply:
        """Speak one line; `on_text` gets all of it that has come so far. A cancelled task cancels the line.

        A line that is not spoken to its end leaves no trace in what the NPC remembers. Raises `RequestError` if it is
        refused, `DisconnectedError` if the daemon is gone.
        """
        self._said, self._is_answered = text, False
        on_text("")  # from here on Ctrl-C is the line's
        line: dict[str, Any] = {"line": 1, "npc": self._npc, "input": {"text": text}}
        line |= {} if seed is None else {"sampling": {"seed": seed}}
        try:
            reply = await self._speak(line, on_text)
        except DisconnectedError:  # a daemon that was started anew, or a laptop that slept
            await self._reconnect()
            reply = await self._speak(line, on_text)
        if reply.is_said:
            turns = [ChatTurn(role="user", content=text), ChatTurn(role="assistant", content=reply.text)]
            self._turns = [*self._turns, *turns][-MAX_TURNS:]
            self._is_answered = True
        return reply

    async def take_back(self) -> str | None:
        """What the player said last, as if it had not been answered; None at the beginning."""
        if self._is_answered:
            assert self._client is not None
            self._turns, self._is_answered = self._turns[:-2], False
            try:
                await self._client.ask(NpcHistory(npc=self._npc, op="pop"))
            except DisconnectedError:
                await self._reconnect()
        return self._said

    async def _connect(self) -> Client:
        await self.close()
        target = self._find()
        self._client = await Client.connect(target.url, token=target.token, name="npc-runtime-chat")
        return self._client

    async def _reconnect(self) -> None:
        client = await self._connect()
        await client.open_npc(self._npc, self._persona, history=self._turns)

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
