"""How many tokens a second the engine speaks, by the number of NPCs, each with its own adapter or with none.

    .venv/bin/python -P benchmarks/engine.py [--dtype float32] [--rows 1 8 32]

SmolLM2-135M, a prompt of 43 tokens, 100 new tokens, adapters of rank 16 on all seven linears (random: the
arithmetic does not depend on the values). The three CPU paths (torch's operators alone, deterministic, fastest), with
and without adapters, take turns in every round; medians. Prints the machine, a table, and one JSON line last.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from npc_kernels import cpu, cpu_exact

from npc_runtime.engine.adapters import AdapterStore
from npc_runtime.engine.core import Ended, EngineConfig, Request, SamplingParams, StepOutput
from npc_runtime.engine.engine import Engine
from npc_runtime.loading import LoadedBase, load_base, make_store

PROMPT_TOKENS, NEW_TOKENS, RANK, ROUNDS = 43, 100, 16, 3


def main() -> None:
    """Measure and print."""
    options = parse_options()
    bases = {
        kernels.__name__.removeprefix("npc_kernels."): load_base(
            "smollm2-135m", options.dtype, lambda label, fraction: None, kernels=kernels
        )
        for kernels in (cpu, cpu_exact)
    }
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, {bases['cpu'].backend}"
    print(f"{machine}, load {os.getloadavg()[0]:.1f}; tokens/s of all NPCs together")
    systems = [(name, adapted) for name in bases for adapted in (False, True)]
    titles = [f"{name} {'adapters' if adapted else 'base only'}" for name, adapted in systems]
    print(f"{'NPCs':>5}", *(f"{title:>20}" for title in titles))
    results = []
    with tempfile.TemporaryDirectory() as folder:
        stores = {name: make_adapters(base, max(options.rows), Path(folder) / name) for name, base in bases.items()}
        for num_rows in options.rows:
            speeds: dict[tuple[str, bool], list[float]] = {system: [] for system in systems}
            for _ in range(ROUNDS):
                for name, adapted in systems:
                    speeds[name, adapted].append(measure(bases[name], stores[name], num_rows, adapted=adapted))
            medians = [round(statistics.median(speeds[system]), 1) for system in systems]
            print(f"{num_rows:>5}", *(f"{median:>20}" for median in medians), flush=True)
            results.append({"npcs": num_rows, **dict(zip(titles, medians, strict=True))})
    print(json.dumps({"benchmark": "engine", "machine": machine, "results": results}))


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "auto"), default="auto")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    return parser.parse_args()


def make_adapters(base: LoadedBase, count: int, folder: Path) -> AdapterStore:
    """Random adapters a0, a1, … in PEFT's format."""
    from safetensors.torch import save_file

    shape = base.decoder.shape
    sizes = {
        "self_attn.q_proj": (shape.hidden, shape.q_size),
        "self_attn.k_proj": (shape.hidden, shape.kv_size),
        "self_attn.v_proj": (shape.hidden, shape.kv_size),
        "self_attn.o_proj": (shape.q_size, shape.hidden),
        "mlp.gate_proj": (shape.hidden, shape.intermediate),
        "mlp.up_proj": (shape.hidden, shape.intermediate),
        "mlp.down_proj": (shape.intermediate, shape.hidden),
    }
    store = make_store(shape, base.device, EngineConfig())
    for number in range(count):
        path = folder / f"a{number}"
        path.mkdir(parents=True)
        tensors = {}
        for layer in range(shape.num_layers):
            for module, (inputs, outputs) in sizes.items():
                name = f"base_model.model.model.layers.{layer}.{module}"
                tensors[f"{name}.lora_A.weight"] = torch.randn(RANK, inputs) / inputs**0.5
                tensors[f"{name}.lora_B.weight"] = torch.randn(outputs, RANK) * 0.01
        save_file(tensors, str(path / "adapter_model.safetensors"))
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK}
        (path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        store.add(path.name, [(path, 1.0)])
    return store


def measure(base: LoadedBase, store: AdapterStore, num_rows: int, *, adapted: bool) -> float:
    """Tokens per second of one batch, prefill included."""
    live = set(range(num_rows))

    def on_step(step: StepOutput) -> None:
        live.difference_update(event.request_id for event in step.events if isinstance(event, Ended))

    engine = Engine(base.decoder, base.tokenizer, store, EngineConfig(), on_step=on_step)
    sampling = SamplingParams(seed=0, max_tokens=NEW_TOKENS, min_tokens=NEW_TOKENS, temperature=0.7)
    prompt = tuple(range(100, 100 + PROMPT_TOKENS))
    requests = [
        Request(id=n, prompt_ids=prompt, sampling=sampling, arrival=0.0, adapter=f"a{n}" if adapted else None)
        for n in range(num_rows)
    ]
    engine.submit(requests)
    started = time.perf_counter()
    while live:
        engine.step()
    return num_rows * NEW_TOKENS / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
