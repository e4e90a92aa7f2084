"""What the daemon answers to plain HTTP: the status page, its health, its metrics.

A fixed table of paths, read into memory at the start: nothing a client sends becomes a file name. Nothing here has a
side effect, nothing is told to pages of others, and the token is in none of it: the page gets it from the link's
fragment and says it in `hello`.
"""

import http
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from websockets.datastructures import Headers
from websockets.http11 import Request, Response

from npc_runtime.gate import Gate
from npc_runtime.metrics import METRICS_TYPE, Metrics

__all__ = ["Health", "Pages"]

FOLDER = Path(__file__).parent / "page"
FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
TEXT, JSON = "text/plain; charset=utf-8", "application/json"

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src {socket}; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)

PROTECTION = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
"""In every answer. The last two keep pages of others from embedding this one's files and from holding its window."""


class Health(NamedTuple):
    """How the daemon is: `state` is "ok", or what is wrong; the figures are those of `status`, if there are any."""

    state: str
    figures: Mapping[str, Any]


class Pages:
    """The answers of one daemon."""

    def __init__(
        self, gate: Gate, metrics: Metrics, *, version: str, needs_token: bool, health: Callable[[], Health]
    ) -> None:
        self._gate = gate
        self._metrics = metrics
        self._known = {"version": version, "needs_token": needs_token}
        self._health = health
        self._files = {path: (kind, (FOLDER / name).read_bytes()) for path, (name, kind) in FILES.items()}

    def answer(self, request: Request) -> Response | None:
        """Answer a request; None lets a WebSocket handshake go on."""
        hosts = request.headers.get_all("Host")
        if not self._gate.knows_host(hosts):
            why = "This daemon does not go by that name; serve --allow-host NAME gives it one.\n"
            return self._respond(http.HTTPStatus.MISDIRECTED_REQUEST, TEXT, why)
        path = request.path.partition("?")[0]
        if "websocket" in " ".join(request.headers.get_all("Upgrade")).lower():
            return None if path == "/v1" else self._respond(http.HTTPStatus.NOT_FOUND, TEXT, "Connect to /v1.\n")
        if getattr(request, "method", "GET") != "GET":  # websockets before 17 lets nothing else come this far
            return self._respond(http.HTTPStatus.METHOD_NOT_ALLOWED, TEXT, "", Allow="GET")
        return self._get(path, hosts[0])

    def protect(self, response: Response) -> None:
        """Give the headers of ours to an answer of the library's, a refused handshake's; an accepted one has no use."""
        if response.status_code == http.HTTPStatus.SWITCHING_PROTOCOLS:
            return
        for name, value in {**PROTECTION, "Content-Security-Policy": POLICY.format(socket="'none'")}.items():
            if name not in response.headers:
                response.headers[name] = value

    def _get(self, path: str, host: str) -> Response:
        if path in self._files:
            kind, body = self._files[path]
            return self._respond(http.HTTPStatus.OK, kind, body, socket=f"'self' ws://{host}")
        match path:
            case "/healthz":
                return self._healthz()
            case "/metrics":
                return self._respond(http.HTTPStatus.OK, METRICS_TYPE, self._metrics.text())
            case "/v1":
                say = "A game connects here with a WebSocket.\n"
                return self._respond(http.HTTPStatus.UPGRADE_REQUIRED, TEXT, say, Upgrade="websocket")
        return self._respond(http.HTTPStatus.NOT_FOUND, TEXT, "There is no such page.\n")

    def _healthz(self) -> Response:
        state, figures = self._health()
        shown = {name: figures[name] for name in ("active", "queued", "paused", "uptime_s") if name in figures}
        status = http.HTTPStatus.OK if state == "ok" else http.HTTPStatus.SERVICE_UNAVAILABLE
        return self._respond(status, JSON, json.dumps({"status": state, **self._known, **shown}) + "\n")

    def _respond(
        self, status: http.HTTPStatus, kind: str, body: str | bytes, *, socket: str = "'none'", **more: str
    ) -> Response:
        data = body.encode() if isinstance(body, str) else body
        headers = Headers({"Content-Type": kind, "Content-Length": str(len(data)), "Connection": "close", **more})
        headers["Content-Security-Policy"] = POLICY.format(socket=socket)
        headers.update(PROTECTION)
        self._metrics.http_answered(status)
        return Response(status.value, status.phrase, headers, data)
