"""What protocol, session and socket cost: one engine, asked directly and through the daemon's server, in turns.

    .venv/bin/python -P benchmarks/overhead.py [--npcs 32] [--rounds 3] [--json-frames]

The shipped personas, 100 new tokens a line. Directly, the very requests that the server made are submitted again, so
that both compute the same. Lateness is the time from the end of the step that made a text to its arrival in a client,
which is a process of its own; a text waits for the tick of its connection (33 ms), and for the client to be scheduled.
Prints the machine, a table, and one JSON line last.
"""

import argparse
import asyncio
import itertools
import json
import os
import platform
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the daemon has it

import torch
from websockets.asyncio.client import connect
from websockets.typing import Subprotocol

from npc_runtime.codec import decode, encode, parse_server
from npc_runtime.door import Door
from npc_runtime.engine.core import Ended, EngineConfig, Request, Spoken, StepOutput
from npc_runtime.engine.engine import Engine
from npc_runtime.gate import Gate
from npc_runtime.loading import load_adapters, load_base, make_store
from npc_runtime.persona import Library, shipped_personas
from npc_runtime.persona_folder import PersonaFolder
from npc_runtime.protocol import (
    PROTOCOL_VERSION,
    SUBPROTOCOLS,
    BaseModelInfo,
    Delta,
    Generate,
    Hello,
    Input,
    LineRequest,
    LineSampling,
)
from npc_runtime.server import NpcServer
from npc_runtime.stage import DaemonInfo, Stage

PERSONAS = ("odo", "brom", "vaskar", "thalindra", "marta")
NEW_TOKENS = 100
TICK_S = 0.033

Seen = dict[Any, list[tuple[int, float]]]
"""Of each line, how many characters there were when."""


class Tap:
    """Stands between engine and server: keeps the requests and the times of all texts, and asks the engine itself."""

    def __init__(self) -> None:
        self.server: NpcServer | None = None  # None: the engine is asked directly
        self.requests: list[Request] = []
        self.seen: Seen = defaultdict(list)
        self.step_ends: list[float] = []
        self._left = 0
        self._is_over = threading.Event()

    def begin(self, server: NpcServer | None) -> None:
        """Forget the round before."""
        self.server = server
        self.seen.clear()
        self.step_ends.clear()
        self._is_over.clear()

    def on_step(self, step: StepOutput) -> None:
        """On the engine thread."""
        now = time.monotonic()
        self.step_ends.append(now)
        for event in step.events:
            if isinstance(event, Spoken):
                so_far = self.seen[event.request_id][-1][0] if self.seen[event.request_id] else 0
                self.seen[event.request_id].append((so_far + len(event.text), now))
        if self.server is not None:
            self.server.on_step(step)
        else:
            self._left -= sum(isinstance(event, Ended) for event in step.events)
            if self._left == 0:
                self._is_over.set()

    def run(self, engine: Engine, ids: "itertools.count[int]") -> float:
        """Ask the engine directly for what the server asked for; tokens a second."""
        started = time.monotonic()
        requests = [replace(request, id=next(ids), arrival=started, group=None) for request in self.requests]
        self._left = len(requests)
        engine.submit(requests)
        self._is_over.wait()
        return len(requests) * NEW_TOKENS / (time.monotonic() - started)


async def speak(url: str, *, npcs: int, rounds: int, as_json: bool) -> None:
    """The client's process: a batch for every line read from stdin; what was seen goes to stdout.

    Frames are kept, and read when the round is over: a game has a core of its own for that, this machine may not.
    """
    subprotocol = SUBPROTOCOLS[1 if as_json else 0]
    wanted = [Subprotocol(subprotocol)]
    async with connect(url, subprotocols=wanted, compression=None, ping_interval=None, proxy=None) as socket_:
        await socket_.send(encode(Hello(protocol=PROTOCOL_VERSION), subprotocol))
        await socket_.recv()
        for number in range(rounds):
            await asyncio.to_thread(sys.stdin.readline)
            sampling = LineSampling(trim="none", min_tokens=NEW_TOKENS, max_tokens=NEW_TOKENS, temperature=0.0)
            text = Input(text="What is new in town?")
            lines = [
                LineRequest(line=n, persona=PERSONAS[n % len(PERSONAS)], input=text, sampling=sampling)
                for n in range(npcs)
            ]
            batch = encode(Generate(batch=number, lines=lines), subprotocol)
            frames: list[tuple[float, bytes | str]] = []
            started = time.monotonic()
            await socket_.send(batch)
            while True:
                frame = await socket_.recv()
                frames.append((time.monotonic(), frame))
                if (b"batch.end" if isinstance(frame, bytes) else "batch.end") in frame:  # type: ignore[operator]
                    break
            seen = read(frames, subprotocol)
            print(json.dumps({"s": frames[-1][0] - started, "seen": list(seen.items())}), flush=True)


