"""A real browser, hostile pages, and nonsense on a raw socket, against a real daemon.

The hostile pages know the token: what refuses them is the daemon's gate alone.
"""

import contextlib
import json
import select
import socket
import struct
import threading
import time
import urllib.request

import pytest
from chromium import Watched, launch, serve_pages, until
from conftest import MS, discard, start_daemon
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from npc_runtime.door import MAX_CONNECTIONS
from npc_runtime.gate import DELAY_S, FREE_TRIES, MAX_STRANGERS

WAIT_MS = 20_000_000 * MS
"""Playwright counts milliseconds."""

INJECTION = "<img src=x onerror=\"document.title='injected'\">"

REBOUND = "127.0.0.2"
"""Where rebound.test leads: the attacker's own address at first, then (a forwarder makes it so) the daemon's."""

ATTACK = """
async ({address, token}) => {
  const found = {origin: self.origin};
  for (const path of ["/", "/healthz", "/metrics", "/page.js"]) {
    for (const mode of ["cors", "no-cors"]) {
      try {
        const answer = await fetch(`http://${address}${path}`, {mode});
        found[`${mode} ${path}`] = `${answer.status} ${(await answer.text()).slice(0, 60)}`;
      } catch { found[`${mode} ${path}`] = "blocked"; }
    }
  }
  found.socket = await new Promise((resolve) => {
    const socket = new WebSocket(`ws://${address}/v1`, ["npc.v1.json"]);
    socket.onopen = () => socket.send(JSON.stringify({type: "hello", protocol: 1, token}));
    socket.onmessage = (event) => resolve(JSON.parse(event.data).type);
    socket.onclose = (event) => resolve(event.code);
  });
  return found;
}
"""


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A daemon of this module's own: its log is read, its gate is besieged."""
    folder = tmp_path_factory.mktemp("guarded") / "personas"
    document = {"schema": 1, "display_name": "Guard", "bio": "A guard."}
    for persona_id, fields in {
        "guard": {},
        "mute": {"adapter": "adapter", "display_name": "Mute"},
        "sly": {"display_name": INJECTION},
    }.items():
        (folder / persona_id).mkdir(parents=True)
        text = json.dumps({**document, "id": persona_id, **fields})
        (folder / persona_id / "persona.yaml").write_text(text, encoding="utf-8")
    running = start_daemon("--personas", str(folder), "--project", "web-security")
    assert running.endpoint, running.read_log()
    yield running
    discard(running)


@pytest.fixture(scope="module")
def address(guarded):
    return f"127.0.0.1:{guarded.endpoint['port']}"


@pytest.fixture(scope="module")
def browser():
    rules = f"MAP evil.test 127.0.0.1, MAP rebound.test {REBOUND}"
    with launch(f"--host-resolver-rules={rules}") as browser:
        yield browser


# --- the status page


@pytest.fixture
def shown(browser, guarded, address):
    """The status page, opened by its link."""
    watched = Watched(browser)
    watched.page.goto(f"http://{address}/#token={guarded.token}")
    watched.page.wait_for_selector("#view:not([hidden]) #personas li", timeout=WAIT_MS)
    yield watched
    watched.context.close()


def say(guarded, *lines, wait=True):
    with hello(guarded) as game:
        game.send(json.dumps({"type": "generate", "batch": 1, "lines": list(lines)}))
        while wait and json.loads(game.recv(WAIT_MS / 1000))["type"] != "batch.end":
            pass


def test_the_page_shows_the_daemon(shown, guarded, address):
    page = shown.page
    assert page.url == f"http://{address}/"
    assert page.evaluate("history.length") == 2, "the address with the token was replaced"
    until(page, "#tokens_per_s", r"^\d")
    assert page.inner_text("#version")
    assert "smollm2-135m" in page.inner_text("#facts")
    mute = page.locator("#problems li", has_text="Mute")
    assert "Cannot speak" in mute.inner_text()
    assert "adapter" in mute.locator(".why").inner_text()
    assert INJECTION in page.inner_text("#personas")
    assert page.title() == "npc-runtime"
    line = {"line": 1, "persona": "guard", "input": {"text": "Hello?"}}
    say(guarded, {**line, "sampling": {"min_tokens": 60, "max_tokens": 60, "trim": "none"}})
    until(page, "#totals", "^60 tokens in")
    assert page.get_attribute("#curve", "d").startswith("M")
    assert shown.complaints == []


