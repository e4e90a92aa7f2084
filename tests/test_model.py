"""The decoder computes what transformers computes, for every supported family, prefill and decode alike."""

import pytest
import torch
from driving import make_store
from npc_kernels import cpu, cpu_exact, gpu, reference
from tiny import CONFIGS, make_model
from transformers import AutoConfig

from npc_runtime.engine.core import EngineConfig, Request, SamplingParams, Sequence
from npc_runtime.engine.model import Decoder, ModelShape
from npc_runtime.engine.runner import Runner
from npc_runtime.engine.scheduler import PlannedRow
from npc_runtime.engine.weights import iterate_weights
from npc_runtime.errors import StartupError

CPU = torch.device("cpu")
CONFIG = EngineConfig(block_size=4, kv_tokens=512)


def load(folder, kernels=reference):
    tensors = iterate_weights(folder, dtype=torch.float32, device=CPU, on_progress=lambda fraction: None)
    return Decoder(AutoConfig.from_pretrained(folder), tensors, kernels)


def make_runner(decoder):
    return Runner(decoder, make_store(decoder), CONFIG)


def make_sequence(tokens, first_block):
    sampling = SamplingParams(seed=0, max_tokens=8)
    sequence = Sequence(Request(id=first_block, prompt_ids=tuple(tokens), sampling=sampling, arrival=0.0))
    sequence.blocks = list(range(first_block, first_block + 20))
    return sequence


@pytest.mark.parametrize("kernels", [reference, cpu, cpu_exact, gpu])
@pytest.mark.parametrize("family", CONFIGS)
def test_logits_equal_transformers(family, kernels, tmp_path):
    """Three prompts of different lengths; chunked prefill, then decode mixed with another row's prefill."""
    oracle = make_model(family, tmp_path)
    runner = make_runner(load(tmp_path, kernels))
    prompts = [torch.randint(3, 97, (length,)).tolist() for length in (23, 9, 14)]
    rows = [make_sequence(prompt, 20 * number) for number, prompt in enumerate(prompts)]
    first, second, third = rows
    runner.forward([PlannedRow(first, 0, 10), PlannedRow(second, 0, 9)])
    got = runner.forward([PlannedRow(first, 10, 23), PlannedRow(third, 0, 14)])
    second.output_ids.append(50)
    decoded = runner.forward([PlannedRow(second, 9, 10)])
    expected = [oracle(torch.tensor([prompt])).logits[0, -1] for prompt in (prompts[0], prompts[2], [*prompts[1], 50])]
    torch.testing.assert_close(torch.cat([got, decoded]), torch.stack(expected), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("kernels", [reference, cpu, cpu_exact, gpu])
def test_slots_that_were_never_written_are_never_read(kernels, tmp_path):
    """A cache full of another line's NaN: a short row beside a long one, prefill and decode."""
    oracle = make_model("llama", tmp_path)
    runner = make_runner(load(tmp_path, kernels))
    runner._kv.keys.fill_(torch.nan)
    runner._kv.values.fill_(torch.nan)
    prompts = [list(range(3, 26)), list(range(40, 45))]
    rows = [make_sequence(prompt, 20 * number) for number, prompt in enumerate(prompts)]
    runner.forward([PlannedRow(row, 0, row.num_tokens) for row in rows])
    for row in rows:
        row.output_ids.append(50)
    got = runner.forward([PlannedRow(row, row.num_tokens - 1, row.num_tokens) for row in rows])
    expected = [oracle(torch.tensor([[*prompt, 50]])).logits[0, -1] for prompt in prompts]
    torch.testing.assert_close(got, torch.stack(expected), atol=2e-4, rtol=1e-4)


def test_a_sliding_window_bounds_the_context(tmp_path):
    make_model("mistral", tmp_path)
    assert ModelShape.from_config(AutoConfig.from_pretrained(tmp_path)).context == 64


def test_a_length_dependent_rope_is_refused_by_name(tmp_path):
    make_model("llama", tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    tensors = iterate_weights(tmp_path, dtype=torch.float32, device=CPU, on_progress=lambda fraction: None)
    with pytest.raises(StartupError, match="RoPE of type dynamic"):
        Decoder(config, tensors, reference)


def test_a_missing_tensor_is_named(tmp_path):
    make_model("llama", tmp_path)
    tensors = iterate_weights(tmp_path, dtype=torch.float32, device=CPU, on_progress=lambda fraction: None)
    kept = [(name, tensor) for name, tensor in tensors if "layers.1.mlp.up_proj" not in name]
    with pytest.raises(StartupError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        Decoder(AutoConfig.from_pretrained(tmp_path), kept, reference)
