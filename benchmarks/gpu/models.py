"""Random models and adapters, made on the device without files; values do not change what anything costs."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from bench import bytes_of
from npc_kernels import gpu
from npc_kernels.batch import PAGE_RANK
from npc_kernels.quant import quantize_int4, quantize_int8
from shapes import Model
from torch import Tensor

from gpu.setup import Setup
from npc_runtime.engine.adapters import AdapterStore
from npc_runtime.engine.core import Request, SamplingParams, Sequence
from npc_runtime.engine.model import Decoder, ModelShape, PageLayout
from npc_runtime.engine.peft_folder import AdapterPages
from npc_runtime.engine.quantized import EMBEDDING, HEAD, LINEAR

__all__ = ["Base", "RandomCopies", "in_bits", "make_base", "make_config", "make_sequence", "make_store"]


@dataclass(frozen=True, slots=True)
class Base:
    """A decoder, and the bytes that a step must read of it."""

    decoder: Decoder
    num_bytes: int


def make_config(shape: ModelShape) -> Any:
    """The shape as transformers has it."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.context,
        rms_norm_eps=shape.norm_eps,
        tie_word_embeddings=True,
    )


def make_base(setup: Setup, model: Model, bits: int) -> Base:
    """A random base with a tied head; see `in_bits`."""
    torch.manual_seed(0)
    tensors = {name: in_bits(name, tensor, bits, model.group) for name, tensor in _tensors(model.shape, setup)}
    if bits == 4:
        tensors[HEAD] = in_bits(HEAD, tensors[EMBEDDING], bits, model.group)
    head = HEAD if HEAD in tensors else EMBEDDING
    num_bytes = sum(bytes_of(tensor) for name, tensor in tensors.items() if LINEAR.fullmatch(name) or name == head)
    return Base(Decoder(make_config(model.shape), tensors.items(), gpu), num_bytes)


def in_bits(name: str, weight: Any, bits: int, group: int) -> Any:
    """A tensor as `--quantize` would have it: with 4 bits the linears of the layers have 4 and the head 8."""
    if bits == 4 and name == HEAD:
        return quantize_int8(weight)
    return quantize_int4(weight, group) if bits == 4 and LINEAR.fullmatch(name) else weight


def _tensors(shape: ModelShape, setup: Setup) -> Iterator[tuple[str, Tensor]]:
    """The numbers of one layer again and again, each time in memory of their own: a cache would hold one layer."""

    def random(*size: int) -> Tensor:
        return torch.randn(size, device=setup.device, dtype=setup.dtype) / size[-1] ** 0.5

    def norm() -> Tensor:
        return torch.rand(shape.hidden, device=setup.device, dtype=setup.dtype) + 0.5

    layer = {
        "input_layernorm.weight": norm(),
        "post_attention_layernorm.weight": norm(),
        "self_attn.q_proj.weight": random(shape.q_size, shape.hidden),
        "self_attn.k_proj.weight": random(shape.kv_size, shape.hidden),
        "self_attn.v_proj.weight": random(shape.kv_size, shape.hidden),
        "self_attn.o_proj.weight": random(shape.hidden, shape.q_size),
        "mlp.gate_proj.weight": random(shape.intermediate, shape.hidden),
        "mlp.up_proj.weight": random(shape.intermediate, shape.hidden),
        "mlp.down_proj.weight": random(shape.hidden, shape.intermediate),
    }
    yield EMBEDDING, random(shape.vocab, shape.hidden)
    yield "model.norm.weight", norm()
    for number in range(shape.num_layers):
        yield from ((f"model.layers.{number}.{name}", tensor.clone()) for name, tensor in layer.items())


class RandomCopies:
    """In place of `HostCopies`: adapters that were never on disk, in main memory.

    With `shared` they all have the same numbers, once in memory: for measuring, where there are many.
    """

    def __init__(
        self, layout: PageLayout, ranks: Mapping[str, int], *, dtype: torch.dtype, shared: bool, pinned: bool = False
    ) -> None:
        self._layout = layout
        self._ranks = dict(ranks)
        self._dtype = dtype
        most = max(map(_num_pages, ranks.values()), default=0)
        self._shared = _random_pages(most, layout, dtype, seed=0) if shared else None
        if self._shared is not None and pinned:
            self._shared = self._shared.pin_memory()
        self._pages: dict[str, Tensor] = {}

    def add(self, name: str, parts: object, *, max_pages: int) -> AdapterPages:
        """Make the adapter; there are no files."""
        count = _num_pages(self._ranks[name])
        if self._shared is not None:
            self._pages[name] = self._shared[:count]
        else:
            self._pages[name] = _random_pages(count, self._layout, self._dtype, seed=len(self._pages))
            _blank_tail(self._pages[name], self._ranks[name], self._layout)
        return self.get(name)

    def size_of(self, name: str) -> int:
        """Pages that the adapter needs."""
        return len(self._pages[name])

    @property
    def sizes(self) -> dict[str, int]:
        """Pages that each adapter needs."""
        return {name: len(pages) for name, pages in self._pages.items()}

    @property
    def names(self) -> list[str]:
        """All adapters."""
        return list(self._pages)

    @property
    def has_dora(self) -> bool:
        """None of them is one."""
        return False

    @property
    def num_bytes(self) -> int:
        """What the adapters take."""
        return sum(pages.nbytes for pages in self._pages.values())

    def digest_of(self, name: str) -> str:
        """What identifies the adapter."""
        return name

    def get(self, name: str) -> AdapterPages:
        """The adapter."""
        return AdapterPages(self._pages[name], self._ranks[name], name, "random")


def _num_pages(rank: int) -> int:
    return -(-rank // PAGE_RANK)


def _random_pages(count: int, layout: PageLayout, dtype: torch.dtype, *, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return ((torch.rand(count, layout.num_elements, generator=generator) - 0.5) / 8).to(dtype)


def _blank_tail(pages: Tensor, rank: int, layout: PageLayout) -> None:
    """Zeros behind the last rank, as the adapter store has them."""
    first = (rank - 1) % PAGE_RANK + 1
    for span in layout.spans:
        pages[-1, span.start : span.b_start].view(-1, PAGE_RANK, span.in_features)[:, first:] = 0
        start = span.b_start
        for width in span.out_features:
            pages[-1, start : start + PAGE_RANK * width].view(PAGE_RANK, width)[first:] = 0
            start += PAGE_RANK * width


def make_store(
    decoder: Decoder,
    ranks: Mapping[str, int],
    *,
    shared: bool = False,
    pinned: bool = False,
    max_pages: int = 1 << 20,
) -> AdapterStore:
    """An open store of random adapters; the first ones are in the pool, as many as it has pages for."""
    store = AdapterStore(decoder.shape, decoder.layout, dtype=decoder.dtype, device=decoder.device, max_pages=max_pages)
    copies: Any = RandomCopies(decoder.layout, ranks, dtype=decoder.dtype, shared=shared, pinned=pinned)
    store.host = copies
    for name in ranks:
        store.add(name, ())
    store.open()
    return store


def make_sequence(number: int, prompt: tuple[int, ...], adapter: str | None, blocks: list[int]) -> Sequence:
    """A line that a runner can be given."""
    sampling = SamplingParams(seed=number, max_tokens=1 << 20)
    sequence = Sequence(Request(id=number, prompt_ids=prompt, sampling=sampling, arrival=0.0, adapter=adapter))
    sequence.blocks = blocks
    return sequence
