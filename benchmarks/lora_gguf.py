"""A PEFT folder as the GGUF file that llama.cpp's `--lora` reads.

llama.cpp keeps the rows of q and k of a Llama model in another order than transformers does: the two halves of each
head, which the rotary embedding pairs, are interleaved. A LoRA's B has one row per output, so B of q and k is put
into the same order; A stays as it is.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["interleave_halves", "write_lora_gguf"]

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TENSOR = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.((?:self_attn|mlp)\.\w+)\.lora_([AB])\.weight")


def interleave_halves(
    rows: np.ndarray[Any, Any],  # (heads * head_size, anything)
    num_heads: int,
) -> np.ndarray[Any, Any]:
    """Reorder each head's rows 0 1 2 3 | 4 5 6 7 to 0 4 1 5 2 6 3 7."""
    halves = rows.reshape(num_heads, 2, -1, rows.shape[-1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def write_lora_gguf(folder: Path, base: dict[str, Any], target: Path) -> None:
    """Convert the adapter in `folder`, made for a Llama model of configuration `base`."""
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    heads = {"self_attn.q_proj": base["num_attention_heads"], "self_attn.k_proj": base["num_key_value_heads"]}
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(".part")
    writer = gguf.GGUFWriter(part, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(config["lora_alpha"]))
    for name, tensor in sorted(load_file(folder / "adapter_model.safetensors").items()):
        layer, module, side = _parse(name)
        if side == "B" and module in heads:
            tensor = interleave_halves(tensor, heads[module])
        writer.add_tensor(f"blk.{layer}.{NAMES[module]}.weight.lora_{side.lower()}", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.replace(target)


def _parse(name: str) -> tuple[int, str, str]:
    found = TENSOR.fullmatch(name)
    if not found or found[2] not in NAMES:
        raise ValueError(f"{name} is not a LoRA tensor of a Llama linear")
    return int(found[1]), found[2], found[3]
