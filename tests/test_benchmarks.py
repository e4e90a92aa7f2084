"""The bench scripts without the peers: options, adapters and their GGUF form, prompts, turns, JSON, picture."""

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import peers
import pytest
from lora_gguf import interleave_halves, write_lora_gguf
from picture import draw
from place import Place
from processes import Group, Skipped, Worker, make_venv
from race import Race
from report import results_of, skipped_of, tables_of
from workload import Cell, Measured, default_grid, make_adapter, prompts_of

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the bench stops processes by POSIX signals")

ROOT = Path(__file__).parents[1]

CONFIG = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2_000,
}
MACHINE = {"cpu": "a <fast> one", "physical_cores": 2, "isa": ["avx2"], "memory_gib": 8, "system": "Linux"}
KEYS = (
    "system",
    "npcs",
    "adapters",
    "rank",
    "prompt_tokens",
    "new_tokens",
    "tokens_per_s",
    "last_line_s",
    "ttft_p50_ms",
)


def test_options_narrow_the_run():
    options = peers.parse_options(["--peers", "peft,llama-server", "--npcs", "8", "--avx2"])
    assert options.peers == ["llama-server", "peft"]
    assert options.npcs == [8]
    assert options.avx2
    assert not peers.is_complete(options, {})
    assert peers.is_complete(peers.parse_options(["--avx2"]), {})
    assert not peers.is_complete(peers.parse_options([]), {"peft": "no network"})
    assert peers.parse_options([]).peers == list(peers.PEERS)
    assert peers.parse_options(["--peers", "none"]).peers == []


@pytest.mark.parametrize("arguments", [["--peers", "ollama"], ["--npcs", "0"], ["--npcs", "x"]])
def test_wrong_options_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        peers.parse_options(arguments)
    assert arguments[1] in capsys.readouterr().err


def test_the_default_grid():
    cells = [(cell.npcs, cell.rank, cell.prompt_tokens) for cell in default_grid([1, 8, 32], [43, 400, 1000])]
    assert cells == [(1, 16, 43), (8, 16, 43), (8, 16, 400), (8, 16, 1000), (8, "mixed", 43), (32, 16, 43)]
    assert Cell(5, "mixed", 43).adapters == ("r8-00", "r16-01", "r32-02", "r64-03", "r8-04")
    assert Cell(2, 0, 43).adapters == ()


def test_prompts_are_new_in_every_round_and_differ_from_the_first_token():
    cell = Cell(32, 16, 43)
    first, second = (prompts_of(cell, salt, vocabulary=49_152) for salt in ("0.0", "1.0"))
    assert first == prompts_of(cell, "0.0", vocabulary=49_152)
    assert {len(prompt) for prompt in first} == {43}
    starts = [prompt[0] for prompt in first + second]
    assert len(set(starts)) > 60


def test_an_adapter_is_the_same_in_gguf(tmp_path):
    """Applied to the same input, B·A of the file gives the rows of the folder's, in llama.cpp's order."""
    import gguf
    from safetensors.numpy import load_file

    make_adapter(tmp_path / "r8-03", CONFIG, name="r8-03")
    write_lora_gguf(tmp_path / "r8-03", CONFIG, tmp_path / "out" / "r8-03.gguf")
    reader = gguf.GGUFReader(tmp_path / "out" / "r8-03.gguf")
    assert reader.fields["general.type"].contents() == "adapter"
    assert reader.fields["general.architecture"].contents() == "llama"
    assert reader.fields["adapter.type"].contents() == "lora"
    assert reader.fields["adapter.lora.alpha"].contents() == 8.0
    written = {tensor.name: tensor.data for tensor in reader.tensors}
    tensors = load_file(tmp_path / "r8-03" / "adapter_model.safetensors")
    assert len(written) == len(tensors) == 2 * 7 * CONFIG["num_hidden_layers"]
    head = "base_model.model.model.layers.1."
    np.testing.assert_array_equal(written["blk.1.ffn_up.weight.lora_b"], tensors[f"{head}mlp.up_proj.lora_B.weight"])
    np.testing.assert_array_equal(
        written["blk.1.attn_q.weight.lora_a"], tensors[f"{head}self_attn.q_proj.lora_A.weight"]
    )
    rows = written["blk.1.attn_k.weight.lora_b"].reshape(2, 6, 2, 8)  # heads, pairs, which half, rank
    np.testing.assert_array_equal(rows.swapaxes(1, 2).reshape(24, 8), tensors[f"{head}self_attn.k_proj.lora_B.weight"])


def test_rows_are_interleaved_within_each_head():
    rows = np.arange(16).reshape(16, 1)
    assert interleave_halves(rows, 2).ravel().tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]


def test_the_interleaving_is_that_of_the_published_base(base_folder):
    """The embedded base's q weights, as transformers has them, interleaved: the rows of the published GGUF."""
    import gguf
    from safetensors import safe_open

    config = json.loads((base_folder / "config.json").read_text())
    with safe_open(base_folder / "model.safetensors", "np") as file:
        weight = file.get_tensor("model.layers.0.self_attn.q_proj.weight")
    tensors = gguf.GGUFReader(base_folder / "published.gguf").tensors
    (published,) = (tensor for tensor in tensors if tensor.name == "blk.0.attn_q.weight")
    values = gguf.quants.dequantize(published.data, published.tensor_type)
    np.testing.assert_allclose(interleave_halves(weight, config["num_attention_heads"]), values, atol=1e-6)


