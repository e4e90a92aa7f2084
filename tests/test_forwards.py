"""One forward pass, many adapters: how often the base is read, counted where torch multiplies."""

from collections import Counter

import torch
from driving import NUM_ADAPTERS, greedy, make_engine, make_store, speak
from torch.utils._python_dispatch import TorchDispatchMode

from npc_runtime.engine.core import EngineConfig

NUM_TOKENS = 48


class BaseGemms(TorchDispatchMode):
    """Counts matrix products that read a base weight, by weight."""

    PRODUCTS = ("mm", "addmm", "linear", "bmm", "matmul", "_mm", "mkldnn_linear")

    def __init__(self, decoder):
        super().__init__()
        layers = [(index, layer) for index, layer in enumerate(decoder._layers)]
        self.names = {
            getattr(layer, field).weight.untyped_storage().data_ptr(): f"{index}.{field}"
            for index, layer in layers
            for field in ("qkv", "o", "gate_up", "down")
        }
        self.names[decoder.head.weight.untyped_storage().data_ptr()] = "head"
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.PRODUCTS:
            for arg in args:
                if isinstance(arg, torch.Tensor):
                    name = self.names.get(arg.untyped_storage().data_ptr())
                    self.counts.update([name] if name else [])
        return func(*args, **(kwargs or {}))


def test_eight_adapters_share_every_forward(tiny):
    """8 adapters, a base row, 48 tokens: 48 forwards, the first of which is all prompts' prefill."""
    base, store = tiny
    engine, run = make_engine(base, store, EngineConfig(kv_tokens=2048))
    requests = [greedy(n + 1, range(3, 12 + n), f"a{n}", max_tokens=NUM_TOKENS) for n in range(NUM_ADAPTERS)]
    requests.append(greedy(99, range(3, 30), None, max_tokens=NUM_TOKENS))
    with BaseGemms(base.decoder) as gemms:
        speak(engine, run, requests)
    assert {len(tokens) for tokens in run.tokens.values()} == {NUM_TOKENS}
    assert run.forwards == {"batch": NUM_TOKENS}
    assert gemms.counts == {name: NUM_TOKENS for name in gemms.names.values()}


def test_long_prompts_cost_their_chunks_and_no_more(tiny):
    """Prompts of 8 × 60 tokens through steps of 100: 5 forwards of prefill at most on top."""
    base, store = tiny
    engine, run = make_engine(base, store, EngineConfig(kv_tokens=2048, max_step_tokens=100))
    requests = [greedy(n + 1, [3 + n] * 60, f"a{n}", max_tokens=20) for n in range(NUM_ADAPTERS)]
    with BaseGemms(base.decoder) as gemms:
        speak(engine, run, requests)
    assert run.forwards["batch"] <= 20 + 5
    assert set(gemms.counts.values()) == {run.forwards["batch"]}


def test_a_line_is_the_same_alone_and_in_a_crowd(tiny):
    """With a seed and a temperature; in float32 the sums agree to far below what sampling could notice."""
    base, store = tiny
    crowd = [
        greedy(n + 1, range(3, 20 + n), f"a{n}", max_tokens=24, temperature=0.8, seed=n, min_tokens=0)
        for n in range(NUM_ADAPTERS)
    ]
    engine, run = make_engine(base, store)
    together = {n: list(tokens) for n, tokens in speak(engine, run, crowd).tokens.items()}
    for request in crowd:
        engine, run = make_engine(base, store)
        assert speak(engine, run, [request]).tokens[request.id] == together[request.id]


def test_more_adapters_than_pages_all_speak(tiny, tmp_path):
    """64 lines of 8 adapters through 5 pages, the rank-64 ones four pages each: the same words as with room."""
    base, store = tiny
    engine, run = make_engine(base, store, EngineConfig(kv_tokens=2048))
    requests = [greedy(n + 1, range(3, 12), f"a{n}", max_tokens=8) for n in range(NUM_ADAPTERS)]
    roomy = {n: list(tokens) for n, tokens in speak(engine, run, requests).tokens.items()}
    tight = make_store(base.decoder, max_pages=5)
    for number in range(NUM_ADAPTERS):
        tight.add(f"a{number}", [(tmp_path / f"a{number}", 1.0)])
    engine, run = make_engine(base, tight, EngineConfig(kv_tokens=2048))
    crowded = [
        greedy(100 * (n + 1) + k, range(3, 12), f"a{n}", max_tokens=8) for k in range(8) for n in range(NUM_ADAPTERS)
    ]
    speak(engine, run, crowded)
    for request in crowded:
        assert run.tokens[request.id] == roomy[request.id // 100]
