"""The asyncio shell: connections, and the one bridge to the engine thread.

What is decided about messages is decided in `session`; `connection` performs its effects, here as far as they concern
more than one connection. `gate` says whose sockets are taken, `pages` what plain HTTP is answered.
"""

import asyncio
import itertools
import logging
import secrets
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.http11 import Request as HttpRequest
from websockets.http11 import Response
from websockets.typing import Subprotocol

from npc_runtime import protocol as wire
from npc_runtime.connection import Connection
from npc_runtime.door import Door
from npc_runtime.effects import Effect, PersonaMessage
from npc_runtime.engine.core import (
    AdapterEvicted,
    AdapterLoaded,
    Degraded,
    Ended,
    EndReason,
    Event,
    LineEngine,
    News,
    Request,
    SamplingParams,
    StepOutput,
)
from npc_runtime.errors import DeviceFailed, InternalError, OverloadError, WireError
from npc_runtime.figures import engine_figures
from npc_runtime.gate import HELLO_TIMEOUT_S, Gate
from npc_runtime.line import Job
from npc_runtime.metrics import Metrics
from npc_runtime.pages import Health, Pages
from npc_runtime.persona_folder import PersonaFolder
from npc_runtime.recording import Recorder
from npc_runtime.session import Session, clip_reason
from npc_runtime.stage import Stage

__all__ = ["NpcServer"]

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S, FLUSH_TIMEOUT_S, CLOSE_TIMEOUT_S = 0.8, 0.3, 0.6  # a stop takes less than two seconds
REPLACE_TIMEOUT_S = 30.0
STATS_S = 1.0
SEED_BITS = 53


