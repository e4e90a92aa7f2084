"""How the running daemon is, second by second: asked over one connection, drawn for a terminal.

Every field of `status` may be missing, and is left out then: daemon and terminal need not be of one version.
"""

import asyncio
import json
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.styled import Styled
from rich.table import Table
from rich.text import Text

from npc_runtime.client import Client
from npc_runtime.errors import DisconnectedError, StartupError
from npc_runtime.protocol import Event, Welcome
from npc_runtime.running import Target

__all__ = ["Picture", "Snapshot", "sparkline", "take_snapshot", "watch"]

PERIOD_S = 1.0
HISTORY_S = 60
BARS = "▁▂▃▄▅▆▇█"
METER_WIDTH = 20
MAX_NAMED = 12


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A daemon at one moment: what it is, and what it answered to `status`."""

    at: float  # seconds since 1970
    version: str
    device: str
    backend: str
    base: str
    status: dict[str, Any]

    @classmethod
    def of(cls, welcome: Welcome, status: dict[str, Any]) -> "Snapshot":
        """What was learned over a connection."""
        about = (welcome.version, welcome.device, welcome.backend, welcome.base.name)
        return cls(time.time(), *about, status)

    def to_json(self) -> str:
        """One line of JSON."""
        about = {name: getattr(self, name) for name in ("version", "device", "backend", "base")}
        return json.dumps({"at": round(self.at, 3), **about, **self.status}, ensure_ascii=False)


async def take_snapshot(target: Target) -> Snapshot:
    """Ask once. Raises `NpcError`."""
    async with await _connect(target) as client:
        return Snapshot.of(client.welcome, await client.status())


async def watch(
    find: Callable[[], Target], on_note: Callable[[str], None], *, period_s: float = PERIOD_S
) -> AsyncIterator[Snapshot]:
    """Ask once a period, for ever; a daemon that goes away is looked for again.

    `on_note` gets what there is to say meanwhile, and "" when all is well. Raises `NpcError` if there is no daemon to
    begin with.
    """
    was_there = False
    while True:
        try:
            async with await _connect(find(), on_note) as client:
                on_note("")
                while True:
                    yield Snapshot.of(client.welcome, await client.status())
                    was_there = True
                    await asyncio.sleep(period_s)
        except (DisconnectedError, StartupError) as error:
            if not was_there:
                raise
            on_note(f"{error.message} Looking for it again …")
        await asyncio.sleep(period_s)


async def _connect(target: Target, on_note: Callable[[str], None] = lambda note: None) -> Client:
    def on_loading(event: Event) -> None:
        share = "" if event.progress is None else f" {event.progress:.0%}"
        on_note(f"The daemon is loading: {event.message or event.kind}{share}")

    return await Client.connect(target.url, token=target.token, name="npc-runtime-top", on_loading=on_loading)


class Picture:
    """What a terminal shows: the last snapshot, a minute of speed, and a note while there is no daemon."""

    def __init__(self) -> None:
        self.note = ""
        self._last: Snapshot | None = None
        self._speeds: deque[float] = deque(maxlen=HISTORY_S)

    def take(self, snapshot: Snapshot) -> None:
        """Show this one from now on."""
        self._last = snapshot
        self._speeds.append(float(snapshot.status.get("tokens_per_s") or 0.0))

    def draw(self) -> RenderableType:
        """Everything, for a console of any width."""
        parts: list[RenderableType] = []
        if self._last is not None:
            figures = Group(_title(self._last), _table(self._last.status, self._speeds))
            parts.append(Styled(figures, "dim") if self.note else figures)
        if self.note:
            parts.append(Text(self.note, style="bold yellow"))
        return Group(*parts)


def sparkline(values: Sequence[float]) -> str:
    """A bar for each value, the highest one full; what is more than nothing is seen."""
    highest = max(values, default=0.0)
    if highest <= 0:
        return BARS[0] * len(values)
    return "".join(BARS[math.ceil(value / highest * 7)] for value in values)


def _title(snapshot: Snapshot) -> Text:
    uptime = snapshot.status.get("uptime_s")
    about = f"{snapshot.base} on {snapshot.device} ({snapshot.backend})" + (f", up {_span(uptime)}" if uptime else "")
    return Text.assemble((f"npc-runtime {snapshot.version}  ", "bold"), about)


def _table(status: dict[str, Any], speeds: Sequence[float]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in _rows(status, speeds):
        if text:
            table.add_row(label, text)
    return table


def _rows(status: dict[str, Any], speeds: Sequence[float]) -> list[tuple[str, Text | str]]:
    adapters = status.get("adapters")
    memory = status.get("memory") or {}
    return [
        ("lines", _join(status, active="{} active", queued="{} queued")),
        ("tokens/s", _speed(status, speeds)),
        ("limits", _limits(status)),
        ("KV cache", _meter(status)),
        ("adapters", "" if adapters is None else _names(adapters)),
        ("memory", ", ".join(f"{name.replace('_', ' ')} {size:,.0f} MiB" for name, size in memory.items())),
        ("clients", _join(status, connections="{} connected", personas="{} personas")),
        ("so far", _join(status, tokens="{:,} tokens", forwards="{:,} forward passes", preempted="{:,} preempted")),
    ]


def _join(status: dict[str, Any], **forms: str) -> str:
    return ", ".join(form.format(status[name]) for name, form in forms.items() if status.get(name) is not None)


def _speed(status: dict[str, Any], speeds: Sequence[float]) -> Text | str:
    if status.get("tokens_per_s") is None:
        return ""
    return Text.assemble(
        (f"{status['tokens_per_s']:>7,.1f}  ", "bold"), (sparkline(speeds) if len(speeds) > 1 else "", "green")
    )


def _limits(status: dict[str, Any]) -> Text | str:
    if status.get("paused"):
        return Text("paused", style="bold yellow")
    pace = status.get("max_tokens_per_s")
    return f"at most {pace:,.0f} tokens/s" if pace else ""


def _meter(status: dict[str, Any]) -> str:
    used = status.get("kv_used")
    if used is None:
        return ""
    filled = min(round(used * METER_WIDTH), METER_WIDTH)
    cached = status.get("kv_cached")
    known = "" if cached is None else f", {cached:.0%} holds known prompts"
    return f"{'█' * filled}{'░' * (METER_WIDTH - filled)} {used:.0%} used{known}"


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return f"{len(names)} on the device: {', '.join(names[:MAX_NAMED])}{more}" if names else "none on the device"


def _span(seconds: float) -> str:
    """`42 s`, `17 min`, `3 h 05 min`."""
    minutes, rest = divmod(int(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
