"""What a run works on: real sizes on a GPU; tiny ones for Triton's interpreter, where only the tests go."""

from dataclasses import dataclass, replace

import torch
from shapes import MODELS, Model, shape

__all__ = ["RANKS", "Setup"]

RANKS = {"r8": 8, "r16": 16, "r24": 24, "r64": 64}
"""The adapters of the proofs: less than a page, one page, a page and a half, four pages."""


@dataclass(frozen=True, slots=True)
class Setup:
    """Sizes of a run."""

    device: torch.device
    model: Model  # of the table
    proof_model: Model  # the same layers, fewer of them
    dtype: torch.dtype
    crowds: tuple[int, ...]  # rows of the proof of independence
    new_tokens: int  # of each of its lines
    twins: tuple[tuple[int, int], ...]  # rows and rank of each comparison of kernels
    rows: tuple[int, ...]  # of the table
    prompts: tuple[int, ...]
    rounds: int  # of each cell
    copy_bytes: int

    @classmethod
    def for_gpu(cls) -> "Setup":
        """Llama-3.2-3B on the first GPU."""
        layer = MODELS["Llama-3.2-3B"]
        return cls(
            device=torch.device("cuda"),
            model=replace(layer, shape=replace(layer.shape, num_layers=28)),
            proof_model=replace(layer, shape=replace(layer.shape, num_layers=4)),
            dtype=torch.bfloat16,
            crowds=(1, 3, 8, 33, 64),
            new_tokens=12,
            twins=((1, 16), (8, 16), (8, 64), (33, 32), (64, 16)),
            rows=(1, 2, 4, 8, 16, 32, 64),
            prompts=(43, 1000),
            rounds=4,
            copy_bytes=1 << 30,
        )

    @classmethod
    def for_interpreter(cls) -> "Setup":
        """A tiny model on the CPU: shows that the code runs, and nothing about any GPU."""
        tiny = Model(shape(64, 96, 4, 2, 16, 150), 32)
        return cls(
            device=torch.device("cpu"),
            model=tiny,
            proof_model=replace(tiny, shape=replace(tiny.shape, num_layers=2)),
            dtype=torch.float32,
            crowds=(1, 3),
            new_tokens=3,
            twins=((3, 16),),
            rows=(1, 2),
            prompts=(5,),
            rounds=1,
            copy_bytes=1 << 20,
        )

    @property
    def on_gpu(self) -> bool:
        """Whether there are events, graphs and pinned memory."""
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.on_gpu:
            torch.cuda.synchronize()
