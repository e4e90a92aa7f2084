"""Proof: in one mixed batch every line is what transformers and PEFT compute for it alone.

Small random models of two families with adapters that PEFT saved. Weights are rounded to bfloat16 first, so that both
dtypes and the codes of 4 bits have the same base; the oracle of 4 bits is transformers with the weights that the codes
stand for. In float32 greedy tokens are equal; in bfloat16 logits are at most twice as far from float32 as
transformers' own are.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from npc_kernels import gpu
from npc_kernels.quant import dequantize, quantize_int4, quantize_int8
from torch import Tensor

from gpu.independence import Stage
from gpu.models import in_bits, make_sequence
from gpu.setup import RANKS, Setup
from npc_runtime.engine.adapters import AdapterStore
from npc_runtime.engine.core import EngineConfig, Request, SamplingParams, Sequence
from npc_runtime.engine.model import Decoder, ModelShape
from npc_runtime.engine.runner import Runner
from npc_runtime.engine.scheduler import PlannedRow

__all__ = ["Parity"]

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EOS = 2
GROUP = 32
FAMILIES = ("Llama", "Qwen3")
MAX_ROW = 32
"""Tokens of a step: more in float32 take more shared memory than small cards have."""


class Parity:
    """A part: families, bases and dtypes."""

    kind = "proof"

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._made: dict[tuple[str, str], _Cast] = {}

    @property
    def items(self) -> list[str]:
        """Tokens first."""
        bases = [f"{family}, {base}" for family in FAMILIES for base in ("dense", "int4")]
        return [f"parity with PEFT, {base}, {what}" for what in ("tokens", "bfloat16") for base in bases]

    def measure(self, item: str) -> dict[str, Any]:
        """Compare with the oracle; tf32 is off, or it would be the less exact of the two."""
        torch.backends.cuda.matmul.allow_tf32 = False
        _, family, base, what = item.split(", ")
        key = family, base
        if key not in self._made:
            self._made[key] = _Cast(self._setup, family, is_int4=base == "int4")
        cast = self._made[key]
        return cast.compare_tokens() if what == "tokens" else cast.compare_bfloat16()


class _Cast:
    """A base, its oracle, and a line for every adapter and for none."""

    def __init__(self, setup: Setup, family: str, *, is_int4: bool) -> None:
        self._setup = setup
        self._num_tokens = 24 if setup.on_gpu else 4
        self._config = _config_of(family, setup)
        self._model = _random_model(self._config, setup.device)
        self._shape = ModelShape.from_config(self._config)
        self._bits = 4 if is_int4 else 16
        self._weights = {name: tensor.clone() for name, tensor in self._model.state_dict().items()}
        if is_int4:
            _round_to_codes(self._model)
        with tempfile.TemporaryDirectory(prefix="npc-gpu-") as folder:
            self._oracle = _with_adapters(self._model, Path(folder))
            self._ours = {dtype: self._make_ours(dtype, Path(folder)) for dtype in (torch.float32, torch.bfloat16)}
        vocab = self._config.vocab_size - 3
        self._lines: dict[str | None, tuple[int, ...]] = {
            name: tuple(3 + (29 * number + 13 * position) % vocab for position in range(5 + 3 * number))
            for number, name in enumerate([*RANKS, None])
        }

    def compare_tokens(self) -> dict[str, Any]:
        """Ours through the engine; the oracle's choice at every position of ours."""
        wrong = []
        for name, tokens in self._spoken.items():
            choices = self._exact[name][: len(tokens)].clone()
            choices[:, EOS] = -torch.inf  # held back on both sides
            if choices.argmax(-1).tolist() != tokens:
                wrong.append(str(name))
        kinds = len({tuple(tokens) for tokens in self._spoken.values()})
        return {"passed": not wrong and kinds > 1, "lines": len(self._spoken), "different": wrong, "texts": kinds}

    def compare_bfloat16(self) -> dict[str, Any]:
        """The largest difference of a logit to float32: ours as a multiple of transformers' own, by line."""
        ours = self._teacher_forced(torch.bfloat16)
        theirs = self._ask(copy.deepcopy(self._oracle).to(torch.bfloat16))
        shares = {}
        for name, exact in self._exact.items():
            allowed = (theirs[name] - exact).abs().max()
            shares[str(name)] = round(((ours[name] - exact).abs().max() / allowed).item(), 3)
        return {"passed": all(share <= 2 for share in shares.values()), "of_theirs": shares}

    @cached_property
    def _spoken(self) -> dict[str | None, list[int]]:
        stage = Stage(*self._ours[torch.float32], EngineConfig(kv_tokens=1024, max_step_tokens=MAX_ROW))
        sampling = SamplingParams(seed=0, max_tokens=self._num_tokens, min_tokens=self._num_tokens, temperature=0.0)
        stage.say(
            [
                Request(id=number, prompt_ids=prompt, sampling=sampling, arrival=0.0, adapter=name)
                for number, (name, prompt) in enumerate(self._lines.items())
            ]
        )
        return {name: stage.tokens[number] for number, name in enumerate(self._lines)}

    @cached_property
    def _exact(self) -> dict[str | None, Tensor]:
        return self._ask(self._oracle)

    @torch.no_grad()
    def _ask(self, oracle: Any) -> dict[str | None, Tensor]:
        """Its logits behind the prompt and behind each of our tokens, line by line."""
        found = {}
        for name, prompt in self._lines.items():
            ids = torch.tensor([[*prompt, *self._spoken[name]]], device=self._setup.device)
            if name is None:
                with oracle.disable_adapter():
                    logits = oracle(input_ids=ids).logits
            else:
                oracle.set_adapter(name)
                logits = oracle(input_ids=ids).logits
            found[name] = logits[0, len(prompt) - 1 :].float()
        return found

    def _teacher_forced(self, dtype: torch.dtype) -> dict[str | None, Tensor]:
        """Our logits behind the prompt and behind each of our tokens, all lines in every step."""
        decoder, store = self._ours[dtype]
        runner = Runner(decoder, store, EngineConfig(kv_tokens=1024))
        lines = {name: _line(store, number, name, prompt) for number, (name, prompt) in enumerate(self._lines.items())}
        for line in lines.values():
            runner.forward([PlannedRow(line, 0, line.num_tokens - 1)])
        steps = [self._step(runner, list(lines.values()))]
        for position in range(self._num_tokens):
            for name, line in lines.items():
                line.output_ids.append(self._spoken[name][position])
            steps.append(self._step(runner, list(lines.values())))
        return {name: torch.stack([step[row] for step in steps]) for row, name in enumerate(lines)}

    def _step(self, runner: Runner, lines: list[Sequence]) -> Tensor:
        return runner.forward([PlannedRow(line, line.num_tokens - 1, line.num_tokens) for line in lines]).clone()

    def _make_ours(self, dtype: torch.dtype, folder: Path) -> tuple[Decoder, AdapterStore]:
        tensors = {name: in_bits(name, tensor.to(dtype), self._bits, GROUP) for name, tensor in self._weights.items()}
        decoder = Decoder(self._config, tensors.items(), gpu)
        store = AdapterStore(self._shape, decoder.layout, dtype=dtype, device=decoder.device, max_pages=64)
        for name in RANKS:
            store.add(name, [(folder / name, 1.0)])
        store.open()
        return decoder, store


