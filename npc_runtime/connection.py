"""One socket: reads frames, performs what the session asks for, writes from a bounded outbox."""

import asyncio
import logging
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed

from npc_runtime import codec
from npc_runtime import protocol as wire
from npc_runtime.effects import (
    Close,
    Configure,
    Dropped,
    Effect,
    ManagePersona,
    Send,
    SendStatus,
    Shutdown,
    Stop,
    Submit,
    Supersede,
    Watch,
)
from npc_runtime.engine.core import Ended, Spoken, Started
from npc_runtime.errors import WireError
from npc_runtime.gate import HELLO_TIMEOUT_S
from npc_runtime.recording import Recorder
from npc_runtime.session import Session

if TYPE_CHECKING:
    from npc_runtime.server import NpcServer

__all__ = ["Connection"]

logger = logging.getLogger(__name__)

SEND_TIMEOUT_S = 10.0
MAX_OUTBOX = 2_048  # messages; more than all ends of a full connection
CONGESTED_OUTBOX = 16  # from here on deltas wait and merge
MAX_WATCHED_OUTBOX = CONGESTED_OUTBOX // 2  # from here on a watcher misses what other connections say
MAX_READ_AHEAD = 256  # messages; from here on no more questions are read until some answers are sent
SEND_BUFFER = 64 * 1024
"""Bytes that the system may hold for a client that does not read; left to itself it takes megabytes, and hides for
minutes that nobody listens."""


