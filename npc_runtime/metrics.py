"""What Prometheus is told: counts and durations that the server reports, and the figures of `status` when it asks.

Labels have few values: reasons, codes and subprotocols of the protocol, and ids of personas that were loaded. Nothing
that a client wrote becomes one, and nothing is counted for every token.
"""

import http
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
    exposition,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from npc_runtime import protocol as wire

__all__ = ["METRICS_TYPE", "Metrics"]

METRICS_TYPE = exposition.CONTENT_TYPE_LATEST

MAX_PERSONAS = 256
"""Persona ids that become labels; a game that makes up more shares "other"."""

CLOSE_CODES = {1000, 1001, 1002, 1003, 1005, 1006, 1007, 1009, 1011, 1012} | {
    value for name, value in vars(wire.CloseCode).items() if name.isupper()
}

MS = 0.001
FAST_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
SLOW_S = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0)
TOKENS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

GAUGES = {
    "active": ("lines_active", "Lines that are being spoken."),
    "queued": ("lines_queued", "Lines that wait for their first forward pass."),
    "tokens_per_s": ("tokens_per_second", "Generated tokens of the last second."),
    "kv_used": ("kv_used_ratio", "Share of the KV cache that running lines hold."),
    "kv_cached": ("kv_cached_ratio", "Share of the KV cache that keeps prompts for later lines."),
    "personas": ("personas", "Personas that can be asked for."),
    "connections": ("connections", "Open connections."),
    "paused": ("paused", "1 while a client has the daemon paused."),
    "max_tokens_per_s": ("max_tokens_per_second", "What a client limits generation to; absent: nothing."),
}
"""Entries of the status map, and what they are called here."""

COUNTERS = {
    "tokens": ("tokens", "Generated tokens."),
    "forwards": ("forwards", "Forward passes of the base."),
    "preempted": ("preemptions", "Lines that lost their KV blocks and were computed again."),
}


