"""What 4 and 8 bits cost: perplexity, and KL divergence of the logits from those of bfloat16 weights.

    python benchmarks/quality.py [--tokens 10000]

The text is our own: what players and NPCs say in the personas' training lines, as conversations behind each persona's
prompt; the prompt itself is not scored. Every variant is computed in float32 with the weights that its codes stand for,
so that nothing but the weights differs. Prints the machine, a table, and one JSON line last.
"""

import argparse
import json
import math
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from npc_kernels import reference
from npc_kernels.batch import BatchMetadata
from npc_kernels.quant import dequantize, quantize_int4, quantize_int8
from torch import Tensor

from npc_runtime.console import progress_bars, stderr
from npc_runtime.engine.bases import resolve_base
from npc_runtime.engine.embedded import EMBEDDED_BASE
from npc_runtime.engine.model import Decoder, KvCache
from npc_runtime.engine.tokenizer import ChatTokenizer
from npc_runtime.engine.weights import iterate_weights, read_config
from npc_runtime.persona import Library, Persona, shipped_personas

CPU, BLOCK_SIZE, LINES_OF_A_TEXT = torch.device("cpu"), 16, 20


@dataclass(frozen=True, slots=True)
class Text:
    """A conversation, and where what is scored begins."""

    token_ids: Tensor
    start: int


@dataclass(frozen=True, slots=True)
class Variant:
    """What becomes of the weights."""

    name: str
    linear: Callable[[Tensor], Tensor]
    head: Callable[[Tensor], Tensor] | None = None  # None: as the embedding


@dataclass(frozen=True, slots=True)
class Result:
    """A row of the table."""

    variant: str
    perplexity: float
    mean_kl: float  # nats a token
    p99_kl: float


def int4(group: int, *, uses_all_codes: bool = True) -> Callable[[Tensor], Tensor]:
    """To 4 bits and back."""
    return lambda weight: dequantize(quantize_int4(weight, group, uses_all_codes=uses_all_codes))


def int8(weight: Tensor) -> Tensor:
    """To 8 bits and back."""
    return dequantize(quantize_int8(weight))


def bfloat16(weight: Tensor) -> Tensor:
    """To bfloat16 and back."""
    return weight.bfloat16().float()


VARIANTS = (
    Variant("bf16", bfloat16, bfloat16),
    Variant("as published (float32)", lambda weight: weight),
    Variant("int8", int8, bfloat16),
    Variant("bf16, int8 head", bfloat16, int8),
    *(
        Variant(f"int4, groups of {group}, plain rounding", int4(group, uses_all_codes=False), bfloat16)
        for group in (64, 32)
    ),
    *(Variant(f"int4, groups of {group}", int4(group), bfloat16) for group in (64, 32)),
    Variant("int4, groups of 64, int8 head", int4(64), int8),
)
"""The first one is what the others are compared with."""


