"""LoRA training of one persona: from its lines to `adapter/` in PEFT's folder format.

The prompt of a training line is rendered exactly as the daemon renders it; the loss counts the reply and its
end token only. Every epoch the loss on the lines that are held out is measured, and the best epoch is kept. Needs the
extra `train` (peft).

Nothing that a step does depends on what the process did before: the order of an epoch's lines, the dropout and the
learning rate are functions of the seed and the step. So a run that was stopped goes on from its last saved state
(`training_state`) to the very bits it would have come to.
"""

import hashlib
import json
import math
import random
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from npc_runtime import __version__
from npc_runtime.adapter_folder import install_adapter, peft_config, round_adapter
from npc_runtime.engine.checkpoints import read_scheme
from npc_runtime.engine.device import Device, choose_device
from npc_runtime.engine.model import ModelShape
from npc_runtime.engine.tokenizer import ChatTokenizer
from npc_runtime.engine.weights import describe_base, read_config
from npc_runtime.errors import PersonaInvalid, StartupError
from npc_runtime.persona import Persona
from npc_runtime.training_lines import TrainingLine, read_training_set
from npc_runtime.training_state import Epoch, TrainingState, load_state, save_state

__all__ = ["Epoch", "Example", "Progress", "Recipe", "measure_loss", "tokenize_lines", "train_persona"]

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

MAX_LINE_TOKENS = 2_048
"""Prompt and reply; the memory of a step grows with the longest line."""

SAVE_EVERY_S = 10.0
SAVE_SHARE = 20
"""A state is saved no more often than every ten seconds, nor for more than a twentieth of the time."""


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


Example = tuple[list[int], list[int]]  # token ids of the prompt, of the reply with its end token


class Progress(NamedTuple):
    """What is told after every step."""

    step: int
    num_steps: int
    loss: float
    seconds_left: float


def train_persona(
    persona: Persona,
    base: Path,
    *,
    base_name: str,
    recipe: Recipe,
    on_step: Callable[[Progress], None],
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
    on_note: Callable[[str], None] = lambda note: None,
    out: Path | None = None,
    restart: bool = False,
) -> list[Epoch]:
    """Train and write `out`, else `<persona>/adapter`; goes on with a run that was stopped unless `restart` is set.

    Raises `PersonaInvalid` for lines that cannot be trained on, `StartupError` for a quantized base. The files are
    replaced only at the end, by those of the epoch with the lowest held-out loss.
    """
    try:
        import peft  # noqa: F401 - said before minutes are spent
    except ImportError as error:
        raise StartupError("Training needs the package peft.", "pip install 'npc-runtime[train]'") from error

    shape = ModelShape.from_config(read_config(base))  # refuses what is no base
    if read_scheme(base) is not None:
        raise StartupError(
            f"{base} is quantized, and adapters are trained on dense weights.",
            "Train on the float16 or bfloat16 version of the same model; the adapter fits this one too.",
        )
    tokenizer = ChatTokenizer(base)
    lines = read_training_set(persona, lambda text: len(tokenizer.encode_reply(text)) - 1)
    bound = min(MAX_LINE_TOKENS, shape.context)
    train, heldout = (tokenize_lines(persona, part, tokenizer, bound) for part in (lines.train, lines.heldout))
    if lines.was_split:
        on_note(f"there is no heldout.jsonl: {len(heldout)} of {len(train) + len(heldout)} lines are held out")
    device = choose_device("auto")
    target = out or persona.folder / "adapter"
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(target.name + ".unfinished")
    identity = _identify(recipe, base_name, base, device, train, heldout)
    state = None if restart else _find_state(unfinished, identity, on_note)

    def save() -> None:
        with _writing(unfinished):
            save_state(unfinished, run.state, identity)

    try:
        run = _Run(base, device, recipe, state)
        epochs = run.finish(train, heldout, save, on_step, on_epoch)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise StartupError(
            f"There is no memory to train this base on {device.name}.", "Train a smaller one, or with shorter lines."
        ) from error
    if not run.state.best:
        unfinished.unlink(missing_ok=True)
        raise StartupError("The loss was never a number.", "Look for odd lines, or lower --learning-rate.")
    with _writing(target):
        log = {"recipe": asdict(recipe), "base": base_name, "epochs": [asdict(epoch) for epoch in epochs]}
        install_adapter(target, run.state.best, peft_config(run.model, base_name), log)
    unfinished.unlink(missing_ok=True)
    return epochs


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise StartupError(f"{target} cannot be written ({error}).", "Make room, or name another --out.") from error


