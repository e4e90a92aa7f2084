"""GPTQ and AWQ folders, packed here word by word as their formats say, give the weights that they stand for."""

import json
import logging
import shutil

import pytest
import torch
from npc_kernels import gpu, reference
from npc_kernels.quant import Int4Weight, dequantize
from safetensors.torch import load_file, save_file
from test_model import CPU, make_runner, make_sequence
from tiny import make_model
from transformers import AutoConfig

from npc_runtime.engine.checkpoints import read_scheme
from npc_runtime.engine.model import Decoder
from npc_runtime.engine.scheduler import PlannedRow
from npc_runtime.engine.weights import iterate_weights, read_config
from npc_runtime.errors import StartupError

STEM = "model.layers.1.mlp.up_proj"
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word belongs to output AWQ_ORDER[i] of its eight


def pack(numbers, order=range(8), less=0):
    """Rows of numbers of 4 bits to rows of int32 words, eight in each, the first in the lowest bits."""
    rows = []
    for row in numbers.tolist():
        words = [
            sum(row[at + place] << 4 * nibble for nibble, place in enumerate(order)) for at in range(0, len(row), 8)
        ]
        wrapped = [(word - less) % 2**32 for word in words]
        rows.append([word - 2**32 if word >= 2**31 else word for word in wrapped])
    return torch.tensor(rows, dtype=torch.int32)