def test_the_page_is_reached_by_localhost_too(browser, guarded, address):
    watched = Watched(browser)
    watched.page.goto(f"http://{address.replace('127.0.0.1', 'localhost')}/#token={guarded.token}")
    watched.page.wait_for_selector("#view:not([hidden]) #personas li", timeout=WAIT_MS)
    assert watched.complaints == []
    watched.context.close()


def test_the_page_asks_for_the_token_and_takes_it_from_the_keyboard(browser, guarded, address):
    watched = Watched(browser, viewport={"width": 360, "height": 740})
    page = watched.page
    page.goto(f"http://{address}/")
    page.wait_for_selector("#lock:not([hidden])", timeout=WAIT_MS)
    assert "npc-runtime page" in page.inner_text("#lock")
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    until(page, "#refusal", "not this daemon's")
    page.keyboard.type(f"http://{address}/#token={guarded.token}")
    page.keyboard.press("Enter")
    page.wait_for_selector("#view:not([hidden]) #personas li", timeout=WAIT_MS)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out on a phone"
    page.reload()
    page.wait_for_selector("#view:not([hidden]) #personas li", timeout=WAIT_MS)
    assert page.url == f"http://{address}/"
    assert watched.complaints == []
    watched.context.close()


def test_the_token_is_in_no_request(browser, guarded, address):
    watched, seen = Watched(browser), []
    watched.page.on("request", lambda request: seen.append((request.url.split("#")[0], request.all_headers())))
    watched.page.on("websocket", lambda opened: seen.append((opened.url, {})))
    watched.page.goto(f"http://{address}/#token={guarded.token}")
    watched.page.wait_for_selector("#view:not([hidden]) #personas li", timeout=WAIT_MS)
    assert {url for url, _ in seen} >= {f"http://{address}/", f"ws://{address}/v1"}
    assert guarded.token not in str(seen)
    assert guarded.token not in watched.page.content()
    watched.context.close()


def test_the_page_runs_no_script_that_is_put_into_it(shown):
    """What an injection would need: the policy stops it, and says so."""
    before = "document.head.append(Object.assign(document.createElement('script'), {text: 'document.title = 1'}))"
    with pytest.raises(Exception, match="TrustedScript"):
        shown.page.evaluate(before)
    with pytest.raises(Exception, match="TrustedHTML"):
        shown.page.evaluate("document.body.innerHTML = '<b>x</b>'")
    with contextlib.suppress(Exception):
        shown.page.evaluate("fetch('http://127.0.0.1:9/')")
    assert any("connect-src" in complaint for complaint in shown.complaints)
    assert shown.page.title() == "npc-runtime"


# --- pages of others


def is_refused(found, address):
    """Nothing read, no welcome."""
    blocked = {key: value for key, value in found.items() if "cors" in key}
    assert len(blocked) == 8
    assert set(blocked.values()) == {"blocked"}, found
    assert found["socket"] in (4403, 1006), found
    return True


def test_a_page_of_another_port_is_refused(browser, guarded, address):
    arguments = {"address": address, "token": guarded.token}
    frame = f'<iframe src="http://{address}/"></iframe>'
    with serve_pages({"/": f"<title>evil</title>{frame}"}) as elsewhere:
        watched = Watched(browser)
        watched.page.goto(elsewhere)
        found = watched.page.evaluate(ATTACK, arguments)
        assert found["origin"] == elsewhere
        assert is_refused(found, address)
        assert found["socket"] == 4403, "the page may know why"
        assert [frame.url for frame in watched.page.frames[1:]] == ["chrome-error://chromewebdata/"]
        opened = watched.page.evaluate(
            "(url) => {const opened = open(url); return new Promise(r => setTimeout(() => r(opened.closed), 500))}",
            f"http://{address}/",
        )
        assert opened is True, "the window of the status page is out of reach for who opened it"
        watched.context.close()


