"""The async Python client; the shape that the C# and Godot clients copy.

    async with await Client.connect("ws://127.0.0.1:4780/v1", token=token) as client:
        batch = await client.generate([{"line": 1, "persona": "odo", "input": {"text": "The king is dead!"}}])
        async for event in batch:
            ...

`say` is the short form for one line.
"""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Any, Self

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, WebSocketException
from websockets.typing import Subprotocol

from npc_runtime import __version__, codec
from npc_runtime import protocol as wire
from npc_runtime.errors import DisconnectedError, InvalidError, NpcError, ProtocolError

__all__ = ["Batch", "BatchEvent", "Client", "RequestError"]

ANSWER_TIMEOUT_S = 10.0
WARMUP_TIMEOUT_S = 120.0  # dozens of prompts on a laptop that speaks meanwhile
CLOSE_TIMEOUT_S = 1.0  # unread frames can hide the answer to a close
MAX_BATCH_EVENTS = 4_096

BatchEvent = wire.LineStart | wire.DeltaItem | wire.LineEnd | wire.BatchEnd


class RequestError(NpcError):
    """The daemon answered a request with an error."""

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.code = code


class Batch:
    """The lines of one `generate`. Iterate it to the end: it yields starts, deltas and ends, `BatchEnd` last.

    Events wait in a bounded queue; a batch that nobody reads holds up the others of its connection.
    """

    def __init__(self, client: "Client", batch_id: wire.Id) -> None:
        self.id = batch_id
        self.accepted: wire.Accepted | None = None
        self._client = client
        self._events: asyncio.Queue[BatchEvent] = asyncio.Queue(MAX_BATCH_EVENTS)
        self._failure: asyncio.Future[NpcError] = asyncio.get_running_loop().create_future()
        self._is_over = False

    @property
    def rejected(self) -> list[wire.AcceptedItem]:
        """The lines that were not accepted, with the reason."""
        return [item for item in self.accepted.items if item.status == "rejected"] if self.accepted else []

    async def cancel(self) -> None:
        """Cancel what still runs; every line still gets its end."""
        await self._client.send(wire.Cancel(batch=self.id))

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


