"""Our engine, stepped without its thread, in a process of its own. The one place that touches the engine's API."""

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import worker

from npc_runtime.engine.core import Ended, EngineConfig, Request, SamplingParams, Spoken, StepOutput
from npc_runtime.engine.engine import Engine
from npc_runtime.loading import load_base, make_store


class Ours:
    """A base, a store with every adapter, and one engine that lives as long as the process."""

    def __init__(self) -> None:
        self._clock = worker.Clock()
        self._counts: dict[int, int] = {}
        self._next_id = 0

    def start(self, command: dict[str, Any]) -> dict[str, Any]:
        """Load the base and every adapter of the cell."""
        config = EngineConfig()
        base = load_base(command["base"], "auto", lambda label, fraction: None)
        store = make_store(base.decoder.shape, base.device, config)
        for path in command["adapters"]:
            store.add(Path(path).name, [(Path(path), 1.0)])
        self._engine = Engine(base.decoder, base.tokenizer, store, config, on_step=self._take)
        return {"backend": base.backend}

    def speak(self, command: dict[str, Any]) -> dict[str, Any]:
        """Submit the batch and step until every line ended."""
        new = command["new_tokens"]
        sampling = SamplingParams(seed=0, max_tokens=new, min_tokens=new, temperature=0.0)
        names = [Path(path).name for path in command["adapters"]] or [None] * len(command["prompts"])
        requests = []
        for ids, name in zip(command["prompts"], names, strict=True):
            self._next_id += 1
            key = name or ""
            requests.append(Request(self._next_id, tuple(ids), sampling, arrival=0.0, adapter=name, cache_key=key))
        self._counts = {}
        self._clock = worker.Clock()
        self._engine.submit(requests)
        while len(self._counts) < len(requests):
            self._engine.step()
        return self._clock.stop(list(self._counts.values()), prompt_tokens=len(command["prompts"][0]))

    def _take(self, step: StepOutput) -> None:
        for event in step.events:
            if isinstance(event, Spoken):
                self._clock.has_text(event.request_id)
            elif isinstance(event, Ended):
                self._counts[event.request_id] = event.num_completion


if __name__ == "__main__":
    ours = Ours()
    worker.serve(ours.start, ours.speak)
