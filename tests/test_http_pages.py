"""The answers to plain HTTP: a fixed table, the same protection on each, nothing of the file system."""

import http
import json
from pathlib import Path

import pytest
from websockets.datastructures import Headers
from websockets.http11 import Request, Response

from npc_runtime.gate import Gate
from npc_runtime.metrics import Metrics
from npc_runtime.pages import FILES, FOLDER, Health, Pages

HOST = "127.0.0.1:4780"


class Daemon:
    """What pages are asked of."""

    def __init__(self):
        self.health = Health("ok", {"active": 3, "queued": 1, "adapters": ["odo"], "secret": "x"})
        metrics = Metrics(lambda: self.health.figures)
        gate = Gate("127.0.0.1", 4780)
        self.pages = Pages(gate, metrics, version="1.2.3", needs_token=True, health=lambda: self.health)

    def get(self, path, method="GET", **headers):
        return self.pages.answer(Request(path, Headers({"Host": HOST, **headers}), method))


@pytest.fixture
def pages():
    return Daemon()


@pytest.mark.parametrize("path", [*FILES, "/healthz", "/metrics", "/v1", "/none", "/page.js?x=1"])
def test_every_answer_is_protected(pages, path):
    headers = pages.get(path).headers
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["X-Frame-Options"] == "DENY"
    assert headers["Cache-Control"] == "no-store"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    policy = dict(part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == "'self'"
    assert policy["connect-src"] == (f"'self' ws://{HOST}" if path.partition("?")[0] in FILES else "'none'")
    assert not [name for name in headers if name.lower().startswith("access-control")]


def test_the_page_has_nothing_inline_and_nothing_from_elsewhere(pages):
    text = pages.get("/").body.decode()
    assert "style=" not in text
    assert "<style" not in text
    assert text.count("<script") == text.count('<script type="module" src="/page.js"></script>') == 1
    for name, _ in FILES.values():
        source = (FOLDER / name).read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in source.replace("http://${", "")
        assert "https://" not in source
        assert "innerHTML" not in source


def test_the_package_has_all_the_files():
    assert {path.name for path in FOLDER.iterdir()} == {name for name, _ in FILES.values()}
    root = Path(__file__).parent.parent
    assert '"page/*"' in (root / "pyproject.toml").read_text(encoding="utf-8")


def test_health_says_little(pages):
    answer = pages.get("/healthz")
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, "application/json")
    assert json.loads(answer.body) == {
        "status": "ok",
        "version": "1.2.3",
        "needs_token": True,
        "active": 3,
        "queued": 1,
    }


@pytest.mark.parametrize("state", ["loading", "the engine thread died"])
def test_health_is_503_when_nothing_can_be_said(pages, state):
    pages.health = Health(state, {})
    answer = pages.get("/healthz")
    assert answer.status_code == http.HTTPStatus.SERVICE_UNAVAILABLE
    assert json.loads(answer.body)["status"] == state
    assert pages.get("/metrics").status_code == 200


def test_metrics_are_text(pages):
    answer = pages.get("/metrics")
    assert answer.headers["Content-Type"].startswith("text/plain")
    assert b"npc_runtime_lines_active 3.0" in answer.body
    assert b"secret" not in answer.body


@pytest.mark.parametrize(
    "path",
    [
        "/../pages.py",
        "/page/../pages.py",
        "/%2e%2e/pages.py",
        "/..%2fpages.py",
        "/page.js/",
        "//page.js",
        "/./page.js",
        "/PAGE.JS",
        "/page.js%00",
        "/index.html",
        "/page/page.js",
        "/etc/passwd",
        "/C:/Windows/win.ini",
        "\\page.js",
        "http://127.0.0.1:4780/",
        "http://evil.test/",
        "*",
        "",
        "/" + 7_000 * "a",
    ],
)
def test_there_is_nothing_but_the_table(pages, path):
    assert pages.get(path).status_code == 404


@pytest.mark.parametrize("method", ["HEAD", "POST", "PUT", "DELETE", "OPTIONS", "TRACE", "get"])
def test_only_get(pages, method):
    answer = pages.get("/", method)
    assert (answer.status_code, answer.body, answer.headers["Allow"]) == (405, b"", "GET")


def test_a_foreign_host_sees_nothing(pages):
    for path in ("/", "/healthz", "/metrics", "/v1"):
        headers = {"Host": "evil.test:4780", "Upgrade": "websocket"}
        answer = pages.pages.answer(Request(path, Headers(headers)))
        assert answer.status_code == 421
        assert b"--allow-host" in answer.body
        assert b"evil" not in answer.body


def test_a_handshake_goes_on_at_v1_only(pages):
    assert pages.get("/v1", Upgrade="websocket") is None
    assert pages.get("/v1?x=1", Upgrade="WebSocket") is None
    assert pages.get("/v2", Upgrade="websocket").status_code == 404
    assert pages.get("/v1").status_code == 426


def test_the_librarys_answers_are_protected_too(pages):
    answer = Response(400, "Bad Request", Headers({"Content-Type": "text/plain"}), b"")
    assert pages.pages.protect(answer) is None
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'")