@pytest.mark.parametrize("kind", ["sandboxed", "data", "blob"])
def test_a_frame_of_no_origin_is_refused(browser, guarded, address, kind):
    frames = {
        "sandboxed": '<iframe sandbox="allow-scripts" srcdoc="<p>x"></iframe>',
        "data": '<iframe src="data:text/html,<p>x"></iframe>',
        "blob": '<iframe sandbox="allow-scripts" src="/blob"></iframe>',
    }
    with serve_pages({"/": frames[kind], "/blob": "<p>x"}) as elsewhere:
        watched = Watched(browser)
        watched.page.goto(elsewhere)
        found = watched.page.frames[1].evaluate(ATTACK, {"address": address, "token": guarded.token})
        assert found["origin"] == "null"
        assert is_refused(found, address)
        watched.context.close()


def test_a_file_is_refused(browser, guarded, address, tmp_path):
    (tmp_path / "saved.html").write_text("<p>x", encoding="utf-8")
    watched = Watched(browser)
    watched.page.goto((tmp_path / "saved.html").as_uri())
    assert is_refused(watched.page.evaluate(ATTACK, {"address": address, "token": guarded.token}), address)
    watched.context.close()


def test_a_foreign_name_that_leads_here_is_misdirected(browser, guarded, address):
    port = guarded.endpoint["port"]
    watched = Watched(browser)
    answer = watched.page.goto(f"http://evil.test:{port}/")
    assert answer.status == 421
    with serve_pages({"/": "<title>evil</title>"}) as elsewhere:
        watched.page.goto(elsewhere.replace("127.0.0.1", "evil.test"))
        arguments = {"address": f"evil.test:{port}", "token": guarded.token}
        found = watched.page.evaluate(ATTACK, arguments)
        assert is_refused(found, address)
        assert found["socket"] == 1006, "the handshake itself was refused"
    watched.context.close()


class Rebinding:
    """An address that is the attacker's until `turn`, and the daemon's from then on: every connection is handed on."""

    def __init__(self, port, attacker):
        self.target, self.daemon = attacker, ("127.0.0.1", port)
        self.listener = socket.create_server((REBOUND, port))
        self.threads = [threading.Thread(target=self.accept)]
        self.threads[0].start()

    def turn(self):
        self.target = self.daemon

    def accept(self):
        with self.listener, contextlib.suppress(OSError):
            while True:
                ours, _ = self.listener.accept()
                self.threads.append(threading.Thread(target=self.hand_on, args=(ours,)))
                self.threads[-1].start()

    def hand_on(self, ours):
        with ours, socket.create_connection(self.target) as theirs, contextlib.suppress(OSError):
            other = {ours: theirs, theirs: ours}
            while True:
                for source in select.select([ours, theirs], [], [])[0]:
                    piece = source.recv(65536)
                    if not piece:
                        return
                    other[source].sendall(piece)

    def close(self):
        self.listener.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join()


def test_dns_rebinding_finds_a_closed_gate(browser, guarded, address):
    """The page came by the name and port that now lead to the daemon: to the browser it is the daemon's own."""
    port = guarded.endpoint["port"]
    with serve_pages({"/": "<title>evil</title>"}) as elsewhere:
        attacker = ("127.0.0.1", int(elsewhere.rpartition(":")[2]))
        try:
            rebinding = Rebinding(port, attacker)
        except OSError:
            pytest.skip(f"{REBOUND} is no address of this machine's")
        watched = Watched(browser)
        watched.page.goto(f"http://rebound.test:{port}/")
        assert watched.page.title() == "evil"
        rebinding.turn()
        arguments = {"address": f"rebound.test:{port}", "token": guarded.token}
        found = watched.page.evaluate(ATTACK, arguments)
        watched.context.close()
        rebinding.close()
    assert found["origin"] == f"http://rebound.test:{port}"
    read = {value for key, value in found.items() if "cors" in key}
    assert read == {"421 This daemon does not go by that name; serve --allow-host NAM"}
    assert found["socket"] == 1006


