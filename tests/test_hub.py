"""Bases of the hub: fetched once by its real client, from a server of ours, and never asked for again."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from conftest import MS
from fake_hub import COMMIT, serve_hub
from families import make_base
from safetensors.torch import load_file, save_file
from tiny import SIZES
from transformers import AutoModelForCausalLM, LlamaConfig

from npc_runtime.client import Client
from npc_runtime.engine.base_folder import INDEX, is_complete
from npc_runtime.engine.bases import base_name, find_base, resolve_base
from npc_runtime.engine.hub import HubId, parse_hub_id
from npc_runtime.errors import StartupError

REPO = "Tester/Tiny-Model"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that has one model, with all that may lie beside it there, and an empty cache on our side."""
    folder = tmp_path / "published"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(**{**SIZES, "vocab_size": 320, "max_position_embeddings": 512})
    )
    make_base("smollm2", folder)
    model.save_pretrained(folder)
    (folder / "onnx").mkdir()
    for name in ("pytorch_model.bin", "modeling.py", "README.md", "consolidated.safetensors", "onnx/model.safetensors"):
        (folder / name).write_bytes(b"not wanted")
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with serve_hub(folder) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
        yield hub


def quiet(label, fraction):
    pass


def run(*arguments, **environment):
    command = [sys.executable, "-P", "-m", "npc_runtime", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **environment})


def test_only_what_a_base_needs_is_fetched_and_only_once(hub, tmp_path):
    seen = []
    folder = resolve_base(REPO, lambda label, fraction: seen.append((label, fraction)))
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"} <= names
    assert not names & {"pytorch_model.bin", "modeling.py", "README.md", "consolidated.safetensors", "onnx"}
    assert folder.is_relative_to(tmp_path / "home")
    assert is_complete(folder)
    assert {label for label, _ in seen} == {f"downloading {REPO}"}
    fractions = [fraction for _, fraction in seen]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    hub.requests.clear()
    assert resolve_base(REPO, quiet) == find_base(REPO) == folder
    assert hub.requests == []


def test_a_revision_is_fetched_beside_the_other(hub):
    folder = resolve_base(f"{REPO}@v1.0", quiet)
    assert folder.name == COMMIT
    assert find_base(f"{REPO}@v1.0") == find_base(f"{REPO}@{COMMIT}") == folder
    assert find_base(REPO) is None  # nobody has asked what main is
    hub.requests.clear()
    assert resolve_base(REPO, quiet) == folder
    assert "model.safetensors" not in hub.fetched()


def test_shards_are_those_of_the_index(hub):
    tensors = load_file(hub.folder / "model.safetensors")
    names = sorted(tensors)
    shards = {f"model-0000{number}-of-00002.safetensors": names[number - 1 :: 2] for number in (1, 2)}
    for file, members in shards.items():
        save_file({name: tensors[name] for name in members}, hub.folder / file, metadata={"format": "pt"})
    places = {name: file for file, members in shards.items() for name in members}
    (hub.folder / INDEX).write_text(json.dumps({"weight_map": places}))
    folder = resolve_base(REPO, quiet)
    assert {path.name for path in folder.glob("*.safetensors")} == set(shards)
    (folder / INDEX).unlink()
    assert not is_complete(folder)  # they look whole, but how many there are is not known
    assert resolve_base(REPO, quiet) == folder
    (folder / next(iter(shards))).unlink()
    hub.requests.clear()
    assert resolve_base(REPO, quiet) == folder
    assert [name for name in hub.fetched() if name.endswith(".safetensors")] == []  # its bytes were still there


def test_a_connection_that_breaks_goes_on_where_it_was(hub):
    """The client keeps what it wrote to the disk, which it does in pieces of 10 MiB."""
    path = hub.folder / "model.safetensors"
    path.write_bytes(os.urandom(25 << 20))
    hub.cut_after, hub.cuts_left = 15 << 20, 1
    seen = []
    folder = resolve_base(REPO, lambda label, fraction: seen.append(fraction))
    assert hub.ranges == [f"model.safetensors {10 << 20}"]
    assert (folder / "model.safetensors").read_bytes() == path.read_bytes()
    assert any(0.3 < fraction < 0.9 for fraction in seen)
    assert seen == sorted(seen)


def test_what_is_complete_is_kept_when_a_download_fails(hub, tmp_path):
    hub.sizes = {"model.safetensors": 10**15}
    with pytest.raises(StartupError, match=r"needs 1000000\.0 GB in .*Make room, or set HF_HOME"):
        resolve_base(REPO, quiet)
    assert hub.fetched() == ["config.json"]
    assert find_base(REPO) is None
    hub.sizes, hub.requests[:] = {}, []
    resolve_base(REPO, quiet)
    assert "config.json" not in hub.fetched()
    assert not list((tmp_path / "home").rglob("*.incomplete"))


