"""The asyncio shell: sockets, who of them is let in, and the one bridge to the engine thread.

What is decided about messages is decided in `session`; this module performs its effects. `gate` says who may come in,
`pages` what plain HTTP is answered.
"""

import asyncio
import itertools
import logging
import secrets
import socket
import time
from collections import defaultdict
from collections.abc import Hashable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request as HttpRequest
from websockets.http11 import Response
from websockets.typing import Subprotocol

from npc_runtime import codec
from npc_runtime import protocol as wire
from npc_runtime.gate import Gate
from npc_runtime.effects import Close, Effect, Send, SendStatus, Stop, Submit
from npc_runtime.engine.core import Ended, EngineStats, Request, SamplingParams, Spoken, Started, StepOutput
from npc_runtime.engine.engine import Engine
from npc_runtime.errors import OverloadError, WireError
from npc_runtime.line import Job, Renderer
from npc_runtime.metrics import Metrics
from npc_runtime.pages import Health, Pages
from npc_runtime.persona import Library
from npc_runtime.session import DaemonInfo, Session

__all__ = ["NpcServer"]

logger = logging.getLogger(__name__)

HELLO_TIMEOUT_S = 5.0
SEND_TIMEOUT_S = 10.0
CLOSE_TIMEOUT_S = 0.8
FLUSH_TIMEOUT_S = 0.5
REPLACE_TIMEOUT_S = 30.0
MAX_CONNECTIONS = 16
MAX_OUTBOX = 2_048  # messages; more than all ends of a full connection
CONGESTED_OUTBOX = 16  # from here on deltas wait and merge
SEED_BITS = 53