class Connection:
    """A client's socket and its session."""

    def __init__(self, number: int, socket_: ServerConnection, session: Session, server: "NpcServer") -> None:
        self.session = session
        self._number = number
        self.opened_at = time.monotonic()
        self._was_let_in = False
        self._socket = socket_
        self._server = server
        self._outbox: asyncio.Queue[wire.ServerMessage | Close] = asyncio.Queue(MAX_OUTBOX)
        self._was_sent = asyncio.Event()
        self._is_aborted = False
        self._timer: asyncio.TimerHandle | None = None
        sock = socket_.transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)

    async def run(self) -> None:
        """Serve until either side closes; then cancel what runs."""
        writer = asyncio.create_task(self._write())
        reader = asyncio.create_task(self._read())
        try:
            await asyncio.wait([writer, reader], return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.perform(self.session.disconnect(time.monotonic()))
            if self._timer is not None:
                self._timer.cancel()
            for task in (reader, writer):
                task.cancel()
            for outcome in await asyncio.gather(reader, writer, return_exceptions=True):
                if isinstance(outcome, Exception) and not isinstance(outcome, ConnectionClosed):
                    logger.error("session=%s failed", self.session.label, exc_info=outcome)
            self._log_end()

    def on_step(self, events: Iterable[Started | Spoken | Ended], forwards: Iterable[wire.Id]) -> None:
        """Hand a step's events to the session and perform what it answers."""
        now = time.monotonic()
        session = self.session
        session.on_forward(forwards)
        effects: list[Effect] = []
        for event in events:
            match event:
                case Started():
                    effects += session.on_started(event)
                case Spoken():
                    session.on_spoken(event)
                case Ended():
                    effects += session.on_ended(event, now)
        self.perform([*effects, *session.after_step(now)])

    def perform(self, effects: Iterable[Effect]) -> None:
        """Do what the session asks for."""
        for effect in effects:
            match effect:
                case Send(message, persona):
                    self._server.metrics.sent(message, persona)
                    self._enqueue(message)
                case Close():
                    self._enqueue(effect)
                case Submit(jobs):
                    self._server.submit(self, jobs)
                case Stop(request_ids):
                    self._server.cancel(request_ids)
                case _:
                    self._ask_server(effect)
        self._update()

    def _ask_server(self, effect: Effect) -> None:
        """Hand on what concerns the whole daemon."""
        match effect:
            case Dropped(personas):
                self._server.metrics.lines_dropped(personas)
            case SendStatus(re):
                self.perform(self.session.reply(re, self._server.status()))
            case Configure(re, max_tokens_per_s, paused):
                holds = self._server.configure(self, max_tokens_per_s, paused)
                self.perform(self.session.reply(re, holds))
            case ManagePersona(message):
                self._server.manage_persona(self, message)
            case Watch(on):
                self._server.watch(self, on)
            case Supersede(session):
                self._server.supersede(session)
            case Shutdown():
                self._server.is_over.set()

    def watched(self, other: Session, message: wire.LineStart | wire.Delta | wire.LineEnd) -> None:
        """A line of another connection did something; a watcher that does not keep up misses it."""
        if self._outbox.qsize() < MAX_WATCHED_OUTBOX:
            self.perform(self.session.on_watched(other, message))

    async def flushed(self) -> None:
        """Wait until everything in the outbox was sent."""
        await self._outbox.join()

    def abort(self) -> None:
        """Drop the socket without a close handshake."""
        self._is_aborted = True
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
            while self._outbox.qsize() > MAX_READ_AHEAD:
                self._was_sent.clear()
                await self._was_sent.wait()

    def _take(self, frame: bytes | str) -> None:
        had_said_hello = self.session.has_said_hello
        effects = self.session.receive(frame, time.monotonic())
        if self._server.recorder is not None and self.session.has_said_hello:
            self._record_frame(self._server.recorder, frame)  # before what is answered
        self.perform(effects)
        if self.session.has_said_hello and not had_said_hello:
            session = self.session
            self._was_let_in = True
            self._server.gate.leave(self._socket.transport)
            self._server.metrics.connection_opened(session.subprotocol)
            logger.info(
                "opened session=%s client=%r subprotocol=%s", session.label, session.client, session.subprotocol
            )

    def _record_frame(self, recorder: Recorder, frame: bytes | str) -> None:
        with suppress(WireError):  # what is no message is answered, and is of no use to a replay
            recorder.add(self._number, "client", codec.decode(frame, self.session.subprotocol))

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
                    await self._socket.send(codec.encode(message, self.session.subprotocol))
                self._outbox.task_done()
                self._was_sent.set()
                self._update()
        except TimeoutError:
            logger.warning("session=%s did not read for %.0f s; dropped", self.session.label, SEND_TIMEOUT_S)
            self.abort()
        except ConnectionClosed:
            return

    def _enqueue(self, message: wire.ServerMessage | Close) -> None:
        if self._is_aborted:
            return
        try:
            self._outbox.put_nowait(message)
        except asyncio.QueueFull:
            logger.warning("session=%s reads too slowly; dropped", self.session.label)
            self.abort()
            return
        if isinstance(message, Close):
            return
        if self._server.recorder is not None:
            self._server.recorder.add(self._number, "daemon", message.model_dump(mode="json", exclude_none=True))
        if isinstance(message, wire.LineStart | wire.Delta | wire.LineEnd):
            self._server.on_said(self.session, message)

    def _update(self) -> None:
        """Tell the session whether the client keeps up, and wake it when it wants to be woken."""
        now = time.monotonic()
        self.session.set_congested(self._outbox.qsize() > CONGESTED_OUTBOX, now)
        wake_at = self.session.wake_at
        if self._timer is not None:
            if wake_at is not None and self._timer.when() <= asyncio.get_running_loop().time() + wake_at - now:
                return
            self._timer.cancel()
            self._timer = None
        if wake_at is not None:
            self._timer = asyncio.get_running_loop().call_later(max(wake_at - now, 0.0), self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self.perform(self.session.tick(time.monotonic()))

    def _log_end(self) -> None:
        metrics = self._server.metrics
        (metrics.connection_closed if self._was_let_in else metrics.connection_refused)(self._socket.close_code)
        seconds = time.monotonic() - self.opened_at
        logger.info("closed session=%s code=%s seconds=%.1f", self.session.label, self._socket.close_code, seconds)
