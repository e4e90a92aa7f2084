"""A base in 4 bits: made once, kept, made again when it is damaged, and complete in a folder of its own."""

import json
import os
import time

import pytest
import torch
from npc_kernels import cpu, gpu, reference
from npc_kernels.quant import Int4Weight, Int8Weight, dequantize
from test_checkpoints import gptq
from test_cli import run
from test_model import CPU, make_runner, make_sequence
from tiny import SIZES, make_model
from transformers import LlamaConfig, LlamaForCausalLM

from npc_runtime.engine import quantized
from npc_runtime.engine.model import Decoder, ModelShape
from npc_runtime.engine.scheduler import PlannedRow
from npc_runtime.engine.weights import describe_base, iterate_weights, read_config
from npc_runtime.errors import StartupError
from npc_runtime.loading import load_base
from npc_runtime.persona import shipped_personas


def quiet(*_):
    pass


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A tiny base, and a cache of its own."""
    monkeypatch.setenv("NPC_RUNTIME_CACHE", str(tmp_path / "cache"))
    make_model("llama", tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    (tmp_path / "base" / "other.gguf").write_text("weights in another format")
    return tmp_path / "base"


def load(folder, **options):
    options = {"dtype": torch.float32, "device": CPU, "on_progress": quiet, **options}
    return dict(quantized.load_quantized(describe_base(folder.name, folder), **options))


def write(folder, target=None):
    return quantized.write_quantized(describe_base(folder.name, folder), target, device=CPU, on_progress=quiet)


def read(folder, **options):
    return dict(iterate_weights(folder, dtype=torch.float32, device=CPU, on_progress=quiet, **options))


def assert_same(some, others):
    assert some.keys() == others.keys()
    for name, weight in some.items():
        assert type(weight) is type(others[name])
        for one, other in zip(parts(weight), parts(others[name]), strict=True):
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def parts(weight):
    return [weight] if isinstance(weight, torch.Tensor) else list(weight)


def refuse(*_):
    raise AssertionError("nothing is to be quantized")


def cached(tmp_path):
    return sorted((tmp_path / "cache" / "quantized").iterdir())


@pytest.mark.parametrize(("in_features", "group"), [(3072, 128), (576, 64), (96, 32), (48, 32)])
def test_groups_are_the_largest_that_fit(in_features, group):
    assert quantized.choose_group(in_features) == group


def test_linears_get_4_bits_and_the_head_8(base):
    dense, packed = read(base), load(base)
    for name, weight in packed.items():
        wide = dense["model.embed_tokens.weight" if name == "lm_head.weight" else name]
        if "_proj" in name:
            assert isinstance(weight, Int4Weight)
            assert (dequantize(weight) - wide).norm() < 0.12 * wide.norm()
        elif name == "lm_head.weight":
            assert isinstance(weight, Int8Weight)
            assert (dequantize(weight) - wide).norm() < 0.01 * wide.norm()
        else:
            assert torch.equal(weight, wide)
    assert packed.keys() == dense.keys() | {"lm_head.weight"}
    decoder = Decoder(read_config(base), packed.items(), gpu)
    assert decoder.head.bits == 8, "although it is tied to the embedding"
    assert torch.equal(decoder.embedding, dense["model.embed_tokens.weight"])


def test_the_second_start_reads_what_the_first_one_made(base, tmp_path, monkeypatch):
    first = load(base)
    (kept,) = cached(tmp_path)
    monkeypatch.setattr(quantized, "quantize_int4", refuse)
    monkeypatch.setattr(quantized, "quantize_int8", refuse)
    seen = []
    assert_same(first, load(base, on_progress=lambda label, fraction: seen.append((label, fraction))))
    assert seen[-1] == ("loading base in 4 bits", 1.0)
    assert write(base) == (kept, quantized._read_report(kept))


def test_another_base_is_another_entry(base, tmp_path):
    load(base)
    make_model("llama", tmp_path / "second", seed=1)
    load(tmp_path / "second")
    assert len(cached(tmp_path)) == 2


def test_files_that_were_written_anew_are_another_base(base, tmp_path):
    """The fingerprint reads only a file's header and its end."""
    load(base)
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    load(base)
    assert len(cached(tmp_path)) == 2


