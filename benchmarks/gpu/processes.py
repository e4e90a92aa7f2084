"""A part in a process of its own: its results as they come, its last words if it fails, its end if it takes long."""

import json
import subprocess
import sys
import threading
import time
from typing import Any

from gpu.report import Report

__all__ = ["Process"]


class Process:
    """Started when made. Whatever it has found by the time it ends, or is ended, is in the report."""

    def __init__(self, name: str, command: list[str], report: Report, run_started: float) -> None:
        self.name = name
        self._report = report
        self._run_started = run_started
        self._started = time.monotonic()
        self._last_words = ""
        self._say("begins")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        self._readers = [threading.Thread(target=read, daemon=True) for read in (self._read_results, self._read_errors)]
        for reader in self._readers:
            reader.start()

    def wait(self, until: float) -> None:
        """Until it ends, or is ended."""
        try:
            status = self._process.wait(max(0.0, until - time.monotonic()))
            reason = f"the process ended with status {status}: {self._last_words}" if status else ""
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            reason = ""
            self._say("is stopped: its time is over")
        for reader in self._readers:
            reader.join(5)
        self._report.ended[self.name] = reason
        self._say(reason or f"took {time.monotonic() - self._started:.0f} s")

    def _read_results(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            result: dict[str, Any] = json.loads(line)
            self._report.add(self.name, result)
            if "item" in result:
                verdict = {True: "passed", False: "FAILED", None: "skipped" if result["skipped"] else "measured"}
                self._say(f"{result['item']}: {verdict[result['passed']]} ({result['seconds']} s) {result['skipped']}")

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if line.strip():
                self._last_words = line.strip()[-300:]
                print(f"         {line.rstrip()}", file=sys.stderr, flush=True)

    def _say(self, words: str) -> None:
        elapsed = time.monotonic() - self._run_started
        print(f"{elapsed:6.1f} s {self.name}: {words.rstrip()}", file=sys.stderr, flush=True)
