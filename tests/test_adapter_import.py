"""Adapters from elsewhere: described, written whole or not at all, and only where nothing else is."""

import json

import pytest
import torch
from nemo import model_config, random_lora, state_dict, write_nemo
from tiny import make_adapter, make_model

from npc_runtime import adapter_import
from npc_runtime.adapter_import import Base, check_adapter, import_adapter
from npc_runtime.engine.peft_folder import read_peft_folder
from npc_runtime.errors import AdapterIncompatible, InvalidError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model("llama", tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def base(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "tiny"
    model.save_pretrained(folder)
    return Base.of("tiny", folder)


@pytest.fixture
def adapter(model, tmp_path):
    options = {"use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 20}, "layers_to_transform": [0, 1]}
    return make_adapter(model, tmp_path / "adapter", rank=8, name="somebody/tiny", **options)


@pytest.fixture
def nemo(model, tmp_path):
    lora = random_lora(model.config, rank=6)
    config = model_config(model.config, rank=6, alpha=12)
    return write_nemo(tmp_path / "guard.nemo", config, state_dict(lora, model.config))


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else None


def test_a_peft_folder_is_described(adapter, base):
    report = check_adapter(adapter, base, max_rank=64)
    assert report.kind == "DoRA, scaled as rsLoRA"
    assert report.ranks == {8: 12, 20: 2}
    assert report.targets["q_proj"] == 2
    assert (report.num_pages, report.made_for, report.notes) == (2, "somebody/tiny", [])
    assert json.loads(report.to_json())["num_layers"] == 3
    text = report.to_text()
    assert "8 (12 linears), 20 (2 linears)" in text
    assert "q_proj (2 of 3 layers)" in text


def test_a_nemo_file_is_described(nemo, base):
    report = check_adapter(nemo, base, max_rank=64)
    assert (report.source, report.kind, report.ranks) == ("NeMo", "LoRA", {6: 21})
    (note,) = report.notes
    assert "another name" in note


def test_errors_name_the_nemo_file(nemo, base, model):
    lora = random_lora(model.config, rank=100)
    write_nemo(nemo, model_config(model.config, rank=100, alpha=1), state_dict(lora, model.config))
    with pytest.raises(AdapterIncompatible, match=r"guard\.nemo.* rank 100, not 1 to 64"):
        check_adapter(nemo, base, max_rank=64)
    assert check_adapter(nemo, base, max_rank=128).num_pages == 7


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter.pt", "adapter.ckpt"])
def test_pickles_are_refused(name, base, tmp_path):
    path = tmp_path / name
    torch.save({}, path)
    with pytest.raises(AdapterIncompatible, match="is a pickle and never loaded"):
        check_adapter(path, base, max_rank=64)


def test_other_files_are_refused(adapter, base, tmp_path):
    with pytest.raises(AdapterIncompatible, match="file of an adapter's folder") as caught:
        check_adapter(adapter / "adapter_model.safetensors", base, max_rank=64)
    assert str(adapter) in caught.value.hint
    (tmp_path / "lora.gguf").write_bytes(b"GGUF")
    with pytest.raises(AdapterIncompatible, match="neither a PEFT folder nor"):
        check_adapter(tmp_path / "lora.gguf", base, max_rank=64)
    (tmp_path / "unpacked" / "model_weights").mkdir(parents=True)
    with pytest.raises(AdapterIncompatible, match="NeMo 2"):
        check_adapter(tmp_path / "unpacked", base, max_rank=64)


@pytest.mark.parametrize("source", ["adapter", "nemo"])
def test_an_import_can_be_read_and_says_where_it_came_from(source, base, tmp_path, request):
    path, out = request.getfixturevalue(source), tmp_path / "personas" / "guard" / "adapter"
    import_adapter(path, out, base, max_rank=64)
    assert read_peft_folder(out, base.shape).pairs
    assert sorted(files(out)) == ["adapter_config.json", "adapter_model.safetensors", "import.json"]
    record = json.loads((out / "import.json").read_text())
    assert (record["source"], record["base"]["sha256"]) == (path.name, base.info.sha256)
    assert check_adapter(out, base, max_rank=64).notes == []
    assert list(out.parent.iterdir()) == [out]


def test_the_hash_of_another_base_is_noted(adapter, base, tmp_path):
    import_adapter(adapter, tmp_path / "out", base, max_rank=64)
    folder = tmp_path / "other" / "tiny"
    make_model("llama", folder, seed=1)
    (note,) = check_adapter(tmp_path / "out", Base.of("tiny", folder), max_rank=64).notes
    assert "by its hash" in note


def test_nothing_is_overwritten_without_force(adapter, nemo, base, tmp_path):
    out = tmp_path / "out"
    import_adapter(nemo, out, base, max_rank=64)
    before = files(out)
    with pytest.raises(InvalidError, match="exists"):
        import_adapter(adapter, out, base, max_rank=64)
    assert files(out) == before
    import_adapter(adapter, out, base, max_rank=64, overwrites=True)
    assert files(out)["adapter_model.safetensors"] == files(adapter)["adapter_model.safetensors"]
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "letter.txt").write_text("dear")
    with pytest.raises(InvalidError, match="no adapter's folder"):
        import_adapter(adapter, precious, base, max_rank=64, overwrites=True)
    (tmp_path / "a file").write_text("x")
    with pytest.raises(InvalidError):
        import_adapter(adapter, tmp_path / "a file", base, max_rank=64, overwrites=True)


def test_an_import_that_fails_leaves_everything_as_it_was(adapter, base, tmp_path, monkeypatch):
    out = tmp_path / "personas" / "adapter"
    import_adapter(adapter, out, base, max_rank=64)
    before = files(out)

    def fill_the_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(adapter_import.shutil, "copyfile", fill_the_disk)
    with pytest.raises(OSError, match="No space"):
        import_adapter(adapter, out, base, max_rank=64, overwrites=True)
    assert files(out) == before
    assert list(out.parent.iterdir()) == [out]
