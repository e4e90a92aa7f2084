"""`.nemo` files: NeMo's layout to PEFT's, and all that is refused; test_variants compares what the engine computes."""

import gzip
import io
import tarfile
import zipfile

import pytest
import torch
from nemo import fuse_qkv, model_config, peft_tensors, random_lora, state_dict, write_nemo
from tiny import CONFIGS

from npc_runtime.engine.model import ModelShape
from npc_runtime.engine.nemo_file import read_nemo
from npc_runtime.errors import AdapterIncompatible, AdapterMissing

CONFIG = CONFIGS["llama"]()
SHAPE = ModelShape.from_config(CONFIG)


@pytest.fixture(scope="module")
def lora():
    return random_lora(CONFIG, rank=6)


def settings(**changes):
    return model_config(CONFIG, rank=6, alpha=12, **changes)


def lora_settings(**changes):
    config = settings()
    config["peft"]["lora_tuning"].update(changes)
    return config


@pytest.mark.parametrize("variant", ["nemo", "canonical"])
@pytest.mark.parametrize("prefix", ["model.decoder.layers", "model.module.decoder.layers", "decoder.layers"])
def test_tensors_get_their_names_and_rows(variant, prefix, lora, tmp_path):
    tensors = state_dict(lora, CONFIG, variant=variant, prefix=prefix)
    adapter = read_nemo(write_nemo(tmp_path / "a.nemo", settings(), tensors), SHAPE)
    expected = peft_tensors(lora)
    assert adapter.tensors.keys() == expected.keys()
    assert all(torch.equal(adapter.tensors[name], tensor) for name, tensor in expected.items())
    assert (adapter.config["r"], adapter.config["lora_alpha"]) == (6, 12)
    assert adapter.config["base_model_name_or_path"] == "some-base.nemo"


def test_the_rows_of_a_group_lie_together():
    """Four query heads, two key heads of size 2, as the docstring of the reader has it."""
    q, k, v = (
        torch.tensor([[float(f"{letter}{row}")] for row in range(size)]) for letter, size in ((1, 8), (2, 4), (3, 4))
    )
    fused = fuse_qkv(q, k, v, num_groups=2, head_dim=2).flatten().tolist()
    assert fused == [10, 11, 12, 13, 20, 21, 30, 31, 14, 15, 16, 17, 22, 23, 32, 33]


def test_names_of_nemo_2(lora, tmp_path):
    names = {
        "self_attention.adapter_layer.lora_kqv_adapter": "self_attention.linear_qkv.adapter",
        "self_attention.adapter_layer.lora_dense_attention_adapter": "self_attention.linear_proj.adapter",
        "mlp.adapter_layer.lora_hto4h_adapter": "mlp.linear_fc1.adapter",
        "mlp.adapter_layer.lora_4htoh_adapter": "mlp.linear_fc2.adapter",
    }
    tensors = {}
    for name, tensor in state_dict(lora, CONFIG, prefix="decoder.layers").items():
        old = next(old for old in names if old in name)
        tensors[name.replace(old, names[old])] = tensor
    adapter = read_nemo(write_nemo(tmp_path / "a.nemo", settings(), tensors), SHAPE)
    assert all(torch.equal(adapter.tensors[name], tensor) for name, tensor in peft_tensors(lora).items())


def test_without_an_alpha_the_scaling_is_one(lora, tmp_path):
    for number, config in enumerate([lora_settings(alpha=None), settings(peft={"peft_scheme": "lora"})]):
        adapter = read_nemo(write_nemo(tmp_path / f"{number}.nemo", config, state_dict(lora, CONFIG)), SHAPE)
        assert adapter.config["lora_alpha"] == adapter.config["r"] == 6


def test_some_targets_and_some_layers(lora, tmp_path):
    tensors = {name: t for name, t in state_dict(lora, CONFIG).items() if "kqv" in name and "layers.1." in name}
    adapter = read_nemo(write_nemo(tmp_path / "a.nemo", settings(), tensors), SHAPE)
    assert adapter.config["target_modules"] == ["k_proj", "q_proj", "v_proj"]
    assert len(adapter.tensors) == 6


