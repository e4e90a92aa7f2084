"""A device that computes nothing: it notes launches and copies, and whoever waits for it gets an error.

Torch's meta device has no numbers, so `item`, `tolist` and everything else that must wait for one fail on it; Triton's
launches are noted instead of run. What Triton would compile depends on where tensors lie; there main memory stands in.
"""

import random
import threading
from collections import Counter

import pytest
import torch
from driving import FakeTokenizer, greedy, hold, make_store
from fake_cuda import LOWEST, FakeCuda
from npc_kernels import gpu, gpu_plan
from tiny import CONFIGS, SIZES, make_adapter, make_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.interpreter import GridExecutor, InterpretedFunction
from triton.runtime.jit import JITFunction, create_function_from_signature

import npc_runtime.engine.engine as engine_module
from npc_runtime.engine import sampler
from npc_runtime.engine.core import Ended, EngineConfig, Sequence
from npc_runtime.engine.device import make_stream
from npc_runtime.engine.engine import Engine
from npc_runtime.engine.model import Decoder
from npc_runtime.engine.runner import Runner
from npc_runtime.engine.sampler import sample
from npc_runtime.engine.scheduler import PlannedRow
from npc_runtime.engine.weights import iterate_weights

FAKE = torch.device("meta")
NUM_LAYERS = 3
CONTEXT = 3_000
RANKS = {"one": 16, "two": 24}


class Copies(TorchDispatchMode):
    """Notes from where to where numbers are copied, and how: what is pinned here is so by its word only."""

    def __init__(self, find_stream=lambda: None):
        super().__init__()
        self.pinned = {}  # storages by address, kept so that none is another's later
        self.find_stream = find_stream
        self.clear()

    def clear(self):
        self.streams = set()  # on which there were copies and launches
        self.seen = []
        self.waits = []  # copies that the host would wait for
        self.launched = []  # torch's own kernels on the device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        is_pinned = kwargs.pop("pin_memory", False)
        result = func(*args, **kwargs)
        if is_pinned:
            self.pinned[result.untyped_storage().data_ptr()] = result.untyped_storage()
        sources = [arg for arg in args if isinstance(arg, torch.Tensor)]
        for made in [result] if isinstance(result, torch.Tensor) else []:
            name = func.overloadpacket.__name__
            crossed = [s for s in sources if s.device != made.device]
            self.seen += [(s.device.type, made.device.type) for s in crossed]
            is_free = kwargs.get("non_blocking") or (name == "copy_" and args[2:] == (True,))
            self.waits += [func for s in crossed if not is_free or s.untyped_storage().data_ptr() not in self.pinned]
            is_view = not name.endswith("_") and made.untyped_storage()._cdata in (
                s.untyped_storage()._cdata for s in sources
            )
            if made.device == FAKE and not crossed and not is_view and not name.startswith("empty"):
                self.launched.append(name)
            self.streams |= {self.find_stream()} if made.device == FAKE and not is_view else set()
        return result