def test_our_engine_takes_turns_and_is_reported(tmp_path, base_folder):
    """A whole race of ours alone: worker, counts, table, JSON row."""
    place = Place.at(tmp_path / "bench", base_folder)
    options = peers.parse_options(["--peers", "none"])
    systems = peers.make_systems(place, options)
    cell = Cell(2, 16, 40, new_tokens=3, rounds=1)
    race = Race(place, systems, limit_s=60, minutes=0, say=lambda text: None)
    try:
        race.run(cell, upcoming=[])
    finally:
        race.close()
    assert [entry.reason for entry in race.entries] == ["", "", ""]
    results = results_of(race.entries)
    assert [(row["system"], row["adapters"], row["rank"]) for row in results] == [
        ("npc-runtime", 2, 16),
        ("npc-runtime", 0, 0),
        ("npc-runtime-daemon", 2, 16),
    ]
    for row in json.loads(json.dumps(results)):
        assert set(KEYS) <= row.keys()
        assert row["new_tokens"] == 3
        assert row["tokens_per_s"] > 0
        assert row["ttft_p50_ms"] > 0
        assert row["prompt_tokens"] == 40
    assert "npc-runtime-daemon" in tables_of(race.entries, cell)
    assert all(system.group is None for system in systems)


class Broken:
    """A system that cannot be set up, or speaks too little."""

    name, variant, group = "broken", "", None

    def key(self, cell):
        return cell

    def set_up(self, on_progress):
        raise Skipped("there is no compiler")

    def open(self, cell):
        self.group = Group(["sleep", "60"], log=self.log)

    def speak(self, cell, prompts, limit_s):
        return Measured(1.0, (0.5,), (cell.new_tokens - 1,) * cell.npcs, 20)

    def close(self):
        if self.group:
            self.group.close()
            self.group = None


def test_a_peer_that_cannot_be_set_up_is_skipped_with_the_reason():
    ready, skipped = peers.set_up([Broken()], lambda label, fraction: None)
    assert ready == []
    assert skipped == {"broken": "there is no compiler"}


def test_too_few_tokens_are_no_measurement(tmp_path, base_folder):
    system = Broken()
    system.log = tmp_path / "broken.log"
    race = Race(Place.at(tmp_path, base_folder), [system], limit_s=5, minutes=0, say=lambda text: None)
    cell = Cell(2, 16, 40, new_tokens=8, rounds=2)
    race.run(cell, upcoming=[])
    adapted, plain = race.entries
    assert "generated [7] tokens on 2 lines, not 8" in adapted.reason
    assert plain.reason == "it was ended before"
    assert results_of(race.entries) == []
    assert [(out["system"], out["npcs"]) for out in skipped_of(race.entries)] == [("broken", 2)] * 2
    assert "skipped: generated" in tables_of(race.entries, cell)
    assert system.group is None


def test_a_worker_that_dies_or_hangs_is_skipped(tmp_path):
    script = tmp_path / "hangs.py"
    script.write_text("import time; time.sleep(60)")
    group = Group([sys.executable, str(script)], log=tmp_path / "log")
    with pytest.raises(Skipped, match="no answer within 0 s"):
        group.read_line(0.2)
    group.close()
    assert group.process.returncode is not None
    worker = Worker(Path(sys.executable), "no_such_script.py", log=tmp_path / "log")
    with pytest.raises(Skipped, match=r"no_such_script|process ended"):
        worker.start()
    worker.group.close()


def test_a_venv_that_cannot_be_made_says_why(tmp_path):
    steps = [["install", "--no-index", "no-such-package-as-this"]]
    with pytest.raises(Skipped, match="no-such-package-as-this"):
        make_venv(tmp_path / "peer", steps, lambda label, fraction: None, env={})


def row(system, npcs, speed, **more):
    values = (system, npcs, npcs, 16, 43, 100, speed, 1.0, None)
    return {**dict(zip(KEYS, values, strict=True)), **more}


def test_the_picture_is_well_formed_and_says_the_ratio():
    results = [
        row("npc-runtime", 8, 300.0),
        row("npc-runtime-daemon", 8, 290.0),
        row("npc-runtime", 8, 200.0, env="AVX2"),
        row("llama-server", 8, 100.0, variant="Q4_1"),
        row("npc-runtime", 8, 150.0, prompt_tokens=1000),
    ]
    text = draw({"machine": MACHINE, "results": results})
    root = ElementTree.fromstring(text)
    words = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "300   3.0 × llama-server" in words
    assert "8 NPCs at once" in words
    assert "llama-server (Q4_1)" in words
    assert len(list(root.iter("{http://www.w3.org/2000/svg}rect"))) == 3
    assert ElementTree.fromstring(draw({"machine": MACHINE, "results": []})) is not None


def test_the_overhead_is_measured_from_end_to_end():
    """Three lines, two rounds; a text cannot arrive before it is made, nor much later than its tick."""
    options = [ROOT / "benchmarks" / "overhead.py", "--npcs", "3", "--rounds", "1", "--json-frames"]
    done = subprocess.run([sys.executable, "-P", *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    body = json.loads(done.stdout.splitlines()[-1])
    assert body["direct_tokens_per_s"] > 0
    assert 0.1 < body["share"] < 10
    assert 0 < body["late_p50_ms"] <= body["late_p99_ms"] < 5_000
