"""Steps that are recorded and run again compute, bit by bit, what they compute call by call."""

import copy
import json
import types
from functools import partial

import pytest
import torch
from driving import greedy, hold, make_store
from npc_kernels import cpu, gpu, openmp
from npc_kernels.batch import LoraBatch
from safetensors.torch import save_file
from test_model import load
from tiny import make_adapter, make_model

import npc_runtime.engine.runner as runner_module
from npc_runtime.engine.core import EngineConfig, Sequence
from npc_runtime.engine.rehearsal import rehearse_decode, rehearse_prefill
from npc_runtime.engine.runner import Runner
from npc_runtime.engine.scheduler import PlannedRow
from npc_runtime.engine.weights import dense_weights
from npc_runtime.persona import Library, shipped_personas

RANKS = {"a": 8, "b": 16, "c": 24, "d": 64}


class Pair:
    """Two runners over the same KV cache: one that records, and one that never does."""

    def __init__(self, decoder, store, config):
        self.recording = Runner(decoder, store, config)
        plain = copy.copy(decoder)
        plain.kernels = types.SimpleNamespace(**{**vars(decoder.kernels), "room": lambda batch: None})
        self.plain = Runner(plain, store, config)
        self.plain._kv = self.recording._kv
        self.vocab = decoder.shape.vocab
        self.results = set()  # addresses

    def prefill(self, sequences):
        self.recording.forward([PlannedRow(s, 0, s.num_tokens) for s in sequences])

    def speak(self, sequences):
        """One token of each."""
        for sequence in sequences:
            sequence.output_ids.append((7 * sequence.num_tokens + sequence.request.id) % self.vocab)
        rows = [PlannedRow(s, s.num_tokens - 1, s.num_tokens) for s in sequences]
        expected = self.plain.forward(rows).clone()
        result = self.recording.forward(rows)
        assert torch.equal(result, expected)
        self.results.add(result.untyped_storage().data_ptr())

    @property
    def num_recorded(self):
        return sum(found.replay is not None for found in self.recording._recordings.values())


def make_sequences(adapters, lengths, store, num_blocks):
    sequences = []
    for number, (name, length) in enumerate(zip(adapters, lengths, strict=True)):
        sequence = Sequence(greedy(number, [3 + (5 * number + position) % 90 for position in range(length)], name))
        sequence.blocks = list(range(num_blocks * number, num_blocks * (number + 1)))
        sequences.append(sequence)
        if name is not None:
            hold(store, name)
    return sequences


@pytest.fixture(scope="module")
def embedded(float_base):
    """The embedded base, all of whose linears have codes; and three shipped adapters."""
    store = make_store(float_base.decoder)
    for persona in Library.load(shipped_personas()):
        if persona.adapter:
            store.add(persona.id, [(persona.folder / persona.adapter[0].path, 1.0)])
    store.open()
    return float_base.decoder, store


def test_a_tape_is_the_step(embedded, monkeypatch):
    """Few lines on a CPU: adapters change, rows come and go, and a line grows out of its first room."""
    monkeypatch.setattr(cpu, "SEEN_STEP", 256)
    decoder, store = embedded
    pair = Pair(decoder, store, EngineConfig(kv_tokens=2048))
    names = [*store.resident[:3], None]
    first, second, third, plain = sequences = make_sequences(names, (20, 254, 8, 30), store, 20)
    pair.prefill(sequences)
    for rows in ([first], *[[second]] * 3, [first, plain], [third, first], [plain], sequences, [first]):
        pair.speak(rows)
    assert pair.num_recorded == len(pair.recording._recordings) == 6


