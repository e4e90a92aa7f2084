"""The language that the compiled CPU kernels are written in: a struct of work, its arrays, stored numbers, e^x.

A kernel is a C function of a pointer to `Work`, compiled by numba for the processor at hand. It takes its items
(tokens, tiles, blocks of outputs) from a counter that all threads share, so that any number of them may run it side
by side, one included; what it computes for an item depends on that item alone, to the last bit. Activations, caches
and adapters are bfloat16 (read as uint16) or float32, by the type of the struct's field `element`; everything is
computed in float32.
"""

import ctypes
import functools
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from llvmlite import ir
from numba import carray, cfunc, from_dtype, njit, types
from numba.extending import intrinsic

from npc_kernels.openmp import run_on_all_threads

if TYPE_CHECKING:
    from npc_kernels.cpu_tape import Tape

__all__ = [
    "F32",
    "FAST",
    "Work",
    "array",
    "as_float",
    "compiled",
    "exp",
    "narrow",
    "next_item",
    "run",
    "wide",
    "work_of",
]

F32 = np.float32
FAST = {"reassoc", "contract", "arcp", "nsz"}
"""LLVM's fast-math, without nnan and ninf: an overflow must be seen at the logits."""

NUMBERS = [
    *["element", "counter", "num_items", "num_tokens"],  # what is worked on
    *["tiles", "token_ids", "hidden", "x", "out", "result", "weight", "width"],
    *["outs", "out_rows"],  # of a linear in several parts: their addresses, and the rows of each
    *["pool", "page_size", "live", "num_live", "mask"],  # adapters
    *["multipliers", "num_outputs", "first_output", "first_pages", "bias"],  # DoRA
    *["span_start", "in_features", "num_slices", "slice0", "slice1", "slice2"],
    *["wide_x", "wide_out", "shrunk", "scores"],  # scratch, float32
    *["q_norm", "k_norm", "rotates", "cos", "sin", "positions", "kv_slots", "keys", "values"],  # attention
    *["num_heads", "num_kv_heads", "head_dim", "tables", "max_blocks", "block_size", "token_rows", "max_seen"],
    *["first_token", "num_parts", "codes", "scales", "minima"],  # 4-bit weights from codes on
]


class Work(ctypes.Structure):
    """Addresses and sizes, all int64, and the norm's epsilon; what each means is said where it is read."""

    _fields_ = [*((name, ctypes.c_int64) for name in NUMBERS), ("eps", ctypes.c_double)]


@functools.cache
def compiled(kernel: Any, dtype: torch.dtype) -> int:
    """The address of a kernel compiled for a dtype.

    The first call on a machine takes a second; numba keeps the result beside the source or in the user's cache.
    """
    signature = types.void(types.CPointer(_record("u2" if dtype == torch.bfloat16 else "f4")))
    function = cfunc(signature, fastmath=FAST, cache=True)(kernel)
    _KEPT.append(function)
    address: int = function.address
    return address


def run(kernel: Any, work: Work, num_items: int, dtype: torch.dtype, tape: "Tape | None" = None) -> None:
    """Run a kernel over so many items on torch's threads, and record that."""
    counter = ctypes.c_int64()
    work.counter, work.num_items = ctypes.addressof(counter), num_items
    # All or one: GNU's OpenMP ends the threads that a smaller team leaves out, and must start them again.
    num_threads = torch.get_num_threads() if num_items > 1 else 1
    address = compiled(kernel, dtype)
    run_on_all_threads(address, ctypes.addressof(work), num_threads)
    if tape is not None:
        tape.add(address, work, num_threads)


_KEPT: list[Any] = []
"""Compiled functions live as long as somebody holds them."""


@functools.cache
def _record(element: Literal["u2", "f4"]) -> Any:
    """`Work` as numba sees it.

    Its cache of compiled functions looks at the type, but not at the sources of what a function calls; so their
    digest is part of the type.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("cpu_*.py")):
        digest.update(path.read_bytes())
    names = [*NUMBERS, "eps", f"of_{digest.hexdigest()}"]
    formats = [element, *["i8"] * (len(NUMBERS) - 1), "f8", "u1"]
    offsets = [8 * number for number in range(len(NUMBERS) + 1)]
    layout: Any = {"names": names, "formats": formats, "offsets": [*offsets, 0], "itemsize": ctypes.sizeof(Work)}
    return from_dtype(np.dtype(layout))


@intrinsic
def _pointer(_context: Any, _address: Any, like: Any) -> Any:
    """An address as a pointer to numbers of the type of `like`."""
    number = types.unliteral(like)
    kind = types.CPointer(number)

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(kind))

    return kind(types.int64, number), generate


@intrinsic
def _fetch_and_add(_context: Any, _counter: Any) -> Any:
    """Add one to a number that all threads share, return what it was."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", args[0], ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(types.CPointer(types.int64)), generate


@intrinsic
def as_float(_context: Any, _bits: Any) -> Any:
    """32 bits as a float32."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic
def wide(_context: Any, value: Any) -> Any:
    """A stored number as float32; a bfloat16 is the upper half of one."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        if value != types.uint16:
            return args[0]
        bits = builder.zext(args[0], ir.IntType(32))
        return builder.bitcast(builder.shl(bits, ir.Constant(ir.IntType(32), 16)), ir.FloatType())

    return types.float32(value), generate


@intrinsic
def narrow(_context: Any, _value: Any, like: Any) -> Any:
    """A float32 as `like` is stored; a bfloat16 is rounded to nearest, ties to even."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        if like != types.uint16:
            return args[0]
        word = ir.IntType(32)
        bits = builder.bitcast(args[0], word)
        is_odd = builder.and_(builder.lshr(bits, ir.Constant(word, 16)), ir.Constant(word, 1))
        rounded = builder.add(builder.add(bits, ir.Constant(word, 0x7FFF)), is_odd)
        return builder.trunc(builder.lshr(rounded, ir.Constant(word, 16)), ir.IntType(16))

    return like(types.float32, like), generate


@njit(inline="always")
def work_of(pointer: Any) -> Any:
    """The struct behind a kernel's argument."""
    return carray(pointer, 1)[0]


@njit(inline="always")
def next_item(w: Any) -> Any:
    """The next item to work on, for this thread alone."""
    return _fetch_and_add(_pointer(w.counter, 0))


@njit(inline="always")
def array(address: Any, shape: Any, like: Any) -> Any:
    """The numbers at an address, of the type of `like`."""
    return carray(_pointer(address, like), shape)


@njit(fastmath=FAST, inline="always")
def exp(x: Any) -> Any:
    """e^x to about 2 ulp in operations that vectorise (Cephes expf: Cody-Waite reduction, degree 6)."""
    x = min(max(x, F32(-87.0)), F32(88.0))
    n = np.floor(x * F32(1.44269504) + F32(0.5))
    r = x - n * F32(0.693359375) + n * F32(2.12194440e-4)
    p = F32(1.9875691500e-4)
    p = p * r + F32(1.3981999507e-3)
    p = p * r + F32(8.3334519073e-3)
    p = p * r + F32(4.1665795894e-2)
    p = p * r + F32(1.6666665459e-1)
    p = p * r + F32(5.0000001201e-1)
    return (p * r * r + r + F32(1)) * as_float(np.uint32(np.int32(n) + np.int32(127)) << np.uint32(23))