class Bomb:
    """A pickle that would run a command."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('unpickled')",))


def saved(value, *, compression=zipfile.ZIP_STORED, **options):
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    if compression == zipfile.ZIP_STORED:
        return buffer.getvalue()
    packed = io.BytesIO()
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(packed, "w", compression) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    return packed.getvalue()


KQV = "model.decoder.layers.0.self_attention.adapter_layer.lora_kqv_adapter"


def with_tensor(name, tensor):
    return lambda lora: {**state_dict(lora, CONFIG), name: tensor}


def whole(lora):
    return state_dict(lora, CONFIG)


BAD = {
    "a pickle with code": (settings(), lambda lora: saved({"x": Bomb()}), "holds no plain tensors"),
    "the old pickle format": (
        settings(),
        lambda lora: saved(whole(lora), _use_new_zipfile_serialization=False),
        "holds no plain tensors",
    ),
    "a compressed one": (settings(), lambda lora: saved(whole(lora), compression=zipfile.ZIP_DEFLATED), "compressed"),
    "no table": (settings(), lambda lora: saved([torch.zeros(2)]), "no table of tensors"),
    "a text among the tensors": (settings(), with_tensor(f"{KQV}.linear_in.weight", "x"), "of type str"),
    "whole numbers": (settings(), with_tensor(f"{KQV}.linear_in.weight", torch.zeros(6, 48).int()), "torch.int32"),
    "another hidden size": (
        settings(),
        with_tensor(f"{KQV}.linear_in.weight", torch.zeros(6, 50)),
        r"lora_kqv_adapter.linear_in.weight has shape \(6, 50\), this base needs \(rank, 48\)",
    ),
    "a tensor of terabytes": (
        settings(),
        with_tensor(f"{KQV}.linear_in.weight", torch.zeros(1).expand(1 << 40, 48)),
        "rank",
    ),
    "another rank": (settings(), with_tensor(f"{KQV}.linear_in.weight", torch.zeros(5, 48)), "rank 5, not 6"),
    "fused and canonical": (
        settings(),
        lambda lora: {**state_dict(lora, CONFIG), **state_dict(lora, CONFIG, variant="canonical")},
        "there twice",
    ),
    "embedding": (
        settings(),
        with_tensor("model.embedding.word_embeddings.adapter.linear_in.weight", torch.zeros(1)),
        "e",
    ),
    "before Megatron Core": (
        settings(),
        lambda lora: state_dict(lora, CONFIG, prefix="model.language_model.encoder.layers"),
        "language_model.encoder",
    ),
    "experts": (settings(), with_tensor("model.decoder.layers.0.mlp.experts.linear_fc1.x", torch.zeros(1)), "experts"),
    "no YAML": (b"a: [1, 2", whole, "model_config.yaml cannot be read"),
    "YAML of no table": (b"- 1", whole, "model_config.yaml cannot be read"),
    "YAML with code": (b"a: !!python/object/apply:os.system ['true']", whole, "model_config.yaml cannot be read"),
    "huge YAML": (b"#" * (2 << 20), whole, "model_config.yaml has 2097152 bytes"),
    "another base": (settings(hidden_size=4096), whole, "hidden_size of its base is 4096, this base has 48"),
    "parallel": (settings(tensor_model_parallel_size=2), whole, "tensor_model_parallel_size is 2"),
    "p-tuning": (settings(peft={"peft_scheme": "ptuning"}), whole, "peft_scheme ptuning"),
    "tied layers": (lora_settings(weight_tying=True), whole, "weight_tying"),
    "rank of text": (lora_settings(adapter_dim="six"), whole, "adapter_dim is six"),
    "no weights": (settings(), None, "no model_weights.ckpt"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_lora_of_this_base_is_refused_by_name(case, lora, tmp_path):
    config, make, message = BAD[case]
    path = tmp_path / "bad.nemo"
    write_nemo(path, config, make(lora) if make else b"x")
    if make is None:
        write_nemo(path, config, b"", extra={"model_weights.ckpt": None})
    with pytest.raises(AdapterIncompatible, match=message) as caught:
        read_nemo(path, SHAPE)
    assert str(path) in str(caught.value)
    assert caught.value.hint


FORMS = {
    "model_weights/common.pt": "distributed checkpoint",
    "model_weights/.metadata": "distributed checkpoint",
    "mp_rank_00/model_weights.ckpt": "parallel ranks",
    "tp_rank_00_pp_rank_000/model_weights.ckpt": "parallel ranks",
    "weights/metadata.json": "NeMo 2",
}


@pytest.mark.parametrize("member", FORMS)
def test_other_forms_are_refused_by_name(member, tmp_path):
    extra = {"model_weights.ckpt": None, member: b"x"}
    path = write_nemo(tmp_path / "a.nemo", settings(), b"", extra=extra)
    with pytest.raises(AdapterIncompatible, match=FORMS[member]):
        read_nemo(path, SHAPE)


def test_a_folder_and_nothing_at_all(tmp_path):
    with pytest.raises(AdapterIncompatible, match="NeMo 2"):
        read_nemo(tmp_path, SHAPE)
    with pytest.raises(AdapterMissing, match="does not exist"):
        read_nemo(tmp_path / "none.nemo", SHAPE)


def test_a_gzip_bomb_is_stopped(tmp_path):
    """A gigabyte of zeros in a megabyte; the largest adapter of this base has less than 20 MB."""
    path = tmp_path / "bomb.nemo"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(64):
            file.write(bytes(1 << 20))
    with pytest.raises(AdapterIncompatible, match="more than the"):
        read_nemo(path, SHAPE)


def test_links_are_not_followed(tmp_path):
    path = tmp_path / "links.nemo"
    with tarfile.open(path, "w") as tar:
        for name in ("model_config.yaml", "model_weights.ckpt"):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(info)
    with pytest.raises(AdapterIncompatible, match=r"no model_config\.yaml"):
        read_nemo(path, SHAPE)


def test_noise_and_half_a_file(lora, tmp_path):
    path = write_nemo(tmp_path / "a.nemo", settings(), state_dict(lora, CONFIG))
    sound = path.read_bytes()
    for data in (b"", b"noise" * 1_000, sound[:3_000], b"\x1f\x8b" + sound[:100]):
        path.write_bytes(data)
        with pytest.raises(AdapterIncompatible):
            read_nemo(path, SHAPE)
