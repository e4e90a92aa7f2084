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
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, WebSocketException
from websockets.typing import Subprotocol

from npc_runtime import __version__, codec
from npc_runtime import protocol as wire
from npc_runtime.batch import Batch, BatchEvent
from npc_runtime.errors import DisconnectedError, InvalidError, NpcError, ProtocolError

__all__ = ["Batch", "BatchEvent", "Client", "Notice", "RequestError"]

ANSWER_TIMEOUT_S = 10.0
WARMUP_TIMEOUT_S = 120.0  # dozens of prompts on a laptop that speaks meanwhile
CLOSE_TIMEOUT_S = 1.0  # unread frames can hide the answer to a close
MAX_NOTICES = 256

Notice = wire.Event | wire.Stats | wire.Watched
"""What a daemon sends unasked."""


class RequestError(NpcError):
    """The daemon answered a request with an error."""

    def __init__(self, code: str, message: str, hint: str = "", *, retryable: bool = False) -> None:
        super().__init__(message, hint)
        self.code = code
        self.retryable = retryable


class Client:
    """A connection to a daemon. Use it as an async context manager."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._subprotocol = str(socket.subprotocol)
        self._ids = itertools.count(1)
        self._answers: dict[wire.Id, asyncio.Future[dict[str, Any]]] = {}
        self._batches: dict[wire.Id, Batch] = {}
        self._line_owners: dict[wire.Id, Batch] = {}
        self._parts: dict[wire.Id | None, list[str]] = {}
        self._notices: deque[Notice] = deque(maxlen=MAX_NOTICES)
        self._has_notice = asyncio.Event()
        self._failure: NpcError | None = None
        self._farewells: set[asyncio.Task[None]] = set()
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
        project: str | None = None,
        owner_pid: int | None = None,
        resume: str | None = None,
        want: wire.Want | None = None,
        on_loading: Callable[[wire.Event], None] = lambda event: None,
    ) -> Self:
        """Open a connection and wait for `welcome`. Raises `DisconnectedError` with the daemon's reason.

        `resume` is the `welcome.session` of a connection that was lost. While the daemon loads its base, `on_loading`
        is told how far it is.
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
            info = wire.ClientInfo(name=name, version=__version__)
            hello = wire.Hello(
                protocol=wire.PROTOCOL_VERSION,
                token=token,
                client=info,
                project=project,
                owner_pid=owner_pid,
                resume=resume,
                want=want or wire.Want(),
            )
            client.welcome = await client._open(hello, on_loading)
        except BaseException:
            await socket.close()
            raise
        client._reader = asyncio.create_task(client._read())
        return client

    async def _open(self, hello: wire.Hello, on_loading: Callable[[wire.Event], None]) -> wire.Welcome:
        await self.send(hello)
        while True:
            try:
                async with asyncio.timeout(ANSWER_TIMEOUT_S):
                    frame = await self._socket.recv()
            except ConnectionClosed as error:
                raise _disconnected(error) from error
            except TimeoutError as error:
                raise DisconnectedError(f"The daemon did not answer hello within {ANSWER_TIMEOUT_S:.0f} s.") from error
            message = codec.parse_server(codec.decode(frame, self._subprotocol))
            if isinstance(message, wire.Welcome):
                return message
            if isinstance(message, wire.Event):
                on_loading(message)
            elif message is not None:
                raise ProtocolError(f"The daemon answered hello with {message.type}.", "Is it a daemon of ours?")

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
        handle = Batch(batch_id, self.send)
        self._batches[batch_id] = handle
        message_id = next(self._ids)
        try:
            body = await self._ask(wire.Generate(id=message_id, batch=batch_id, lines=list(lines)), message_id)
        except BaseException:
            self._batches.pop(batch_id, None)
            self._give_up(batch_id)
            raise
        handle.accepted = wire.Accepted.model_validate(body)
        return handle

    def _give_up(self, batch_id: wire.Id) -> None:
        """Have the daemon cancel what nobody waits for any more."""

        async def cancel() -> None:
            with suppress(NpcError):
                await self.send(wire.Cancel(batch=batch_id))

        task = asyncio.ensure_future(cancel())
        self._farewells.add(task)
        task.add_done_callback(self._farewells.discard)

    async def say(self, persona: str, text: str, **fields: Any) -> wire.LineEnd:
        """Have a persona speak one line, and wait for its end. Raises `RequestError` if it is not accepted."""
        return await self._speak({"persona": persona, "input": {"text": text}, **fields})

    async def talk(self, npc: str, text: str, **fields: Any) -> wire.LineEnd:
        """Say something to an open NPC and wait for the end of its line; it remembers both. Raises as `say`."""
        return await self._speak({"npc": npc, "input": {"text": text}, **fields})

    async def _speak(self, request: dict[str, Any]) -> wire.LineEnd:
        batch = await self.generate([{"line": f"l{next(self._ids)}", **request}])
        ends = [event async for event in batch if isinstance(event, wire.LineEnd)]
        for item in batch.rejected:
            raise RequestError(
                item.code or "internal", item.message or "", item.hint or "", retryable=bool(item.retryable)
            )
        return ends[0]

    async def open_npc(
        self,
        npc: str,
        persona: str,
        *,
        npc_vars: Mapping[str, bool | int | float | str] | None = None,
        history: Sequence[wire.ChatTurn] | None = None,
    ) -> None:
        """Bring an NPC to life under the game's own id for it; one that is open keeps its history."""
        turns = None if history is None else list(history)
        await self.ask(wire.NpcOpen(npc=npc, persona=persona, vars=dict(npc_vars or {}), history=turns))

    async def close_npc(self, npc: str) -> None:
        """Forget an NPC and its history."""
        await self.ask(wire.NpcClose(npc=npc))

    async def history(self, npc: str) -> list[wire.ChatTurn]:
        """What an NPC remembers."""
        body = await self.ask(wire.NpcHistory(npc=npc, op="get"))
        return [wire.ChatTurn.model_validate(turn) for turn in body["messages"]]

    async def snapshot(self, npc: str) -> str:
        """An NPC as a text for a save game."""
        return str((await self.ask(wire.NpcSnapshot(npc=npc)))["state"])

    async def restore(self, npc: str, state: str) -> None:
        """Bring back an NPC as `snapshot` saw it."""
        await self.ask(wire.NpcRestore(npc=npc, state=state))

    async def configure(self, *, max_tokens_per_s: float | None = None, paused: bool = False) -> dict[str, Any]:
        """Give the game more of the device, while this connection is open; returns what holds for all."""
        return await self.ask(wire.Config(max_tokens_per_s=max_tokens_per_s, paused=paused))

    async def cancel(self, lines: Sequence[wire.Id]) -> None:
        """Cancel lines; unknown ids are ignored."""
        await self.send(wire.Cancel(lines=list(lines)))

    async def personas(self) -> list[wire.PersonaInfo]:
        """List the daemon's personas."""
        body = await self.ask(wire.PersonaList())
        return [wire.PersonaInfo.model_validate(item) for item in body["personas"]]

    async def warmup(self, personas: Sequence[str], *, timeout_s: float = WARMUP_TIMEOUT_S) -> list[wire.WarmupItem]:
        """Make personas ready for their first line and wait until all are; each is `ready` or `rejected`."""
        body = await self.ask(wire.Warmup(personas=list(personas)), timeout_s=timeout_s)
        return [wire.WarmupItem.model_validate(item) for item in body["personas"]]

    async def status(self) -> dict[str, Any]:
        """Ask how the daemon is."""
        return await self.ask(wire.Status())

    async def ask(self, message: wire.ClientMessage, *, timeout_s: float = ANSWER_TIMEOUT_S) -> dict[str, Any]:
        """Send a question, whatever its `id`, and wait for the body of the `reply`. Raises `RequestError`."""
        message_id = next(self._ids)
        return await self._ask(message.model_copy(update={"id": message_id}), message_id, timeout_s=timeout_s)

    async def notices(self) -> AsyncIterator[Notice]:
        """What the daemon sends unasked, until the connection ends; of what nobody took in time the oldest is lost."""
        while True:
            while self._notices:
                yield self._notices.popleft()
            if self._reader is None or self._reader.done():
                return
            self._has_notice.clear()
            await self._has_notice.wait()

    async def send(self, message: wire.ClientMessage) -> None:
        """Send one message. Raises `DisconnectedError`, or why the connection was given up."""
        if self._failure is not None:
            raise self._failure
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
                message = codec.parse_server(codec.decode(frame, self._subprotocol))
                if message is not None:
                    await self._dispatch(message)
        except ConnectionClosed as error:
            reason = _disconnected(error)
        except NpcError as error:
            reason = error
            await self._socket.close()  # whoever asks next is told at once
        finally:
            self._failure = reason
            for answer in self._answers.values():
                if not answer.done():
                    answer.set_exception(reason)
            for batch in self._batches.values():
                batch.fail(reason)
            asyncio.get_running_loop().call_soon(self._has_notice.set)  # when this task is over: nothing more comes

    async def _dispatch(self, message: wire.ServerMessage) -> None:
        match message:
            case wire.Accepted():
                self._take_accepted(message)
            case wire.Reply():
                self._take_reply(message)
            case wire.Error():
                self._fail(message)
            case wire.Event() | wire.Stats() | wire.Watched():
                self._notices.append(message)
                self._has_notice.set()
            case wire.Welcome():
                raise ProtocolError("The daemon said welcome twice.")
            case _:
                await self._dispatch_line(message)

    async def _dispatch_line(self, message: wire.Delta | wire.LineStart | wire.LineEnd | wire.BatchEnd) -> None:
        match message:
            case wire.Delta():
                for delta in message.items:
                    await self._hand(self._line_owners.get(delta.line), delta)
            case wire.LineStart():
                await self._hand(self._line_owners.get(message.line), message)
            case wire.LineEnd():
                await self._hand(self._line_owners.pop(message.line, None), message)
            case wire.BatchEnd():
                await self._hand(self._batches.pop(message.batch, None), message)

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
        parts = self._parts.setdefault(message.re, [])
        parts.append(message.data or "")
        if len(parts) == message.parts:
            del self._parts[message.re]
            self._answer(message.re, json.loads("".join(parts)))

    def _answer(self, re: wire.Id | None, body: dict[str, Any]) -> None:
        future = self._answers.get(re) if re is not None else None
        if future is not None and not future.done():
            future.set_result(body)

    def _fail(self, message: wire.Error) -> None:
        future = self._answers.get(message.re) if message.re is not None else None
        if future is not None and not future.done():
            future.set_exception(RequestError(message.code, message.message, message.hint, retryable=message.retryable))


def _disconnected(error: ConnectionClosed) -> DisconnectedError:
    code = error.rcvd.code if error.rcvd else 1006
    reason = error.rcvd.reason if error.rcvd and error.rcvd.reason else "the connection was lost"
    return DisconnectedError(f"The daemon closed the connection ({code}): {reason}.")
