"""A step's calls of compiled kernels, recorded once and run again without Python between them.

One token of the embedded base is some three hundred calls of 20 µs; Python costs another 4 µs each, and holds its lock,
which the daemon's event loop waits for. A tape is run by one compiled loop, without the lock.
"""

import ctypes
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from llvmlite import ir
from numba import carray, cfunc, types
from numba.extending import intrinsic

from npc_kernels.cpu_jit import Work
from npc_kernels.openmp import fork_address

__all__ = ["Tape", "prepare_tapes"]

Kept = TypeVar("Kept")

HEADER, CALL = 2, 4
"""Numbers of a tape before its first call (how many there are, who runs a team of threads), and of each call (function,
work, threads, the counter that the threads share)."""


class Tape:
    """Calls in order, each with a copy of its work, and everything that their addresses point to."""

    def __init__(self) -> None:
        self.is_whole = True
        """Whether all that was computed are calls; some GEMMs are torch's, and cannot be recorded."""
        self._numbers = torch.zeros(0, dtype=torch.int64)
        self._calls: list[tuple[int, Work, int]] = []
        self._kept: list[Any] = []

    def add(self, function: int, work: Work, num_threads: int) -> None:
        """Record a call of the function at this address."""
        self._calls.append((function, Work.from_buffer_copy(work), num_threads))

    def keep(self, kept: Kept) -> Kept:
        """Let a tensor, or an array of addresses, live as long as the tape."""
        self._kept.append(kept)
        return kept

    def close(self) -> None:
        """Make the calls ready to be played; no more are added."""
        numbers = torch.zeros(HEADER + CALL * len(self._calls), dtype=torch.int64)
        numbers[0], numbers[1] = len(self._calls), fork_address()
        for index, (function, work, num_threads) in enumerate(self._calls):
            first = HEADER + CALL * index
            work.counter = numbers[first + 3 :].data_ptr()
            numbers[first : first + 3] = torch.tensor([function, ctypes.addressof(work), num_threads])
        self._numbers = numbers

    def play(self) -> None:
        """Run all calls again, on the same addresses."""
        _player().run(self._numbers.data_ptr())


def prepare_tapes() -> None:
    """Compile what plays tapes."""
    _player()


class _Player(NamedTuple):
    """The compiled loop, which must be held by somebody, and what runs it without Python's lock."""

    compiled: Any
    run: Callable[[int], None]


@functools.cache
def _player() -> _Player:
    compiled = cfunc(types.void(types.CPointer(types.int64)), cache=True)(_play)
    return _Player(compiled, ctypes.CFUNCTYPE(None, ctypes.c_void_p)(compiled.address))


@intrinsic
def _call(_context: Any, _fork: Any, _function: Any, _work: Any, _num_threads: Any) -> Any:
    """`function(work)` on a team of threads, or where nobody runs teams (0) on this one."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        fork, function, work, num_threads = args
        word, half, nothing = ir.IntType(64), ir.IntType(32), ir.VoidType()
        of_one = builder.inttoptr(function, ir.FunctionType(nothing, [word]).as_pointer())
        of_team = builder.inttoptr(fork, ir.FunctionType(nothing, [word, word, half, half]).as_pointer())
        with builder.if_else(builder.icmp_unsigned("==", fork, ir.Constant(word, 0))) as (alone, together):
            with alone:
                builder.call(of_one, [work])
            with together:
                builder.call(of_team, [function, work, builder.trunc(num_threads, half), ir.Constant(half, 0)])
        return _context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), generate


def _play(tape: Any) -> None:
    num_calls = carray(tape, HEADER)[0]
    numbers = carray(tape, HEADER + CALL * num_calls)
    for index in range(num_calls):
        first = HEADER + CALL * index
        numbers[first + 3] = 0
        _call(numbers[1], numbers[first], numbers[first + 1], numbers[first + 2])
