"""Runs in PEFT's venv: transformers' `generate` with an adapter per row (`adapter_names`), base in bfloat16."""

from pathlib import Path
from typing import Any

import torch
import worker
from peft import PeftModel
from transformers import AutoModelForCausalLM

torch.set_grad_enabled(False)
state: dict[str, Any] = {}


def start(command: dict[str, Any]) -> dict[str, Any]:
    """Load the base and every adapter of the cell."""
    torch.set_num_threads(command["threads"])
    model = AutoModelForCausalLM.from_pretrained(command["base"], dtype=torch.bfloat16).eval()
    for path in command["adapters"]:
        name = Path(path).name
        if isinstance(model, PeftModel):
            model.load_adapter(path, adapter_name=name)
        else:
            model = PeftModel.from_pretrained(model, path, adapter_name=name)
    state["model"] = model.eval()  # adapters in float32, as PEFT loads them: faster here than bfloat16
    return {}


def speak(command: dict[str, Any]) -> dict[str, Any]:
    """Generate the whole batch; nothing streams."""
    ids = torch.tensor(command["prompts"])
    clock = worker.Clock()
    out = state["model"].generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        adapter_names=[Path(path).name for path in command["adapters"]],
        min_new_tokens=command["new_tokens"],
        max_new_tokens=command["new_tokens"],
        do_sample=False,
        pad_token_id=0,
    )
    return clock.stop([out.shape[1] - ids.shape[1]] * out.shape[0], prompt_tokens=ids.shape[1])


if __name__ == "__main__":
    worker.serve(start, speak)
