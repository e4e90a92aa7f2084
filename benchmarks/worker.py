"""The inside of a helper process: answers each line of JSON on stdin with one on stdout. Standard library only.

A worker script calls `serve` with a function that starts its system and one that speaks a batch. What libraries
print goes to stderr, so that stdout stays a clean channel.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

__all__ = ["Clock", "serve"]


class Clock:
    """Times of one batch: from its making to the first text of each line."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._first: dict[Any, float] = {}

    def has_text(self, line: Any) -> None:
        """Note that a line has text now; only its first counts."""
        self._first.setdefault(line, time.perf_counter() - self._began)

    def stop(self, counts: list[int], *, prompt_tokens: int) -> dict[str, Any]:
        """End the batch and return what `Measured` holds; call it right after the last token."""
        return {
            "last_line_s": time.perf_counter() - self._began,
            "first_text_s": list(self._first.values()),
            "counts": counts,
            "prompt_tokens": prompt_tokens,
        }


def serve(start: Callable[[dict[str, Any]], dict[str, Any]], speak: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Serve `start` and `speak` commands until stdin ends; an exception is answered with its last line."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = {"start": start, "speak": speak}[command.pop("do")](command)
        except Exception as error:  # the driver decides; the log has the rest
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        channel.write(json.dumps(answer) + "\n")
        channel.flush()