def cut_off(kept):
    path = kept / "model-00001.safetensors"
    os.truncate(path, path.stat().st_size - 5)


def lose(kept):
    (kept / "model-00001.safetensors").unlink()


def empty_index(kept):
    (kept / "model.safetensors.index.json").write_text("{}")


def forget_report(kept):
    (kept / "quantization.json").write_text('{"bytes": 3}')


@pytest.mark.parametrize("damage", [cut_off, lose, empty_index, forget_report])
def test_a_damaged_entry_is_made_again(damage, base, tmp_path, caplog):
    first = load(base)
    damage(cached(tmp_path)[0])
    assert_same(first, load(base))
    assert "is damaged" in caplog.text
    caplog.clear()
    load(base)
    assert not caplog.text


def test_without_room_for_the_cache_the_base_starts_all_the_same(base, tmp_path, monkeypatch, caplog):
    expected = load(base)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("NPC_RUNTIME_CACHE", str(tmp_path / "file"))
    assert_same(expected, load(base))
    assert caplog.text.count("every start makes it again") == 1


@pytest.mark.parametrize("step", ["add", "finish"])
def test_a_disk_that_becomes_full(step, base, tmp_path, monkeypatch, caplog):
    calls = []
    right = getattr(quantized.ModelFolder, step)

    def fail(self, *arguments):
        calls.append(arguments)
        if step == "finish" or len(calls) == 7:
            raise OSError(28, "No space left on device")
        return right(self, *arguments)

    monkeypatch.setattr(quantized.ModelFolder, step, fail)
    names = load(base).keys()
    assert "model.norm.weight" in names
    assert caplog.text.count("No space left on device") == 1
    assert cached(tmp_path) == []
    assert len(calls) == (7 if step == "add" else 1)
    calls.clear()
    with pytest.raises(StartupError, match=r"No space left.*NPC_RUNTIME_CACHE"):
        write(base)
    assert cached(tmp_path) == []


def test_what_killed_processes_left_is_swept(base, tmp_path):
    for name, age in (("making-old", 7200), ("making-new", 60)):
        (tmp_path / "cache" / "quantized" / name).mkdir(parents=True)
        os.utime(tmp_path / "cache" / "quantized" / name, (time.time() - age,) * 2)
    load(base)
    assert [path.name for path in cached(tmp_path) if path.name.startswith("making")] == ["making-new"]


def test_a_folder_of_its_own_is_complete(base, tmp_path, monkeypatch):
    monkeypatch.setattr("npc_runtime.engine.model_folder.SHARD_BYTES", 20_000)
    (tmp_path / "out").mkdir()
    (tmp_path / "making-something").mkdir()
    os.utime(tmp_path / "making-something", (0, 0))
    folder, report = write(base, tmp_path / "out")
    assert folder == tmp_path / "out"
    assert (tmp_path / "making-something").is_dir(), "that is somebody else's"
    assert not (tmp_path / "cache").exists()
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert {path.name for path in folder.iterdir() if path.suffix != ".safetensors"} == {
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "quantization.json",
        "tokenizer.json",
    }
    assert report.bytes_after == sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert report.bytes_before == (base / "model.safetensors").stat().st_size
    kinds = {f"{kind}_proj" for kind in ("q", "k", "v", "o", "gate", "up", "down")}
    assert report.errors.keys() == {*kinds, "lm_head"}
    assert all(0.02 < report.errors[kind]["median"] <= report.errors[kind]["worst"] < 0.12 for kind in kinds)
    assert read_config(folder).hidden_size == SIZES["hidden_size"]
    assert_same(load(base), read(folder, keeps_codes=True))
    with pytest.raises(StartupError, match="not an empty folder"):
        write(base, folder)
    with pytest.raises(StartupError, match="is quantized already"):
        write(folder)


def test_a_copy_of_a_tied_head_is_left_out(base):
    from safetensors.torch import load_file, save_file

    expected = load(base)["lm_head.weight"]
    tensors = load_file(base / "model.safetensors")
    save_file({"lm_head.weight": torch.zeros(97, 48), **tensors}, base / "model.safetensors")
    assert torch.equal(load(base)["lm_head.weight"].values, expected.values)
    quantizer = quantized.Quantizer(describe_base("base", base), CPU, quiet)
    assert [name for name, _ in quantizer.weights()].count("lm_head.weight") == 1


