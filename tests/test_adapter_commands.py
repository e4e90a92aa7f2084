"""`npc-runtime adapter …` as a user types it, with a tiny base."""

import json

import pytest
import torch
from nemo import model_config, random_lora, state_dict, write_nemo
from tiny import make_adapter, make_model
from typer.testing import CliRunner

from npc_runtime import cli
from npc_runtime.adapter_commands import adapter_app
from npc_runtime.errors import NpcError


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("commands")


@pytest.fixture(scope="module")
def model(place):
    return make_model("llama", place / "base")


@pytest.fixture(scope="module")
def adapter(model, place):
    return make_adapter(model, place / "adapter", use_dora=True, target_modules=["q_proj"])


@pytest.fixture
def run(place):
    def run(*arguments):
        return CliRunner().invoke(adapter_app, [*map(str, arguments), "--base", str(place / "base")])

    return run


def test_check_says_what_it_is(run, adapter):
    done = run("check", adapter)
    assert done.exit_code == 0, done.output
    assert "DoRA, from PEFT" in done.stdout
    assert done.stdout.splitlines()[-1] == "ok"
    assert json.loads(run("check", adapter, "--json").stdout)["ranks"] == {"8": 3}


def test_an_imported_nemo_is_checked_and_merged(run, model, adapter, tmp_path):
    config = model.config
    path = write_nemo(
        tmp_path / "guard.nemo", model_config(config, rank=6, alpha=6), state_dict(random_lora(config, rank=6), config)
    )
    out, merged = tmp_path / "personas" / "guard" / "adapter", tmp_path / "merged"
    assert f"written to {out}" in run("import", path, out).stdout
    assert isinstance(run("import", path, out).exception, NpcError)
    assert run("import", path, out, "--force").exit_code == 0
    assert run("check", out).exit_code == 0
    done = run("merge", out, path, merged, "--scale", "0.5", "--scale", "0.5", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1])["num_merged"] == 21
    from safetensors.torch import load_file

    got = load_file(merged / "model-00001.safetensors")["model.layers.1.mlp.down_proj.weight"]
    lora = random_lora(config, rank=6)[1]["down"]
    torch.testing.assert_close(got, model.state_dict()["model.layers.1.mlp.down_proj.weight"] + lora[1] @ lora[0])


@pytest.mark.parametrize("arguments", [("check", "none"), ("merge", "none", "out"), ("import", "none", "out")])
def test_errors_are_ours(run, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert isinstance(run(*arguments).exception, NpcError)
    assert list(tmp_path.iterdir()) == []


def test_each_adapter_has_one_scale(run, adapter, tmp_path):
    assert "1 adapters and 2 --scale" in str(
        run("merge", adapter, tmp_path / "out", "--scale", "1", "--scale", "2").exception
    )


def test_the_command_line_prints_one_line(adapter, monkeypatch, capsys, place):
    monkeypatch.setattr("sys.argv", ["npc-runtime", "adapter", "check", str(place), "--base", str(place / "base")])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
