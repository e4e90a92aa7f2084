"""The 4-bit codes of the embedded base, as its GGUF has them; the dense weights beside it hold the same numbers."""

from pathlib import Path
from typing import Any

import torch
from npc_kernels.batch import Codes

from npc_runtime.engine.embedded import hugging_face_name, unpermute

__all__ = ["read_codes"]

BLOCK_BYTES = 20  # of Q4_1: scale and minimum in float16, then 16 bytes of codes


def read_codes(folder: Path) -> dict[str, Codes]:
    """Codes of every linear by tensor name; empty for a base that was not published in 4 bits."""
    path = folder / "published.gguf"
    if not path.is_file():
        return {}
    from gguf import GGMLQuantizationType, GGUFReader

    reader = GGUFReader(str(path))
    heads = {
        kind: reader.fields[f"llama.attention.{field}"].contents()
        for kind, field in (("q_proj", "head_count"), ("k_proj", "head_count_kv"))
    }
    codes = {}
    for tensor in reader.tensors:
        if tensor.tensor_type == GGMLQuantizationType.Q4_1:
            name = hugging_face_name(tensor.name)
            kind = name.split(".")[-2]
            codes[name] = _split(unpermute(tensor.data, heads[kind]) if kind in heads else tensor.data)
    return codes


def _split(data: Any) -> Codes:
    import numpy as np

    blocks = data.reshape(len(data), -1, BLOCK_BYTES)
    factors = np.ascontiguousarray(blocks[..., :4]).view(np.float16).astype(np.float32)
    return Codes(
        values=torch.from_numpy(np.ascontiguousarray(blocks[..., 4:])),
        scale=torch.from_numpy(np.ascontiguousarray(factors[..., 0])),
        minimum=torch.from_numpy(np.ascontiguousarray(factors[..., 1])),
    )
