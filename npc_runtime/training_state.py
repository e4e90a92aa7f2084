"""A training run on disk, so that the same command goes on where one was stopped: weights, optimizer, best epoch.

One file, replaced as a whole: a run that is killed at any moment leaves the last state it saved. The file says what it
belongs to, and is used only for a run that is the same in everything that its result depends on.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["Epoch", "Found", "TrainingState", "load_state", "save_state"]

FORMAT = "npc-runtime training 1"

Tensors = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Epoch:
    """Mean losses in nats per reply token; `kept` is set when this epoch is the best so far."""

    number: int
    train: float
    heldout: float
    kept: bool


@dataclass(slots=True)
class TrainingState:
    """How far a run is, and all it needs to go on."""

    step: int = 0  # steps done, in all epochs
    losses: list[float] = field(default_factory=list)  # of the epoch that is under way
    epochs: list[Epoch] = field(default_factory=list)  # that are over
    seconds: float = 0.0  # of training so far
    weights: Tensors = field(default_factory=dict)
    first_moments: Tensors = field(default_factory=dict)
    second_moments: Tensors = field(default_factory=dict)
    best: Tensors = field(default_factory=dict)  # the adapter of the best epoch, as it will be saved

    @property
    def best_loss(self) -> float:
        """The lowest held-out loss so far; infinite before the first epoch."""
        return min((epoch.heldout for epoch in self.epochs if epoch.kept), default=float("inf"))


class Found(NamedTuple):
    """What is on disk: a state to go on from, or None and why not; both None if there is nothing."""

    state: TrainingState | None
    obstacle: str | None


_PARTS = ("weights", "first_moments", "second_moments", "best")


def save_state(path: Path, state: TrainingState, identity: Mapping[str, Any]) -> None:
    """Put the state in the place of the last one."""
    from safetensors.torch import save_file

    tensors = {
        f"{part}/{name}": tensor.detach().cpu().contiguous()
        for part in _PARTS
        for name, tensor in getattr(state, part).items()
    }
    progress = {
        "step": state.step,
        "losses": state.losses,
        "epochs": [asdict(epoch) for epoch in state.epochs],
        "seconds": state.seconds,
    }
    metadata = {"format": FORMAT, "identity": json.dumps(identity), "progress": json.dumps(progress)}
    fresh = path.with_name(path.name + ".new")
    save_file(tensors, str(fresh), metadata=metadata)
    os.replace(fresh, path)


def load_state(path: Path, identity: Mapping[str, Any]) -> Found:
    """Read the state of a run that was stopped, if it is one of this run."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    if not path.is_file():
        return Found(None, None)
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            return Found(None, "its file is of another version")
        before = json.loads(metadata["identity"])
        changed = [name for name in {**before, **identity} if before.get(name) != identity.get(name)]
        if changed:
            return Found(None, _describe(changed, before, identity))
        state = _parse(json.loads(metadata["progress"]), load_file(str(path)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        return Found(None, f"its file cannot be read ({error})")
    return Found(state, None)


def _parse(progress: dict[str, Any], tensors: Tensors) -> TrainingState:
    state = TrainingState(
        step=int(progress["step"]),
        losses=[float(loss) for loss in progress["losses"]],
        epochs=[Epoch(**epoch) for epoch in progress["epochs"]],
        seconds=float(progress["seconds"]),
    )
    for key, tensor in tensors.items():
        part, _, name = key.partition("/")
        getattr(state, part)[name] = tensor
    return state


def _describe(changed: list[str], before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Name what changed, with both values where they say something to a person."""
    said = []
    for name in changed:
        values = [str(side.get(name, "none")) for side in (before, now)]
        is_digest = any(len(value) == 64 for value in values)
        said.append(f"{name} changed" if is_digest else f"{name} was {values[0]} and is {values[1]}")
    return ", ".join(said)
