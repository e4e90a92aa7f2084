"""A client's side of one `generate`: what becomes of its lines, as it comes."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

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
        self._events: asyncio.Queue[BatchEvent] = asyncio.Queue(MAX_BATCH_EVENTS)
        self._failure: asyncio.Future[NpcError] = asyncio.get_running_loop().create_future()
        self._is_over = False

    @property
    def rejected(self) -> list[wire.AcceptedItem]:
        """The lines that were not accepted, with the reason."""
        return [item for item in self.accepted.items if item.status == "rejected"] if self.accepted else []

    async def cancel(self) -> None:
        """Cancel what still runs; every line still gets its end."""
        await self._send(wire.Cancel(batch=self.id))

    async def put(self, event: BatchEvent) -> None:
        """Take an event from the connection."""
        await self._events.put(event)

    def fail(self, reason: NpcError) -> None:
        """The connection is gone: whoever iterates gets what came before, then the reason."""
        if not self._failure.done():
            self._failure.set_result(reason)

    async def __aiter__(self) -> AsyncIterator[BatchEvent]:
        while not self._is_over:
            event = await self._next()
            self._is_over = isinstance(event, wire.BatchEnd)
            yield event

    async def _next(self) -> BatchEvent:
        if self._events.empty() and not self._failure.done():
            getter = asyncio.ensure_future(self._events.get())
            either: list[asyncio.Future[Any]] = [getter, self._failure]
            try:
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                if getter.done():
                    return getter.result()
            finally:
                getter.cancel()
        if self._events.empty():
            raise self._failure.result()
        return self._events.get_nowait()
