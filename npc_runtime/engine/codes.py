"""The codes of the embedded base, as its GGUF has them; the dense weights beside it hold the same numbers."""

from pathlib import Path
from typing import Any

import torch
from npc_kernels.batch import Codes

from npc_runtime.engine.embedded import hugging_face_name, unpermute

__all__ = ["read_codes"]


def read_codes(folder: Path) -> dict[str, Codes]:
    """Codes of every linear and of the embedding by tensor name; empty for a base that was not published so."""
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
        name = hugging_face_name(tensor.name)
        kind = name.split(".")[-2]
        data = unpermute(tensor.data, heads[kind]) if kind in heads else tensor.data
        if tensor.tensor_type == GGMLQuantizationType.Q4_1:
            codes[name] = _split(data, block_bytes=20, factor_bytes=4)
        elif tensor.tensor_type == GGMLQuantizationType.Q8_0:
            codes[name] = _split(data, block_bytes=34, factor_bytes=2)
    return codes


def _split(data: Any, *, block_bytes: int, factor_bytes: int) -> Codes:
    """Blocks of 32 weights: scale and, with 4 bits, minimum in float16, then the codes."""
    import numpy as np

    blocks = data.reshape(len(data), -1, block_bytes)
    factors = np.ascontiguousarray(blocks[..., :factor_bytes]).view(np.float16).astype(np.float32)
    has_minimum = factor_bytes == 4
    values = np.ascontiguousarray(blocks[..., factor_bytes:])
    return Codes(
        values=torch.from_numpy(values if has_minimum else values.view(np.int8)),
        scale=torch.from_numpy(np.ascontiguousarray(factors[..., 0])),
        minimum=torch.from_numpy(np.ascontiguousarray(factors[..., 1])) if has_minimum else None,
    )