class NpcServer:
    """All connections of one engine. `start` binds nothing: the caller hands in a bound socket."""

    def __init__(self, *, info: DaemonInfo, library: Library, render: Renderer, gate: Gate) -> None:
        self._info = info
        self._library = library
        self._render = render
        self.gate = gate
        build = {"version": info.version, "device": info.device, "backend": info.backend, "base": info.base.name}
        self.metrics = Metrics(lambda: self._health().figures, build=build)
        self._pages = Pages(
            gate, self.metrics, version=info.version, needs_token=info.token is not None, health=self._health
        )
        self.is_over = asyncio.Event()  # nothing more will be generated
        self._engine: Engine | None = None
        self._server: Server | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._request_ids = itertools.count(1)
        self._session_ids = itertools.count(1)
        self._owners: dict[int, _Connection] = {}
        self._connections: set[_Connection] = set()

    async def start(self, sock: socket.socket, engine: Engine) -> None:
        """Serve on this socket with this engine; `on_step` must be its callback."""
        self._loop = asyncio.get_running_loop()
        self._engine = engine
        engine.start()
        self._server = await serve(
            self._handle,
            sock=sock,
            process_request=self._answer,
            process_response=lambda _, __, response: self._pages.protect(response),
            select_subprotocol=_select_subprotocol,
            create_connection=_visitors_of(self.gate),
            open_timeout=HELLO_TIMEOUT_S,
            compression=None,
            close_timeout=CLOSE_TIMEOUT_S,
            ping_interval=None,  # an editor at a breakpoint answers no ping; a dead peer on loopback is reported
            max_size=wire.MAX_CLIENT_FRAME,
            server_header=None,
        )

    async def close(self, reason: str) -> None:
        """Tell every client that the daemon goes, and stop the engine; both get the same time."""
        assert self._server is not None
        assert self._engine is not None
        if self._engine.has_died:
            await self._flush()
        self._server.close(code=wire.CloseCode.RESTART, reason=reason)
        closed = asyncio.ensure_future(self._server.wait_closed())
        stopped = asyncio.ensure_future(asyncio.to_thread(self._engine.close, CLOSE_TIMEOUT_S))
        await asyncio.wait([closed, stopped], timeout=CLOSE_TIMEOUT_S)
        for connection in self._connections:  # a client that does not read does not answer the close either
            connection.abort()

    async def _flush(self) -> None:
        """Wait, a moment at most, until everybody has got what was said last: that their lines are over, and why."""
        unsent = [asyncio.ensure_future(connection.flushed()) for connection in self._connections]
        if unsent:
            _, pending = await asyncio.wait(unsent, timeout=FLUSH_TIMEOUT_S)
            for task in pending:
                task.cancel()

    def on_step(self, step: StepOutput) -> None:
        """Take a step's outcome from the engine thread to the loop: the one place where the two meet."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._deliver, step)
        except RuntimeError:  # the loop is closed: nobody is left to be told
            logger.debug("a step of the engine came after the loop was closed")

    def on_engine_death(self) -> None:
        """Take the end of the engine thread to the loop."""
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self.is_over.set)

    def _deliver(self, step: StepOutput) -> None:
        events: defaultdict[_Connection, list[Started | Spoken | Ended]] = defaultdict(list)
        for event in step.events:
            owner = self._owners.get(event.request_id)
            if owner is not None:
                events[owner].append(event)
            if isinstance(event, Ended):
                self._owners.pop(event.request_id, None)
        forwards: defaultdict[_Connection, list[wire.Id]] = defaultdict(list)
        for group in step.groups:
            owner, batch_id = _split_group(group)
            forwards[owner].append(batch_id)
        for connection in self._connections & (events.keys() | forwards.keys()):
            try:
                connection.on_step(events[connection], forwards[connection])
            except Exception:  # a defect that one client met must not cost the others their ends
                logger.exception("a connection could not take a step's outcome")
                connection.abort()

    def submit(self, owner: "_Connection", jobs: Iterable[Job]) -> None:
        """Give a connection's lines to the engine as one command."""
        assert self._engine is not None
        requests = [_to_request(job, None if job.batch is None else (owner, job.batch)) for job in jobs]
        self._owners.update((request.id, owner) for request in requests)
        self._engine.submit(requests)

    def cancel(self, request_ids: Iterable[int]) -> None:
        """Cancel lines in the engine."""
        assert self._engine is not None
        self._engine.cancel(request_ids)

    async def replace_adapter(self, name: str, parts: list[tuple[Path, float]]) -> None:
        """Have the engine use new files of an adapter from the next line on. Raises `WireError`: they are not used."""
        assert self._engine is not None
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[WireError | None] = loop.create_future()

        def finish(error: WireError | None) -> None:
            if not answer.done():
                answer.set_result(error)

        def on_done(error: WireError | None) -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(finish, error)

        self._engine.replace_adapter(name, parts, on_done)
        try:
            async with asyncio.timeout(REPLACE_TIMEOUT_S):
                error = await answer
        except TimeoutError as late:
            raise OverloadError(f"The adapter of {name} was not read in time.", "Save it again.") from late
        if error is not None:
            raise error

    def announce(self, persona_id: str) -> None:
        """Tell every client that a persona's files were saved."""
        for connection in self._connections:
            connection.announce(persona_id)

    def status(self) -> dict[str, Any]:
        """The body of `reply` to `status`."""
        assert self._engine is not None
        stats: EngineStats = self._engine.stats()
        return {
            "active": stats.num_running,
            "queued": stats.num_waiting,
            "tokens_per_s": round(stats.tokens_per_s, 1),
            "tokens": stats.num_tokens,
            "forwards": stats.num_forwards,
            "kv_used": stats.kv_blocks_used / stats.kv_blocks_total,
            "kv_cached": stats.kv_blocks_cached / stats.kv_blocks_total,
            "preempted": stats.num_preempted,
            "adapters": list(stats.adapters_resident),
            "personas": len(self._library),
            "connections": self._num_open,
        }

    async def _handle(self, socket_: ServerConnection) -> None:
        refusal = self._refusal(socket_)
        if refusal is not None:
            self.metrics.connection_refused(refusal[0])
            await socket_.close(*refusal)
            return
        session = Session(
            name=f"s{next(self._session_ids)}",
            subprotocol=str(socket_.subprotocol),
            info=self._info,
            library=self._library,
            render=self._render,
            new_request_id=self._request_ids.__next__,
            new_seed=lambda: secrets.randbits(SEED_BITS),
        )
        connection = _Connection(socket_, session, self)
        self._connections.add(connection)
        try:
            await connection.run()
        finally:
            self._connections.discard(connection)

    def _refusal(self, socket_: ServerConnection) -> tuple[int, str] | None:
        """Why this connection is closed at once. After accepting, since browsers and Mono see no other reason."""
        assert socket_.request is not None
        headers = socket_.request.headers
        origins = headers.get_all("Origin")
        if not self.gate.knows_origin(origins, headers["Host"]):
            logger.warning("refused a connection from the web page %s", str(origins)[:200])
            return wire.CloseCode.ORIGIN, "this origin may not connect"
        if socket_.subprotocol not in wire.SUBPROTOCOLS:
            return wire.CloseCode.PROTOCOL, f"offer a subprotocol: {' or '.join(wire.SUBPROTOCOLS)}"
        return None

    async def _answer(self, socket_: ServerConnection, request: HttpRequest) -> Response | None:
        if socket_.protocol.eof_sent:  # a second request in the same bytes: the library has given this socket up
            socket_.transport.abort()
            await socket_.wait_closed()
        return self._pages.answer(request)

    def let_in(self, socket_: ServerConnection) -> bool:
        """Whether there is room for a client that has just said a valid hello; until then it took no one's place."""
        self.gate.leave(socket_.transport)
        return self._num_open <= MAX_CONNECTIONS

    @property
    def _num_open(self) -> int:
        return sum(connection.is_open for connection in self._connections)

    def _health(self) -> Health:
        if self._engine is None:
            return Health("loading", {})
        return Health("the engine thread died" if self._engine.has_died else "ok", self.status())