SMALL = ModelShape(16, 576, 1536, 9, 3, 64, 49152, 8192, 1e-5)
LARGE = ModelShape(28, 3072, 8192, 24, 8, 128, 128256, 8192, 1e-5)


@pytest.mark.parametrize(
    ("wanted", "shape", "kernels", "expected"),
    [
        ("auto", SMALL, gpu, False),
        ("auto", LARGE, gpu, True),
        ("auto", LARGE, cpu, False),
        ("auto", LARGE, reference, False),
        ("none", LARGE, gpu, False),
        ("none", LARGE, cpu, False),
        ("int4", SMALL, gpu, True),
    ],
)
def test_what_is_quantized_at_load(wanted, shape, kernels, expected, base):
    assert quantized.is_to_be_quantized(wanted, base, shape, kernels) == expected


@pytest.mark.parametrize(("reorders", "expected"), [(False, False), (True, True)])
def test_published_codes_are_kept_unless_no_kernel_reads_them(reorders, expected, base):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": gptq(desc_act=reorders)}))
    assert quantized.is_to_be_quantized("auto", base, LARGE, gpu) == expected
    assert quantized.is_to_be_quantized("int4", base, SMALL, gpu) == expected


@pytest.fixture(scope="module")
def speaking_base(tmp_path_factory, base_folder):
    """A tiny base with the embedded one's tokenizer."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("speaking") / "tiny"
    LlamaForCausalLM(LlamaConfig(**{**SIZES, "vocab_size": 49152})).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((base_folder / name).read_bytes())
    return folder


def logits(decoder):
    row = make_sequence(range(3, 20), 0)
    return make_runner(decoder).forward([PlannedRow(row, 0, row.num_tokens)])


def test_the_loaded_base_computes_with_its_codes(speaking_base, tmp_path, monkeypatch):
    """Quantized, from the cache, and from a folder of its own, where the reference computes it densely."""
    monkeypatch.setenv("NPC_RUNTIME_CACHE", str(tmp_path))
    write(speaking_base, tmp_path / "out")
    expected = logits(load_base(str(tmp_path / "out"), "float32", quiet, kernels=reference).decoder)
    for name in (speaking_base, speaking_base, tmp_path / "out"):
        quantize = "auto" if name == tmp_path / "out" else "int4"
        base = load_base(str(name), "float32", quiet, quantize=quantize, kernels=gpu)
        assert (base.decoder._layers[0].qkv.bits, base.decoder.head.bits) == (4, 8)
        assert "int4" in base.backend
        torch.testing.assert_close(logits(base.decoder), expected, atol=2e-4, rtol=1e-3)
    assert "int4" not in load_base(str(speaking_base), "float32", quiet, kernels=reference).backend


def test_int4_on_a_cpu_is_refused_with_a_remedy(speaking_base):
    with pytest.raises(StartupError, match=r"--quantize int4.*Leave it out"):
        load_base(str(speaking_base), "float32", quiet, quantize="int4", kernels=cpu)


def test_the_command_writes_and_reports(speaking_base, tmp_path, monkeypatch):
    monkeypatch.setenv("NPC_RUNTIME_CACHE", str(tmp_path))
    done = run("quantize", "--base", str(speaking_base), "--json")
    assert done.returncode == 0, done.stderr
    body = json.loads(done.stdout)
    assert body["bytes_after"] < body["bytes_before"]
    assert body["errors"]["down_proj"]["median"] > 0.02
    shown = run("quantize", "--base", str(speaking_base), "--out", str(tmp_path / "out"))
    assert shown.returncode == 0, shown.stderr
    assert "q_proj       off by" in shown.stdout
    assert str(tmp_path / "out") in shown.stdout
    refused = run("quantize", "--base", str(tmp_path / "out"))
    assert refused.returncode == 1
    assert "is quantized already" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    untrained = run("train", str(shipped_personas() / "odo"), "--base", str(tmp_path / "out"))
    assert untrained.returncode == 1
    assert "is quantized" in untrained.stderr
