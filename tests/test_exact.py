"""`--deterministic`: a line's logits have the same bits alone, in a crowd, from the prefix cache and after preemption.

With the embedded base and real sizes, since a library's GEMM behaves differently for tiny ones.
"""

import pytest
import torch
from driving import make_engine, make_store
from npc_kernels import cpu_exact
from tiny import make_adapter
from transformers import AutoModelForCausalLM

from npc_runtime.engine.core import EngineConfig, Request, SamplingParams
from npc_runtime.loading import load_base

NUM_LINES, NUM_TOKENS = 17, 12


class Recorder:
    """Stands in front of a draw and keeps the logits of every (line, position)."""

    def __init__(self, engine):
        self._engine = engine
        self._draw = engine._runner.draw
        self.logits = {}
        engine._runner.draw = self

    def __call__(self, logits, settings):
        sampling = [row for row in self._engine._rows if row.samples]
        for row, values in zip(sampling, logits, strict=True):
            self.logits[row.sequence.request.id, row.stop] = values.clone()
        return self._draw(logits, settings)


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def base(request):
    return load_base("smollm2-135m", request.param, lambda label, fraction: None, kernels=cpu_exact)


@pytest.fixture(scope="module")
def store(base, base_folder, tmp_path_factory):
    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    store = make_store(base.decoder)
    for name, rank in (("a16", 16), ("a24", 24)):
        store.add(name, [(make_adapter(model, tmp_path_factory.mktemp(name), rank=rank, seed=rank), 1.0)])
    return store


def make_request(number):
    sampling = SamplingParams(seed=number, max_tokens=NUM_TOKENS, min_tokens=NUM_TOKENS, temperature=0.9)
    prompt = tuple(100 + (7 * number + position) % 900 for position in range(20 + 9 * number))
    return Request(
        id=number, prompt_ids=prompt, sampling=sampling, arrival=0.0, adapter=(None, "a16", "a24")[number % 3]
    )


def speak(engine, run, recorder, requests):
    """Step to the end; the logits of every line, position by position, and its text."""
    engine.submit(requests)
    for _ in range(2_000):
        engine.step()
        engine.check_integrity()
        if all(run.ended(request.id) for request in requests):
            return recorder.logits, {request.id: run.ended(request.id).text for request in requests}
    raise AssertionError("the engine did not finish")


def start(base, store, **sizes):
    engine, run = make_engine(base, store, EngineConfig(**{"kv_tokens": 8192, **sizes}))
    plan = engine._scheduler.plan

    def remember(*args, **options):
        engine._rows = plan(*args, **options)
        return engine._rows

    engine._scheduler.plan = remember
    return engine, run, Recorder(engine)


@pytest.fixture(scope="module")
def alone(base, store):
    logits, texts = {}, {}
    for number in range(NUM_LINES):
        said = speak(*start(base, store), [make_request(number)])
        logits |= said[0]
        texts |= said[1]
    return logits, texts


CROWDS = {
    "fresh": {},
    "small chunks": {"max_step_tokens": 37},
    "preempted": {"kv_tokens": 208, "block_size": 4},
}


@pytest.mark.parametrize("crowd", CROWDS)
def test_the_same_bits_alone_and_in_a_crowd(crowd, alone, base, store):
    engine, run, recorder = start(base, store, **CROWDS[crowd])
    logits, texts = speak(engine, run, recorder, [make_request(number) for number in range(NUM_LINES)])
    assert (engine.stats().num_preempted > 0) == (crowd == "preempted")
    assert texts == alone[1]
    assert logits.keys() == alone[0].keys()
    assert all(torch.equal(logits[place], alone[0][place]) for place in logits)


def test_the_same_bits_from_the_prefix_cache(alone, base, store):
    engine, run, recorder = start(base, store)
    speak(engine, run, recorder, [make_request(16)])
    recorder.logits.clear()
    run.events.clear()
    logits, texts = speak(engine, run, recorder, [make_request(16), make_request(4)])
    assert run.ended(16).num_cached > 0
    assert texts[16] == alone[1][16]
    assert all(torch.equal(logits[place], alone[0][place]) for place in logits)