class _Connection:
    """One socket: reads frames, performs effects, writes from a bounded outbox."""

    def __init__(self, socket_: ServerConnection, session: Session, server: NpcServer) -> None:
        self._socket = socket_
        self._session = session
        self._server = server
        self._outbox: asyncio.Queue[wire.ServerMessage | Close] = asyncio.Queue(MAX_OUTBOX)
        self._timer: asyncio.TimerHandle | None = None
        self._was_open = False

    @property
    def is_open(self) -> bool:
        """Whether its client said a valid hello and is still there."""
        return self._session.is_open

    async def run(self) -> None:
        """Serve until either side closes; then cancel what runs."""
        writer = asyncio.create_task(self._write())
        reader = asyncio.create_task(self._read())
        try:
            await asyncio.wait([writer, reader], return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._perform(self._session.disconnect())
            if self._timer is not None:
                self._timer.cancel()
            for task in (reader, writer):
                task.cancel()
            for outcome in await asyncio.gather(reader, writer, return_exceptions=True):
                if isinstance(outcome, Exception) and not isinstance(outcome, ConnectionClosed):
                    logger.error("%s failed", self._session.name, exc_info=outcome)
            logger.info("%s closed (%s)", self._session.name, self._socket.close_code)
            tell = self._server.metrics.connection_closed if self._was_open else self._server.metrics.connection_refused
            tell(self._socket.close_code)

    def on_step(self, events: Iterable[Started | Spoken | Ended], forwards: Iterable[wire.Id]) -> None:
        """Hand a step's events to the session and perform what it answers."""
        now = time.monotonic()
        session = self._session
        session.on_forward(forwards)
        effects: list[Effect] = []
        for event in events:
            match event:
                case Started():
                    effects += session.on_started(event)
                case Spoken():
                    effects += session.on_spoken(event)
                case Ended():
                    effects += session.on_ended(event, now)
        self._perform([*effects, *session.after_step(now)])
        self._plan_tick(now)

    def announce(self, persona_id: str) -> None:
        """Have the session tell its client that a persona's files were saved."""
        self._perform(self._session.announce(persona_id))

    async def flushed(self) -> None:
        """Wait until everything in the outbox was sent."""
        await self._outbox.join()

    def abort(self) -> None:
        """Drop the socket without a close handshake."""
        self._socket.transport.abort()

    async def _read(self) -> None:
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                self._take(await self._socket.recv())
        except TimeoutError:
            reason = f"no hello within {HELLO_TIMEOUT_S:.0f} s"
            await self._socket.close(wire.CloseCode.HELLO_TIMEOUT, reason)
            return
        except ConnectionClosed:
            return
        async for frame in self._socket:
            self._take(frame)

    def _take(self, frame: bytes | str) -> None:
        effects = self._session.receive(frame, time.monotonic())
        if self._session.is_open and not self._was_open:
            self._was_open = True
            self._server.metrics.connection_opened(self._session.subprotocol)
            logger.info("%s opened (%s)", self._session.name, self._session.subprotocol)
            if not self._server.let_in(self._socket):
                reason = f"{MAX_CONNECTIONS} connections are open already"
                effects = [*self._session.disconnect(), Close(wire.CloseCode.TOO_MANY, reason)]
        self._perform(effects)

    async def _write(self) -> None:
        try:
            while True:
                message = await self._outbox.get()
                if isinstance(message, Close):
                    if message.code == wire.CloseCode.AUTH:
                        await asyncio.sleep(self._server.gate.delay_wrong_token(time.monotonic()))
                    await self._socket.close(message.code, message.reason)
                    return
                async with asyncio.timeout(SEND_TIMEOUT_S):
                    await self._socket.send(codec.encode(message, self._session.subprotocol))
                self._outbox.task_done()
                self._session.is_congested = self._outbox.qsize() > CONGESTED_OUTBOX
                self._plan_tick(time.monotonic())
        except TimeoutError:
            logger.warning("%s did not read for %.0f s; dropped", self._session.name, SEND_TIMEOUT_S)
            self.abort()
        except ConnectionClosed:
            return

    def _perform(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            match effect:
                case Send(message, persona):
                    self._server.metrics.sent(message, persona)
                    self._enqueue(message)
                case Close():
                    self._enqueue(effect)
                case SendStatus(re):
                    self._perform(self._session.reply(re, self._server.status()))
                case Submit(jobs):
                    self._server.submit(self, jobs)
                case Stop(request_ids, dropped):
                    self._server.metrics.lines_dropped(dropped)
                    self._server.cancel(request_ids)
        self._session.is_congested = self._outbox.qsize() > CONGESTED_OUTBOX

    def _enqueue(self, message: wire.ServerMessage | Close) -> None:
        try:
            self._outbox.put_nowait(message)
        except asyncio.QueueFull:
            logger.warning("%s reads too slowly; dropped", self._session.name)
            self.abort()

    def _plan_tick(self, now: float) -> None:
        due = self._session.next_tick
        if due is not None and self._timer is None and not self._session.is_congested:
            self._timer = asyncio.get_running_loop().call_later(max(due - now, 0.0), self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        now = time.monotonic()
        self._perform(self._session.tick(now))
        self._plan_tick(now)


def _select_subprotocol(_: ServerConnection, offered: Iterable[Subprotocol]) -> Subprotocol | None:
    """Take ours if it is offered; else echo the first, so that the client can be told why it is closed."""
    offers = list(offered)
    ours = [name for name in offers if name in wire.SUBPROTOCOLS]
    return next(iter(ours or offers), None)


def _visitors_of(gate: Gate) -> type[ServerConnection]:
    """Connections that the gate knows of from the moment the system accepts them, before a byte is read."""

    class Visitor(ServerConnection):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            gate.enter(self.transport)

        def connection_lost(self, exc: Exception | None) -> None:
            gate.leave(self.transport)
            super().connection_lost(exc)

    return Visitor


def _to_request(job: Job, group: Hashable) -> Request:
    sampling = job.sampling
    values = sampling.model_dump(exclude={"stop"})
    return Request(
        id=job.request_id,
        prompt_ids=job.prompt_ids,
        sampling=SamplingParams(**values, stop=tuple(sampling.stop or ()), soft_words=job.soft_words),
        arrival=job.arrival,
        adapter=job.adapter,
        group=group,
        priority=job.priority,
        deadline=None if job.deadline_ms is None else job.arrival + job.deadline_ms / 1000,
        is_warmup=job.batch is None,
    )


def _split_group(group: Hashable) -> tuple[_Connection, wire.Id]:
    assert isinstance(group, tuple)
    return group[0], group[1]
