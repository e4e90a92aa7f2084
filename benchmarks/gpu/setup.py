"""What a run works on: real sizes on a GPU; tiny ones in Triton's interpreter, where only the tests go."""

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
    shortest: int  # prompt of them
    growth: int  # from one line's prompt to the next one's
    longest: int  # line of the proof of graphs
    chunk: int  # tokens of a step where prompts come in small chunks
    block_size: int  # of the prefix cache
    engine: dict[str, int]  # of its sizes, what is not the daemon's
    twins: tuple[tuple[int, int], ...]  # rows and rank of each comparison of kernels
    rows: tuple[int, ...]  # of the table
    prompts: tuple[int, ...]
    rounds: int  # of each cell
    burst: int  # steps of one system before the next one has its turn
    loads: int  # of adapters, while others speak
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
            shortest=9,
            growth=7,
            longest=250,
            chunk=23,
            block_size=16,
            engine={},
            twins=((1, 16), (8, 16), (8, 64), (33, 32), (64, 16)),
            rows=(1, 2, 4, 8, 16, 32, 64),
            prompts=(43, 1000),
            rounds=4,
            burst=6,
            loads=10,
            copy_bytes=1 << 30,
        )

    @classmethod
    def for_tests(cls) -> "Setup":
        """A tiny model on a CPU, in Triton's interpreter: shows that the script runs, and nothing about any GPU."""
        tiny = Model(shape(32, 48, 2, 1, 16, 67), 32)
        return cls(
            device=torch.device("cpu"),
            model=tiny,
            proof_model=tiny,
            dtype=torch.float32,
            crowds=(1, 3),
            new_tokens=8,
            shortest=5,
            growth=2,
            longest=9,
            chunk=4,
            block_size=4,
            engine={"max_step_tokens": 16},  # as wide as a step of single tokens: numpy's products have its bits then
            twins=((3, 16),),
            rows=(1, 2),
            prompts=(5,),
            rounds=1,
            burst=2,
            loads=2,
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
