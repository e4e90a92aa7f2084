"""Processes of the systems: venvs that are set up once, groups that are stopped while another is measured.

Every wait has a limit. A process lives in a session of its own, so that SIGSTOP and SIGKILL reach its children.
"""

import contextlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from workload import Measured

__all__ = ["Group", "Skipped", "Worker", "make_venv", "physical_cores"]

OnProgress = Callable[[str, float], None]

SETUP_LIMIT_S = 3_600
START_LIMIT_S = 300
STOP_LIMIT_S = 10
FAR_AHEAD = 0.95  # how far a bar goes that knows nothing better


class Skipped(Exception):
    """A system cannot be measured; the reason in one line."""


def physical_cores() -> int:
    """Cores without their hyper-threads, as far as Linux tells; else what Python counts."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError):
        cores = set()
        for path in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/topology"):
            cores.add(tuple((path / name).read_text() for name in ("physical_package_id", "core_id")))
        return max(1, min(allowed, len(cores) or allowed))
    return allowed


def make_venv(folder: Path, steps: list[list[str]], on_progress: OnProgress, *, env: dict[str, str]) -> Path:
    """A venv made by these pip commands, once; returns its Python. Raises `Skipped` with pip's last error line."""
    python, stamp = folder / "bin" / "python", folder / ".made-by"
    recipe = json.dumps(steps)
    if stamp.exists() and stamp.read_text(encoding="utf-8") == recipe:
        return python
    label, log = f"setting up {folder.name}", folder.with_suffix(".log")
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("", encoding="utf-8")
    on_progress(label, 0.0)
    commands = [[sys.executable, "-m", "venv", str(folder)], *([str(python), "-m", "pip", *step] for step in steps)]
    for number, command in enumerate(commands):
        share = 1 / len(commands)
        _run_logged(command, log, lambda part, n=number, s=share: on_progress(label, (n + part) * s), env=env)
    stamp.write_text(recipe, encoding="utf-8")
    on_progress(label, 1.0)
    return python


def _run_logged(command: list[str], log: Path, on_part: Callable[[float], None], *, env: dict[str, str]) -> None:
    """Run a command at the lowest priority, its output in the log; percentages in it become progress."""
    limit = time.monotonic() + SETUP_LIMIT_S
    with log.open("a", encoding="utf-8") as file:
        process = subprocess.Popen(
            ["nice", "-n", "19", *command],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env={**os.environ, **env},
            start_new_session=True,
        )
        try:
            while process.poll() is None:
                if time.monotonic() > limit:
                    raise Skipped(f"its set-up took more than {SETUP_LIMIT_S // 60} minutes; see {log}")
                time.sleep(0.5)
                on_part(_part_done(log))
        finally:
            _kill_group(process)
    if process.returncode:
        raise Skipped(f"{_last_error(log)} (all of it: {log})")


def _part_done(log: Path) -> float:
    """The last `[ 42%]` of a build log; a build's compiler says it, pip says nothing."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4_096))
        found = re.findall(rb"\[ *(\d+)%\]", file.read())
    return FAR_AHEAD * int(found[-1]) / 100 if found else 0.0


def _last_error(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["it failed without a word"])[-1][:300]


class Group:
    """A process with its children: started, stopped while idle, gone at the end.

    `is_spoken_to`: its stdin and stdout are ours; otherwise stdout goes to the log too.
    """

    def __init__(
        self, command: list[str], *, log: Path, env: dict[str, str] | None = None, is_spoken_to: bool = True
    ) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        with log.open("w", encoding="utf-8") as file:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE if is_spoken_to else subprocess.DEVNULL,
                stdout=subprocess.PIPE if is_spoken_to else file,
                stderr=file,
                env={**os.environ, **(env or {})},
                start_new_session=True,
            )

    def pause(self) -> None:
        """Take it off the processor until `resume`."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it run."""
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """End it and everything it started."""
        self.resume()
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_LIMIT_S)
        _kill_group(self.process)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                with contextlib.suppress(OSError):
                    pipe.close()

    def read_line(self, limit_s: float) -> str:
        """The next line of its stdout. Raises `Skipped` if there is none in time."""
        assert self.process.stdout is not None
        end, data, handle = time.monotonic() + limit_s, b"", self.process.stdout.fileno()
        while not data.endswith(b"\n"):
            if not select.select([handle], [], [], max(0.0, end - time.monotonic()))[0]:
                raise Skipped(f"no answer within {limit_s:.0f} s")
            chunk = os.read(handle, 1 << 16)
            if not chunk:
                raise Skipped(f"its process ended: {_last_error(self.log)}")
            data += chunk
        return data.decode("utf-8")

    def write_line(self, text: str) -> None:
        """Send a line to its stdin. Raises `Skipped` if it is gone."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(text.encode("utf-8") + b"\n")
            self.process.stdin.flush()
        except OSError as error:
            raise Skipped(f"its process ended: {_last_error(self.log)}") from error

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def _kill_group(process: subprocess.Popen[Any]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class Worker:
    """A helper process that speaks `worker.serve`'s language."""

    def __init__(self, python: Path, script: str, *, log: Path, env: dict[str, str] | None = None) -> None:
        self.group = Group([str(python), str(Path(__file__).parent / script)], log=log, env=env)

    def start(self, **settings: Any) -> dict[str, Any]:
        """Start the system inside. Raises `Skipped`."""
        return self._ask({"do": "start", **settings}, START_LIMIT_S)

    def speak(self, limit_s: float, **batch: Any) -> Measured:
        """Speak one batch. Raises `Skipped`."""
        answer = self._ask({"do": "speak", **batch}, limit_s)
        return Measured(
            last_line_s=answer["last_line_s"],
            first_text_s=tuple(answer["first_text_s"]),
            counts=tuple(answer["counts"]),
            prompt_tokens=answer["prompt_tokens"],
        )

    def _ask(self, command: dict[str, Any], limit_s: float) -> dict[str, Any]:
        self.group.write_line(json.dumps(command))
        answer: dict[str, Any] = json.loads(self.group.read_line(limit_s))
        if "error" in answer:
            raise Skipped(answer["error"])
        return answer
