"""Adapters from disk: every PEFT variant that is applied, every one that is refused, and every kind of garbage."""

import contextlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny import CONFIGS, SIZES, make_adapter, make_model, rewrite
from transformers import AutoModelForCausalLM, LlamaConfig

from npc_runtime.engine.model import ModelShape, PageLayout
from npc_runtime.engine.peft_folder import load_peft_folder, read_peft_folder
from npc_runtime.errors import AdapterIncompatible, AdapterMissing


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def shape(model):
    return ModelShape.from_config(model.config)


@pytest.fixture
def adapter(model, tmp_path):
    return make_adapter(model, tmp_path / "adapter", rank=8)


def magnitudes_of_zero(tensors):
    for name in [name for name in tensors if "magnitude" in name]:
        tensors[name].fill_(float("nan"))


def load(folder, shape, **options):
    return load_peft_folder(folder, shape, PageLayout.of(shape), dtype=torch.float32, **options)


def delta(pages, shape, layer, group, index):
    """`B A` of one linear, from its pages; (out_features, in_features)."""
    span = PageLayout.of(shape).layers[layer][group]
    a_start = span.start + index * 16 * span.in_features
    b_start = span.b_start + 16 * sum(span.out_features[:index])
    out = span.out_features[index]
    a = pages[:, a_start : a_start + 16 * span.in_features].reshape(-1, span.in_features)
    b = pages[:, b_start : b_start + 16 * out].reshape(-1, out)
    return b.T @ a