# --- who waits at the gate


@contextlib.contextmanager
def hello(guarded, token=None):
    """An open connection of a game's; raises `ConnectionClosed` if it is not welcome."""
    with connect(guarded.url, subprotocols=["npc.v1.json"], compression=None) as game:
        game.send(json.dumps({"type": "hello", "protocol": 1, "token": token or guarded.token}))
        assert json.loads(game.recv(WAIT_MS / 1000))["type"] == "welcome"
        yield game


def refusal(guarded, token):
    """The close code that a token meets, and after how many seconds."""
    began = time.monotonic()
    with pytest.raises(ConnectionClosed) as caught, hello(guarded, token):
        pass
    return caught.value.rcvd.code, time.monotonic() - began


def test_wrong_tokens_are_slowed_and_the_right_one_is_not(guarded):
    tried = [refusal(guarded, f"wrong{number}") for number in range(FREE_TRIES + 2)]
    assert {code for code, _ in tried} == {4401}
    assert tried[-1][1] >= DELAY_S
    waiting = threading.Thread(target=refusal, args=(guarded, "wrong again"))
    waiting.start()
    began = time.monotonic()
    with hello(guarded):
        assert time.monotonic() - began < DELAY_S
    waiting.join()


def test_silent_sockets_do_not_keep_the_game_out(guarded, address):
    """Half of them said nothing at all, half are WebSockets without a hello; more than there are places."""
    host, port = address.split(":")
    with contextlib.ExitStack() as stack:
        early = stack.enter_context(hello(guarded))
        silent = [stack.enter_context(socket.create_connection((host, int(port)))) for _ in range(MAX_STRANGERS)]
        for _ in range(MAX_CONNECTIONS + 4):
            stack.enter_context(
                connect(guarded.url, subprotocols=["npc.v1.json"], compression=None, close_timeout=100 * MS)
            )
        began = time.monotonic()
        with hello(guarded):
            assert time.monotonic() - began < 2_000 * MS
            silent[0].settimeout(2_000 * MS)
            with contextlib.suppress(ConnectionResetError):
                assert silent[0].recv(1) == b"", "the oldest was dropped"
        early.send(json.dumps({"type": "status"}))
        assert json.loads(early.recv(WAIT_MS / 1000))["type"] == "reply", "who said hello is no stranger"


def test_those_who_said_hello_have_their_number(guarded):
    with contextlib.ExitStack() as stack:
        games = [stack.enter_context(hello(guarded)) for _ in range(MAX_CONNECTIONS)]
        assert refusal(guarded, guarded.token)[0] == 4429
        games[0].close()
        deadline = time.monotonic() + 5_000 * MS
        while time.monotonic() < deadline:
            with contextlib.suppress(ConnectionClosed), hello(guarded):
                return
        raise AssertionError("a place that was left stays taken")


# --- nonsense

