"""Writes `.nemo` files of LoRAs as NeMo does, from separate q, k, v, gate and up; knows nothing of the reader."""

import io
import tarfile

import torch
import yaml


def fuse_qkv(q, k, v, *, num_groups, head_dim):
    """Megatron's order: of every group its query heads, its key head, its value head."""
    rows = []
    per_group = len(q) // head_dim // num_groups
    for group in range(num_groups):
        for head in range(per_group):
            first = (group * per_group + head) * head_dim
            rows += [q[row] for row in range(first, first + head_dim)]
        for part in (k, v):
            rows += [part[row] for row in range(group * head_dim, (group + 1) * head_dim)]
    return torch.stack(rows)


def random_lora(config, *, rank, seed=0, std=0.1):
    """Tensors of a LoRA as NeMo trains it: q, k and v share A, and so do gate and up. By layer and linear: (A, B)."""
    torch.manual_seed(seed)
    size, inner = config.hidden_size, config.intermediate_size
    heads, groups = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    lora = {}
    for layer in range(config.num_hidden_layers):
        a_qkv, a_up = torch.randn(rank, size) / 5, torch.randn(rank, size) / 5
        lora[layer] = {
            "q": (a_qkv, std * torch.randn(heads, rank)),
            "k": (a_qkv, std * torch.randn(groups, rank)),
            "v": (a_qkv, std * torch.randn(groups, rank)),
            "o": (torch.randn(rank, heads) / 5, std * torch.randn(size, rank)),
            "gate": (a_up, std * torch.randn(inner, rank)),
            "up": (a_up, std * torch.randn(inner, rank)),
            "down": (torch.randn(rank, inner) / 5, std * torch.randn(size, rank)),
        }
    return lora


def state_dict(lora, config, *, variant="nemo", prefix="model.decoder.layers"):
    """NeMo's names; `variant` as in its lora_tuning: "nemo" is fused, "canonical" is not."""
    tensors = {}

    def put(layer, module, a, b):
        tensors[f"{prefix}.{layer}.{module}.linear_in.weight"] = a.clone()
        tensors[f"{prefix}.{layer}.{module}.linear_out.weight"] = b.clone()

    for layer, of in lora.items():
        attention, mlp = "self_attention.adapter_layer", "mlp.adapter_layer"
        if variant == "nemo":
            groups = dict(num_groups=config.num_key_value_heads, head_dim=config.head_dim)
            b = fuse_qkv(of["q"][1], of["k"][1], of["v"][1], **groups)
            put(layer, f"{attention}.lora_kqv_adapter", of["q"][0], b)
            put(layer, f"{mlp}.lora_hto4h_adapter", of["gate"][0], torch.cat([of["gate"][1], of["up"][1]]))
        else:
            for name in "qkv":
                put(layer, f"{attention}.lora_unfused_kqv_adapter.{name}_adapter", *of[name])
            for name in ("gate", "up"):
                put(layer, f"{mlp}.lora_unfused_hto4h_adapter.{name}_adapter", *of[name])
        put(layer, f"{attention}.lora_dense_attention_adapter", *of["o"])
        put(layer, f"{mlp}.lora_4htoh_adapter", *of["down"])
    return tensors


def model_config(config, *, rank, alpha, **changes):
    """What NeMo keeps of the training's configuration, as far as it matters here."""
    return {
        "restore_from_path": "/checkpoints/some-base.nemo",
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.num_key_value_heads,
        "kv_channels": config.head_dim,
        "peft": {
            "peft_scheme": "lora",
            "restore_from_path": None,
            "lora_tuning": {"variant": "nemo", "target_modules": ["all"], "adapter_dim": rank, "alpha": alpha},
        },
        **changes,
    }


def write_nemo(path, config, tensors, *, mode="w", front="./", extra=None):
    """The archive; `config` and `tensors` may be bytes, to write what no NeMo writes."""
    if not isinstance(tensors, bytes):
        buffer = io.BytesIO()
        torch.save(tensors, buffer)
        tensors = buffer.getvalue()
    config = config if isinstance(config, bytes) else yaml.safe_dump(config).encode()
    members = {"model_config.yaml": config, "model_weights.ckpt": tensors, **(extra or {})}
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            if data is not None:
                info = tarfile.TarInfo(front + name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def peft_tensors(lora):
    """The same LoRA in PEFT's names."""
    tensors = {}
    for layer, of in lora.items():
        for name, (a, b) in of.items():
            parent = "self_attn" if name in "qkvo" else "mlp"
            front = f"base_model.model.model.layers.{layer}.{parent}.{name}_proj"
            tensors[f"{front}.lora_A.weight"], tensors[f"{front}.lora_B.weight"] = a.clone(), b.clone()
    return tensors