def make_config():
    """Four query heads a key head: the attention's tiles of prompts are wider than those of decode."""
    return LlamaConfig(
        **{**SIZES, "num_key_value_heads": 1, "max_position_embeddings": CONTEXT}, tie_word_embeddings=True
    )


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels that were launched."""
    seen = []
    monkeypatch.setattr(GridExecutor, "__call__", lambda self, *args, **kwargs: seen.append(self.fn.__name__))
    return seen


@pytest.fixture
def copies(monkeypatch):
    """What is copied to the device, as it is to a GPU: from pinned memory."""
    for module in (gpu_plan, sampler):
        monkeypatch.setattr(module, "copies_from_pinned", lambda device: device == FAKE)
    with Copies() as noted:
        yield noted


@pytest.fixture
def compiled(monkeypatch):
    """What Triton would compile for the launches: its own keys of them, for a GPU. Nothing is computed."""
    seen, binders, backend = set(), {}, make_backend(GPUTarget("cuda", 86, 32))

    def note(self, *args, grid, warmup, **options):
        if self not in binders:
            function = JITFunction(self.fn, **self.kwargs)
            binders[self] = create_function_from_signature(function.signature, function.params, backend)
        _, key, options = binders[self](*args, **options)
        seen.add((self.__name__, str(key), str(options)))

    monkeypatch.setattr(InterpretedFunction, "run", note)
    return seen


def make_filled_store(folder, decoder):
    store = make_store(decoder)
    for name in RANKS:
        store.add(name, [(folder / name, 1.0)])
    return store


class Game:
    """A runner on the fake device and lines that have read their prompts."""

    def __init__(self, folder, lengths, adapters, device=FAKE):
        config = make_config()
        tensors = iterate_weights(
            folder / "model", dtype=torch.bfloat16, device=device, on_progress=lambda fraction: None
        )
        decoder = Decoder(config, tensors, gpu)
        self.store = make_filled_store(folder, decoder)
        self.store.open()
        self.runner = Runner(decoder, self.store, EngineConfig(kv_tokens=4096))
        self.lines = []
        for number, (length, name) in enumerate(zip(lengths, adapters, strict=True)):
            line = Sequence(greedy(number, [3] * length, name, min_tokens=0))
            line.blocks = list(range(32 * number, 32 * (number + 1)))
            self.lines.append(line)
            if name is not None:
                hold(self.store, name)
        self.runner.forward([PlannedRow(line, 0, line.num_tokens) for line in self.lines])

    def speak(self, num_rows):
        lines = self.lines[:num_rows]
        for line in lines:
            line.output_ids.append(5)
        logits = self.runner.forward([PlannedRow(line, line.num_tokens - 1, line.num_tokens) for line in lines])
        assert (logits.device, logits.shape) == (FAKE, (num_rows, 97))
        sample(logits, lines, frozenset({2}), self.draw)

    def random_row(self, chance, *, speaks):
        """A row of any length and adapter; where its keys are does not matter here."""
        stop = chance.choice([chance.randint(2, 600), chance.randint(2, CONTEXT)])
        length = 1 if speaks else chance.randint(1, min(stop, chance.choice([40, 512])))
        is_cut = not speaks and chance.random() < 0.5
        line = Sequence(greedy(0, [3] * (stop - speaks + is_cut), chance.choice([*RANKS, None])), blocks=[7] * 200)
        line.output_ids += [5] * speaks
        return PlannedRow(line, stop - length, stop)

    def draw(self, logits, settings):
        """The kernel, and tokens as if they were read: the one thing a step waits for."""
        self.runner.draw(logits, settings)
        return torch.zeros(len(logits), dtype=torch.long)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fake")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONFIGS, "llama", make_config)
        model = make_model("llama", folder / "model")
    for seed, (name, rank) in enumerate(RANKS.items()):
        make_adapter(model, folder / name, rank=rank, seed=seed)
    return folder


@pytest.mark.parametrize(
    ("lengths", "adapters", "a_layer"),
    [
        ((5, 9, 30), ("one", "two", None), 9),
        ((5, 9, 30), (None, None, None), 9),
        ((5, 9, 300), ("one", "two", None), 10),
    ],
    ids=["adapters", "base only", "long"],
)
def test_a_step_is_nine_launches_a_layer_and_two_copies(folder, launches, copies, lengths, adapters, a_layer):
    """Metadata and how to sample; recorded for the first time, and refilled. A wait would raise."""
    game = Game(folder, lengths, adapters)
    for _ in range(2):
        launches.clear()
        copies.clear()
        game.speak(3)
        assert copies.seen == [("cpu", "meta")] * 2
        assert copies.waits == []
        assert copies.launched == ["embedding", "to", "stack"], "tokens, as float32; how to sample, row by row"
        assert Counter(launches).total() == NUM_LAYERS * a_layer + 3
        assert Counter(launches)["_project_kernel"] == 4 * NUM_LAYERS
        assert [launches[0], *launches[-2:]] == ["_begin_kernel", "_head_kernel", "_draw_kernel"]


def test_penalties_and_shortest_lengths_do_not_wait_either(folder, launches, copies):
    game = Game(folder, (5, 9), ("one", None))
    sampling = dict(repetition_penalty=1.2, min_tokens=9)
    game.lines = [
        Sequence(greedy(n, [3] * 5, line.request.adapter, **sampling), blocks=line.blocks)
        for n, line in enumerate(game.lines)
    ]
    copies.clear()
    game.speak(2)
    assert copies.seen == [("cpu", "meta")] * 2, "metadata, and how to sample"
    assert copies.waits == []
    assert len(copies.launched) == 3 + 10 + 1, "besides what every step has: penalties, and ends that come too early"


def test_a_rehearsal_leaves_nothing_to_compile_or_record(folder, launches):
    """Every number of rows, with the adapters that there are and without, in the first chunk and behind it."""
    game = Game(folder, (5,), (None,))
    fractions = []
    game.runner.warm(fractions.append)
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    rooms = set(game.runner._recordings)
    buckets = {1, 2, 4, 8, 12, 16, 24, 32, 48, 64}
    assert rooms == {(rows, pages, planes) for rows in buckets for pages in (0, 1, 4) for planes in (1, 2, 4, 8)}


def test_no_step_compiles_anything_after_the_rehearsal(folder, compiled):
    """Prompts and their chunks, lines that speak, both, up to the context, any adapters: random, and no news."""
    game = Game(folder, (5, 5), tuple(RANKS), torch.device("cpu"))
    compiled.clear()
    game.runner.warm(lambda fraction: None)
    for recording in game.runner._recordings.values():
        recording.replay()  # as `Plan.record` does on a GPU
    known, rooms = set(compiled), set(game.runner._recordings)
    chance = random.Random(0)
    for _ in range(400):
        rows = [game.random_row(chance, speaks=True) for _ in range(chance.choice([0, 0, 1, 3, 7, 20, 64]))]
        rows += [game.random_row(chance, speaks=False) for _ in range(chance.choice([0, 1, 1, 2, 5]) if rows else 1)]
        logits = game.runner.forward(rows)
        sample(logits, [row.sequence for row in rows if row.samples], frozenset({2}), game.draw)
        assert compiled == known, Counter(name for name, *_ in compiled - known)
    assert set(game.runner._recordings) == rooms
    assert Counter(name for name, *_ in known) == {
        "_begin_kernel": 1,
        "_project_kernel": 4 * 3 * 3,  # linears, numbers of tokens, classes of pages
        "_qkv_kernel": 3,
        "_attend_kernel": 2 * 2,  # widths of a tile, with and without several planes
        "_combine_kernel": 1,
        "_residual_kernel": 2 * 3,
        "_gate_up_kernel": 3,
        "_head_kernel": 3,
        "_draw_kernel": 1,
    }


def test_all_that_an_engine_asks_for_is_on_one_stream_of_the_lowest_priority(folder, monkeypatch):
    """Pools, the rehearsal, and what its thread does: launches, copies, and the events that loads wait for."""
    cuda = FakeCuda(monkeypatch)
    monkeypatch.setattr(engine_module, "make_stream", lambda device: make_stream(torch.device("cuda:0")))
    launched = []
    monkeypatch.setattr(GridExecutor, "__call__", lambda self, *args, **kwargs: launched.append(cuda.current))
    copies = Copies(lambda: cuda.current)
    game = Game(folder, (5,), (None,))
    decoder, ends, is_over = game.runner._decoder, [], threading.Event()
    launched.clear()

    def note_end(step):
        ends.extend(event for event in step.events if isinstance(event, Ended))
        if len(ends) == 3:
            is_over.set()

    with copies:
        store = make_filled_store(folder, decoder)
        engine = Engine(decoder, FakeTokenizer(), store, EngineConfig(kv_tokens=2048), on_step=note_end)
        engine.warm(lambda fraction: None)
    (stream,) = cuda.made
    assert (stream.priority, cuda.waits) == (LOWEST, [(stream, cuda.default)])
    assert copies.streams == set(launched) == {stream}
    assert cuda.current is cuda.default, "of other threads' work nothing is changed"
    copies.clear()
    launched.clear()
    run_rows = engine._run_rows

    def run_noted(rows, events):
        with copies:  # a mode is a thread's own
            run_rows(rows, events)

    monkeypatch.setattr(engine, "_run_rows", run_noted)
    monkeypatch.setattr(engine._runner, "draw", game.draw)
    engine.start()
    engine.submit([greedy(number, [3] * 9, name, max_tokens=3) for number, name in enumerate(["one", "two", None])])
    assert is_over.wait(30)
    engine.close(30)
    assert launched
    assert copies.seen
    assert copies.streams == set(launched) == {stream}


def test_waiting_for_the_device_fails(folder, launches):
    """So that the tests above can."""
    game = Game(folder, (5,), (None,))
    game.draw = game.runner.draw
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        game.speak(1)