class NpcServer:
    """All connections of one engine. `start` binds nothing: the caller hands in a bound socket."""

    def __init__(self, *, gate: Gate, door: Door, personas: PersonaFolder, version: str) -> None:
        self.gate = gate
        self.metrics = Metrics(lambda: self._health().figures)
        self._door = door
        self._pages = Pages(
            gate, self.metrics, version=version, needs_token=door.token is not None, health=self._health
        )
        self.is_over = asyncio.Event()  # nothing more will be generated
        self._started_at = time.monotonic()
        self._personas = personas
        self._tasks: set[asyncio.Task[None]] = set()
        self._disk = ThreadPoolExecutor(2, "personas")  # whose slow answers nothing else waits for
        self._engine: LineEngine | None = None
        self._stage: Stage | None = None
        self._server: Server | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stats: asyncio.Task[None] | None = None
        self.recorder: Recorder | None = None
        self._request_ids = itertools.count(1)
        self._numbers = itertools.count(1)
        self._owners: dict[int, Connection] = {}
        self._connections: set[Connection] = set()
        self._watchers: set[Connection] = set()
        self._wishes: dict[Connection, tuple[float | None, bool]] = {}

    async def start(self, sock: socket.socket) -> None:
        """Take connections on this socket; who says hello is told how the loading goes, until `open`."""
        self._loop = asyncio.get_running_loop()
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

    def open(self, engine: LineEngine, make_stage: Callable[[Callable[[], int], Callable[[], int]], Stage]) -> None:
        """Speak lines with this engine, whose callback is `on_step`. `make_stage` gets what makes request ids and
        seeds.
        """
        self._engine = engine
        self._stage = make_stage(self._request_ids.__next__, lambda: secrets.randbits(SEED_BITS))
        info = self._stage.info
        self.metrics.describe(version=info.version, device=info.device, backend=info.backend, base=info.base.name)
        engine.start()
        self._stats = asyncio.create_task(self._send_stats())
        stage = self._stage
        self._tell_all(lambda session: session.on_loaded(stage))

    async def close(self, reason: str, *, code: int = wire.CloseCode.RESTART) -> None:
        """Tell every client that the daemon goes, let every line end and its end be sent, and stop the engine.

        Of the reason they hear as much as a close frame has room for.
        """
        assert self._server is not None
        refusal = OverloadError("The daemon is stopping.", "Connect again when it is back.")
        self._disk.shutdown(wait=False, cancel_futures=True)
        self.broadcast(wire.Event(kind="shutdown", message=reason))
        self._tell_all(lambda session: session.refuse(refusal, time.monotonic()))
        if self._stats is not None:
            self._stats.cancel()
        if self._engine is not None:
            stopped = asyncio.ensure_future(asyncio.to_thread(self._engine.close, STOP_TIMEOUT_S))
            await asyncio.wait([stopped], timeout=STOP_TIMEOUT_S)
        await self._flush()
        self._server.close(code=code, reason=clip_reason(reason))
        await asyncio.wait([asyncio.ensure_future(self._server.wait_closed())], timeout=CLOSE_TIMEOUT_S)
        for connection in self._connections:  # a client that does not read does not answer the close either
            connection.abort()

    async def _flush(self) -> None:
        """Wait, a moment at most, until everybody has got what was said last: that their lines are over, and why."""
        unsent = [asyncio.ensure_future(connection.flushed()) for connection in self._connections]
        if unsent:
            _, pending = await asyncio.wait(unsent, timeout=FLUSH_TIMEOUT_S)
            for task in pending:
                task.cancel()

    # -- the engine --

    def on_step(self, step: StepOutput) -> None:
        """Take a step's outcome from the engine thread to the loop: the one place where the two meet."""
        self._call_soon(self._deliver, step)

    def on_engine_death(self) -> None:
        """Take the end of the engine thread to the loop."""
        self._call_soon(self.is_over.set)

    def on_loading(self, label: str, progress: float) -> None:
        """Take how far the loading is, from any thread, to those who wait."""
        self._call_soon(self._tell_loading, label, progress)

    def _call_soon(self, callback: Callable[..., object], *arguments: object) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:  # the loop is closed: nobody is left to be told
            logger.debug("%s came after the loop was closed", callback)

    def _tell_loading(self, label: str, progress: float) -> None:
        self._tell_all(lambda session: session.on_loading(label, progress))

    def _deliver(self, step: StepOutput) -> None:
        for news in step.news:
            self.broadcast(_event_of(news))
        events: defaultdict[Connection, list[Event]] = defaultdict(list)
        for event in step.events:
            owner = self._owners.get(event.request_id)
            if owner is not None:
                events[owner].append(event)
            if isinstance(event, Ended):
                self._owners.pop(event.request_id, None)
        forwards: defaultdict[Connection, list[wire.Id]] = defaultdict(list)
        for group in step.groups:
            owner, batch_id = _split_group(group)
            forwards[owner].append(batch_id)
        for connection in self._connections & (events.keys() | forwards.keys()):
            try:
                connection.on_step(events[connection], forwards[connection])
            except Exception:  # a defect that one client met must not cost the others their ends
                logger.exception("a connection could not take a step's outcome")
                connection.abort()

    def submit(self, owner: Connection, jobs: Iterable[Job]) -> None:
        """Give a connection's lines to the engine as one command."""
        assert self._engine is not None
        requests = [_to_request(job, owner) for job in jobs]
        self._owners.update((request.id, owner) for request in requests)
        if self._engine.has_died:  # and another process is about to take over
            error = DeviceFailed("The engine has stopped.", "The daemon restarts; send the line again.")
            ends = tuple(Ended(request.id, EndReason.ERROR, error=error) for request in requests)
            self._call_soon(self._deliver, StepOutput(ends))
        else:
            self._engine.submit(requests)

    def cancel(self, request_ids: Iterable[int]) -> None:
        """Cancel lines in the engine."""
        assert self._engine is not None
        self._engine.cancel(request_ids)

    def configure(self, connection: Connection, max_tokens_per_s: float | None, paused: bool) -> dict[str, Any]:
        """Note what a connection wishes, and have the engine keep to the strictest wishes of all; returns those."""
        if max_tokens_per_s is None and not paused:
            self._wishes.pop(connection, None)
        else:
            self._wishes[connection] = max_tokens_per_s, paused
        return self._apply_wishes()

    def _apply_wishes(self) -> dict[str, Any]:
        assert self._engine is not None
        max_tokens_per_s = min((rate for rate, _ in self._wishes.values() if rate is not None), default=None)
        paused = any(paused for _, paused in self._wishes.values())
        self._engine.configure(max_tokens_per_s=max_tokens_per_s, paused=paused)
        return {"max_tokens_per_s": max_tokens_per_s, "paused": paused}

    async def replace_adapter(self, name: str, parts: list[tuple[Path, float]]) -> None:
        """Have the engine use new files of an adapter from the next line on. Raises `WireError`: they are not used."""
        assert self._engine is not None
        answer: asyncio.Future[WireError | None] = asyncio.get_running_loop().create_future()

        def finish(error: WireError | None) -> None:
            if not answer.done():
                answer.set_result(error)

        self._engine.replace_adapter(name, parts, lambda error: self._call_soon(finish, error))
        try:
            async with asyncio.timeout(REPLACE_TIMEOUT_S):
                error = await answer
        except TimeoutError as late:
            raise OverloadError(f"The adapter of {name} was not read in time.", "Save it again.") from late
        if error is not None:
            raise error

    # -- what concerns several connections --

    def broadcast(self, event: wire.Event) -> None:
        """Tell every client."""
        self._tell_all(lambda session: session.on_event(event))

    def announce(self, persona_id: str) -> None:
        """Tell every client that a persona's files were saved."""
        self._tell_all(lambda session: session.on_persona_changed(persona_id))

    def _tell_all(self, tell: Callable[[Session], list[Effect]]) -> None:
        """Have every session say something; a defect that one client met must not cost the others theirs."""
        for connection in list(self._connections):
            try:
                connection.perform(tell(connection.session))
            except Exception:
                logger.exception("a connection could not be told")
                connection.abort()

    def watch(self, connection: Connection, on: bool) -> None:
        """Begin, or stop, to let a connection hear what others' lines say."""
        (self._watchers.add if on else self._watchers.discard)(connection)

    def on_said(self, session: Session, message: wire.LineStart | wire.Delta | wire.LineEnd) -> None:
        """A session told its client about a line; those who watch hear it too."""
        for watcher in self._watchers:
            if watcher.session is not session:
                watcher.watched(session, message)

    def supersede(self, session: object) -> None:
        """Close the connection of this session, whose cast another one has resumed."""
        for connection in self._connections:
            if connection.session is session:
                self._forget(connection)
                connection.perform(connection.session.supersede(time.monotonic()))

    def manage_persona(self, connection: Connection, message: PersonaMessage) -> None:
        """Read or write a persona's file, off the loop, and tell who asked; the session bounds how many."""

        async def manage() -> None:
            outcome = await asyncio.get_running_loop().run_in_executor(self._disk, _manage, self._personas, message)
            connection.perform(connection.session.on_managed(message.id, outcome))

        task = asyncio.create_task(manage())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def status(self) -> dict[str, Any]:
        """The fields of `stats`, and the body of `reply` to `status`."""
        assert self._engine is not None
        assert self._stage is not None
        return {
            **engine_figures(self._engine.stats()),
            "personas": len(self._stage.library),
            "connections": sum(connection.session.has_said_hello for connection in self._connections),
            "uptime_s": round(time.monotonic() - self._started_at, 1),
        }

    async def _send_stats(self) -> None:
        while True:
            await asyncio.sleep(STATS_S)
            self._door.casts.expire(time.monotonic())
            if any(connection.session.wants_stats for connection in self._connections):
                stats = wire.Stats(**self.status())
                self._tell_all(partial(Session.on_stats, stats=stats))

    # -- sockets --

    async def _handle(self, socket_: ServerConnection) -> None:
        refusal = self._refusal(socket_)
        if refusal is not None:
            self.metrics.connection_refused(refusal[0])
            await socket_.close(*refusal)
            return
        session = Session(subprotocol=str(socket_.subprotocol), door=self._door, stage=self._stage)
        connection = Connection(next(self._numbers), socket_, session, self)
        self._connections.add(connection)
        try:
            await connection.run()
        finally:
            self._connections.discard(connection)
            self._forget(connection)

    def _forget(self, connection: Connection) -> None:
        self._watchers.discard(connection)
        if self._wishes.pop(connection, None) is not None:
            self._apply_wishes()

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

    def _health(self) -> Health:
        if self._engine is None:
            return Health("loading", {})
        return Health("the engine thread died" if self._engine.has_died else "ok", self.status())


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


