"""Errors of the device itself: which they are, whether it still answers, and how often it is tried again.

After some errors of a GPU (an illegal address, a failed assertion in a kernel) every later call of the process fails
too, and nothing on the device can be saved: only another process can use it again. After others (a launch that was
refused) it computes as before. What is on the device is suspect either way; `probe_device` tells the two apart.
No memory left is not a fault: the device is as sound as before.
"""

import queue
import threading
from collections import deque
from collections.abc import Iterable

import torch

from npc_runtime.errors import DeviceFailed, InternalError, OutOfMemory, WireError

__all__ = ["Attempts", "DeviceLost", "as_wire", "is_device_error", "is_out_of_memory", "probe_device"]

PROBE_TIMEOUT_S = 10.0

# torch's own type covers its runtime calls; cuBLAS and Triton's launcher raise plain RuntimeErrors.
DEVICE_ERRORS = ("CUDA error", "Triton Error [CUDA]")


class DeviceLost(Exception):
    """This process cannot compute on the device any more."""


class Attempts:
    """At most `limit` attempts within any `window_s` seconds; `times` are those made before."""

    def __init__(self, limit: int, window_s: float, times: Iterable[float] = ()) -> None:
        self.limit = limit
        self.window_s = window_s
        self._times = deque(times)

    @property
    def times(self) -> tuple[float, ...]:
        """When the attempts within the last window were made."""
        return tuple(self._times)

    def take(self, now: float) -> bool:
        """Make one more attempt, if the limit allows it."""
        while self._times and now - self._times[0] >= self.window_s:
            self._times.popleft()
        if len(self._times) >= self.limit:
            return False
        self._times.append(now)
        return True


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the device or in the machine."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return _is_of_device(error) and "out of memory" in str(error).partition("\n")[0]


def is_device_error(error: BaseException) -> bool:
    """Whether what is on the device cannot be trusted any more."""
    return isinstance(error, DeviceLost) or (_is_of_device(error) and not is_out_of_memory(error))


def as_wire(error: BaseException) -> WireError:
    """What a client is told of an unexpected error; the log has the rest."""
    if isinstance(error, WireError):
        return error
    if is_device_error(error):
        return DeviceFailed("The device failed, and all lines with it.", "The daemon recovers; send the line again.")
    if is_out_of_memory(error):
        return OutOfMemory("The device ran out of memory in a step.", "Send fewer lines at once.")
    return InternalError("A step of the engine failed.", "The daemon's log has the details; report it.")


def probe_device(device: torch.device, *, timeout_s: float = PROBE_TIMEOUT_S) -> None:
    """Raise `DeviceLost` unless the device still computes; on a thread, since a call may hang for good."""
    answers: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def ask() -> None:
        try:
            _compute(device)
        except Exception as error:  # whatever it is, the device does not compute
            answers.put(error)
        else:
            answers.put(None)

    threading.Thread(target=ask, name="device probe", daemon=True).start()
    try:
        error = answers.get(timeout=timeout_s)
    except queue.Empty:
        raise DeviceLost(f"The device did not answer within {timeout_s:.0f} s.") from None
    if error is not None:
        raise DeviceLost("The device does not compute any more.") from error


def _compute(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # what failed in the background is reported here
    torch.ones(2, device=device).sum().item()


def _is_of_device(error: BaseException) -> bool:
    if isinstance(error, torch.AcceleratorError):
        return True
    return isinstance(error, RuntimeError) and str(error).startswith(DEVICE_ERRORS)
