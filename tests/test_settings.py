"""What is wrong with the options of `serve`, as far as it can be told before anything is loaded."""

import json
from dataclasses import replace

import pytest

from npc_runtime.errors import StartupError
from npc_runtime.settings import Settings, check_settings


@pytest.fixture
def settings(tmp_path):
    return Settings("smollm2-135m", tmp_path, "127.0.0.1", 0, "auto", None, True)


def test_what_is_right_passes(settings, tmp_path):
    check_settings(settings)
    check_settings(replace(settings, host="0.0.0.0", record=tmp_path / "new"))
    check_settings(replace(settings, host="localhost", needs_token=False))
    check_settings(replace(settings, base="an-organisation/a-model-that-nobody-fetched@main"))
    check_settings(replace(settings, base="no such thing", replay=tmp_path / "read elsewhere"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"host": "0.0.0.0", "needs_token": False}, "--no-auth is refused on 0.0.0.0"),
        ({"base": "smollm2-153m"}, "Did you mean smollm2-135m?"),
        ({"base": "a/b/c"}, "there is no such folder"),
        ({"base": "."}, "has no config.json"),
        ({"replay": "x", "replay_speed": 0.0}, "is no speed"),
        ({"replay": "x", "replay_speed": -1.0}, "is no speed"),
        ({"replay": "x", "replay_speed": float("nan")}, "is no speed"),
    ],
)
def test_what_is_wrong_is_named(settings, monkeypatch, tmp_path, changes, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StartupError) as caught:
        check_settings(replace(settings, **changes))
    assert message in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "cannot be read"),
        (json.dumps({"architectures": ["GPTNeoXForCausalLM"]}), "GPTNeoXForCausalLM is not supported"),
        (json.dumps({"architectures": ["LlamaForCausalLM"]}), "has no *.safetensors"),
    ],
)
def test_a_folder_that_is_no_base_is_seen(settings, tmp_path, config, message):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(StartupError) as caught:
        check_settings(replace(settings, base=str(tmp_path)))
    assert message in str(caught.value)


def test_folders_and_files_that_are_not_there_or_are(settings, tmp_path):
    (tmp_path / "taken").touch()
    for changes, message in (
        ({"personas": tmp_path / "none"}, "no such folder"),
        ({"record": tmp_path / "taken"}, "there already"),
        ({"record": tmp_path / "none" / "file"}, "no folder"),
    ):
        with pytest.raises(StartupError, match=message):
            check_settings(replace(settings, **changes))
