"""Merged models: what base and adapter say together, in a folder like any other."""

import copy
import json

import pytest
import torch
from peft import PeftModel
from tiny import make_adapter, make_model, rewrite
from transformers import AutoModelForCausalLM

from npc_runtime.adapter_import import Base
from npc_runtime.engine.merged import write_merged
from npc_runtime.engine.peft_folder import read_peft_folder
from npc_runtime.errors import AdapterIncompatible, InvalidError, StartupError

PROMPT = torch.tensor([[3, 14, 15, 92, 65, 35]])
KINDS = {
    "LoRA": {},
    "DoRA": {"use_dora": True, "use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 20}, "alpha_pattern": {"q_proj": 3}, "layers_to_transform": [0, 2]},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model("llama-untied-bias", tmp_path_factory.mktemp("model"))


@pytest.fixture
def base(model, tmp_path):
    folder = tmp_path / "base"
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text('{"a": 1}')
    return Base.of("tiny", folder)


def adapter_of(model, folder, base, *, scale=1.0, **options):
    make_adapter(copy.deepcopy(model), folder, std=0.2, **options)
    rewrite(folder, lambda tensors: [tensor.mul_(1.3) for name, tensor in tensors.items() if "magnitude" in name])
    return read_peft_folder(folder, base.shape, scale=scale)


def merge(base, adapters, out, **options):
    steps = []
    result = write_merged(base.info, adapters, out, on_progress=steps.append, **options)
    assert steps[-1] == 1.0
    return result


@torch.no_grad()
def logits(model):
    return model.eval()(PROMPT).logits.float()


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_says_what_base_and_adapter_say(kind, model, base, tmp_path):
    adapter = adapter_of(model, tmp_path / "adapter", base, **KINDS[kind])
    result = merge(base, [adapter], tmp_path / "out")
    assert result.num_merged == len(adapter.pairs)
    expected = logits(PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "adapter")))
    got = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32))
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)
    assert (got - logits(model)).abs().max() > 0.1
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"a": 1}'
    assert result.num_bytes > 100_000


def test_several_adapters_are_added_up(model, base, tmp_path):
    adapters = [
        adapter_of(model, tmp_path / "a", base, seed=1, scale=0.5),
        adapter_of(model, tmp_path / "b", base, seed=2, target_modules=["q_proj"]),
    ]
    merge(base, adapters, tmp_path / "out")
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    name = "model.layers.1.self_attn.q_proj"
    expected = model.state_dict()[f"{name}.weight"] + sum(adapter.pairs[name].change for adapter in adapters)
    torch.testing.assert_close(got[f"{name}.weight"], expected)


def test_weights_are_stored_as_the_base_is_or_as_asked(model, base, tmp_path):
    adapter = adapter_of(model, tmp_path / "adapter", base)
    half = copy.deepcopy(model).to(torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    narrow = Base.of("half", tmp_path / "half")
    for number, (dtype, kind) in enumerate([("base", "bfloat16"), ("float32", "float32")]):
        out = tmp_path / str(number)
        merge(narrow, [adapter], out, dtype=dtype)
        found = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
        assert str(found.dtype) == f"torch.{kind}"
        assert json.loads((out / "config.json").read_text())["dtype"] == kind


def test_what_cannot_be_merged_is_refused(model, base, tmp_path):
    plain = adapter_of(model, tmp_path / "plain", base)
    dora = adapter_of(model, tmp_path / "dora", base, use_dora=True)
    with pytest.raises(AdapterIncompatible, match="DoRA"):
        merge(base, [plain, dora], tmp_path / "out")
    with pytest.raises(InvalidError, match="exists"):
        merge(base, [plain], tmp_path / "plain")
    config = json.loads((base.info.folder / "config.json").read_text())
    quantized = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (base.info.folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantized}))
    with pytest.raises(StartupError, match=r"quantized \(gptq\)"):
        merge(base, [plain], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_infinite_weights_are_refused_and_nothing_is_left(model, base, tmp_path):
    adapter = adapter_of(model, tmp_path / "adapter", base, scale=1e39)
    with pytest.raises(AdapterIncompatible, match="infinite"):
        merge(base, [adapter], tmp_path / "out" / "merged")
    assert list((tmp_path / "out").iterdir()) == []
