"""The NPCs of a game, which outlive its connection: who they are, what they know and remember.

A connection has one cast. When it is lost the cast waits in the green room, for a while, until the game comes back.
"""

import json
import math
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from npc_runtime.errors import InvalidError, NpcUnknown, OverloadError
from npc_runtime.history import MAX_HISTORY_MESSAGES, History
from npc_runtime.prompt import Message

__all__ = ["MAX_NPCS", "MAX_VARS", "Arrival", "Cast", "GreenRoom", "Npc"]

MAX_NPCS = 512
MAX_WAITING, MAX_WAITING_CHARS = 64, 16 << 20  # casts without a connection, and what all their NPCs remember
MAX_VARS = 64
STATE_VERSION = 1

Value = bool | int | float | str


@dataclass(slots=True, eq=False)
class Npc:
    """One instance of a persona in a running game; `vars` are facts for what the persona knows."""

    id: str
    persona: str
    vars: Mapping[str, Value] = field(default_factory=dict)
    history: History = field(default_factory=History)
    num_dropped: int = 0  # messages that the last prompt had no room for: probably nor has the next one

    def snapshot(self) -> str:
        """The NPC as a text for a save game; `Cast.restore` reads it, in this version of the program or a later one."""
        messages = [[turn["role"], turn["content"]] for turn in self.history.messages]
        document = {"npc": STATE_VERSION, "persona": self.persona, "vars": dict(self.vars), "messages": messages}
        return json.dumps(document, ensure_ascii=False, separators=(",", ":"))


class Cast:
    """The NPCs of one game."""

    def __init__(self) -> None:
        self._npcs: dict[str, Npc] = {}

    def __len__(self) -> int:
        return len(self._npcs)

    @property
    def num_chars(self) -> int:
        """Code points that all of them remember."""
        return sum(npc.history.num_chars for npc in self._npcs.values())

    def find(self, npc_id: str) -> Npc:
        """Return an open NPC. Raises `NpcUnknown`."""
        if npc_id not in self._npcs:
            known = ", ".join(sorted(self._npcs)[:20]) or "none"
            raise NpcUnknown(f"There is no npc '{npc_id}'.", f"Send npc.open first; open are: {known}.")
        return self._npcs[npc_id]

    def open(self, npc_id: str, persona: str, npc_vars: Mapping[str, Value], history: Iterable[Message] | None) -> Npc:
        """Open an NPC; one that is open keeps its history unless there is a new one. Raises `OverloadError`."""
        npc = self._npcs.get(npc_id)
        if npc is None:
            npc = self._npcs[npc_id] = self._new(npc_id, persona)
        npc.persona, npc.vars = persona, dict(npc_vars)
        if history is not None:
            npc.history.set(history)
        return npc

    def close(self, npc_id: str) -> Npc:
        """Forget an NPC. Raises `NpcUnknown`."""
        npc = self.find(npc_id)
        del self._npcs[npc_id]
        return npc

    def restore(self, npc_id: str, state: str) -> Npc:
        """Bring an NPC back from a snapshot, as a new one in place of any that is open under the id.

        Raises `InvalidError` for a text that is no snapshot, and `OverloadError`.
        """
        npc = _read_state(npc_id, state)
        if npc_id not in self._npcs:
            self._new(npc_id, npc.persona)
        self._npcs[npc_id] = npc
        return npc

    def _new(self, npc_id: str, persona: str) -> Npc:
        if len(self._npcs) >= MAX_NPCS:
            raise OverloadError(f"{MAX_NPCS} NPCs are open already.", "Close those that have left the scene.")
        return Npc(npc_id, persona)


class Arrival(NamedTuple):
    """A connection's cast. `name` is how it is asked for again; `before` is who had it until now, if anybody."""

    name: str
    cast: Cast
    is_resumed: bool
    before: object | None


@dataclass(slots=True)
class _Place:
    cast: Cast
    owner: object | None
    until: float = 0.0  # seconds; of those that nobody has


class GreenRoom:
    """All casts of a daemon, by name. `owner`s are connections; times are seconds of the caller's clock."""

    def __init__(self, new_name: Callable[[], str] = lambda: secrets.token_hex(8)) -> None:
        self._places: dict[str, _Place] = {}
        self._new_name = new_name

    def __len__(self) -> int:
        return len(self._places)

    def num_present(self, *, besides: str | None) -> int:
        """Casts whose connection is there, not counting the one of this name."""
        return sum(place.owner is not None for name, place in self._places.items() if name != besides)

    def arrive(self, owner: object, resume: str | None, now: float) -> Arrival:
        """Give a connection the cast that it had, also if another still has it, or else a new one."""
        self.expire(now)
        place = self._places.get(resume or "")
        if place is None:
            name, cast = self._new_name(), Cast()
            self._places[name] = _Place(cast, owner)
            return Arrival(name, cast, False, None)
        before, place.owner = place.owner, owner
        assert resume is not None
        return Arrival(resume, place.cast, True, before)

    def leave(self, name: str, owner: object, now: float, linger_s: float) -> None:
        """A connection is gone: its cast waits, unless it has none or another connection took it."""
        place = self._places.get(name)
        if place is None or place.owner is not owner:
            return
        place.owner, place.until = None, now + linger_s
        if not len(place.cast):
            del self._places[name]
        self.expire(now)

    def expire(self, now: float) -> None:
        """Forget the casts whose time is over, and the oldest where there are too many or they are too large."""
        waiting = sorted(
            ((place.until, name) for name, place in self._places.items() if place.owner is None), reverse=True
        )
        num_chars = 0
        for number, (until, name) in enumerate(waiting):
            num_chars += self._places[name].cast.num_chars
            if until <= now or number >= MAX_WAITING or num_chars > MAX_WAITING_CHARS:
                del self._places[name]


def _read_state(npc_id: str, state: str) -> Npc:
    try:
        document = json.loads(state)
        version = document["npc"]
        if type(version) is int and version > STATE_VERSION:
            raise InvalidError(
                f"'state' is of version {version}, newer than this daemon reads ({STATE_VERSION}).",
                "Update npc-runtime, or load an older save.",
            )
        if type(version) is not int or version != STATE_VERSION:
            raise ValueError("version")
        if not isinstance(document["messages"], list):
            raise ValueError("messages")
        messages = [_read_turn(*turn) for turn in document["messages"][-MAX_HISTORY_MESSAGES:]]
        return Npc(npc_id, _text(document["persona"], 64), _read_vars(document["vars"]), History(messages))
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
        raise InvalidError("'state' is not what npc.snapshot gave.", "Send it back as it was.") from error


def _read_turn(role: Any, content: Any) -> Message:
    if role not in ("user", "assistant"):
        raise ValueError("role")
    return {"role": role, "content": _text(content)}


def _read_vars(value: Any) -> dict[str, Value]:
    if not isinstance(value, dict) or len(value) > MAX_VARS:
        raise ValueError("vars")
    for name, each in value.items():
        _text(name, 64)
        if isinstance(each, str):
            _text(each or " ", 1_000)
        elif not isinstance(each, Value) or (isinstance(each, float) and not math.isfinite(each)):
            raise ValueError("vars")
    return value


def _text(value: Any, max_chars: int | None = None) -> str:
    if not isinstance(value, str) or (max_chars is not None and not 0 < len(value) <= max_chars):
        raise ValueError("text")
    value.encode()  # half a surrogate pair is not a character
    return value
