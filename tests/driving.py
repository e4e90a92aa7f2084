"""Drives an engine without its thread, step by step, with an integrity check after each."""

import itertools
import time
from dataclasses import dataclass, field

from npc_runtime.engine.adapters import AdapterStore
from npc_runtime.engine.core import (
    Admission,
    Ended,
    EngineConfig,
    Request,
    SamplingParams,
    Sequence,
    Spoken,
    Started,
)
from npc_runtime.engine.engine import Engine


@dataclass
class Run:
    """What came out: events of each request, how many forwards served each group, and news."""

    events: dict = field(default_factory=dict)
    forwards: dict = field(default_factory=dict)
    tokens: dict = field(default_factory=dict)
    news: list = field(default_factory=list)

    def on_step(self, step):
        self.news += step.news
        for event in step.events:
            self.events.setdefault(event.request_id, []).append(event)
        for group in step.groups:
            self.forwards[group] = self.forwards.get(group, 0) + 1

    def ended(self, request_id):
        ends = [event for event in self.events.get(request_id, []) if isinstance(event, Ended)]
        assert len(ends) <= 1
        return ends[0] if ends else None

    def spoken(self, request_id):
        return "".join(event.text for event in self.events[request_id] if isinstance(event, Spoken))

    def started(self, request_id):
        return next(event for event in self.events[request_id] if isinstance(event, Started))


NUM_ADAPTERS = 8
"""Adapters a0 … a7 of the `tiny` base."""


class FakeTokenizer:
    """A letter per token."""

    eos_ids = frozenset({2})

    def decode(self, ids):
        return "".join(chr(97 + i % 26) for i in ids)


class TinyBase:
    """What an engine needs of a base."""

    def __init__(self, decoder):
        self.decoder = decoder
        self.tokenizer = FakeTokenizer()


def make_store(decoder, max_pages=64, **budgets):
    options = dict(dtype=decoder.dtype, device=decoder.device, max_pages=max_pages, **budgets)
    return AdapterStore(decoder.shape, decoder.layout, **options)


_holders = itertools.count(1_000_000)


def ask(store, name, request_id=None):
    """A line that wants the adapter, and what it is told."""
    sequence = Sequence(greedy(request_id or next(_holders), [3], name))
    outcome = store.admit(sequence)
    sequence.is_promised = outcome is Admission.LOADING
    return sequence, outcome


def hold(store, name):
    """Make the adapter resident and in use, whatever loads it takes; returns who uses it, for `store.leave`."""
    store.open()
    sequence, outcome = ask(store, name)
    for _ in range(2_000):
        for failure in store.collect():
            raise failure.error
        if outcome is Admission.ADMITTED:
            return sequence
        time.sleep(0.001)
        outcome = store.admit(sequence)
    raise AssertionError(f"{name} was not loaded: {outcome}")


def make_engine(base, store, config=None, **options):
    run = Run()
    config = config or EngineConfig(kv_tokens=4096)
    return Engine(base.decoder, base.tokenizer, store, config, on_step=run.on_step, **options), run


def speak(engine, run, requests, max_steps=2_000):
    """Submit together and step until every line ended; also keeps every line's token ids in `run.tokens`."""
    engine.submit(requests)
    sequences = {}
    for _ in range(max_steps):
        engine.step(wait=engine._scheduler.has_work)
        engine.check_integrity()
        sequences.update({s.request.id: s for s in engine._scheduler.running})
        run.tokens = {request_id: s.output_ids for request_id, s in sequences.items()}
        if all(run.ended(request.id) for request in requests):
            return run
    raise AssertionError("the engine did not finish")


def greedy(request_id, prompt_ids, adapter, *, max_tokens=48, group="batch", deadline=None, **sampling):
    settings = {"seed": 0, "temperature": 0.0, "min_tokens": max_tokens, **sampling}
    return Request(
        id=request_id,
        prompt_ids=tuple(prompt_ids),
        sampling=SamplingParams(max_tokens=max_tokens, **settings),
        arrival=0.0,
        adapter=adapter,
        group=group,
        deadline=deadline,
    )