def read(frames: Iterable[tuple[float, bytes | str]], subprotocol: str) -> Seen:
    """What the frames of a round say."""
    seen: Seen = defaultdict(list)
    for at, frame in frames:
        message = parse_server(decode(frame, subprotocol))
        for item in message.items if isinstance(message, Delta) else []:
            so_far = seen[item.line][-1][0] if seen[item.line] else 0
            seen[item.line].append((so_far + len(item.text), at))
    return seen


def lateness(spoken: Seen, heard: Seen) -> list[float]:
    """Seconds from a text's step to its arrival, for every text."""
    late = []
    for request_id, line in zip(sorted(spoken), sorted(heard), strict=True):
        arrivals = iter(heard[line])
        so_far, at = next(arrivals)
        for num_chars, made_at in spoken[request_id]:
            while so_far < num_chars:
                so_far, at = next(arrivals)
            late.append(at - made_at)
    return late


async def measure(
    engine: Engine, tap: Tap, server: NpcServer, options: argparse.Namespace, port: int
) -> dict[str, Any]:
    """Both ways in turns; medians."""
    command = [sys.executable, "-P", __file__, "--client", f"ws://127.0.0.1:{port}/v1", "--npcs", str(options.npcs)]
    command += ["--rounds", str(options.rounds + 1)] + ["--json-frames"] * options.json_frames
    pipe = asyncio.subprocess.PIPE
    client = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, limit=1 << 26)
    assert client.stdin is not None
    assert client.stdout is not None
    direct, through, late, steps = [], [], [], []
    ids = itertools.count(1 << 40)
    for number in range(options.rounds + 1):
        tap.begin(server)
        tap.requests.clear()
        client.stdin.write(b"\n")
        told = json.loads(await client.stdout.readline())
        through.append(options.npcs * NEW_TOKENS / told["s"])
        late.append(lateness(dict(tap.seen), dict(told["seen"])))
        steps.append(statistics.median(b - a for a, b in itertools.pairwise(tap.step_ends)))
        tap.begin(None)
        direct.append(await asyncio.to_thread(tap.run, engine, ids))
        print(f"round {number}: {direct[-1]:.0f} directly, {through[-1]:.0f} through the server", file=sys.stderr)
    await client.wait()
    all_late = sorted(itertools.chain(*late[1:]))  # the first round fills the prefix cache
    return {
        "npcs": options.npcs,
        "direct_tokens_per_s": round(statistics.median(direct[1:]), 1),
        "daemon_tokens_per_s": round(statistics.median(through[1:]), 1),
        "share": round(statistics.median(a / b for a, b in zip(through[1:], direct[1:], strict=True)), 3),
        "step_ms": round(1000 * statistics.median(steps[1:]), 1),
        "late_p50_ms": round(1000 * all_late[len(all_late) // 2], 1),
        "late_p99_ms": round(1000 * all_late[int(0.99 * len(all_late))], 1),
        "late_bound_ms": round(1000 * (TICK_S + statistics.median(steps[1:])), 1),
    }


async def run(options: argparse.Namespace) -> dict[str, Any]:
    """Load, serve, measure."""
    base = load_base("smollm2-135m", "auto", lambda label, fraction: None)
    config = EngineConfig()
    store = make_store(base.decoder.shape, base.device, config, base.info.folder)
    library = Library.load(shipped_personas())
    load_adapters(store, library, base.info.name)
    tap = Tap()
    engine = Engine(base.decoder, base.tokenizer, store, config, on_step=tap.on_step)
    submit = engine.submit

    def keep(requests: Any) -> None:
        requests = list(requests)
        if tap.server is not None:
            tap.requests += requests
        submit(requests)

    engine.submit = keep  # type: ignore[method-assign]
    sock = socket.create_server(("127.0.0.1", 0))
    port = sock.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        server = NpcServer(
            gate=Gate("127.0.0.1", port), door=Door(token=None), personas=PersonaFolder(Path(folder)), version="bench"
        )
        await server.start(sock)
        info = DaemonInfo("bench", base.device.name, base.backend, BaseModelInfo(name="", sha256="", context=8192))
        server.open(
            engine,
            lambda new_id, new_seed: Stage(
                info, library, lambda m: base.tokenizer.render(m).token_ids, new_id, new_seed
            ),
        )
        figures = await measure(engine, tap, server, options, port)
        await server.close("over")
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, {base.backend}"
    return {"benchmark": "overhead", "machine": machine, "load": round(os.getloadavg()[0], 1), **figures}


def main() -> None:
    """Measure and print, or be the client."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--npcs", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json-frames", action="store_true")
    parser.add_argument("--client", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client:
        asyncio.run(speak(options.client, npcs=options.npcs, rounds=options.rounds, as_json=options.json_frames))
        return
    result = asyncio.run(run(options))
    print(f"{result['machine']}, load {result['load']}")
    for name, value in result.items():
        if isinstance(value, int | float) and name != "load":
            print(f"{name:>22} {value:>10}")
    print(json.dumps(result))
    os._exit(0)


if __name__ == "__main__":
    main()
