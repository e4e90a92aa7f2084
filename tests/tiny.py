"""Tiny random models and adapters, made where a test needs them."""

import json

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

SIZES = dict(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)

CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama-untied-bias": lambda: LlamaConfig(**SIZES, tie_word_embeddings=False, attention_bias=True),
    "llama3-rope": lambda: LlamaConfig(
        **SIZES,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "yarn-rope": lambda: LlamaConfig(
        **SIZES,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=64),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES),
    "smollm3": lambda: SmolLM3Config(**SIZES, no_rope_layers=[1, 0, 1], use_sliding_window=False),
}


def make_model(name, folder, seed=0):
    """A random float32 model, saved to `folder`; biases and norms are random too, so that none can be forgotten."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    return model


def make_adapter(base, folder, *, rank=8, seed=0, std=0.05, name="base", **options):
    """A random LoRA of `base` (left unchanged) in PEFT's folder format; `B` is random too, else it would do nothing."""
    torch.manual_seed(seed)
    targets = options.pop(
        "target_modules", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    config = LoraConfig(
        r=rank,
        lora_alpha=options.pop("lora_alpha", 2 * rank),
        target_modules=targets,
        task_type="CAUSAL_LM",
        **options,
    )
    model = get_peft_model(base, config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(0, std)
    model.save_pretrained(folder)
    model.unload()
    path = folder / "adapter_config.json"
    written = json.loads(path.read_text())
    path.write_text(json.dumps({**written, "base_model_name_or_path": name}))
    return folder


def rewrite(folder, change):
    """Apply `change` to the tensors of an adapter folder."""
    from safetensors.torch import load_file

    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