def write_dora(folder):
    """A DoRA of two linears of the embedded base."""
    folder.mkdir()
    front, tensors = "base_model.model.model.layers.", {}
    for module, out_features, in_features in (("0.self_attn.q_proj", 576, 576), ("7.mlp.up_proj", 1536, 576)):
        tensors[f"{front}{module}.lora_A.weight"] = torch.randn(8, in_features) / 20
        tensors[f"{front}{module}.lora_B.weight"] = torch.randn(out_features, 8) / 20
        tensors[f"{front}{module}.lora_magnitude_vector"] = torch.rand(out_features) + 1
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "use_dora": True, "target_modules": ["q_proj", "up_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_a_tape_follows_the_factors(float_base, tmp_path):
    """Of a DoRA, whose row and a LoRA's take turns in one recording."""
    store = make_store(float_base.decoder, base=partial(dense_weights, float_base.info.folder))
    store.add("dora", [(write_dora(tmp_path / "dora"), 1.0)])
    store.add("odo", [(shipped_personas() / "odo" / "adapter", 1.0)])
    store.open()
    pair = Pair(float_base.decoder, store, EngineConfig(kv_tokens=2048))
    dora, lora, plain = sequences = make_sequences(["dora", "odo", None], (5, 7, 6), store, 20)
    pair.prefill(sequences)
    for rows in ([dora], [lora], [dora], [plain], [lora]):
        pair.speak(rows)
    assert pair.num_recorded == 2


def test_rehearsed_steps_have_the_factors():
    """A step that is recorded without them would never have them."""
    adapters = LoraBatch(torch.zeros(4, 8), (), torch.ones(4, 9))
    steps = [*rehearse_decode(2, 512, [1, 4], adapters, 16), *rehearse_prefill(512, 512, [1], adapters, 16)]
    with_adapters = [step.lora for step in steps if step.lora is not None]
    assert len(with_adapters) == 12
    assert all(lora.multipliers is adapters.multipliers for lora in with_adapters)


def test_one_thread_plays_where_openmp_is_another(embedded, monkeypatch):
    monkeypatch.setattr(openmp, "_loaded_libraries", list)
    openmp._fork.cache_clear()
    try:
        assert openmp.fork_address() == 0
        pair = Pair(*embedded, EngineConfig(kv_tokens=512))
        sequences = make_sequences([None], [5], embedded[1], 20)
        pair.prefill(sequences)
        pair.speak(sequences)
        assert pair.num_recorded == 1
    finally:
        openmp._fork.cache_clear()


def test_a_step_that_torch_multiplies_is_tried_once(tmp_path):
    """A base without codes."""
    make_model("llama", tmp_path)
    decoder = load(tmp_path, cpu)
    store = make_store(decoder)
    store.open()
    pair = Pair(decoder, store, EngineConfig(block_size=16, kv_tokens=512))
    sequences = make_sequences([None], [5], store, 20)
    pair.prefill(sequences)
    pair.speak(sequences)
    assert (len(pair.recording._recordings), pair.num_recorded) == (1, 0)


def test_a_graph_has_room_for_every_step_of_its_kind(tmp_path):
    """The GPU's kernels in the interpreter: rows that are left over, more segments than when it was recorded."""
    model = make_model("qwen3", tmp_path / "model")
    decoder = load(tmp_path / "model", gpu)
    store = make_store(decoder)
    for seed, (name, rank) in enumerate(RANKS.items()):
        store.add(name, [(make_adapter(model, tmp_path / name, rank=rank, seed=seed, std=0.2), 1.0)])
    store.open()
    pair = Pair(decoder, store, EngineConfig(block_size=16, kv_tokens=2048))
    names = ["b", "b", "b", "a", "c", "d", None]
    one, two, three, other, wide, widest, plain = make_sequences(names, (3, 5, 2, 4, 3, 2, 3), store, 8)
    pair.prefill([one, two, three, other, wide, widest, plain])
    pair.speak([one, two, three])  # one segment, a bucket of four rows
    with torch.inference_mode():
        store.pool[store.pages_of("b")[0]].mul_(2)  # pages are read where they lie
    pair.speak([one, other, plain, two])  # three segments
    pair.speak([plain])
    pair.speak([widest, wide, other, plain])
    assert set(pair.recording._recordings) == {(4, 1, 1), (1, 0, 1), (4, 4, 1)}
    assert len(pair.results) == 1, "none keeps logits of its own"


def test_recordings_are_kept_within_bounds(embedded, monkeypatch):
    monkeypatch.setattr(runner_module, "MAX_RECORDINGS", 2)
    decoder, store = embedded
    pair = Pair(decoder, store, EngineConfig(kv_tokens=512))
    sequences = make_sequences([None] * 3, (5, 6, 7), store, 2)
    pair.prefill(sequences)
    for count in (1, 2, 1, 3, 1):
        pair.speak(sequences[:count])
    assert [found.num_rows for found in pair.recording._recordings] == [3, 1], "the least recently used one went"
