"""Where a daemon is, and whether it answers."""

import contextlib
import json
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from npc_runtime.discovery import Endpoint, write_endpoint
from npc_runtime.errors import StartupError
from npc_runtime.running import Health, Target, ask_health, find_daemon


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="XDG_RUNTIME_DIR is Linux's")
def test_the_runtime_file_says_where(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    write_endpoint("game", Endpoint(port=4711, pid=1, token="secret", protocol=1, base="x"))
    assert find_daemon("game", tmp_path) == Target("ws://127.0.0.1:4711/v1", "secret")
    assert find_daemon("game", tmp_path, url="ws://far/v1", token="t") == Target("ws://far/v1", "t")
    with pytest.raises(StartupError, match="personas"):
        find_daemon(None, tmp_path)


@contextlib.contextmanager
def web_server(status, body):
    """Something that answers every page alike."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield Target(f"ws://127.0.0.1:{server.server_address[1]}/v1", None)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_daemon_that_is_well_says_how_it_is(daemon, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    health = ask_health(Target(daemon.url, None))
    assert health.state == "well"
    assert health.body["status"] == "ok"
    assert "active" in health.body


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (503, b'{"status": "the engine thread died"}', Health("ill", {"status": "the engine thread died"})),
        (503, b'{"status": "loading"}', Health("loading", {"status": "loading"})),
        (503, b"The service is unavailable.", Health("silent")),
        (404, b"There is no such page.", Health("silent")),
        (200, b"<html>Another program's page</html>", Health("silent")),
        (200, b"[1, 2]", Health("silent")),
        (200, json.dumps({"status": "ok"}).encode(), Health("well", {"status": "ok"})),
    ],
)
def test_what_answers_on_the_port_may_be_anything(status, body, expected):
    with web_server(status, body) as target:
        assert ask_health(target) == expected


def test_nobody_and_somebody_who_says_nothing():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        target = Target(f"ws://127.0.0.1:{listening.getsockname()[1]}/v1", None)
        assert ask_health(target).state == "gone"
        listening.listen()
        assert ask_health(target, timeout_s=0.1).state == "silent"
