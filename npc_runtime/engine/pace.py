"""How fast the engine may go on: a bound on tokens a second, and a pause. No torch, no clock.

A game that needs the GPU for itself wants it evenly, not in between spurts. So nothing is saved up: a step begins when
what came before it is paid for, and is itself paid for by waiting. Prompts are read in pieces that cost no more than a
quarter of a second. A worked example, with 20 tokens a second:

    now     the step                                             its cost       the next one begins at
    0.0     4 lines speak                                        4              0.2
    0.2     4 lines speak, 40 tokens of a prompt are read        4 + 40 / 8     0.65
    5.0     4 lines speak, after a while without any             4              5.2
"""

import math

__all__ = ["Pace"]

PROMPT_TOKENS = 8
"""Tokens of a prompt that cost as much as one that is spoken, since many are computed together.

Measured on two CPU cores with the embedded base: a lone line's token takes 8 ms, one of eight lines' 1.9, a prompt's
0.7.
"""

EVEN_S = 0.25
"""A step reads no more of prompts than the bound allows in so long, so that lines that speak go on meanwhile."""

LATE_S = 0.02
"""Who is no later than this is late, not idle, and makes up for it: on Windows timers are, by up to 16 ms."""


class Pace:
    """A bound of `max_tokens_per_s` (None: as fast as it goes), and whether nothing runs at all."""

    def __init__(self) -> None:
        self.max_tokens_per_s: float | None = None
        self.paused = False
        self._owed = 0.0  # tokens, at the time `_at`
        self._at = 0.0

    def configure(self, now: float, *, max_tokens_per_s: float | None, paused: bool) -> None:
        """Change both; what is owed until now stays owed."""
        self._owed, self._at = self._owed_at(now), now
        self.max_tokens_per_s, self.paused = max_tokens_per_s, paused

    @property
    def max_prompt_tokens(self) -> int | None:
        """Tokens of prompts that one step may read; None: no bound of ours."""
        limit = self.max_tokens_per_s
        return None if limit is None else max(int(limit * EVEN_S * PROMPT_TOKENS), PROMPT_TOKENS)

    def began(self, now: float, *, num_spoken: int, num_read: int) -> None:
        """A step began, with so many tokens that it will speak and so many of prompts that it reads."""
        self._owed = self._owed_at(now) + num_spoken + num_read / PROMPT_TOKENS
        self._at = now

    def rest_s(self, now: float) -> float:
        """How long nothing may begin: 0 is now, infinity until `configure` ends the pause."""
        return math.inf if self.paused else self.owed_s(now)

    def owed_s(self, now: float) -> float:
        """How long it takes to pay for the steps so far."""
        return 0.0 if self.max_tokens_per_s is None else max(self._owed_at(now), 0.0) / self.max_tokens_per_s

    def _owed_at(self, now: float) -> float:
        if self.max_tokens_per_s is None:
            return 0.0
        owed = self._owed - self.max_tokens_per_s * (now - self._at)
        return owed if owed >= -LATE_S * self.max_tokens_per_s else 0.0
