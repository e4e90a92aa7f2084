"""A client's side of one `generate`: what becomes of its lines, as it comes."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable

from npc_runtime import protocol as wire
from npc_runtime.errors import NpcError

__all__ = ["Batch", "BatchEvent"]

MAX_BATCH_EVENTS = 4_096

BatchEvent = wire.LineStart | wire.DeltaItem | wire.LineEnd | wire.BatchEnd


class Batch:
    """The lines of one `generate`. Iterate it to the end: it yields starts, deltas and ends, `BatchEnd` last.

    Events wait in a bounded queue; a batch that nobody reads holds up the others of its connection.
    """

    def __init__(self, batch_id: wire.Id, send: Callable[[wire.ClientMessage], Awaitable[None]]) -> None:
        self.id = batch_id
        self.accepted: wire.Accepted | None = None
        self._send = send
        self._events: deque[BatchEvent] = deque()
        self._has_news = asyncio.Event()
        self._has_room = asyncio.Event()
        self._failure: NpcError | None = None
        self._is_over = False

    @property
    def rejected(self) -> list[wire.AcceptedItem]:
        """The lines that were not accepted, with the reason."""
        return [item for item in self.accepted.items if item.status == "rejected"] if self.accepted else []

    async def cancel(self) -> None:
        """Cancel what still runs; every line still gets its end."""
        await self._send(wire.Cancel(batch=self.id))

    async def put(self, event: BatchEvent) -> None:
        """Take an event from the connection, when there is room for it."""
        while len(self._events) >= MAX_BATCH_EVENTS:
            self._has_room.clear()
            await self._has_room.wait()
        self._events.append(event)
        self._has_news.set()

    def fail(self, reason: NpcError) -> None:
        """The connection is gone: whoever iterates gets what came before, then the reason."""
        self._failure = self._failure or reason
        self._has_news.set()

    async def __aiter__(self) -> AsyncIterator[BatchEvent]:
        while not self._is_over:
            event = await self._next()
            self._is_over = isinstance(event, wire.BatchEnd)
            yield event

    async def _next(self) -> BatchEvent:
        while not self._events:
            if self._failure is not None:
                raise self._failure
            self._has_news.clear()
            await self._has_news.wait()
        self._has_room.set()
        return self._events.popleft()