class _Run:
    """A model in training, at the state that it was made with."""

    def __init__(self, base: Path, device: Device, recipe: Recipe, state: TrainingState | None) -> None:
        self.recipe = recipe
        self.model = _load_model(base, device, recipe)
        self._weights = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        self._optimizer = torch.optim.AdamW(list(self._weights.values()), lr=recipe.learning_rate, weight_decay=0.0)
        self.state = state or TrainingState()
        if state is not None:
            self._restore(state)

    def finish(
        self,
        train: Sequence[Example],
        heldout: Sequence[Example],
        save: Callable[[], None],
        on_step: Callable[[Progress], None],
        on_epoch: Callable[[Epoch], None],
    ) -> list[Epoch]:
        """Train what is left, saving the state from time to time and after every epoch."""
        recipe, state = self.recipe, self.state
        per_epoch = math.ceil(len(train) / recipe.batch_size)
        num_steps = per_epoch * recipe.epochs
        clock = _Clock(num_steps, state)
        while state.step < num_steps:
            number, place = divmod(state.step, per_epoch)
            batch = _order(train, recipe.seed, number)[place * recipe.batch_size :][: recipe.batch_size]
            loss = self._step(batch, _rate(state.step, num_steps))
            state.step += 1
            state.losses.append(loss)
            is_last = place == per_epoch - 1
            if is_last:
                self._end_epoch(number + 1, heldout)
            left = clock.tick(state)
            if is_last or clock.is_time_to_save():
                self._note_tensors()
                clock.measure_save(save)
            on_step(Progress(state.step, num_steps, loss, left))
            if is_last:
                on_epoch(state.epochs[-1])
        return state.epochs

    def _step(self, batch: Sequence[Example], rate: float) -> float:
        torch.manual_seed(_mix(self.recipe.seed, self.state.step))  # for the dropout
        for group in self._optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate * rate
        self.model.train()
        loss = _mean_loss(self.model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self._weights.values(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.item()

    def _end_epoch(self, number: int, heldout: Sequence[Example]) -> None:
        state = self.state
        measured = measure_loss(self.model, heldout)
        kept = measured < state.best_loss
        if kept:
            state.best = round_adapter(self.model)
        state.epochs.append(Epoch(number, sum(state.losses) / len(state.losses), measured, kept))
        state.losses = []

    def _note_tensors(self) -> None:
        moments = [self._optimizer.state[weight] for weight in self._weights.values()]
        names = list(self._weights)
        self.state.weights = {name: weight.detach() for name, weight in self._weights.items()}
        self.state.first_moments = {name: found["exp_avg"] for name, found in zip(names, moments, strict=True)}
        self.state.second_moments = {name: found["exp_avg_sq"] for name, found in zip(names, moments, strict=True)}

    @torch.no_grad()
    def _restore(self, state: TrainingState) -> None:
        for name, weight in self._weights.items():
            weight.copy_(state.weights[name])
            self._optimizer.state[weight] = {
                "step": torch.tensor(float(state.step)),
                "exp_avg": state.first_moments[name].to(weight.device),
                "exp_avg_sq": state.second_moments[name].to(weight.device),
            }


class _Clock:
    """How long the rest will take, by what the steps took so far, and when the state is to be saved."""

    def __init__(self, num_steps: int, state: TrainingState) -> None:
        self._num_steps = num_steps
        self._last = self._saved_at = time.monotonic()
        self._save_s = 0.0
        self._seconds, self._steps = 0.0, 0  # of this process

    def tick(self, state: TrainingState) -> float:
        """Count a step; returns the seconds that are left."""
        now = time.monotonic()
        if self._steps == 1:
            self._seconds = 0.0  # the first one took many times as long: everything happened for the first time
        self._seconds += now - self._last
        self._steps += 1
        state.seconds += now - self._last
        self._last = now
        return self._seconds / max(self._steps - 1, 1) * (self._num_steps - state.step)

    def is_time_to_save(self) -> bool:
        return time.monotonic() - self._saved_at > max(SAVE_EVERY_S, SAVE_SHARE * self._save_s)

    def measure_save(self, save: Callable[[], None]) -> None:
        started = time.monotonic()
        save()
        self._saved_at = time.monotonic()
        self._save_s = self._saved_at - started


@torch.no_grad()
def measure_loss(model: Any, examples: Sequence[Example]) -> float:
    """Mean loss in nats per reply token, in evaluation mode."""
    model.eval()
    sizes = [(batch, sum(len(reply) for _, reply in batch)) for batch in _batches(examples, 8)]
    total = sum(_mean_loss(model, batch).item() * size for batch, size in sizes)
    return total / sum(size for _, size in sizes)


def _mean_loss(model: Any, batch: Sequence[Example]) -> Tensor:
    """The head computes only what is counted: over prompts its logits would take most of the memory of a step."""
    longest = max(len(prompt) + len(reply) for prompt, reply in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (prompt, reply) in enumerate(batch):
        size = len(prompt) + len(reply)
        ids[row, :size] = torch.tensor(prompt + reply)
        mask[row, :size] = 1
        labels[row, len(prompt) : size] = torch.tensor(reply)
    ids, mask, labels = (tensor.to(model.device) for tensor in (ids, mask, labels))
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = causal.model(input_ids=ids, attention_mask=mask).last_hidden_state[:, :-1]
    chosen = labels[:, 1:] != -100
    return torch.nn.functional.cross_entropy(causal.lm_head(hidden[chosen]).float(), labels[:, 1:][chosen])


def _batches(examples: Sequence[Example], size: int) -> Iterator[Sequence[Example]]:
    for start in range(0, len(examples), size):
        yield examples[start : start + size]


def _order(examples: Sequence[Example], seed: int, epoch: int) -> list[Example]:
    return random.Random(_mix(seed, epoch)).sample(examples, len(examples))


def _mix(seed: int, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:7], "big")


def _rate(step: int, num_steps: int) -> float:
    """A tenth of the steps up to the full rate, then a cosine down to a tenth of it."""
    warmup = max(1, num_steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def tokenize_lines(
    persona: Persona, lines: Sequence[TrainingLine], tokenizer: ChatTokenizer, bound: int = MAX_LINE_TOKENS
) -> list[Example]:
    """The lines as the model sees them. Raises `PersonaInvalid` naming those of more than `bound` tokens."""
    examples, problems = [], []
    for line in lines:
        prompt = list(tokenizer.render(persona.messages(line.earlier, line.player)).token_ids)
        examples.append((prompt, tokenizer.encode_reply(line.npc)))
        size = sum(map(len, examples[-1]))
        if size > bound:
            problems.append(f"\n  {line.file}, line {line.number}: prompt and reply have {size} tokens")
    if problems:
        listed = "".join(problems[:30])
        raise PersonaInvalid(
            f"More than {bound} tokens cannot be trained on:{listed}\n", "Shorten the persona or its 'history'."
        )
    return examples


def _load_model(base: Path, device: Device, recipe: Recipe) -> Any:
    """The base with a fresh adapter, in what the device computes best; the adapter itself is float32."""
    import peft
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # ours is on the same terminal
    torch.manual_seed(recipe.seed)
    model: Any = AutoModelForCausalLM.from_pretrained(str(base), dtype=device.dtype).to(device.torch_device)
    config = peft.LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=list(TARGETS),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 on transformers 5.23; nobody here can act on it
        return peft.get_peft_model(model, config)


def _identify(
    recipe: Recipe, base_name: str, base: Path, device: Device, train: list[Example], heldout: list[Example]
) -> dict[str, Any]:
    """Everything that the result depends on, by names that mean something to whoever changed one of them."""
    dtype = str(device.dtype).removeprefix("torch.")
    return {
        **{name.replace("_", " "): value for name, value in asdict(recipe).items()},
        "the base": describe_base(base_name, base).sha256,
        "lines.jsonl, or the prompt": _digest(train),
        "what is held out": _digest(heldout),
        "the device": f"{device.name} ({dtype}, torch {torch.__version__})",
        "npc-runtime": __version__,
    }


def _digest(examples: list[Example]) -> str:
    return hashlib.sha256(json.dumps(examples).encode()).hexdigest()


def _find_state(path: Path, identity: dict[str, Any], on_note: Callable[[str], None]) -> TrainingState | None:
    found = load_state(path, identity)
    if found.state is not None:
        on_note(f"going on after step {found.state.step} of the run that was stopped (--restart starts anew)")
    elif found.obstacle is not None:
        on_note(f"starting anew, a run that was stopped is not this one: {found.obstacle}")
    return found.state
