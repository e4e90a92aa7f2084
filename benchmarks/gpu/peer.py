"""PEFT's `adapter_names` on the same shapes: eight rows, each with an adapter of its own, decode steps with a cache."""

import statistics
import time
from typing import Any

import torch

from gpu.models import make_config
from gpu.parity import LINEARS
from gpu.results import Skip
from gpu.setup import Setup

__all__ = ["Peer"]

RANK = 16


class Peer:
    """A part with one item."""

    kind = "peft"

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._rows = min(8, max(setup.rows))

    @property
    def items(self) -> list[str]:
        """PEFT."""
        return [f"PEFT adapter_names, bf16, prompt {self._setup.prompts[0]}, rank {RANK}, B = {self._rows}"]

    @torch.no_grad()
    def measure(self, item: str) -> dict[str, Any]:
        """The median of some decode steps; each ends when the tokens are known."""
        setup, rows = self._setup, self._rows
        self._check_memory()
        model, names = self._model(), [f"a{number}" for number in range(rows)]
        ids = torch.randint(3, setup.model.shape.vocab, (rows, setup.prompts[0]), device=setup.device)
        done = model(input_ids=ids, use_cache=True, adapter_names=names)
        times = []
        for _ in range(3 + 4 * setup.rounds):
            started = time.perf_counter()
            tokens = done.logits[:, -1].argmax(-1, keepdim=True)
            tokens.tolist()
            done = model(input_ids=tokens, past_key_values=done.past_key_values, use_cache=True, adapter_names=names)
            setup.synchronize()
            times.append(1000 * (time.perf_counter() - started))
        found = statistics.median(times[3:])
        return {"rows": rows, "step_ms": round(found, 3), "tokens_per_s": round(1000 * rows / found, 1)}

    def _check_memory(self) -> None:
        shape, item = self._setup.model.shape, self._setup.dtype.itemsize
        layer = shape.hidden * (2 * shape.q_size + 2 * shape.kv_size + 3 * shape.intermediate)
        needed = (shape.num_layers * layer + shape.vocab * shape.hidden) * item + (2 << 30)
        if self._setup.on_gpu and torch.cuda.mem_get_info()[0] < needed:
            raise Skip(f"transformers and PEFT need {needed / 1e9:.0f} GB for the base")

    def _model(self) -> Any:
        """Random weights, made on the device; adapters random too."""
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        with self._setup.device:
            base = AutoModelForCausalLM.from_config(make_config(self._setup.model.shape), dtype=self._setup.dtype)
        config = LoraConfig(r=RANK, target_modules=list(LINEARS), task_type="CAUSAL_LM", init_lora_weights=False)
        model: Any = get_peft_model(base, config, adapter_name="a0", autocast_adapter_dtype=False)
        for number in range(1, self._rows):
            model.add_adapter(f"a{number}", config)
        return model.to(self._setup.dtype).eval()