def main() -> None:
    """Measure all variants."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=10_000, help="score at least so many, if the lines suffice")
    options = parser.parse_args()
    with progress_bars(stderr()) as report:
        folder = resolve_base(EMBEDDED_BASE, report)
    weights = dict(iterate_weights(folder, dtype=torch.float32, device=CPU, on_progress=lambda fraction: None))
    texts = list(read_texts(ChatTokenizer(folder), options.tokens))
    num_tokens = sum(len(text.token_ids) - text.start for text in texts)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    print(f"{machine}; {EMBEDDED_BASE}, {num_tokens} tokens of {len(texts)} conversations")
    print(f"{'weights':<36} {'perplexity':>10} {'mean KL':>9} {'p99 KL':>9}", flush=True)
    results: list[Result] = []
    expected: list[Tensor] = []
    for variant in VARIANTS:
        row = measure(variant, build(variant, weights, read_config(folder)), texts, expected)
        print(f"{row.variant:<36} {row.perplexity:>10.2f} {row.mean_kl:>9.4f} {row.p99_kl:>9.3f}", flush=True)
        results.append(row)
    body = {"benchmark": "quality", "machine": machine, "base": EMBEDDED_BASE, "tokens": num_tokens}
    print(json.dumps({**body, "results": [asdict(result) for result in results]}))


def read_texts(tokenizer: ChatTokenizer, num_tokens: int) -> Iterator[Text]:
    """Conversations of each persona in turn, until there are enough tokens."""
    talks = {persona: read_lines(persona) for persona in Library.load(shipped_personas()) if persona.adapter}
    for first in range(0, max(map(len, talks.values())), LINES_OF_A_TEXT):
        for persona, lines in talks.items():
            if num_tokens > 0 and first < len(lines):
                text = make_text(tokenizer, persona, lines[first : first + LINES_OF_A_TEXT])
                num_tokens -= len(text.token_ids) - text.start
                yield text


def read_lines(persona: Persona) -> list[dict[str, str]]:
    """What players and the NPC said."""
    text = (persona.folder / "lines.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def make_text(tokenizer: ChatTokenizer, persona: Persona, lines: list[dict[str, str]]) -> Text:
    """A conversation of some lines behind the persona's prompt."""
    *prompt, _ = persona.messages([], "x")
    turns = [
        {"role": role, "content": line[who]}
        for line in lines
        for role, who in (("user", "player"), ("assistant", "npc"))
    ]
    token_ids = tokenizer.render([*prompt, *turns]).token_ids
    others = tokenizer.render([*prompt, {"role": "user", "content": "\N{SNOWMAN}"}]).token_ids
    start = next(place for place, pair in enumerate(zip(token_ids, others, strict=False)) if pair[0] != pair[1])
    return Text(torch.tensor(token_ids), start)


def build(variant: Variant, weights: dict[str, Tensor], config: object) -> Decoder:
    """The base with other weights."""
    changed = {name: variant.linear(value) if "_proj.weight" in name else value for name, value in weights.items()}
    decoder = Decoder(config, changed.items(), reference)
    if variant.head:
        decoder.head = reference.Linear(variant.head(weights["model.embed_tokens.weight"]))
    return decoder


@torch.no_grad()
def score(decoder: Decoder, text: Text) -> Tensor:  # (scored tokens, vocabulary)
    """Log-probabilities of what comes at each scored place."""
    num_tokens = len(text.token_ids)
    num_blocks, everywhere = -(-num_tokens // BLOCK_SIZE), torch.arange(num_tokens)
    kv = KvCache.allocate(
        decoder.shape, num_blocks=num_blocks, block_size=BLOCK_SIZE, dtype=decoder.dtype, device=decoder.device
    )
    batch = BatchMetadata(
        positions=everywhere,
        kv_slots=everywhere,
        num_decode=0,
        row_starts=(0, num_tokens),
        block_tables=torch.arange(num_blocks)[None],
        block_size=BLOCK_SIZE,
        max_seen=num_tokens,
        lora=None,
    )
    places = everywhere[text.start - 1 : -1]
    return torch.log_softmax(decoder.forward(text.token_ids, places, decoder.plan(batch), kv), -1)


def measure(variant: Variant, decoder: Decoder, texts: list[Text], expected: list[Tensor]) -> Result:
    """Perplexity, and how far the distributions are from the expected ones; the first variant's are put there."""
    losses, diverged, is_first = [], [], not expected
    for number, text in enumerate(texts):
        found = score(decoder, text)
        if is_first:
            expected.append(found)
        wide = expected[number]
        losses.append(-found.gather(1, text.token_ids[text.start :, None])[:, 0])
        diverged.append((wide.exp() * (wide - found)).sum(-1).clamp(min=0))
    kl = torch.cat(diverged)
    perplexity = math.exp(torch.cat(losses).double().mean())
    return Result(variant.name, perplexity, float(kl.mean()), float(kl.quantile(0.99)))


if __name__ == "__main__":
    main()