def _manage(folder: PersonaFolder, message: PersonaMessage) -> dict[str, Any] | WireError:
    """What came of it; in a thread of its own."""
    try:
        match message:
            case wire.PersonaGet():
                return folder.get(message.persona)
            case wire.PersonaPut():
                return folder.put(message.persona, message.doc, etag=message.etag)
            case wire.PersonaValidate():
                return folder.validate(message.doc, message.persona)
        return folder.delete(message.persona)
    except WireError as error:
        return error
    except Exception:  # files come from anywhere
        logger.exception("the persona could not be managed")
        return InternalError("The persona's file could not be managed.", "The daemon's log has the details.")


def _to_request(job: Job, owner: Connection) -> Request:
    sampling = job.sampling
    values = sampling.model_dump(exclude={"stop"})
    return Request(
        id=job.request_id,
        prompt_ids=job.prompt_ids,
        sampling=SamplingParams(**values, stop=tuple(sampling.stop or ()), soft_words=job.soft_words),
        arrival=job.arrival,
        adapter=job.adapter,
        group=None if job.batch is None else (owner, job.batch),
        client=owner,
        asked=job.asked,
        priority=job.priority,
        deadline=None if job.deadline_ms is None else job.arrival + job.deadline_ms / 1000,
        is_warmup=job.batch is None,
    )


def _event_of(news: News) -> wire.Event:
    match news:
        case AdapterLoaded(name):
            return wire.Event(kind="adapter.loaded", adapter=name)
        case AdapterEvicted(name):
            return wire.Event(kind="adapter.evicted", adapter=name)
        case Degraded(message):
            return wire.Event(kind="degraded", message=message)


def _split_group(group: Hashable) -> tuple[Connection, wire.Id]:
    assert isinstance(group, tuple)
    return group[0], group[1]
