"""A real `npc-runtime serve` and a real client: what a game gets, WebSocket, protocol and session included.

A persona's own prompt comes from the daemon's prefix cache after its first line. So the player's text is sized such
that the tokens that must be computed (`usage.prompt` − `usage.cached`) are as many as everybody else's whole prompt.
"""

import asyncio
import json
import shutil
import statistics
import sys
import time
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from place import Place
from processes import START_LIMIT_S, Group, Skipped
from workload import Cell, Measured, adapter_folder, prompts_of

from npc_runtime.client import Client
from npc_runtime.errors import NpcError
from npc_runtime.protocol import DeltaItem, LineEnd

__all__ = ["Daemon"]

TEXT = (
    "the man said that his old house was near a green river and every day many people came over from her "
    "town with good food for their long way home where no one had ever seen such great fire before this "
    "night "
)
WORDS = TEXT.split()
"""Each is one token of the embedded base with its space."""

SHORTEST = 4  # words a player says at least
SIZING_ROUNDS = 3


@dataclass(slots=True)
class _Line:
    """What one line brought."""

    first_text_s: float | None = None
    end: LineEnd | None = None

    @property
    def computed(self) -> int:
        """Prompt tokens that did not come from the prefix cache."""
        return self.end.usage.prompt - self.end.usage.cached if self.end else 0


@dataclass(slots=True)
class Daemon:
    """A daemon whose personas carry a cell's adapters, and a connection to it."""

    place: Place
    name: str = "npc-runtime-daemon"
    variant: str = ""
    group: Group | None = None
    _runner: asyncio.Runner = field(default_factory=asyncio.Runner)
    _client: Client | None = None
    _num_words: dict[int, int] = field(default_factory=dict)  # by wanted prompt tokens

    def key(self, cell: Cell) -> Hashable:
        """What it must be started for."""
        return cell.adapters

    def set_up(self, on_progress: Any) -> None:
        """Nothing: it is in this venv."""

    def open(self, cell: Cell) -> None:
        """Start the daemon with a persona for each adapter and connect. Raises `Skipped`."""
        personas = self.place.root / "personas"
        _write_personas(personas, self.place, cell)
        options = ["--port", "0", "--base", str(self.place.base), "--personas", str(personas), "--log-file", "-"]
        command = [sys.executable, "-P", "-m", "npc_runtime", "serve", *options]
        env = {"XDG_RUNTIME_DIR": str(self.place.root)}
        self.group = Group(command, log=self.place.log(self.name), env=env)
        endpoint = json.loads(self.group.read_line(START_LIMIT_S))
        url = f"ws://127.0.0.1:{endpoint['port']}/v1"
        self._num_words = {}
        try:
            connecting = Client.connect(url, token=endpoint["token"], name="bench")  # which waits for the base
            self._client = self._runner.run(asyncio.wait_for(connecting, START_LIMIT_S))
        except NpcError as error:
            raise Skipped(str(error)) from error
        except TimeoutError as error:
            raise Skipped(f"the base was not loaded within {START_LIMIT_S:.0f} s") from error

    def speak(self, cell: Cell, prompts: list[list[int]], limit_s: float) -> Measured:
        """Speak one batch of lines whose text has as many tokens as the prompts. Raises `Skipped`."""
        length = len(prompts[0])
        if length not in self._num_words:
            self._num_words[length] = self._find_num_words(cell, length, limit_s)
        lines, last_line_s = self._play(_texts(prompts, self._num_words[length]), cell.new_tokens, limit_s)
        return Measured(
            last_line_s=last_line_s,
            first_text_s=tuple(line.first_text_s for line in lines if line.first_text_s is not None),
            counts=tuple(line.end.usage.completion if line.end else 0 for line in lines),
            prompt_tokens=round(statistics.median(line.computed for line in lines)),
        )

    def close(self) -> None:
        """Disconnect and stop the daemon."""
        if self._client is not None and self.group is not None:
            self.group.resume()
            self._runner.run(self._client.close())
            self._client = None
        self._runner.close()
        self._runner = asyncio.Runner()  # makes a loop when it is first used
        if self.group is not None:
            self.group.close()
            self.group = None

    def _find_num_words(self, cell: Cell, length: int, limit_s: float) -> int:
        """Words to say so that `length` tokens must be computed; short lines tell what the template adds."""
        num_words = SHORTEST
        for trial in range(SIZING_ROUNDS):
            prompts = prompts_of(cell, f"sizing {length} {trial}", vocabulary=self.place.config["vocab_size"])
            lines, _ = self._play(_texts(prompts, num_words), 1, limit_s)
            if trial:  # the first only fills the cache
                overhead = statistics.median(line.computed for line in lines) - num_words
                num_words = max(SHORTEST, length - round(overhead))
        return num_words

    def _play(self, texts: list[str], new_tokens: int, limit_s: float) -> tuple[list[_Line], float]:
        sampling = {"temperature": 0.0, "min_tokens": new_tokens, "max_tokens": new_tokens, "trim": "none"}
        requests = [
            {"line": n, "persona": f"npc{n}", "input": {"text": text}, "sampling": sampling}
            for n, text in enumerate(texts)
        ]
        try:
            return self._runner.run(asyncio.wait_for(self._receive(requests), limit_s))
        except TimeoutError as error:
            raise Skipped(f"no answer within {limit_s:.0f} s") from error
        except NpcError as error:
            raise Skipped(str(error)) from error

    async def _receive(self, requests: list[dict[str, Any]]) -> tuple[list[_Line], float]:
        assert self._client is not None
        lines = [_Line() for _ in requests]
        began = time.perf_counter()
        batch = await self._client.generate(requests)
        for item in batch.rejected:
            raise Skipped(f"{item.message} {item.hint}")
        async for event in batch:
            if isinstance(event, DeltaItem) and lines[int(event.line)].first_text_s is None:
                lines[int(event.line)].first_text_s = time.perf_counter() - began
            elif isinstance(event, LineEnd):
                lines[int(event.line)].end = event
        return lines, time.perf_counter() - began


def _texts(prompts: list[list[int]], num_words: int) -> list[str]:
    """A text for each prompt, picked by its token ids, so that it is as new as they are."""
    return [" ".join(WORDS[token % len(WORDS)] for token in (ids * 2)[:num_words]) for ids in prompts]


def _write_personas(folder: Path, place: Place, cell: Cell) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for number in range(cell.npcs):
        path = folder / f"npc{number}"
        path.mkdir(parents=True, exist_ok=True)
        document: dict[str, Any] = {"schema": 1, "id": path.name, "display_name": "Bo", "bio": "A cat."}
        if cell.adapters:
            document["adapter"] = str(adapter_folder(place.root, cell.adapters[number]))
        (path / "persona.yaml").write_text(json.dumps(document), encoding="utf-8")