HOST = b"Host: 127.0.0.1:{port}\r\n"
UPGRADE = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
KEY = b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
NONSENSE = {
    "traversal": b"GET /../../etc/passwd HTTP/1.1\r\n" + HOST + b"\r\n",
    "encoded traversal": b"GET /%2e%2e/%2e%2e/etc/passwd HTTP/1.1\r\n" + HOST + b"\r\n",
    "doubly encoded": b"GET /%252e%252e/pages.py HTTP/1.1\r\n" + HOST + b"\r\n",
    "backslashes": b"GET /..\\..\\pages.py HTTP/1.1\r\n" + HOST + b"\r\n",
    "nul": b"GET /page.js\x00.html HTTP/1.1\r\n" + HOST + b"\r\n",
    "absolute": b"GET http://127.0.0.1:{port}/etc/passwd HTTP/1.1\r\n" + HOST + b"\r\n",
    "absolute elsewhere": b"GET http://evil.test/ HTTP/1.1\r\n" + HOST + b"\r\n",
    "absolute, own host missing": b"GET http://127.0.0.1:{port}/ HTTP/1.1\r\nHost: evil.test\r\n\r\n",
    "proxy": b"CONNECT evil.test:443 HTTP/1.1\r\nHost: evil.test:443\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "no host, old": b"GET / HTTP/1.0\r\n\r\n",
    "two hosts": b"GET / HTTP/1.1\r\n" + HOST + HOST + b"\r\n",
    "older": b"GET /\r\n",
    "newer": b"GET / HTTP/2.0\r\n" + HOST + b"\r\n",
    "http2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + 200 * b"\xab" + b"\r\n",
    "noise": bytes(range(256)) + b"\r\n\r\n",
    "long path": b"GET /" + 20_000 * b"a" + b" HTTP/1.1\r\n" + HOST + b"\r\n",
    "long header": b"GET / HTTP/1.1\r\n" + HOST + b"X: " + 20_000 * b"a" + b"\r\n\r\n",
    "many headers": b"GET / HTTP/1.1\r\n" + HOST + 500 * b"X: a\r\n" + b"\r\n",
    "endless line": 100_000 * b"a",
    "spaces": b"GET  / HTTP/1.1\r\n" + HOST + b"\r\n",
    "folded header": b"GET / HTTP/1.1\r\n" + HOST + b" folded: x\r\n\r\n",
    "bare line feeds": b"GET /nothing HTTP/1.1\n" + HOST + b"\n",
    "head": b"HEAD / HTTP/1.1\r\n" + HOST + b"\r\n",
    "post": b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 5\r\n\r\nhello",
    "options": b"OPTIONS / HTTP/1.1\r\n" + HOST + b"Origin: http://evil.test\r\n\r\n",
    "get with a body": b"GET / HTTP/1.1\r\n" + HOST + b"Content-Length: 30\r\n\r\nGET /metrics HTTP/1.1\r\n\r\n",
    "smuggled": b"GET / HTTP/1.1\r\n" + HOST + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /",
    "two lengths": b"GET / HTTP/1.1\r\n" + HOST + b"Content-Length: 0\r\nContent-Length: 9\r\n\r\nGET / HTT",
    "header injection": b"GET / HTTP/1.1\r\nHost: 127.0.0.1:{port}\rX: y\r\n\r\n",
    "upgrade elsewhere": b"GET /v2 HTTP/1.1\r\n" + HOST + UPGRADE + KEY + b"\r\n",
    "upgrade by traversal": b"GET /x/../v1 HTTP/1.1\r\n" + HOST + UPGRADE + KEY + b"\r\n",
    "upgrade without a key": b"GET /v1 HTTP/1.1\r\n" + HOST + UPGRADE + b"\r\n",
    "upgrade with a bad key": b"GET /v1 HTTP/1.1\r\n" + HOST + UPGRADE + b"Sec-WebSocket-Key: \xff\xfe\r\n\r\n",
    "upgrade, old": b"GET /v1 HTTP/1.0\r\n" + HOST + UPGRADE + KEY + b"\r\n",
    "upgrade by post": b"POST /v1 HTTP/1.1\r\n" + HOST + UPGRADE + KEY + b"\r\n",
    "odd subprotocol": b"GET /v1 HTTP/1.1\r\n" + HOST + UPGRADE + KEY + b"Sec-WebSocket-Protocol: a b,,\x80\r\n\r\n",
}