class Linear:
    """Random codes, zeros and scales of a linear, and what they stand for."""

    def __init__(self, out_features, in_features, group, *, symmetric=False, reordered=False):
        num_groups = -(-in_features // group)
        self.codes = torch.randint(16, (in_features, out_features))
        self.zeros = torch.randint(1, 16, (num_groups, out_features))
        if symmetric:
            self.zeros = torch.full_like(self.zeros, 8)
        self.scales = (torch.rand(num_groups, out_features) / 40 + 0.005).half()
        self.groups = torch.arange(in_features) // group
        if reordered:
            self.groups = self.groups[torch.randperm(in_features)]

    @property
    def dense(self):
        return ((self.codes - self.zeros[self.groups]) * self.scales[self.groups].float()).T.contiguous()

    def gptq(self, stem, form="gptq"):
        return {
            f"{stem}.qweight": pack(self.codes.T).T.contiguous(),
            f"{stem}.qzeros": pack(self.zeros, less=0x11111111 if form == "gptq" else 0),
            f"{stem}.scales": self.scales,
            f"{stem}.g_idx": self.groups.to(torch.int32),
        }

    def awq(self, stem):
        return {
            f"{stem}.qweight": pack(self.codes, AWQ_ORDER),
            f"{stem}.qzeros": pack(self.zeros, AWQ_ORDER),
            f"{stem}.scales": self.scales,
        }


def write(folder, tensors, **quantization):
    folder.mkdir(exist_ok=True)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def gptq(group=32, **fields):
    return {"quant_method": "gptq", "bits": 4, "group_size": group, "sym": False, "desc_act": False, **fields}


def awq(group=32, **fields):
    return {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm", **fields}


def read(folder, **options):
    options = {"dtype": torch.float32, "device": CPU, "on_progress": lambda fraction: None, **options}
    return dict(iterate_weights(folder, **options))


def read_one(folder):
    (found,) = read(folder, keeps_codes=True).items()
    return found


@pytest.mark.parametrize("in_features", [256, 72])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq(symmetric, form, group, in_features, tmp_path):
    torch.manual_seed(0)
    linear = Linear(24, in_features, group, symmetric=symmetric)
    if not symmetric:
        linear.zeros[0, :3] = torch.tensor([0, 15, 0])  # stored less one, a zero borrows from its neighbour
    folder = write(tmp_path / "base", linear.gptq(STEM, form), **gptq(group, checkpoint_format=form, sym=symmetric))
    name, weight = read_one(folder)
    assert name == f"{STEM}.weight"
    assert isinstance(weight, Int4Weight)
    assert (weight.zeros is None) == symmetric
    assert torch.equal(dequantize(weight), linear.dense)
    assert torch.equal(read(folder)[name], linear.dense), "and without codes"


@pytest.mark.parametrize("in_features", [256, 72])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_awq(group, in_features, tmp_path):
    torch.manual_seed(0)
    linear = Linear(24, in_features, group)
    _, weight = read_one(write(tmp_path / "base", linear.awq(STEM), **awq(group)))
    assert isinstance(weight, Int4Weight)
    assert torch.equal(dequantize(weight), linear.dense)


def test_a_symmetric_checkpoint_that_names_the_wrong_format(tmp_path):
    """Says gptq and holds the zeros of gptq_v2 (vllm#38966): symmetric means 8."""
    torch.manual_seed(0)
    linear = Linear(16, 64, 32, symmetric=True)
    folder = write(tmp_path / "base", linear.gptq(STEM, "gptq_v2"), **gptq(sym=True))
    assert torch.equal(dequantize(read_one(folder)[1]), linear.dense)


def test_reordered_inputs_become_dense(tmp_path, caplog):
    torch.manual_seed(0)
    linear, plain = Linear(16, 96, 32, reordered=True), Linear(16, 96, 32)
    tensors = {**linear.gptq("a.q_proj"), **plain.gptq("a.k_proj")}
    folder = write(tmp_path / "base", tensors, **gptq(desc_act=True))
    with caplog.at_level(logging.INFO):
        found = read(folder, keeps_codes=True)
    assert torch.equal(found["a.q_proj.weight"], linear.dense)
    assert torch.equal(dequantize(found["a.k_proj.weight"]), plain.dense)
    assert "1 linears of this GPTQ checkpoint have their inputs out of order" in caplog.text


@pytest.mark.parametrize("groups", [None, 0])
def test_groups_that_are_not_named_are_in_order(groups, tmp_path):
    torch.manual_seed(0)
    linear = Linear(16, 96, 32)
    tensors = linear.gptq(STEM)
    if groups is None:
        del tensors[f"{STEM}.g_idx"]
    else:
        tensors[f"{STEM}.g_idx"].zero_()
    assert torch.equal(dequantize(read_one(write(tmp_path / "base", tensors, **gptq()))[1]), linear.dense)


def test_a_file_of_its_own_tells_how_older_checkpoints_are_quantized(tmp_path):
    torch.manual_seed(0)
    linear = Linear(16, 64, 32)
    for method, tensors, name, fields in (
        ("gptq", linear.gptq(STEM), "quantize_config.json", {"bits": 4, "group_size": 32, "sym": False}),
        ("awq", linear.awq(STEM), "quant_config.json", {"w_bit": 4, "q_group_size": 32, "version": "GEMM"}),
    ):
        folder = write(tmp_path / method, tensors)
        (folder / name).write_text(json.dumps(fields))
        assert read_scheme(folder).method == method
        assert torch.equal(dequantize(read_one(folder)[1]), linear.dense)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"quant_method": "fp8"}, "quantized with fp8"),
        ({"bits": 4}, "quantized with an unnamed method"),
        (gptq(bits=8), "8 bits"),
        (gptq(-1), "groups of -1"),
        (gptq(checkpoint_format="marlin"), "format marlin"),
        (gptq(dynamic={"+:.*down.*": {"bits": 8}}), "dynamic"),
        (awq(version="gemv"), "version gemv"),
        (awq(bits=3), "3 bits"),
        (awq(zero_point=False), "without zero points"),
        ({"quant_method": "npc-runtime", "format": 99}, "another version"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(fields, problem, tmp_path):
    folder = write(tmp_path / "base", {}, **fields)
    with pytest.raises(StartupError, match=problem) as refusal:
        read_config(folder)
    assert str(folder) in str(refusal.value)
    assert refusal.value.hint


def test_layers_that_were_left_out_of_the_quantization_are_no_other_settings(tmp_path):
    assert read_scheme(write(tmp_path / "base", {}, **gptq(dynamic={"-:.*lm_head.*": {}}))).group == 32


@pytest.mark.parametrize("form", ["gptq", "awq"])
def test_parts_that_are_missing_or_do_not_fit_are_named(form, tmp_path):
    linear = Linear(16, 128, 32)
    make, settings = (linear.gptq, gptq) if form == "gptq" else (linear.awq, awq)
    for end in ("qzeros", "scales"):
        tensors = make(STEM)
        del tensors[f"{STEM}.{end}"]
        with pytest.raises(StartupError, match=f"has no tensor {STEM}.{end}"):
            read_one(write(tmp_path / "base", tensors, **settings()))
    with pytest.raises(StartupError, match=f"parts of {STEM} do not fit"):
        read_one(write(tmp_path / "base", make(STEM), **settings(64)))
    with pytest.raises(StartupError, match=f"parts of {STEM} do not fit"):
        read_one(write(tmp_path / "base", {**make(STEM), f"{STEM}.scales": torch.ones(4, 8)}, **settings()))


# -- whole models ----------------------------------------------------------------------------------------------


def make_pair(family, folder, form):
    """A tiny model whose linears are quantized, and beside it the dense model that it stands for."""
    make_model(family, folder / "dense")
    shutil.copytree(folder / "dense", folder / form)
    dense, packed = load_file(folder / "dense" / "model.safetensors"), {}
    for name in list(dense):
        if name.endswith("_proj.weight"):
            linear = Linear(*dense[name].shape, 32)
            packed |= (linear.awq if form == "awq" else linear.gptq)(name.removesuffix(".weight"))
            dense[name] = linear.dense
        else:
            packed[name] = dense[name]
    save_file(dense, folder / "dense" / "model.safetensors", metadata={"format": "pt"})
    save_file(packed, folder / form / "model.safetensors")
    path = folder / form / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "quantization_config": awq() if form == "awq" else gptq()}))
    return folder / "dense", folder / form


def logits(folder, kernels, **options):
    decoder = Decoder(AutoConfig.from_pretrained(folder), read(folder, **options).items(), kernels)
    rows = [make_sequence(range(3, 20), 0), make_sequence(range(40, 47), 20)]
    return make_runner(decoder).forward([PlannedRow(row, 0, row.num_tokens) for row in rows]), decoder


@pytest.mark.parametrize("form", ["gptq", "awq"])
@pytest.mark.parametrize("family", ["llama", "llama-untied-bias", "qwen3"])
def test_a_model_says_what_the_dense_one_says(family, form, tmp_path):
    torch.manual_seed(0)
    dense, packed = make_pair(family, tmp_path, form)
    expected, _ = logits(dense, reference)
    assert torch.equal(logits(packed, reference)[0], expected)
    got, decoder = logits(packed, gpu, keeps_codes=True)
    assert {decoder._layers[0].qkv.bits, decoder._layers[2].down.bits} == {4}
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)