class Client:
    """A connection to a daemon. Use it as an async context manager."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._subprotocol = str(socket.subprotocol)
        self._ids = itertools.count(1)
        self._answers: dict[wire.Id, asyncio.Future[dict[str, Any]]] = {}
        self._batches: dict[wire.Id, Batch] = {}
        self._line_owners: dict[wire.Id, Batch] = {}
        self._parts: list[str] = []
        self._reader: asyncio.Task[None] | None = None
        self.welcome: wire.Welcome

    @classmethod
    async def connect(
        cls,
        url: str,
        *,
        token: str | None = None,
        name: str = "npc-runtime-python",
        json_frames: bool = False,
        tick_ms: float | None = None,
    ) -> Self:
        """Open a connection and wait for `welcome`. Raises `DisconnectedError` with the daemon's reason.

        `tick_ms` is the time between texts of a line, at least; None leaves it to the daemon, 0 is every token.
        """
        subprotocol = Subprotocol(wire.SUBPROTOCOLS[1 if json_frames else 0])
        try:
            socket = await connect(
                url,
                subprotocols=[subprotocol],
                compression=None,
                ping_interval=None,
                close_timeout=CLOSE_TIMEOUT_S,
                proxy=None,
            )
        except (OSError, WebSocketException, TimeoutError) as error:
            raise DisconnectedError(f"No daemon answers at {url} ({error}).", "Is it running?") from error
        client = cls(socket)
        try:
            client.welcome = await client._open(token, name, tick_ms)
        except BaseException:
            await socket.close()
            raise
        client._reader = asyncio.create_task(client._read())
        return client

    async def _open(self, token: str | None, name: str, tick_ms: float | None) -> wire.Welcome:
        info = wire.ClientInfo(name=name, version=__version__)
        want = wire.Want() if tick_ms is None else wire.Want(tick_ms=tick_ms)
        await self.send(wire.Hello(protocol=wire.PROTOCOL_VERSION, token=token, client=info, want=want))
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                message = codec.parse_server(codec.decode(await self._socket.recv(), self._subprotocol))
        except ConnectionClosed as error:
            raise _disconnected(error) from error
        except TimeoutError as error:
            raise DisconnectedError(f"The daemon did not answer hello within {ANSWER_TIMEOUT_S:.0f} s.") from error
        if not isinstance(message, wire.Welcome):
            raise ProtocolError(f"The daemon answered hello with {message.type}.", "Is it a daemon of ours?")
        return message

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; what still runs is cancelled."""
        if self._reader is not None:
            self._reader.cancel()  # it may be waiting for a batch that nobody reads
            await asyncio.gather(self._reader, return_exceptions=True)
        await self._socket.close()

    async def generate(self, lines: Sequence[dict[str, Any]], *, batch: wire.Id | None = None) -> Batch:
        """Send lines (`LineRequest` maps) as one batch and wait until they are accepted or rejected."""
        batch_id = f"b{next(self._ids)}" if batch is None else batch
        if batch_id in self._batches:
            raise InvalidError(f"batch {batch_id!r} is still running.", "Give every batch its own id.")
        handle = Batch(self, batch_id)
        self._batches[batch_id] = handle
        message_id = next(self._ids)
        try:
            body = await self._ask(wire.Generate(id=message_id, batch=batch_id, lines=list(lines)), message_id)
        except BaseException:
            self._batches.pop(batch_id, None)
            raise
        handle.accepted = wire.Accepted.model_validate(body)
        return handle

    async def say(self, persona: str, text: str, **fields: Any) -> wire.LineEnd:
        """Speak one line and wait for its end. Raises `RequestError` if it is not accepted."""
        line = f"l{next(self._ids)}"
        batch = await self.generate([{"line": line, "persona": persona, "input": {"text": text}, **fields}])
        ends = [event async for event in batch if isinstance(event, wire.LineEnd)]
        for item in batch.rejected:
            raise RequestError(item.code or "internal", item.message or "", item.hint or "")
        return ends[0]

    async def cancel(self, lines: Sequence[wire.Id]) -> None:
        """Cancel lines; unknown ids are ignored."""
        await self.send(wire.Cancel(lines=list(lines)))

    async def personas(self) -> list[wire.PersonaInfo]:
        """List the daemon's personas."""
        message_id = next(self._ids)
        body = await self._ask(wire.PersonaList(id=message_id), message_id)
        return [wire.PersonaInfo.model_validate(item) for item in body["personas"]]

    async def warmup(self, personas: Sequence[str], *, timeout_s: float = WARMUP_TIMEOUT_S) -> list[wire.WarmupItem]:
        """Make personas ready for their first line and wait until all are; each is `ready` or `rejected`."""
        message_id = next(self._ids)
        message = wire.Warmup(id=message_id, personas=list(personas))
        body = await self._ask(message, message_id, timeout_s=timeout_s)
        return [wire.WarmupItem.model_validate(item) for item in body["personas"]]

    async def status(self) -> dict[str, Any]:
        """Ask how the daemon is."""
        message_id = next(self._ids)
        return await self._ask(wire.Status(id=message_id), message_id)

    async def send(self, message: wire.ClientMessage) -> None:
        """Send one message. Raises `DisconnectedError`."""
        try:
            await self._socket.send(codec.encode(message, self._subprotocol))
        except ConnectionClosed as error:
            raise _disconnected(error) from error

    async def _ask(
        self, message: wire.ClientMessage, message_id: wire.Id, *, timeout_s: float = ANSWER_TIMEOUT_S
    ) -> dict[str, Any]:
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._answers[message_id] = answer
        try:
            await self.send(message)
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError as error:
            raise DisconnectedError(f"The daemon did not answer {message.type} within {timeout_s:.0f} s.") from error
        finally:
            self._answers.pop(message_id, None)

    async def _read(self) -> None:
        reason: NpcError = DisconnectedError("The connection was closed.")
        try:
            async for frame in self._socket:
                await self._dispatch(codec.parse_server(codec.decode(frame, self._subprotocol)))
        except ConnectionClosed as error:
            reason = _disconnected(error)
        except NpcError as error:
            reason = error
        finally:
            for answer in self._answers.values():
                if not answer.done():
                    answer.set_exception(reason)
            for batch in self._batches.values():
                batch.fail(reason)

    async def _dispatch(self, message: wire.ServerMessage) -> None:
        match message:
            case wire.Accepted():
                self._take_accepted(message)
            case wire.Reply():
                self._take_reply(message)
            case wire.Error():
                self._fail(message)
            case wire.Delta():
                for delta in message.items:
                    await self._hand(self._line_owners.get(delta.line), delta)
            case wire.LineStart():
                await self._hand(self._line_owners.get(message.line), message)
            case wire.LineEnd():
                await self._hand(self._line_owners.pop(message.line, None), message)
            case wire.BatchEnd():
                await self._hand(self._batches.pop(message.batch, None), message)
            case wire.Welcome():
                raise ProtocolError("The daemon said welcome twice.")

    async def _hand(self, batch: Batch | None, event: BatchEvent) -> None:
        """Give a batch its event; one that was given up meanwhile (its `accepted` came too late) gets none."""
        if batch is not None:
            await batch.put(event)

    def _take_accepted(self, message: wire.Accepted) -> None:
        owner = self._batches.get(message.batch)
        if owner is not None:
            self._line_owners.update((item.line, owner) for item in message.items if item.status == "queued")
        self._answer(message.re, message.model_dump())

    def _take_reply(self, message: wire.Reply) -> None:
        """Answers come whole, or as parts in order."""
        if message.parts is None:
            self._answer(message.re, message.body or {})
            return
        self._parts.append(message.data or "")
        if len(self._parts) == message.parts:
            text, self._parts = "".join(self._parts), []
            self._answer(message.re, json.loads(text))

    def _answer(self, re: wire.Id | None, body: dict[str, Any]) -> None:
        future = self._answers.get(re) if re is not None else None
        if future is not None and not future.done():
            future.set_result(body)

    def _fail(self, message: wire.Error) -> None:
        future = self._answers.get(message.re) if message.re is not None else None
        if future is not None and not future.done():
            future.set_exception(RequestError(message.code, message.message, message.hint))


def _disconnected(error: ConnectionClosed) -> DisconnectedError:
    code = error.rcvd.code if error.rcvd else 1006
    reason = error.rcvd.reason if error.rcvd and error.rcvd.reason else "the connection was lost"
    return DisconnectedError(f"The daemon closed the connection ({code}): {reason}.")
