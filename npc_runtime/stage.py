"""What all sessions of a daemon share once its base is in memory."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from npc_runtime import protocol as wire
from npc_runtime.engine.core import LineEngine
from npc_runtime.line import Renderer
from npc_runtime.persona import Library

__all__ = ["DaemonInfo", "Stage", "Voice"]


@dataclass(frozen=True, slots=True)
class DaemonInfo:
    """What `welcome` says about the daemon; the same for every connection."""

    version: str
    device: str
    backend: str
    base: wire.BaseModelInfo


class Voice(NamedTuple):
    """What speaks: the engine, what is said of it, and what makes its prompts."""

    engine: LineEngine
    info: DaemonInfo
    render: Renderer


@dataclass(frozen=True, slots=True)
class Stage:
    """What lines are made with."""

    info: DaemonInfo
    library: Library
    render: Renderer
    new_request_id: Callable[[], int]
    new_seed: Callable[[], int]
