"""Chat templates and special tokens of the supported families, short and behaving as the published ones do."""

import json
from dataclasses import dataclass, field

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

CHATML = "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
BEGIN = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
ALTERNATE = (
    "{% for m in turns %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
)
SPLIT_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}"
    "{% else %}{% set turns = messages %}{% endif %}"
)

LLAMA3 = (
    "{{ bos_token }}"
    + SPLIT_SYSTEM.replace("['content']", "['content'] | trim")
    + "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: "
    "{{ date_string or '26 Jul 2024' }}\n\n{{ system or '' }}<|eot_id|>{% for m in turns %}"
    "<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA2 = (
    SPLIT_SYSTEM + ALTERNATE + "{% for m in turns %}{% if loop.first and system is defined %}"
    "{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m['content'] %}"
    "{% else %}{% set content = m['content'] %}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
SMOLLM2 = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "<|im_start|>system\nYou are SmolLM.<|im_end|>\n{% endif %}" + CHATML + "{% endfor %}" + BEGIN
)
SMOLLM3 = (
    "{% set mode = '/think' if enable_thinking is not defined or enable_thinking else '/no_think' %}"
    "<|im_start|>system\n{% if messages[0].role == 'system' %}{% set own = messages[0].content %}"
    "{% if '/no_think' in own %}{% set mode = '/no_think' %}{% elif '/think' in own %}{% set mode = '/think' %}"
    "{% endif %}{% set words = own.replace('/no_think', '').replace('/think', '').rstrip() %}{% endif %}"
    "{% if own and '/system_override' in own %}{{ words.replace('/system_override', '').rstrip() }}<|im_end|>\n"
    "{% else %}## Metadata\n\nReasoning Mode: {{ mode }}\n\n## Custom Instructions\n\n{{ words }}\n\n<|im_end|>\n"
    "{% endif %}{% for m in messages if m.role != 'system' %}{% if m.role == 'assistant' and mode == '/no_think' %}"
    "{%- generation -%}{{ '<|im_start|>assistant\n<think>\n\n</think>\n' + m.content.lstrip('\n') + '<|im_end|>\n' }}"
    "{%- endgeneration -%}{% else %}"
    + CHATML
    + "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if mode == '/no_think' %}<think>\n\n</think>\n{% endif %}{% endif %}"
)
QWEN25 = SMOLLM2.replace("You are SmolLM.", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.")
QWEN3 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% set content = m.content %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<|im_start|>assistant\n{{ content }}<|im_end|>\n{% else %}" + CHATML + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
MISTRAL1 = (
    "{% set turns = messages %}{{ bos_token }}" + ALTERNATE + "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
MISTRAL3 = (
    "{{ bos_token }}" + SPLIT_SYSTEM + ALTERNATE + "{% for m in turns %}{% if m['role'] == 'user' %}"
    "{% if loop.last and system is defined %}{{ '[INST] ' + system + '\n\n' + m['content'] + '[/INST]' }}"
    "{% else %}{{ '[INST] ' + m['content'] + '[/INST]' }}{% endif %}"
    "{% else %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL7 = (
    "{{ bos_token }}" + SPLIT_SYSTEM + ALTERNATE + "{% if system is defined %}[SYSTEM_PROMPT]{{ system }}"
    "[/SYSTEM_PROMPT]{% endif %}{% for m in turns %}{% if m['role'] == 'user' %}[INST]{{ m['content'] }}[/INST]"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
VICUNA = (
    SPLIT_SYSTEM + "{{ system or '' }}{% for m in turns %}{{ ' USER: ' if m['role'] == 'user' else ' ASSISTANT: ' }}"
    "{{ m['content'] }}{{ '</s>' if m['role'] == 'assistant' else '' }}{% endfor %} ASSISTANT:"
)
ALPACA = (
    SPLIT_SYSTEM + "{{ system or '' }}\n\n{% for m in turns %}{{ '### Instruction:' if m['role'] == 'user' else "
    "'### Response:' }}\n{{ m['content'] }}\n\n{% endfor %}### Response:\n"
)

IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA_HEADERS = ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>")
THINK = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
INST = ("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]")


@dataclass(frozen=True)
class Family:
    """A family: `special` and `plain` are added tokens, `words` are markers that are plain text in its template."""

    template: str | None
    special: tuple[str, ...]
    bos: str | None = None
    eos: str = "</s>"
    plain: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    normalizer: str | None = None
    is_sentencepiece: bool = False
    lost: tuple[str, ...] = field(default=())  # what the template takes out of messages


FAMILIES = {
    "llama3": Family(LLAMA3, LLAMA_HEADERS, "<|begin_of_text|>", "<|eot_id|>"),
    "llama2": Family(
        LLAMA2, ("<s>", "</s>"), "<s>", words=("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"), is_sentencepiece=True
    ),
    "smollm2": Family(SMOLLM2, (*IM, "<repo_name>"), eos="<|im_end|>"),
    "smollm3": Family(SMOLLM3, (*IM, *THINK[:2]), eos="<|im_end|>", lost=("/no_think", "/think", "/system_override")),
    "qwen2.5": Family(QWEN25, IM, eos="<|im_end|>", plain=THINK[2:4], normalizer="NFC"),
    "qwen3": Family(QWEN3, IM, eos="<|im_end|>", plain=THINK, normalizer="NFC", lost=("</think>",)),
    "mistral-0.1": Family(MISTRAL1, ("<s>", "</s>"), "<s>", words=("[INST]", "[/INST]"), is_sentencepiece=True),
    "mistral-0.3": Family(MISTRAL3, ("<s>", "</s>", *INST), "<s>"),
    "mistral-7": Family(MISTRAL7, ("<s>", "</s>", *INST, "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"), "<s>"),
    "no-template": Family(None, ("<s>", "</s>"), "<s>", words=("Player:", "Reply:")),
    "vicuna": Family(VICUNA, ("<s>", "</s>"), words=("USER:", "ASSISTANT:"), is_sentencepiece=True),
    "alpaca": Family(ALPACA, ("<s>", "</s>"), words=("### Instruction:", "### Response:"), is_sentencepiece=True),
    # Found nowhere in this form, but a tokenizer may: tokens that only appear when the text was normalized.
    "normalizing": Family(SMOLLM2, (), eos="<|im_end|>", plain=IM, normalizer="NFKC"),
}


def make_base(name, folder):
    """Write a model folder with the family's tokenizer (bytes, no merges) and template; no weights."""
    family = FAMILIES[name]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _sentencepiece() if family.is_sentencepiece else _bytes(family.normalizer)
    is_hidden = family.normalizer == "NFKC"
    tokenizer.add_tokens([AddedToken(token, normalized=is_hidden, special=False) for token in family.plain])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in family.special])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": family.bos, "eos_token": family.eos}
    config |= {"chat_template": family.template} if family.template else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def _bytes(normalizer):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: number for number, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = getattr(normalizers, normalizer)()
    return tokenizer


def _sentencepiece():
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(33, 127))]
    tokenizer = Tokenizer(
        models.BPE({piece: number for number, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


SPEAKER = {
    "schema": 1,
    "id": "odo",
    "display_name": "Odo",
    "bio": "The innkeeper of the Lantern",
    "personality": "Nervous.",
    "speech_style": "Hurried!",
    "scenario": "The taproom, late",
    "goals": ["to sell the last barrel", "peace"],
    "knows": [
        {"id": "mill", "text": "The mill is empty"},
        {"id": "king", "text": "{{char}} saw the king fall", "when": 'king == "dead"'},
        {"id": "feast", "text": "There will be a feast", "when": 'king != "dead"'},
        {"id": "road", "text": "The road is closed.", "when": '"road" in said', "priority": 5},
    ],
    "never_says": ["okay"],
    "guardrails": {"avoid": ["dice"], "stay_in_character": True},
    "examples": [{"player": "Hello, {{char}}.", "npc": "Oh! Hello, {{user}}."}],
    "locale": "de-AT",
    "post_history_instructions": "Be brief",
}


def speak(tokenizer):
    """One line of a persona with everything: two earlier turns, context, facts."""
    from npc_runtime.persona import Persona
    from npc_runtime.prompt import Context

    history = [{"role": "user", "content": "Is the road open?"}, {"role": "assistant", "content": "I think so."}]
    context = Context(scene="The taproom", mood="tense", nearby=("Brom",), facts=("It rains",))
    persona = Persona.model_validate(SPEAKER)
    return tokenizer.render(
        persona.messages(history, "Which road?", speaker="Ada", context=context, facts={"king": "dead"})
    )