def test_whoever_is_stopped_leaves_no_half_file(hub, tmp_path):
    hub.stalls = True
    command = [sys.executable, "-P", "-m", "npc_runtime", "persona", "render", "odo", "--text", "Hi", "--base", REPO]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        give_up = time.monotonic() + 20_000 * MS
        while not list((tmp_path / "home").rglob("*.incomplete")) or "model.safetensors" not in hub.fetched():
            assert time.monotonic() < give_up
            time.sleep(20 * MS)
        process.terminate()
        process.wait(10_000 * MS)
    finally:
        process.kill()
    assert not list((tmp_path / "home").rglob("*.incomplete"))
    assert find_base(REPO) is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Tester/Other", r"no folder Tester/Other, and no model of that name.*spelling.*hf auth login"),
        (f"{REPO}@v9", r"has no revision 'v9'"),
        ("Tester/Tiny--Model", r"no name of a model"),
    ],
)
def test_names_that_are_wrong_are_told(name, message, hub):
    with pytest.raises(StartupError, match=message):
        resolve_base(name, quiet)


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        ((403, "GatedRepo"), r"is gated.*Ask at http.*/Tester/Tiny-Model, then run: hf auth login"),
        ((401, ""), r"refuses access|no model of that name"),
        ((403, ""), r"refuses access.*hf auth login"),
        ((410, ""), r"cannot serve .* \(HTTP 410\)"),
    ],
)
def test_refusals_have_their_remedy(refusal, message, hub):
    hub.refusal = refusal
    with pytest.raises(StartupError, match=message):
        resolve_base(REPO, quiet)
    assert hub.fetched() == []


def test_a_model_that_cannot_be_run_is_refused_before_its_weights_are_fetched(hub):
    path = hub.folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "architectures": ["MambaForCausalLM"]}))
    with pytest.raises(StartupError, match="MambaForCausalLM is not supported"):
        resolve_base(REPO, quiet)
    assert hub.fetched() == ["config.json"]


@pytest.mark.parametrize(
    ("missing", "message"),
    [("*.safetensors", "no .*safetensors file"), ("t*.json", "tokenizer"), ("co*.json", "config")],
)
def test_a_model_that_lacks_something_is_refused_before_anything_large_is_fetched(missing, message, hub):
    for path in hub.folder.glob(missing):
        path.unlink()
    with pytest.raises(StartupError, match=message):
        resolve_base(REPO, quiet)
    assert "model.safetensors" not in hub.fetched()


@pytest.mark.parametrize("name", ["../secret.safetensors", "onnx/model.safetensors", "pytorch_model.bin"])
def test_an_index_can_only_name_safetensors_of_the_repository(name, hub):
    (hub.folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(StartupError, match=r"names .*, which is no safetensors file of it"):
        resolve_base(REPO, quiet)


def test_no_network_is_said(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(StartupError, match=r"cannot be reached for Tester/Tiny-Model .*Look at the network"):
        resolve_base(REPO, quiet)


def test_a_user_who_wants_to_be_offline_is(hub, monkeypatch):
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
        with pytest.raises(StartupError, match=f"not in the cache of the hub, and {name}=1 forbids"):
            resolve_base(REPO, quiet)
        monkeypatch.delenv(name)
    assert hub.requests == []


def test_a_folder_goes_before_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / REPO).mkdir(parents=True)
    assert str(resolve_base(REPO, quiet)) == REPO
    assert base_name(REPO, tmp_path / REPO) == "Tiny-Model"
    assert hub.requests == []


def test_a_typo_gets_what_is_possible():
    with pytest.raises(StartupError, match=r"Did you mean smollm2-135m\?.*folder.*ORG/NAME"):
        find_base("smollm2-135")
    with pytest.raises(StartupError, match="no such folder, and no embedded base") as caught:
        find_base("./models/llama")
    assert "Did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", HubId("org/name")),
        ("HuggingFaceTB/SmolLM2-360M-Instruct", HubId("HuggingFaceTB/SmolLM2-360M-Instruct")),
        ("org/name@refs/pr/3", HubId("org/name", "refs/pr/3")),
        *(
            (text, None)
            for text in ("name", "./org/name", "../name", "/org/name", "~/name", "a/b/c", "C:/x", "a/b@", "")
        ),
    ],
)
def test_ids(text, expected):
    assert parse_hub_id(text) == expected
    assert expected is None or str(expected) == text


def test_commands_fetch_and_then_do_without_the_hub(hub, tmp_path, make_persona):
    """Our own process is offline all the time; a folder of the cache has the model's name, not the commit's."""
    make_persona("guard")
    options = ("persona", "render", "guard", "--text", "Hi.", "--base", REPO, "--personas", str(tmp_path / "personas"))
    done = run(*options)
    assert done.returncode == 0, done.stderr
    assert "A guard." in done.stdout
    assert f"downloading {REPO}" in done.stderr
    hub.requests.clear()
    again = run(*options, HF_HUB_OFFLINE="1")
    assert (again.returncode, again.stdout) == (0, done.stdout)
    assert hub.requests == []
    wrong = run("persona", "check", "--base", "Tester/Typo", "--personas", str(tmp_path / "personas"))
    assert (wrong.returncode, len(wrong.stderr.strip().splitlines())) == (1, 2)  # the bar's label, and what is wrong
    assert "no model of that name" in wrong.stderr


async def test_a_daemon_speaks_with_a_base_of_the_hub(hub, tmp_path, make_persona, make_daemon):
    make_persona("guard")
    daemon = make_daemon("--base", f"{REPO}@v1.0", "--personas", str(tmp_path / "personas"), "--dtype", "float32")
    assert daemon.endpoint, daemon.read_log()
    assert daemon.endpoint["base"] == f"{REPO}@v1.0"
    async with await Client.connect(daemon.url, token=daemon.token) as client:
        assert client.welcome.base.name == "Tiny-Model"
        assert (await client.say("guard", "Hello.", max_tokens=3)).usage.completion > 0
