"""Whose turn it is: lines of one NPC go to the engine one after the other, each NPC's on its own."""

from collections import deque

from npc_runtime.line import Line

__all__ = ["Turns"]


class Turns:
    """For every NPC with live lines: the one in the engine, and those that are held until it is over."""

    def __init__(self) -> None:
        self._by_npc: dict[str, deque[Line]] = {}

    @property
    def held(self) -> list[Line]:
        """All lines that wait for one before them."""
        return [line for turns in self._by_npc.values() for line in list(turns)[1:]]

    def of(self, npc_id: str) -> list[Line]:
        """All live lines of an NPC, in their order."""
        return list(self._by_npc.get(npc_id, ()))

    def is_held(self, line: Line) -> bool:
        """Whether the line waits for one before it; lines of no NPC never do."""
        return line.npc is not None and self._by_npc[line.npc.id][0] is not line

    def join(self, line: Line) -> None:
        """Take a new line in."""
        if line.npc is not None:
            self._by_npc.setdefault(line.npc.id, deque()).append(line)

    def leave(self, line: Line) -> None:
        """Let go of a line that is over."""
        if line.npc is None:
            return
        turns = self._by_npc[line.npc.id]
        turns.remove(line)
        if not turns:
            del self._by_npc[line.npc.id]

    def clear(self) -> None:
        """Forget all."""
        self._by_npc.clear()
