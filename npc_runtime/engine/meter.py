"""How much was spoken, how fast, and what it takes of the GPU. Written by the engine thread, read from any."""

import math
from collections import deque

import torch

__all__ = ["Meter"]

MAX_STEPS = 64
"""The speed is that of so many steps, the last ones in which somebody spoke or was read a prompt."""

MEASURE_S = 1.0
"""How often torch is asked what it holds. Not when somebody wants to know: its answer takes a lock, and a GPU that
hangs may hold it."""


class Meter:
    """Counts from zero."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._recent: deque[tuple[float, int]] = deque(maxlen=MAX_STEPS)  # seconds, tokens
        self._measured_at = -math.inf
        self.num_tokens = 0
        self.gpu_bytes: int | None = None
        """What torch has taken of the GPU, for everything; None where there is none."""

    @property
    def tokens_per_s(self) -> float:
        """Tokens spoken a second, while there were lines."""
        recent = list(self._recent)
        seconds = sum(took for took, _ in recent)
        return sum(count for _, count in recent) / seconds if seconds else 0.0

    def ran(self, now: float, *, took_s: float, num_tokens: int, is_warmup: bool) -> None:
        """A step is over; what serves warmups alone says nothing about speed."""
        self.num_tokens += num_tokens
        if not is_warmup:
            self._recent.append((took_s, num_tokens))
        if self._device.type == "cuda" and now - self._measured_at >= MEASURE_S:
            self.gpu_bytes, self._measured_at = torch.cuda.memory_reserved(self._device), now