class Metrics:
    """One daemon's metrics, in a registry of its own. All methods are for the event loop's thread."""

    def __init__(self, status: Callable[[], Mapping[str, Any]]) -> None:
        """Take what reads the status map, which is empty while there is no engine."""
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for every counter
        self._registry = CollectorRegistry()
        self._personas: set[str] = set()
        self._make_counters()
        self._make_histograms()
        self._build = Info("npc_runtime_build", "What runs.", registry=self._registry)
        ProcessCollector(registry=self._registry)
        self._registry.register(_StatusCollector(status))

    def text(self) -> bytes:
        """Everything, in the text format `METRICS_TYPE`."""
        return exposition.generate_latest(self._registry)

    def describe(self, *, version: str, device: str, backend: str, base: str) -> None:
        """Name this daemon."""
        self._build.info({"version": version, "device": device, "backend": backend, "base": base})

    def connection_opened(self, subprotocol: str) -> None:
        """A client's `hello` was accepted."""
        self._opened.labels(subprotocol if subprotocol in wire.SUBPROTOCOLS else "other").inc()

    def connection_closed(self, code: int | None) -> None:
        """A connection that was open is over; the code may be the client's own."""
        self._closed.labels(_close_code(code)).inc()

    def connection_refused(self, code: int | None) -> None:
        """A socket was closed before it was open: its page, token or first message was wrong, or it never spoke."""
        self._refused.labels(_close_code(code)).inc()

    def http_answered(self, status: http.HTTPStatus) -> None:
        """A plain HTTP request got its answer."""
        self._http.labels(str(status.value)).inc()

    def sent(self, message: wire.ServerMessage, persona: str | None = None) -> None:
        """A message goes to a client: count what it says. Of an end, `persona` is whose line it was."""
        match message:
            case wire.LineEnd():
                self.line_ended(message, persona)
            case wire.Accepted():
                for item in message.items:
                    if item.status == "queued":
                        self._accepted.inc()
                    else:
                        self._rejected.labels(item.code or "internal").inc()
            case wire.Error():
                self._bad_frames.labels(message.code).inc()

    def line_ended(self, end: wire.LineEnd, persona: str | None) -> None:
        """A line got its end."""
        name = self._label(persona)
        self._lines.labels(end.reason, name).inc()
        self._fallbacks.labels(name).inc(end.fallback)
        self._line_tokens.observe(end.usage.completion)
        self._prompt_tokens.labels("yes").inc(end.usage.cached)
        self._prompt_tokens.labels("no").inc(end.usage.prompt - end.usage.cached)
        self._queue_s.observe(end.timing.queue_ms * MS)
        self._line_s.observe(end.timing.total_ms * MS)
        if end.timing.ttft_ms is not None:
            self._first_text_s.observe(end.timing.ttft_ms * MS)

    def lines_dropped(self, personas: Iterable[str | None]) -> None:
        """These personas' lines were running when their client went; nobody is told of their end."""
        for persona in personas:
            self._lines.labels("disconnected", self._label(persona)).inc()

    def _label(self, persona: str | None) -> str:
        if persona is None or (persona not in self._personas and len(self._personas) >= MAX_PERSONAS):
            return "other"
        self._personas.add(persona)
        return persona

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"npc_runtime_{name}", text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: Iterable[float]) -> Histogram:
        return Histogram(f"npc_runtime_{name}", text, buckets=tuple(buckets), registry=self._registry)

    def _make_counters(self) -> None:
        self._opened = self._counter("connections_opened", "Connections that said hello.", "subprotocol")
        self._closed = self._counter("connections_closed", "Open connections that ended, by close code.", "code")
        self._refused = self._counter("connections_refused", "Sockets closed before they were open.", "code")
        self._http = self._counter("http_answers", "Answers to plain HTTP requests, by status.", "status")
        self._bad_frames = self._counter("frames_refused", "Messages answered with an error.", "code")
        self._accepted = self._counter("lines_accepted", "Lines that were queued.")
        self._rejected = self._counter("lines_rejected", "Lines that were not accepted, by error.", "code")
        self._lines = self._counter("lines", "Lines that ended, by reason and persona.", "reason", "persona")
        self._fallbacks = self._counter("fallbacks", "Lines that ended with an authored fallback.", "persona")
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of lines that ended.", "cached")

    def _make_histograms(self) -> None:
        self._queue_s = self._histogram("queue_seconds", "From a line's arrival to its first pass.", FAST_S)
        self._first_text_s = self._histogram("first_text_seconds", "From a line's arrival to its first text.", FAST_S)
        self._line_s = self._histogram("line_seconds", "From a line's arrival to its end.", SLOW_S)
        self._line_tokens = self._histogram("line_tokens", "Generated tokens of a line.", TOKENS)


class _StatusCollector(Collector):
    """The status map as metrics, read when Prometheus asks."""

    def __init__(self, status: Callable[[], Mapping[str, Any]]) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        status = self._status()
        for entry, (name, text) in GAUGES.items():
            if status.get(entry) is not None:
                yield GaugeMetricFamily(f"npc_runtime_{name}", text, value=float(status[entry]))
        for entry, (name, text) in COUNTERS.items():
            if entry in status:
                yield CounterMetricFamily(f"npc_runtime_{name}", text, value=float(status[entry]))
        if "adapters" in status:
            resident = float(len(status["adapters"]))
            yield GaugeMetricFamily("npc_runtime_adapters_resident", "Adapters on the device.", value=resident)
        if "memory" in status:
            memory = GaugeMetricFamily("npc_runtime_memory_bytes", "Memory, by what holds it.", labels=["kind"])
            for kind, mib in status["memory"].items():
                memory.add_metric([kind], float(mib) * (1 << 20))
            yield memory


def _close_code(code: int | None) -> str:
    return str(code) if code in CLOSE_CODES else "other"
