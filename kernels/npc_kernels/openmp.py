"""Runs a compiled function on the threads that torch itself computes with.

A pool of our own would fight with torch's for the cores.
"""

import ctypes
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["SLEEP", "fork_address", "run_on_all_threads", "sleep_while_waiting"]

SLEEP = {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}
"""Environment in which the threads of GNU's OpenMP, LLVM's and Intel's sleep while they wait."""

Fork = Callable[[int, int, int, int], None]


def sleep_while_waiting() -> None:
    """Let threads sleep instead of spin while they wait for one another; call it before torch is imported.

    A thread that spins takes the core from the one it waits for as soon as a game wants a core too: beside one busy
    thread that is a factor of two to four (kernels/README.md). What the user has set stays.
    """
    for name, value in SLEEP.items():
        os.environ.setdefault(name, value)


def run_on_all_threads(function: int, argument: int, num_threads: int) -> None:
    """Call `function(argument)`, both addresses, on so many threads at once and wait for all.

    The function shares out its work by itself: where torch's OpenMP is not GNU's (Windows, macOS), or torch has
    none, the calling thread does all of it.
    """
    _fork()(function, argument, num_threads, 0)


def fork_address() -> int:
    """The address of `GOMP_parallel`, for compiled code that runs teams by itself; 0 where there is none."""
    fork: Any = _fork()
    return 0 if fork is _call_once else int(ctypes.cast(fork, ctypes.c_void_p).value or 0)


@functools.cache
def _fork() -> Fork:
    """`GOMP_parallel(function, argument, num_threads, flags)` of the library that torch has loaded (libgomp ABI)."""
    for path in _loaded_libraries():
        try:
            # Not CDLL: letting go of Python's lock and taking it again costs more than most calls take.
            fork = ctypes.PyDLL(path).GOMP_parallel
        except (OSError, AttributeError):
            continue
        fork.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        fork.restype = None
        return fork
    return _call_once


def _loaded_libraries() -> list[str]:
    """Files of GNU's OpenMP in this process, torch's own first."""
    if sys.platform != "linux":
        return []
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    paths = {line.split(maxsplit=5)[5] for line in lines if "/libgomp" in line}
    return sorted(paths, key=lambda path: "/torch/" not in path)


def _call_once(function: int, argument: int, num_threads: int, flags: int) -> None:
    ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(function)(argument)
