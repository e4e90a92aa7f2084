"""A daemon's sockets beside its main thread: an event loop in a thread of its own, from before the base is loaded.

The main thread loads and waits, because it is the one that signals interrupt, so that what is half done is cleaned up.
It reaches the loop by `run` alone. Clients are told how far the loading is at a bearable pace, and also while nothing
moves: who hears nothing for ten seconds takes the daemon for dead.
"""

import asyncio
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from npc_runtime.server import NpcServer
from npc_runtime.stopping import stop_signals

__all__ = ["Serving"]

logger = logging.getLogger(__name__)

TELL_EVERY_S = 0.25
REPEAT_EVERY = 6
"""So many times nothing new is not told; the next time it is."""

LEAVE_TIMEOUT_S = 0.5
LOOK_EVERY_S = 0.2 if sys.platform == "win32" else None
"""Windows interrupts no wait that has no end."""

T = TypeVar("T")


class Serving:
    """A server on a bound socket, in a thread of its own; all methods are for the main thread."""

    def __init__(self, server: NpcServer, sock: socket.socket, why_it_stops: Callable[[], str]) -> None:
        """`why_it_stops` is asked when a signal comes."""
        self._server = server
        self._sock = sock
        self._why_it_stops = why_it_stops
        self._loop: asyncio.AbstractEventLoop | None = None
        self._news: tuple[str, float] | None = ("starting", 0.0)  # None: there is nothing to tell any more
        self._is_listening: Future[None] = Future()
        self._is_over = threading.Event()
        self._ear, self._mouth = socket.socketpair()
        self._woken_before = -1
        self._thread = threading.Thread(target=self._run_loop, name="sockets", daemon=True)

    def start(self) -> None:
        """Take connections from here on. Raises what keeps the server from it."""
        for end in (self._ear, self._mouth):
            end.setblocking(False)
        self._woken_before = signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
        self._thread.start()
        self._is_listening.result()

    def report(self, label: str, fraction: float) -> None:
        """How far the loading is; to be told when it is time for it."""
        self._news = label, fraction

    def run(self, coroutine: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T:
        """Have the loop run this, and wait for the outcome. Raises `TimeoutError` if it takes longer."""
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout_s)

    def wait(self) -> None:
        """The loading is over: wait until nothing more will be generated. A signal interrupts this."""
        self._news = None
        while not self._is_over.wait(LOOK_EVERY_S):
            pass

    def leave(self) -> None:
        """End the loop, and what is left on it."""
        if self._loop is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(LEAVE_TIMEOUT_S)
        signal.set_wakeup_fd(self._woken_before)
        for end in (self._ear, self._mouth):
            end.close()

    def _run_loop(self) -> None:
        try:
            with asyncio.Runner() as runner:
                self._loop = runner.get_loop()
                runner.run(self._server.start(self._sock))
                tasks = [self._loop.create_task(work) for work in (self._tell(), self._watch(), self._hear())]
                self._is_listening.set_result(None)
                self._loop.run_forever()
                for task in tasks:
                    task.cancel()
        except Exception as error:
            if self._is_listening.done():
                logger.critical("the sockets are not served any more", exc_info=error)
            else:
                self._is_listening.set_exception(error)
        finally:
            self._is_over.set()

    async def _watch(self) -> None:
        await self._server.is_over.wait()
        self._is_over.set()

    async def _tell(self) -> None:
        """Tell who waits how far the loading is."""
        told, num_untold = None, 0
        while (news := self._news) is not None:
            if news != told or num_untold == REPEAT_EVERY:
                self._server.on_loading(*news)
                told, num_untold = news, 0
            else:
                num_untold += 1
            await asyncio.sleep(TELL_EVERY_S)

    async def _hear(self) -> None:
        """Say goodbye to who waits as soon as a signal comes; the main thread may be in native code, and hear late."""
        loop, wanted = asyncio.get_running_loop(), set(stop_signals())
        while numbers := await loop.sock_recv(self._ear, 64):
            if self._news is not None and not wanted.isdisjoint(numbers):
                await self._server.close(self._why_it_stops())
