"""Every Triton kernel against its torch twin on the GPU at hand: ms, GB/s, and the share of the floor.

    python kernels/bench.py                             Llama-3.2-3B, 1, 8 and 32 rows, rank 16
    python kernels/bench.py --model Qwen3-4B --rows 8 --rank 64

Rows decode at position 93 (the middle of 100 tokens after a prompt of 43), each with an adapter of its own. The floor
is what the bytes that must be read and written take at the copy bandwidth measured here. Kernels run alone, with the
L2 cache flushed before each run, so that the time of a launch is in every line; a layer in a CUDA graph has less of it.
Fails if a kernel and its twin disagree. Prints the machine, a table, and one JSON line last. Needs an NVIDIA GPU.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from npc_kernels import gpu, lora, reference
from npc_kernels.batch import BatchMetadata, LoraBatch, LoraSpan
from npc_kernels.gemm import Activations, Planes
from npc_kernels.quant import Int4Weight, Int8Weight, dequantize, quantize_int4, quantize_int8
from npc_kernels.reference import HeadNorms, Settings
from shapes import MODELS, Model
from torch import Tensor

from npc_runtime.engine.model import PageLayout

POSITION, BLOCK_SIZE, EPS = 93, 16, 1e-5
TOLERANCE = 5e-2  # of the largest number: what bfloat16 leaves of sums over thousands of inputs


class Case(NamedTuple):
    """One kernel, its twin, and the bytes that neither can do without."""

    name: str
    ours: Callable[[], Tensor]
    twin: Callable[[], Tensor]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Bench:
    """A decode step of one layer."""

    model: Model
    num_rows: int
    rank: int
    device: torch.device
    dtype: torch.dtype = torch.bfloat16

    def cases(self) -> Iterator[Case]:
        """Every kernel with the tensors of this step."""
        size, layout = self.model.shape, PageLayout.of(self.model.shape)
        batch = self._batch(layout)
        angles = torch.rand(128, size.head_dim // 2, device=self.device)
        plans = gpu.plan(batch, angles.cos(), angles.sin()), reference.plan(batch, angles.cos(), angles.sin())
        of_qkv, of_o, of_gate_up, of_down = layout.layers[0]
        yield from self._adapters(plans, of_gate_up)
        for name, span in (("qkv", of_qkv), ("o", of_o), ("gate_up", of_gate_up), ("down", of_down)):
            yield from self._project(name, plans, span)
        yield self._finish_qkv(plans, of_qkv)
        yield self._attention(plans)
        yield self._finish_residual(plans, of_down)
        yield self._finish_gate_up(plans, of_gate_up)
        yield from self._head(plans)
        yield self._draw()

    def _batch(self, layout: PageLayout) -> BatchMetadata:
        num_pages = -(-self.rank // 16)
        pages = tuple(tuple(range(num_pages * row, num_pages * (row + 1))) for row in range(self.num_rows))
        pool = self._random(num_pages * self.num_rows, layout.num_elements) / 32
        blocks, rows = -(-(POSITION + 1) // BLOCK_SIZE), torch.arange(self.num_rows)
        tables = torch.randperm(blocks * self.num_rows).view(self.num_rows, blocks)
        slots = tables[:, POSITION // BLOCK_SIZE] * BLOCK_SIZE + POSITION % BLOCK_SIZE
        return BatchMetadata(
            token_ids=rows,
            sampled=rows,
            positions=torch.full((self.num_rows,), POSITION),
            kv_slots=slots,
            num_decode=self.num_rows,
            row_starts=tuple(range(self.num_rows + 1)),
            block_tables=tables,
            block_size=BLOCK_SIZE,
            max_seen=POSITION + 1,
            lora=LoraBatch(pool, pages),
        )

    def _adapters(self, plans: tuple[Any, Any], span: LoraSpan) -> Iterator[Case]:
        ours, twin = plans
        batch, x = twin.batch, self._random(self.num_rows, span.in_features)
        num_pages, item = len(batch.lora.live), self._item

        def shrunk() -> Tensor:
            made = lora.shrink(x, ours, span)[0].planes.sum(0)
            own = made[:, : -(-self.rank // 16)].flatten(1)
            return own

        def twin_shrunk() -> Tensor:
            made = reference.lora_shrink(x, batch.lora, twin.lora_mask, span)
            return made.flatten(2)[twin.lora_mask].view(self.num_rows, -1)

        a_bytes = num_pages * 16 * span.num_slices * span.in_features * item
        yield Case("shrink gate_up", shrunk, twin_shrunk, a_bytes + x.nbytes)
        out = self._random(self.num_rows, sum(span.out_features))
        made, twin_made = lora.shrink(x, ours, span), reference.lora_shrink(x, batch.lora, twin.lora_mask, span)

        def expanded() -> Tensor:
            lora.expand(made, span, out)
            return out

        def twin_expanded() -> Tensor:
            reference.lora_expand(twin_made, batch.lora, span, twin_out)
            return twin_out

        twin_out = out.clone()
        b_bytes = num_pages * 16 * out.shape[1] * item
        yield Case("expand gate_up", expanded, twin_expanded, b_bytes + 2 * out.nbytes)

    def _project(self, name: str, plans: tuple[Any, Any], span: LoraSpan) -> Iterator[Case]:
        ours, twin = plans
        dense = self._random(sum(span.out_features), span.in_features) / span.in_features**0.5
        x = self._random(self.num_rows, span.in_features)
        num_pages = len(twin.batch.lora.live)
        a_bytes = num_pages * 16 * span.num_slices * span.in_features * self._item
        for kind, weight in (("", dense), (" int4", quantize_int4(dense, self.model.group))):
            linear = gpu.Linear(weight)
            reading = reference.Linear(dense if weight is dense else dequantize(weight).to(self.dtype))
            yield Case(
                f"{name} and shrink{kind}",
                lambda linear=linear: gpu.project(linear, x, ours, span).out.sum(0),
                lambda reading=reading: reference.project(reading, x, twin, span).out,
                bytes_of(weight) + a_bytes + x.nbytes,
            )

    def _finish_qkv(self, plans: tuple[Any, Any], span: LoraSpan) -> Case:
        ours, twin = plans
        norms = HeadNorms(None, None, EPS)
        if self.model.has_head_norms:
            norms = HeadNorms(*self._random(2, self.model.shape.head_dim), EPS)
        products, own = self._products(plans, span), [self._caches(), self._caches()]

        def ours_run() -> Tensor:
            return gpu.finish_qkv(products[0], *own[0], ours, span, norms, rotates=True)

        def twin_run() -> Tensor:
            product = products[1]._replace(out=products[1].out.clone())
            return reference.finish_qkv(product, *own[1], twin, span, norms, rotates=True)

        return Case("finish qkv", ours_run, twin_run, self._bytes_to_finish(products[0], span, written=1))

    def _attention(self, plans: tuple[Any, Any]) -> Case:
        size = self.model.shape
        q, (keys, values) = self._random(self.num_rows, size.num_heads, size.head_dim), self._caches()
        read = 2 * self.num_rows * (POSITION + 1) * size.kv_size * self._item
        return Case(
            "attention",
            lambda: gpu.paged_attention(q, keys, values, plans[0]),
            lambda: reference.paged_attention(q, keys, values, plans[1]),
            read + 2 * q.nbytes,
        )

    def _finish_residual(self, plans: tuple[Any, Any], span: LoraSpan) -> Case:
        products, weight = self._products(plans, span), self._random(self.model.shape.hidden)
        start = self._random(self.num_rows, self.model.shape.hidden).float()

        def ours_run() -> Tensor:
            return values_of(gpu.finish_residual(products[0], start.clone(), plans[0], span, weight, EPS))

        def twin_run() -> Tensor:
            product = products[1]._replace(out=products[1].out.clone())
            return reference.finish_residual(product, start.clone(), plans[1], span, weight, EPS)

        return Case("finish residual", ours_run, twin_run, self._bytes_to_finish(products[0], span, written=3))

    def _finish_gate_up(self, plans: tuple[Any, Any], span: LoraSpan) -> Case:
        products = self._products(plans, span)

        def twin_run() -> Tensor:
            product = products[1]._replace(out=products[1].out.clone())
            return reference.finish_gate_up(product, plans[1], span)

        return Case(
            "finish gate_up",
            lambda: gpu.finish_gate_up(products[0], plans[0], span),
            twin_run,
            self._bytes_to_finish(products[0], span, written=1),
        )

    def _head(self, plans: tuple[Any, Any]) -> Iterator[Case]:
        size = self.model.shape
        hidden, norm = self._random(self.num_rows, size.hidden).float(), self._random(size.hidden)
        x = gpu.begin(hidden, plans[0], norm, EPS)
        twin_x = values_of(x)
        dense = self._random(size.vocab, size.hidden) / size.hidden**0.5
        for kind, weight in (("", dense), (" int8", quantize_int8(dense))):
            linear = gpu.Linear(weight)
            reading = reference.Linear(dense if weight is dense else dequantize(weight).to(self.dtype))
            yield Case(
                f"head{kind}",
                lambda linear=linear: gpu.head(linear, x, plans[0]),
                lambda reading=reading: reference.head(reading, twin_x, plans[1]),
                bytes_of(weight) + 4 * self.num_rows * size.vocab,
            )

    def _draw(self) -> Case:
        logits = 3 * torch.randn(self.num_rows, self.model.shape.vocab, device=self.device)
        columns = [0.7, 40.0, 0.9, 0.05, 1.0, 2.0]
        settings = Settings(
            *(torch.full((self.num_rows,), value, dtype=torch.float64, device=self.device) for value in columns)
        )
        return Case(
            "draw",
            lambda: gpu.draw(logits, settings).float(),
            lambda: reference.draw(logits, settings).float(),
            logits.nbytes,
        )

    def _products(self, plans: tuple[Any, Any], span: LoraSpan) -> tuple[Planes, Any]:
        dense = self._random(sum(span.out_features), span.in_features) / span.in_features**0.5
        x = self._random(self.num_rows, span.in_features)
        return (
            gpu.project(gpu.Linear(dense), x, plans[0], span),
            reference.project(reference.Linear(dense), x, plans[1], span),
        )

    def _bytes_to_finish(self, product: Planes, span: LoraSpan, *, written: int) -> int:
        """The planes, `B` of the adapters, and so many rows of outputs."""
        outputs = sum(span.out_features)
        b_bytes = self.num_rows * -(-self.rank // 16) * 16 * outputs * self._item
        return product.out.nbytes + b_bytes + written * self.num_rows * outputs * self._item

    def _caches(self) -> tuple[Tensor, Tensor]:
        size, blocks = self.model.shape, -(-(POSITION + 1) // BLOCK_SIZE) * self.num_rows
        torch.manual_seed(1)
        keys, values = self._random(2, blocks, BLOCK_SIZE, size.num_kv_heads, size.head_dim)
        return keys, values

    @property
    def _item(self) -> int:
        return self.dtype.itemsize

    def _random(self, *sizes: int) -> Tensor:
        return torch.randn(sizes, device=self.device, dtype=self.dtype)


def bytes_of(weight: Tensor | Int4Weight | Int8Weight) -> int:
    """What must be read of a weight."""
    if isinstance(weight, Tensor):
        return weight.nbytes
    return sum(part.nbytes for part in weight if isinstance(part, Tensor))


def values_of(x: Tensor | Activations) -> Tensor:
    """Rows with their norm."""
    return x.normalised() if isinstance(x, Activations) else x


def difference(case: Case) -> float:
    """The largest difference between a kernel and its twin, as a share of the largest number."""
    ours, twin = case.ours().float(), case.twin().float()
    return float((ours - twin).abs().max() / twin.abs().max().clamp(min=1e-6))


def main() -> None:
    """Measure and print."""
    options = parse_options()
    if not torch.cuda.is_available():
        sys.exit("kernels/bench.py measures a GPU, and torch sees none here; the tests prove the kernels without one.")
    from triton.testing import do_bench

    device = torch.device("cuda")
    bandwidth = copy_bandwidth(do_bench, device)
    machine = f"{torch.cuda.get_device_name()}, {bandwidth / 1e9:.0f} GB/s copied, torch {torch.__version__}"
    print(f"{machine}; {options.model}, rank {options.rank}")
    print(f"{'rows':>4}  {'kernel':<24}{'ms':>9}{'twin ms':>9}{'GB/s':>7}{'of floor':>9}{'differs':>9}")
    results, wrong = [], 0
    for rows in options.rows:
        for case in Bench(MODELS[options.model], rows, options.rank, device).cases():
            differs = difference(case)
            ours, twin = (do_bench(run, return_mode="median") for run in (case.ours, case.twin))
            speed, share = case.num_bytes / ours / 1e6, case.num_bytes / bandwidth * 1e3 / ours
            is_wrong = not differs <= TOLERANCE
            wrong += is_wrong
            print(
                f"{rows:>4}  {case.name:<24}{ours:>9.4f}{twin:>9.4f}{speed:>7.0f}{share:>9.0%}{differs:>9.4f}"
                + (" WRONG" if is_wrong else ""),
                flush=True,
            )
            results.append({"rows": rows, "kernel": case.name, "ms": ours, "twin_ms": twin, "floor_share": share})
    print(json.dumps({"bench": "kernels", "machine": machine, "model": options.model, "results": results}))
    sys.exit(bool(wrong))


def copy_bandwidth(do_bench: Callable[..., float], device: torch.device) -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (do_bench(lambda: target.copy_(source), return_mode="median") / 1e3)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="Llama-3.2-3B")
    parser.add_argument("--rows", type=lambda text: [int(part) for part in text.split(",")], default=[1, 8, 32])
    parser.add_argument("--rank", type=int, choices=(16, 32, 64), default=16)
    return parser.parse_args()


if __name__ == "__main__":
    main()