def ask_raw(address, request):
    """What comes back until the daemon closes; nothing if it just closes."""
    host, port = address.split(":")
    received = b""
    with socket.create_connection((host, int(port)), 8_000 * MS) as raw:
        raw.sendall(request.replace(b"{port}", port.encode()))
        with contextlib.suppress(ConnectionError):
            while piece := raw.recv(65536):
                received += piece
    return received


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_refused_and_the_daemon_serves_on(guarded, address, name):
    answer = ask_raw(address, NONSENSE[name])
    assert not answer or answer.startswith((b"HTTP/1.1 4", b"HTTP/1.1 5")), answer[:200]
    assert answer.count(b"HTTP/1.1") <= 1
    assert b"root:" not in answer
    assert b"import" not in answer
    with urllib.request.urlopen(f"http://{address}/healthz") as response:
        assert json.load(response)["status"] == "ok"


@pytest.mark.parametrize("after", ["", "a second request", "frames", "the end", "a reset"])
def test_what_follows_a_request_harms_nobody(guarded, address, after):
    """One answer a connection; what else comes in the same bytes is not somebody else's request, and is not logged."""
    host, port = address.split(":")
    one = f"GET /healthz HTTP/1.1\r\nHost: {address}\r\n\r\n".encode()
    sent = {"a second request": one + one, "frames": one + b"\x81\x80\0\0\0\0"}.get(after, one)
    for _ in range(10):
        with socket.create_connection((host, int(port)), 8_000 * MS) as raw:
            if after == "a reset":
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            raw.sendall(sent)
            if after == "the end":
                raw.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionError):
                received = b"" if after == "a reset" else raw.recv(65536)
                assert received.count(b"HTTP/1.1 200") <= 1
                assert after or received
    assert "Traceback" not in guarded.read_log()


# --- names and origins that a user allowed


def test_other_names_and_origins_are_as_allowed(make_daemon, make_persona, tmp_path):
    """Bound to all addresses: any address is a name of the daemon's, a name only if it was given."""
    make_persona("guard")
    allowed = ["--host", "0.0.0.0", "--allow-host", "game-pc.lan", "--allow-origin", "http://localhost:5173"]
    daemon = make_daemon("--personas", str(tmp_path / "personas"), *allowed)
    port = daemon.endpoint["port"]

    def ask(host):
        return ask_raw(f"127.0.0.1:{port}", f"GET /healthz HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())

    answers = {host: ask(host)[9:12] for host in (f"192.0.2.7:{port}", f"game-pc.lan:{port}", f"evil.test:{port}")}
    assert list(answers.values()) == [b"200", b"200", b"421"]
    for origin, is_welcome in (("http://localhost:5173", True), ("http://localhost:5174", False), ("null", False)):
        options = dict(subprotocols=["npc.v1.json"], compression=None, origin=origin)
        refused = contextlib.nullcontext() if is_welcome else pytest.raises(ConnectionClosed)
        with connect(daemon.url, **options) as page, refused:
            page.send(json.dumps({"type": "hello", "protocol": 1, "token": daemon.token}))
            assert json.loads(page.recv(WAIT_MS / 1000))["type"] == "welcome"
    assert "other machines can connect" in daemon.read_log()


@pytest.mark.parametrize(("option", "value"), [("--allow-origin", "null"), ("--allow-host", "*")])
def test_what_allows_anybody_is_refused_at_the_start(make_daemon, make_persona, tmp_path, option, value):
    make_persona("guard")
    daemon = make_daemon("--personas", str(tmp_path / "personas"), option, value)
    assert daemon.process.returncode == 1
    log = daemon.read_log().strip()
    assert f"{option} '{value}'" in log
    assert len(log.splitlines()) == 1


# --- at last


def test_the_token_was_told_to_nobody(guarded, address):
    """After all of the above: not in the log, not in what plain HTTP answers."""
    log = guarded.read_log()
    assert "opened session=" in log
    assert guarded.token not in log
    assert "Traceback" not in log, log
    for path in ("/", "/page.js", "/page.css", "/icon.svg", "/healthz", "/metrics"):
        with urllib.request.urlopen(f"http://{address}{path}") as response:
            assert guarded.token not in response.read().decode()
            assert guarded.token not in str(response.headers)
