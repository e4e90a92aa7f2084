"""What every system is given to do: how many NPCs, which adapters, which prompts. Knows no system; needs no torch."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

__all__ = ["LINEARS", "MIXED_RANKS", "Cell", "Measured", "adapter_folder", "default_grid", "make_adapter", "prompts_of"]

MIXED_RANKS = (8, 16, 32, 64)
LINEARS = {  # module: (its inputs, its outputs) as keys of `sizes`
    "self_attn.q_proj": ("hidden", "q"),
    "self_attn.k_proj": ("hidden", "kv"),
    "self_attn.v_proj": ("hidden", "kv"),
    "self_attn.o_proj": ("q", "hidden"),
    "mlp.gate_proj": ("hidden", "intermediate"),
    "mlp.up_proj": ("hidden", "intermediate"),
    "mlp.down_proj": ("intermediate", "hidden"),
}
FIRST_PLAIN_ID = 1_000  # below are special tokens, bytes and punctuation


@dataclass(frozen=True, slots=True)
class Cell:
    """One row of the grid. `rank` 16, "mixed" (8, 16, 32, 64 in turn), or 0 for no adapters at all."""

    npcs: int
    rank: int | str
    prompt_tokens: int
    new_tokens: int = 100
    rounds: int = 3

    @property
    def ranks(self) -> tuple[int, ...]:
        """The rank of each NPC's adapter; empty without adapters."""
        if self.rank == "mixed":
            return tuple(MIXED_RANKS[n % len(MIXED_RANKS)] for n in range(self.npcs))
        return (int(self.rank),) * self.npcs if self.rank else ()

    @property
    def adapters(self) -> tuple[str, ...]:
        """The name of each NPC's own adapter; empty without adapters."""
        return tuple(f"r{rank}-{number:02}" for number, rank in enumerate(self.ranks))

    @property
    def title(self) -> str:
        """The cell in words."""
        rank = f"rank {self.rank}" if isinstance(self.rank, int) else "ranks 8, 16, 32, 64"
        return f"{self.npcs} NPC{'s' * (self.npcs > 1)}, {rank}, prompt {self.prompt_tokens}"


@dataclass(frozen=True, slots=True)
class Measured:
    """One batch of one system. `first_text_s` is empty where the system does not stream."""

    last_line_s: float
    first_text_s: tuple[float, ...]
    counts: tuple[int, ...]  # generated tokens of each line
    prompt_tokens: int  # what had to be computed of each prompt

    def explain_wrong_counts(self, cell: Cell) -> str | None:
        """Why the batch is not what was asked for, if it is not."""
        if self.counts != (cell.new_tokens,) * cell.npcs:
            return f"generated {sorted(set(self.counts))} tokens on {len(self.counts)} lines, not {cell.new_tokens}"
        return None


def default_grid(
    npcs: list[int], prompts: list[int], *, rounds: int | None = None, new_tokens: int = 100
) -> list[Cell]:
    """Prompt 43 with every N at rank 16; mixed ranks and longer prompts at 8 NPCs only: all of it would take hours.

    Cells of equal N and rank stand together, so that a peer that must be started for them is started once.
    """
    cells = []
    for count in npcs:
        is_middle = count == (8 if 8 in npcs else npcs[0])
        few = 2 if count > 8 else 3
        cells.append(Cell(count, 16, prompts[0], new_tokens, rounds or few))
        cells += [Cell(count, 16, prompt, new_tokens, rounds or 2) for prompt in prompts[1:] if is_middle]
        cells += [Cell(count, "mixed", prompts[0], new_tokens, rounds or few)] if is_middle else []
    return cells


def prompts_of(cell: Cell, salt: str, *, vocabulary: int) -> list[list[int]]:
    """Random token ids for each NPC, new for every salt, so that no cache of any system can help it."""
    source = random.Random(f"{cell.title} {salt}")
    ids = range(FIRST_PLAIN_ID, vocabulary)
    return [source.choices(ids, k=cell.prompt_tokens) for _ in range(cell.npcs)]


def adapter_folder(root: Path, name: str) -> Path:
    """Where the adapter of that name lies, in PEFT's format."""
    return root / "adapters" / name


def make_adapter(folder: Path, config: dict[str, int], *, name: str) -> None:
    """Write a random LoRA on all seven linears in PEFT's format, unless it is there.

    The speed does not depend on the values. The same name gives the same weights.
    """
    if (folder / "adapter_config.json").exists():
        return
    import numpy as np
    from safetensors.numpy import save_file

    rank, number = (int(part) for part in name.removeprefix("r").split("-"))
    source = np.random.default_rng([rank, number])
    head = config["hidden_size"] // config["num_attention_heads"]
    sizes = {
        "hidden": config["hidden_size"],
        "q": config["num_attention_heads"] * head,
        "kv": config["num_key_value_heads"] * head,
        "intermediate": config["intermediate_size"],
    }
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for module, (inputs, outputs) in LINEARS.items():
            path = f"base_model.model.model.layers.{layer}.{module}"
            a = source.standard_normal((rank, sizes[inputs]), dtype=np.float32) / sizes[inputs] ** 0.5
            b = source.standard_normal((sizes[outputs], rank), dtype=np.float32) * 0.01
            tensors[f"{path}.lora_A.weight"] = a.astype(np.float16)
            tensors[f"{path}.lora_B.weight"] = b.astype(np.float16)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    document = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "smollm2-135m",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": [module.split(".")[1] for module in LINEARS],
        "bias": "none",
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(document), encoding="utf-8")
