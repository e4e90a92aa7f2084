"""The loop beside the main thread: what it tells while that loads, what it hears, and how it ends."""

import asyncio
import os
import signal
import socket
import threading
import time

import pytest
from conftest import MS

from npc_runtime.serving import Serving


class Server:
    """As much of a server as the loop needs."""

    def __init__(self, problem=None):
        self.is_over = asyncio.Event()
        self.problem = problem
        self.told, self.closed = [], []

    async def start(self, sock):
        self.thread = threading.current_thread()
        if self.problem is not None:
            raise self.problem

    def on_loading(self, label, progress):
        self.told.append((time.monotonic(), label, progress))

    async def close(self, reason):
        self.closed.append(reason)


@pytest.fixture
def serve():
    started = []

    def start(server):
        with socket.socket() as sock:
            serving = Serving(server, sock, lambda: "somebody asked")
            started.append(serving)
            serving.start()
            return serving

    yield start
    for serving in started:
        serving.leave()


def test_news_are_told_at_a_bearable_pace(serve):
    serving = serve(server := Server())
    time.sleep(50 * MS)
    until = time.monotonic() + 1.1
    while time.monotonic() < until:
        serving.report("loading x", 1 - (until - time.monotonic()) / 1.1)
        time.sleep(0.001)
    assert server.told[0][1:] == ("starting", 0.0)
    assert 3 <= len(server.told) <= 6
    shares = [share for _, _, share in server.told]
    assert shares == sorted(shares)
    assert shares[-1] > 0.6


def test_without_news_the_last_ones_are_told_again_until_it_is_ready(serve):
    serving = serve(server := Server())
    time.sleep(0.1)
    serving.report("loading x", 0.5)
    time.sleep(4.0)
    told = [news for news in server.told if news[1:] == ("loading x", 0.5)]
    assert len(told) in (2, 3)
    assert 1.0 < told[1][0] - told[0][0] < 2.0
    serving.run(finish(server))
    serving.wait()
    server.told.clear()
    time.sleep(0.5)
    assert server.told == []


async def finish(server):
    server.is_over.set()
    return threading.current_thread()


def test_the_main_thread_waits_until_it_is_over(serve):
    serving = serve(server := Server())
    timer = threading.Timer(0.2, lambda: serving.run(finish(server)))
    started = time.monotonic()
    timer.start()
    serving.wait()
    assert time.monotonic() - started >= 0.2
    timer.join()


def test_what_is_to_run_on_the_loop_runs_there(serve):
    serving = serve(server := Server())
    assert serving.run(finish(server)) is server.thread is not threading.current_thread()
    with pytest.raises(KeyError):
        serving.run(fail(KeyError()))
    with pytest.raises(TimeoutError):
        serving.run(asyncio.sleep(60), 0.05)


async def fail(error):
    raise error


def test_who_cannot_listen_says_so(serve):
    with pytest.raises(OSError, match="no luck"):
        serve(Server(OSError("no luck")))


def test_it_leaves_nothing_behind(serve):
    before = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(before)
    serving = serve(server := Server())
    serving.leave()
    assert not server.thread.is_alive()
    after = signal.set_wakeup_fd(before)
    assert after == before


def test_a_loop_that_ends_ends_the_wait(serve):
    serving = serve(Server())
    serving._loop.call_soon_threadsafe(serving._loop.stop)
    with pytest.raises(RuntimeError, match="has ended"):
        serving.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_that_comes_while_it_loads_is_heard_at_once(serve, number):
    serving = serve(server := Server())
    before = signal.signal(number, lambda *_: None)
    try:
        os.kill(os.getpid(), number)
        for _ in range(200):
            if server.closed:
                break
            time.sleep(10 * MS)
        assert server.closed == ["somebody asked"]
        serving.run(finish(server))
        serving.wait()
        os.kill(os.getpid(), number)
        time.sleep(100 * MS)
        assert server.closed == ["somebody asked"], "whoever waits for the end does it"
    finally:
        signal.signal(number, before)