def _line(store: AdapterStore, number: int, name: str | None, prompt: tuple[int, ...]) -> Sequence:
    line = make_sequence(number, prompt, name, list(range(8 * number, 8 * (number + 1))))
    if name is not None:
        store.admit(line)
    return line


def _config_of(family: str, setup: Setup) -> Any:
    from transformers import LlamaConfig, Qwen3Config

    kind: Callable[..., Any] = {"Llama": LlamaConfig, "Qwen3": Qwen3Config}[family]
    hidden, layers = (512, 4) if setup.on_gpu else (64, 1)
    return kind(
        vocab_size=2051 if setup.on_gpu else 131,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=max(1, hidden // 128),
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=EOS,
    )


def _random_model(config: Any, device: torch.device) -> Any:
    """Norms are random too, so that none can be forgotten; all numbers are bfloat16's."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().to(device)
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.rand_like(parameter) + 0.5
            if parameter.ndim > 1:
                values = torch.randn_like(parameter) * 1.5 / parameter.shape[-1] ** 0.5
            parameter.copy_(values.to(torch.bfloat16))
    return model


def _linears_of(model: Any) -> Iterator[Any]:
    yield from (module for name, module in model.named_modules() if name.rpartition(".")[2] in LINEARS)


@torch.no_grad()
def _round_to_codes(model: Any) -> None:
    """The weights that 4 bits stand for, and the head's 8."""
    for linear in _linears_of(model):
        linear.weight.copy_(dequantize(quantize_int4(linear.weight, GROUP)))
    model.lm_head.weight.copy_(dequantize(quantize_int8(model.lm_head.weight)))


def _with_adapters(model: Any, folder: Path) -> Any:
    """The model with random adapters, each saved as PEFT saves it."""
    from peft import LoraConfig, get_peft_model

    wearing: Any = None
    for name, rank in RANKS.items():
        # Not initialised for training, where B is zero: both sides are random.
        config = LoraConfig(
            r=rank, lora_alpha=8, target_modules=list(LINEARS), task_type="CAUSAL_LM", init_lora_weights=False
        )
        if wearing is None:
            wearing = get_peft_model(model, config, adapter_name=name)
        else:
            wearing.add_adapter(name, config)
    wearing.save_pretrained(str(folder))
    return wearing.eval()
