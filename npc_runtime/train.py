"""LoRA training of one persona: from `lines.jsonl` to `adapter/` in PEFT's folder format.

The prompt of a training line is rendered exactly as the daemon renders it; the loss counts the reply and its
end token only. Every epoch the loss on `heldout.jsonl` is measured and the best epoch is kept. Needs the extra
`train` (peft).
"""

import json
import math
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from npc_runtime.engine.checkpoints import read_scheme
from npc_runtime.engine.tokenizer import ChatTokenizer
from npc_runtime.engine.weights import read_config
from npc_runtime.errors import PersonaInvalid, StartupError
from npc_runtime.persona import Persona

__all__ = ["Epoch", "Recipe", "measure_loss", "train_persona"]

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MIN_LINES = 20


@dataclass(frozen=True, slots=True)
class Recipe:
    """The settings of a run; the defaults were chosen by measurement (`personas/README.md`)."""

    rank: int = 8
    learning_rate: float = 5e-4
    epochs: int = 3
    batch_size: int = 4
    dropout: float = 0.05
    seed: int = 0

    @property
    def alpha(self) -> int:
        """LoRA's alpha; alpha / rank = 2 keeps the scaling an exact power of two."""
        return 2 * self.rank


@dataclass(frozen=True, slots=True)
class Epoch:
    """Mean losses in nats per reply token; `kept` is set when this epoch is the best so far."""

    number: int
    train: float
    heldout: float
    kept: bool


Example = tuple[list[int], list[int]]  # token ids of the prompt, of the reply with its end token


def train_persona(
    persona: Persona,
    base: Path,
    *,
    base_name: str,
    recipe: Recipe,
    on_step: Callable[[int, int, float], None],  # step, steps, loss
) -> list[Epoch]:
    """Train and write `<persona>/adapter`. Raises `PersonaInvalid` for missing or too few lines.

    Raises `StartupError` for a quantized base. The files are replaced only at the end, by those of the epoch with the
    lowest held-out loss.
    """
    try:
        import peft
    except ImportError as error:
        raise StartupError("Training needs the package peft.", "pip install 'npc-runtime[train]'") from error
    from transformers import AutoModelForCausalLM

    read_config(base)  # refuses what is no base
    if read_scheme(base) is not None:
        raise StartupError(
            f"{base} is quantized, and adapters are trained on dense weights.",
            "Train on the float16 or bfloat16 version of the same model; the adapter fits this one too.",
        )
    tokenizer = ChatTokenizer(base)
    train = _read_examples(persona, "lines.jsonl", tokenizer)
    heldout = _read_examples(persona, "heldout.jsonl", tokenizer)
    torch.manual_seed(recipe.seed)
    model: Any = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.bfloat16)
    config = peft.LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=list(TARGETS),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_name,
    )
    model = peft.get_peft_model(model, config)
    with tempfile.TemporaryDirectory(dir=persona.folder) as name:
        epochs = list(_epochs(model, train, heldout, recipe, Path(name), on_step))
        if not any(epoch.kept for epoch in epochs):
            raise StartupError("The loss was never a number.", "Look for odd lines, or lower the learning rate.")
        _install(Path(name), persona.folder / "adapter", base_name, recipe, epochs)
    return epochs


def _epochs(
    model: Any,
    train: list[Example],
    heldout: list[Example],
    recipe: Recipe,
    target: Path,
    on_step: Callable[[int, int, float], None],
) -> Iterator[Epoch]:
    shuffler = random.Random(recipe.seed)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=recipe.learning_rate, weight_decay=0.0)
    num_steps = math.ceil(len(train) / recipe.batch_size) * recipe.epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _warmup_then_cosine(num_steps))
    best, step = math.inf, 0
    for number in range(1, recipe.epochs + 1):
        shuffler.shuffle(train)
        losses = []
        model.train()
        for batch in _batches(train, recipe.batch_size):
            loss = _mean_loss(model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            step += 1
            on_step(step, num_steps, losses[-1])
        measured = measure_loss(model, heldout)
        kept = measured < best
        if kept:
            best = measured
            _save_bfloat16(model, target)
        yield Epoch(number, sum(losses) / len(losses), measured, kept)


@torch.no_grad()
def measure_loss(model: Any, examples: list[Example]) -> float:
    """Mean loss in nats per reply token, in evaluation mode."""
    model.eval()
    sizes = [(batch, sum(len(reply) for _, reply in batch)) for batch in _batches(examples, 8)]
    total = sum(_mean_loss(model, batch).item() * size for batch, size in sizes)
    return total / sum(size for _, size in sizes)


def _mean_loss(model: Any, batch: list[Example]) -> Tensor:
    longest = max(len(prompt) + len(reply) for prompt, reply in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (prompt, reply) in enumerate(batch):
        size = len(prompt) + len(reply)
        ids[row, :size] = torch.tensor(prompt + reply)
        mask[row, :size] = 1
        labels[row, len(prompt) : size] = torch.tensor(reply)
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    chosen = labels[:, 1:] != -100
    return torch.nn.functional.cross_entropy(logits[chosen].float(), labels[:, 1:][chosen])


def _batches(examples: list[Example], size: int) -> Iterator[list[Example]]:
    for start in range(0, len(examples), size):
        yield examples[start : start + size]


def _warmup_then_cosine(num_steps: int) -> Callable[[int], float]:
    """A tenth of the steps up to the full rate, then a cosine down to a tenth of it."""
    warmup = max(1, num_steps // 10)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(1, num_steps - warmup)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))

    return factor


def _read_examples(persona: Persona, name: str, tokenizer: ChatTokenizer) -> list[Example]:
    path = persona.folder / name
    if not path.is_file():
        raise PersonaInvalid(f"{path} is missing.", 'One line each: {"player": "…", "npc": "…"}.')
    examples = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = json.loads(text)
            player, npc = str(line["player"]), str(line["npc"])
        except (ValueError, KeyError, TypeError) as error:
            raise PersonaInvalid(f"{path}, line {number}: {error!r}.", "Each line needs player and npc.") from error
        prompt = list(tokenizer.render(persona.messages([], player)).token_ids)
        examples.append((prompt, tokenizer.encode_reply(npc)))
    needed = MIN_LINES if name == "lines.jsonl" else 1
    if len(examples) < needed:
        raise PersonaInvalid(f"{path} has {len(examples)} lines.", f"At least {needed}; better 100, and 16 held out.")
    return examples


def _save_bfloat16(model: Any, target: Path) -> None:
    """Write the adapter in bf16 and leave the training weights as they are."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    tensors = get_peft_model_state_dict(model)
    rounded = {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}
    save_file(rounded, str(target / "adapter_model.safetensors"), metadata={"format": "pt"})
    model.peft_config["default"].save_pretrained(str(target))


def _install(source: Path, target: Path, base_name: str, recipe: Recipe, epochs: list[Epoch]) -> None:
    config = json.loads((source / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base_name  # PEFT writes the machine's own path here
    _write_json(source / "adapter_config.json", config)
    log = {"recipe": asdict(recipe), "base": base_name, "epochs": [asdict(epoch) for epoch in epochs]}
    _write_json(source / "training.json", log)
    target.mkdir(exist_ok=True)
    for name in ("adapter_config.json", "training.json", "adapter_model.safetensors"):
        (source / name).replace(target / name)


def _write_json(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")
