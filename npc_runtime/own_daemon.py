"""A daemon of a command's own: started as a process, and stopped when the command is over."""

import asyncio
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from npc_runtime.discovery import Endpoint
from npc_runtime.errors import StartupError

__all__ = ["own_daemon", "serve_options"]

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 5.0


@asynccontextmanager
async def own_daemon(options: list[str]) -> AsyncIterator[Endpoint]:
    """Run `npc-runtime serve` as a process of its own; stop it on the way out."""
    # -P keeps the current folder off sys.path: a checkout's kernels/ would shadow the package of that name.
    command = [sys.executable, "-P", "-m", "npc_runtime", "serve", "--port", "0", *options]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            **_out_of_reach(),
        )
        try:
            yield await asyncio.to_thread(_wait_for_endpoint, process, log)
        finally:
            process.terminate()
            try:
                await asyncio.to_thread(process.wait, STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout:
                process.stdout.close()


def _out_of_reach() -> dict[str, Any]:
    """Keep Ctrl-C from the daemon: whether it means a line's end or everybody's is for the command to say."""
    if sys.platform == "win32":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    return {"process_group": 0}


def _wait_for_endpoint(process: subprocess.Popen[str], log: Any) -> Endpoint:
    """Read the daemon's first line; if it ends instead, or takes too long, say what its log says."""
    assert process.stdout is not None
    timer = threading.Timer(START_TIMEOUT_S, process.kill)
    timer.start()
    try:
        line = process.stdout.readline()
        if line:
            return Endpoint.from_json(line)
        process.wait()
    finally:
        timer.cancel()
    log.seek(0)
    said = [text for text in log.read().splitlines() if text.strip()]
    raise StartupError("The daemon did not start:\n" + "\n".join(said[-8:]))


def serve_options(
    *, base: str, personas: Path, command: str, dtype: str = "auto", threads: int | None = None
) -> list[str]:
    """The daemon's command-line options for these settings; `command` is who needs it, and for how long."""
    own = ["--project", f"{command}-{os.getpid()}", "--owner-pid", str(os.getpid()), "--log-file", "-"]
    options = ["--base", base, "--dtype", dtype, "--personas", str(personas), *own]
    return options + (["--threads", str(threads)] if threads else [])
