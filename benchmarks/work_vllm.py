"""Runs in vLLM's venv: its engine in this process, a LoRA request per prompt, stepped by hand to see first texts."""

from pathlib import Path
from typing import Any

import worker
from vllm import EngineArgs, LLMEngine, SamplingParams
from vllm.lora.request import LoRARequest

state: dict[str, Any] = {"batch": 0}


def start(command: dict[str, Any]) -> dict[str, Any]:
    """Start the engine for so many adapters of at most this rank."""
    paths = command["adapters"]
    state["loras"] = {path: LoRARequest(Path(path).name, n + 1, path) for n, path in enumerate(paths)}
    state["engine"] = LLMEngine.from_engine_args(
        EngineArgs(
            model=command["base"],
            dtype="bfloat16",
            max_model_len=command["context"],
            max_num_seqs=command["npcs"],
            enable_lora=bool(paths),
            max_loras=max(1, len(paths)),
            max_lora_rank=command["max_rank"],
            enable_prefix_caching=False,
            disable_log_stats=True,
        )
    )
    for lora in state["loras"].values():
        state["engine"].add_lora(lora)
    return {}


def speak(command: dict[str, Any]) -> dict[str, Any]:
    """Add every line, then step until all are finished."""
    engine = state["engine"]
    state["batch"] += 1
    new = command["new_tokens"]
    sampling = SamplingParams(temperature=0.0, max_tokens=new, min_tokens=new, ignore_eos=True)
    loras = command["adapters"] or [None] * len(command["prompts"])
    clock, counts = worker.Clock(), {}
    for number, (ids, lora) in enumerate(zip(command["prompts"], loras, strict=True)):
        prompt = {"prompt_token_ids": ids}
        engine.add_request(f"{state['batch']}-{number}", prompt, sampling, lora_request=state["loras"].get(lora))
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.outputs[0].text:
                clock.has_text(output.request_id)
            counts[output.request_id] = len(output.outputs[0].token_ids)
    return clock.stop(list(counts.values()), prompt_tokens=len(command["prompts"][0]))


if __name__ == "__main__":
    worker.serve(start, speak)
