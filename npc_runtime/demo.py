"""The tavern scene: a real daemon, a game-like client, one batch with a line for every persona."""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from npc_runtime.client import Client
from npc_runtime.errors import NpcError, StartupError
from npc_runtime.own_daemon import own_daemon
from npc_runtime.protocol import BatchEnd, DeltaItem, LineEnd, LineStart

__all__ = ["SHOUT", "Performance", "Role", "Scene", "play", "show"]

SHOUT = "The king is dead!"


@dataclass(slots=True)
class Role:
    """One line of the scene while it is spoken."""

    persona: str
    display_name: str
    text: str = ""
    start: LineStart | None = None
    end: LineEnd | None = None


@dataclass(slots=True)
class Scene:
    """The whole batch; `device` and `base` for the title."""

    shout: str
    device: str
    base: str
    roles: dict[Any, Role] = field(default_factory=dict)
    end: BatchEnd | None = None


@dataclass(frozen=True, slots=True)
class Performance:
    """The finished scene as `demo --json` prints it."""

    lines: list[dict[str, Any]]
    totals: dict[str, Any]

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps({"lines": self.lines, "totals": self.totals}, ensure_ascii=False)

    @property
    def is_complete(self) -> bool:
        """Whether every line was spoken."""
        return bool(self.totals["ok"]) and not self.totals["failed"]


async def play(
    serve_options: list[str], shout: str, on_change: Callable[[Scene], None], on_ready: Callable[[], None]
) -> Performance:
    """Start a daemon, connect as a game would, speak one batch, stop the daemon.

    Raises `StartupError` if the daemon does not come up, with the end of its log.
    """
    async with own_daemon(serve_options) as endpoint:
        url = f"ws://127.0.0.1:{endpoint.port}/v1"
        async with await Client.connect(url, token=endpoint.token, name="npc-runtime-demo") as client:
            on_ready()
            welcome = client.welcome
            scene = Scene(shout=shout, device=welcome.device, base=welcome.base.name)
            usable = [persona for persona in await client.personas() if persona.error is None]
            for line, persona in enumerate(usable[: welcome.limits["batch"]], 1):
                scene.roles[line] = Role(persona.id, persona.display_name)
            if not scene.roles:
                raise StartupError("No persona can speak.", "npc-runtime persona check says why.")
            await _speak(client, scene, on_change)
    return _perform(scene)


async def _speak(client: Client, scene: Scene, on_change: Callable[[Scene], None]) -> None:
    lines = [
        {"line": line, "persona": role.persona, "input": {"text": scene.shout}} for line, role in scene.roles.items()
    ]
    on_change(scene)
    batch = await client.generate(lines)
    for item in batch.rejected:
        raise NpcError(item.message or "A line was rejected.", item.hint or "")
    async for event in batch:
        match event:
            case LineStart():
                scene.roles[event.line].start = event
            case DeltaItem():
                scene.roles[event.line].text += event.text
            case LineEnd():
                scene.roles[event.line].end = event
                scene.roles[event.line].text = event.text
            case BatchEnd():
                scene.end = event
        on_change(scene)


def _perform(scene: Scene) -> Performance:
    assert scene.end is not None
    lines = []
    for role in scene.roles.values():
        assert role.end is not None
        started = {
            "persona": role.persona,
            "adapter": role.start.adapter if role.start else None,
            "batch_size": role.start.batch_size if role.start else 0,
        }
        lines.append({**role.end.model_dump(mode="json", exclude={"type"}), **started})
    tokens = sum(line["usage"]["completion"] for line in lines)
    totals = {
        "ok": scene.end.ok,
        "failed": scene.end.failed,
        "wall_ms": scene.end.wall_ms,
        "forwards": scene.end.forwards,
        "tokens": tokens,
        "tokens_per_s": round(1000 * tokens / max(scene.end.wall_ms, 1.0), 1),
        "base": scene.base,
        "device": scene.device,
    }
    return Performance(lines, totals)


@contextlib.contextmanager
def show(console: Console) -> Iterator[Callable[[Scene], None]]:
    """Yield a callback that draws the scene as a table, live while it streams."""
    with contextlib.ExitStack() as stack:
        views: list[Live] = []

        def draw(scene: Scene) -> None:
            if not views:  # only now, or it would fight with whatever is shown before the scene begins
                views.append(stack.enter_context(Live(console=console, refresh_per_second=15)))
            views[0].update(_table(scene))

        yield draw


def _table(scene: Scene) -> Table:
    table = Table(title=f"“{scene.shout}”", caption=f"{scene.base} on {scene.device}", expand=True)
    table.add_column("persona", style="bold", no_wrap=True)
    table.add_column("adapter", no_wrap=True)
    table.add_column("line", ratio=1)
    for heading in ("first text", "tok/s", "batch"):
        table.add_column(heading, justify="right", no_wrap=True)
    for role in scene.roles.values():
        timing = role.end.timing if role.end else None
        first = f"{timing.ttft_ms:.0f} ms" if timing and timing.ttft_ms is not None else ""
        adapter = role.start.adapter or "none (prompt only)" if role.start else ""
        said = Text(role.text)
        if role.end is None:
            said.append("▌", style="dim")
        elif role.end.fallback or role.end.error:
            said.append(f"  [{role.end.reason}]", style="red")
        table.add_row(
            role.display_name,
            adapter,
            said,
            first,
            f"{timing.tokens_per_s:.1f}" if timing else "",
            str(role.start.batch_size) if role.start else "",
        )
    return table