VARIANTS = {
    "lora": {},
    "rank 24, two pages": {"rank": 24},
    "rank 64, four pages": {"rank": 64},
    "rsLoRA": {"use_rslora": True, "lora_alpha": 12},
    "rank and alpha patterns": {
        "rank_pattern": {"q_proj": 4, r"layers\.1\.mlp\.down_proj": 20},
        "alpha_pattern": {"q_proj": 3, r"layers\.1\.mlp\.down_proj": 50, "up_proj": 1},
    },
    "attention only": {"target_modules": ["q_proj", "v_proj"]},
    "DoRA": {"use_dora": True},
    "DoRA of one linear": {"use_dora": True, "target_modules": ["up_proj"]},
}
PLACES = {
    "self_attn.q_proj": (0, 0),
    "self_attn.k_proj": (0, 1),
    "self_attn.v_proj": (0, 2),
    "self_attn.o_proj": (1, 0),
    "mlp.gate_proj": (2, 0),
    "mlp.up_proj": (2, 1),
    "mlp.down_proj": (3, 0),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_pages_hold_what_peft_would_merge(variant, tmp_path, shape):
    from peft import PeftModel

    base = make_model("llama", tmp_path / "model")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    folder = make_adapter(base, tmp_path / "adapter", **VARIANTS[variant])
    rewrite(folder, lambda tensors: [t.mul_(0.7) for name, t in tensors.items() if "magnitude" in name])
    found = load(folder, shape, base=lambda names: [(name, before[name]) for name in names])
    pages, factors = found.pages, found.multipliers
    merged = PeftModel.from_pretrained(base, str(folder)).merge_and_unload().state_dict()
    for layer in range(shape.num_layers):
        for module, (group, index) in PLACES.items():
            name = f"model.layers.{layer}.{module}.weight"
            got = before[name] + delta(pages, shape, layer, group, index)
            if factors is not None:
                span = PageLayout.of(shape).layers[layer][group]
                first = span.first_output + sum(span.out_features[:index])
                got *= factors[first : first + len(got), None]
            torch.testing.assert_close(got, merged[name], atol=1e-5, rtol=1e-4)
    assert (factors is not None) == VARIANTS[variant].get("use_dora", False)


def test_rank_128_is_read_on_request(model, shape, tmp_path):
    folder = make_adapter(model, tmp_path / "wide", rank=128)
    with pytest.raises(AdapterIncompatible, match="rank 128, not 1 to 64") as caught:
        load(folder, shape)
    assert "--max-adapter-rank 128" in caught.value.hint
    assert len(load(folder, shape, max_rank=128).pages) == 8


def test_magnitudes_are_checked(model, shape, tmp_path):
    folder = make_adapter(model, tmp_path / "dora", use_dora=True)
    rewrite(folder, magnitudes_of_zero)
    with pytest.raises(AdapterIncompatible, match="magnitude_vector has NaN"):
        load(folder, shape)


def test_keys_that_nobody_knows_are_noted(adapter, shape):
    edit_config(unsloth_fixed=True)(adapter)
    (note,) = read_peft_folder(adapter, shape).config.notes
    assert "unsloth_fixed" in note


def test_the_personas_scale_is_folded_in(adapter, shape):
    whole, half = load(adapter, shape), load(adapter, shape, scale=0.5)
    torch.testing.assert_close(delta(half.pages, shape, 2, 2, 1), 0.5 * delta(whole.pages, shape, 2, 2, 1))
    assert whole.digest != half.digest


def edit_config(**changes):
    def change(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def edit_tensors(change):
    return lambda folder: rewrite(folder, change)


def first_of(tensors, end):
    return next(name for name in sorted(tensors) if name.endswith(end))


def set_nan(tensors):
    tensors[first_of(tensors, "q_proj.lora_A.weight")][0, 0] = float("nan")


def drop_b(tensors):
    del tensors[first_of(tensors, "v_proj.lora_B.weight")]


def add_head(tensors):
    tensors["base_model.model.lm_head.lora_A.weight"] = torch.zeros(8, 48)


def widen(tensors):
    name = first_of(tensors, "o_proj.lora_A.weight")
    tensors[name] = torch.zeros(8, 65)


def add_layer(tensors):
    tensors["base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"] = torch.zeros(8, 48)


def make_huge_rank(tensors):
    tensors[first_of(tensors, "q_proj.lora_A.weight")] = torch.zeros(512, 48)


def empty_pair(tensors):
    tensors[first_of(tensors, "q_proj.lora_A.weight")] = torch.zeros(0, 48)
    tensors[first_of(tensors, "q_proj.lora_B.weight")] = torch.zeros(64, 0)


def narrow(tensors):
    name = first_of(tensors, "q_proj.lora_A.weight")
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)


def truncate(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def claim_a_header_of_10_gb(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes((10 * 2**30).to_bytes(8, "little") + path.read_bytes()[8:])


def write_noise(folder):
    (folder / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 40)


def pickle_instead(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def overlap(folder):
    """All tensors begin at the first byte."""
    path = folder / "adapter_model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    for name, entry in header.items():
        if name != "__metadata__":
            entry["data_offsets"] = [0, entry["data_offsets"][1] - entry["data_offsets"][0]]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def claim_terabytes(folder):
    """A well-formed header of a tensor that nobody has the room for."""
    path = folder / "adapter_model.safetensors"
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    entry = {"dtype": "F32", "shape": [1 << 40, 48], "data_offsets": [0, 48 * 4 << 40]}
    text = json.dumps({name: entry}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)


def name_twice(tensors):
    name = first_of(tensors, "q_proj.lora_A.weight")
    tensors[name.replace("lora_A.weight", "lora_A.default.weight")] = tensors[name].clone()


def rename_all(old, new):
    def change(tensors):
        for name in list(tensors):
            tensors[name.replace(old, new)] = tensors.pop(name)

    return edit_tensors(change)


def add_tensor(name, *size):
    return edit_tensors(lambda tensors: tensors.update({name: torch.zeros(*size)}))


def write_a_bad_config(folder):
    (folder / "adapter_config.json").write_bytes(b"\xff{")


ENDLESS = r"(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)(?(1)\d|x)"

BAD = {
    "folder gone": (shutil.rmtree, AdapterMissing, "does not exist"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), AdapterMissing, "adapter_config.json"),
    "only a pickle": (pickle_instead, AdapterMissing, "pickle"),
    "truncated": (truncate, AdapterIncompatible, "damaged"),
    "10 GB header": (claim_a_header_of_10_gb, AdapterIncompatible, "damaged"),
    "noise": (write_noise, AdapterIncompatible, "damaged"),
    "config is noise": (write_a_bad_config, AdapterIncompatible, "adapter_config.json"),
    "NaN": (edit_tensors(set_nan), AdapterIncompatible, r"q_proj\.lora_A\.weight has NaN"),
    "overlapping offsets": (overlap, AdapterIncompatible, "damaged"),
    "a tensor of terabytes": (claim_terabytes, AdapterIncompatible, "damaged|rank"),
    "one place twice": (edit_tensors(name_twice), AdapterIncompatible, "two tensors for one place"),
    "empty file": (lambda f: (f / "adapter_model.safetensors").write_bytes(b""), AdapterIncompatible, "0 bytes"),
    "config is huge": (
        lambda f: (f / "adapter_config.json").write_bytes(b" " * (2 << 20)),
        AdapterIncompatible,
        "more than any PEFT",
    ),
    "half a pair": (edit_tensors(drop_b), AdapterIncompatible, "v_proj lacks lora_B"),
    "head": (edit_tensors(add_head), AdapterIncompatible, r"lm_head\.lora_A.* LoRA on the head"),
    "embedding": (
        add_tensor("base_model.model.model.embed_tokens.lora_embedding_A", 8, 97),
        AdapterIncompatible,
        "LoRA on the embedding",
    ),
    "a saved module": (add_tensor("base_model.model.lm_head.weight", 97, 48), AdapterIncompatible, "a whole module"),
    "a norm": (add_tensor("base_model.model.model.norm.weight", 48), AdapterIncompatible, "a whole module"),
    "LoRA's bias": (
        add_tensor("base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias", 64),
        AdapterIncompatible,
        "a bias of the LoRA",
    ),
    "experts": (rename_all("mlp.", "mlp.experts.3."), AdapterIncompatible, "LoRA on experts"),
    "a picture model": (rename_all("layers", "vision_tower.layers"), AdapterIncompatible, "another part"),
    "mixed up modules": (rename_all("mlp.up_proj", "self_attn.up_proj"), AdapterIncompatible, "self_attn.up_proj"),
    "magnitudes of no DoRA": (
        add_tensor("base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector", 64),
        AdapterIncompatible,
        "use_dora is not set",
    ),
    "a DoRA without magnitudes": (edit_config(use_dora=True), AdapterIncompatible, "lacks lora_magnitude_vector"),
    "another rank in the config": (edit_config(r=16), AdapterIncompatible, "rank 8, adapter_config.json says 16"),
    "layers that PEFT leaves out": (edit_config(layers_to_transform=[0, 1]), AdapterIncompatible, "leave .*layers.2"),
    "modules that PEFT leaves out": (edit_config(target_modules=["q_proj"]), AdapterIncompatible, "target_modules"),
    "excluded modules": (edit_config(exclude_modules=["mlp.up_proj"]), AdapterIncompatible, "leave .*up_proj"),
    "another hidden size": (
        edit_tensors(widen),
        AdapterIncompatible,
        r"o_proj.* \(8, 65\).* made for 'base'",
    ),
    "more layers": (edit_tensors(add_layer), AdapterIncompatible, "layer 7, but this base has 3"),
    "rank 512": (edit_tensors(make_huge_rank), AdapterIncompatible, "rank 512, not 1 to 64"),
    "empty": (edit_tensors(lambda tensors: tensors.clear()), AdapterIncompatible, "no LoRA tensors"),
    "QALoRA": (edit_config(use_qalora=True), AdapterIncompatible, "use_qalora"),
    "aLoRA": (edit_config(alora_invocation_tokens=[1, 2]), AdapterIncompatible, "alora_invocation_tokens"),
    "BD-LoRA": (edit_config(use_bdlora={"nblocks": 2}), AdapterIncompatible, "use_bdlora"),
    "arrow": (edit_config(arrow_config={"top_k": 2}), AdapterIncompatible, "arrow_config"),
    "tokens": (edit_config(trainable_token_indices=[5]), AdapterIncompatible, "trainable_token_indices"),
    "CorDA": (edit_config(init_lora_weights="corda"), AdapterIncompatible, "corda"),
    "a start from the future": (edit_config(init_lora_weights="moon"), AdapterIncompatible, "'moon' changes"),
    "expression without end": (edit_config(target_modules=ENDLESS), AdapterIncompatible, "too long"),
    "alpha pattern without end": (edit_config(alpha_pattern={ENDLESS: 3}), AdapterIncompatible, "too long"),
    "rank pattern is text": (edit_config(rank_pattern={"q_proj": "x"}), AdapterIncompatible, "q_proj cannot be read"),
    "bias": (edit_config(bias="all"), AdapterIncompatible, "bias"),
    "saved modules": (edit_config(modules_to_save=["lm_head"]), AdapterIncompatible, "modules_to_save"),
    "alpha is text": (edit_config(lora_alpha="abc"), AdapterIncompatible, "lora_alpha"),
    "alpha is null": (edit_config(lora_alpha=None), AdapterIncompatible, "lora_alpha"),
    "alpha is infinite": (edit_config(lora_alpha=float("inf")), AdapterIncompatible, "do not fit"),
    "alpha is no number": (edit_config(lora_alpha=float("nan")), AdapterIncompatible, "do not fit"),
    "alpha is absurd": (edit_config(lora_alpha=1e300), AdapterIncompatible, "do not fit"),
    "bad pattern": (edit_config(alpha_pattern={"(q_proj": 3}), AdapterIncompatible, "alpha_pattern"),
    "pattern is a list": (edit_config(alpha_pattern=["q_proj"]), AdapterIncompatible, "alpha_pattern"),
    "rsLoRA is text": (edit_config(use_rslora="false"), AdapterIncompatible, "use_rslora"),
    "rank 0": (edit_tensors(empty_pair), AdapterIncompatible, "rank 0"),
    "float8": (edit_tensors(narrow), AdapterIncompatible, "type F8_E4M3"),
    "PiSSA": (edit_config(init_lora_weights="pissa_niter_4"), AdapterIncompatible, "pissa"),
    "KaSA": (edit_config(kasa_config={"beta": 1}), AdapterIncompatible, "kasa_config"),
    "parameters": (edit_config(target_parameters=["mlp.experts"]), AdapterIncompatible, "target_parameters"),
    "not LoRA": (edit_config(peft_type="IA3"), AdapterIncompatible, "peft_type IA3"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_applied_is_refused_by_name(case, adapter, shape):
    spoil, kind, message = BAD[case]
    spoil(adapter)
    with pytest.raises(kind, match=message) as caught:
        load(adapter, shape)
    assert str(adapter) in str(caught.value)
    assert caught.value.hint


def test_random_configs_never_crash_the_reader(adapter, shape):
    """Every known key with every odd value: loaded, or refused with one of our errors."""
    path = adapter / "adapter_config.json"
    sound = json.loads(path.read_text())
    odd = [None, True, "", "x", "none", -1, 0, 1e308, [], ["a"], {}, {"a": 1}, {"": None}, [[1]]]
    for key in [*sound, "unknown_key"]:
        for value in odd:
            path.write_text(json.dumps({**sound, key: value}))
            with contextlib.suppress(AdapterIncompatible):
                load(adapter, shape)


def test_every_family_has_a_page_layout_without_gaps():
    for name in CONFIGS:
        shape = ModelShape.from_config(CONFIGS[name]())
        spans = [span for layer in PageLayout.of(shape).layers for span in layer]
        assert [span.start for span in spans[1:]] == [span.stop for span in spans[:-1]]


def test_an_adapter_of_another_family_is_refused(shape, tmp_path):
    config = LlamaConfig(**{**SIZES, "hidden_size": 64})
    folder = make_adapter(AutoModelForCausalLM.from_config(config), tmp_path / "other", name="other-base")
    with pytest.raises(AdapterIncompatible, match="made for 'other-base'"):
        load(folder, shape)


def test_a_file_that_changes_while_it_is_read_is_refused(model, adapter, shape, tmp_path, monkeypatch):
    """Its header was checked, its tensors are another file's."""
    other = make_adapter(model, tmp_path / "other", rank=24) / "adapter_model.safetensors"
    right = Path.read_bytes
    swap = {adapter / "adapter_model.safetensors": other}
    monkeypatch.setattr(Path, "read_bytes", lambda path: right(swap.get(path, path)))
    with pytest.raises(AdapterIncompatible, match="changed while it was read"):
        load(adapter, shape)
