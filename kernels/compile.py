"""Compile every Triton kernel at production shapes for real GPUs, on any machine: no driver is needed.

    make compile                       all models, compute capabilities 80, 86, 89, 90 and 120
    make compile TARGETS=86,90         what CI does

One layer and the head of each model run on tensors without memory, through the code that the engine runs; every launch
is compiled instead of run. Fails on registers spilled to memory, on more shared memory than the target has, on a GEMM
without tensor-core instructions, and on more than 13 launches a layer. Prints, for every kernel and target, registers,
shared memory and occupancy, and one JSON line last.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from npc_kernels import gpu
from npc_kernels.batch import BatchMetadata, LoraBatch
from npc_kernels.quant import Int4Weight, Int8Weight
from npc_kernels.reference import HeadNorms, Settings
from shapes import CONTEXT, MODELS, Model
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from npc_runtime.engine.model import PageLayout

MAX_LAUNCHES = 13
BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Limits:
    """What a GPU of a compute capability has, for each multiprocessor."""

    shared_per_block: int  # bytes
    shared: int  # bytes
    threads: int
    blocks: int
    registers: int = 65536


LIMITS = {
    80: Limits(163 << 10, 164 << 10, 2048, 32),
    86: Limits(99 << 10, 100 << 10, 1536, 16),
    89: Limits(99 << 10, 100 << 10, 1536, 24),
    90: Limits(227 << 10, 228 << 10, 2048, 32),
    120: Limits(99 << 10, 100 << 10, 1536, 24),
}
"""CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"."""


@dataclass(frozen=True, slots=True)
class Row:
    """A compiled kernel."""

    model: str
    target: int
    step: str
    kernel: str
    registers: int
    spilled: int  # bytes a thread
    shared: int  # bytes
    warps: int
    occupancy: float  # warps that a multiprocessor holds, of those that it could
    products: str  # tensor-core instructions, the keys of PRODUCTS; empty: none

    @property
    def problem(self) -> str | None:
        """What is wrong with it, if anything."""
        if self.spilled:
            return f"{self.spilled} bytes of registers spilled"
        if self.shared > LIMITS[self.target].shared_per_block:
            return f"{self.shared} bytes of shared memory, the target has {LIMITS[self.target].shared_per_block}"
        if self.kernel in ("_project_kernel", "_head_kernel", "_attend_kernel") and not self.products:
            return "no tensor-core instruction"
        if "registers" in self.products:
            return "a warp-group product with an operand in registers, which ptxas before 13.3 miscompiles"
        return None


class NoDriver:
    """Stands in for a GPU that is not there, so that Triton compiles for it."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        """What to compile for."""
        return self._target

    def get_current_device(self) -> int:
        """A number of its own for each target, because Triton keeps what it compiled, and what for, by it."""
        return int(self._target.arch)

    def get_current_stream(self, device: int) -> int:
        """Nothing is launched on it."""
        return 0


RUN = JITFunction.run
"""Triton's own, which a recorder puts itself in front of."""


class Recorder:
    """Compiles each launch instead of running it."""

    def __init__(self, capability: int) -> None:
        driver.set_active(NoDriver(capability))
        self.launches: list[tuple[str, Any]] = []

        def compile_only(function: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            compiled = RUN(function, *args, grid=grid, warmup=True, **options)
            self.launches.append((function.__name__, compiled))
            return compiled

        JITFunction.run = compile_only  # type: ignore[method-assign]


@dataclass(frozen=True, slots=True)
class Step:
    """A step whose launches are compiled."""

    name: str
    rows: tuple[tuple[int, int], ...]  # start and stop of each
    ranks: tuple[int, ...]  # of each row's adapter, 0: none
    bits: int = 16
    has_zeros: bool = False


STEPS = (
    Step("decode", ((100, 101),) * 8, (16,) * 8),
    Step("decode, long, rank 64", ((1000, 1001),) * 33, (64, 16, 0) * 11),
    Step("prefill", ((0, 43),) * 8, (16,) * 8),
    Step("decode, base only", ((100, 101),) * 8, (0,) * 8),
    Step("decode int4", ((100, 101),) * 8, (16,) * 8, bits=4),
    Step("prefill int4", ((0, 43),) * 8, (16,) * 8, bits=4),
    Step("decode int4, zeros", ((100, 101),) * 8, (16,) * 8, bits=4, has_zeros=True),
    Step("prefill int4, zeros", ((0, 43),) * 8, (16,) * 8, bits=4, has_zeros=True),
)


def main() -> None:
    """Compile, print, fail if something is wrong."""
    options = parse_options()
    if triton.knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET is set, and what is interpreted cannot be compiled; unset it.")
    jobs = [(model, target) for target in options.targets for model in options.models]
    rows: list[Row] = []
    launches: dict[str, int] = {}
    with ProcessPoolExecutor(options.jobs) as pool:
        compiled = pool.map(compile_model, *zip(*jobs, strict=True))
        for (model, target), (found, counted) in zip(jobs, compiled, strict=True):
            print(f"compiled {model} for {target}: {len(found)} kernels", file=sys.stderr, flush=True)
            rows += found
            launches = {name: max(launches.get(name, 0), number) for name, number in counted.items()}
    print_table(rows)
    print("\nlaunches a layer:", ", ".join(f"{name} {number}" for name, number in launches.items()))
    problems = [f"{row.model}, {row.target}, {row.step}, {row.kernel}: {row.problem}" for row in rows if row.problem]
    problems += [f"{name}: {number} launches a layer" for name, number in launches.items() if number > MAX_LAUNCHES]
    for problem in problems:
        print(f"FAILED {problem}", file=sys.stderr)
    print(json.dumps({"compile": [asdict(row) for row in rows], "launches": launches, "problems": problems}))
    sys.exit(bool(problems))


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=lambda text: [int(part) for part in text.split(",")], default=list(LIMITS))
    parser.add_argument("--models", type=lambda text: text.split(","), default=list(MODELS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    if not set(options.targets) <= set(LIMITS) or not set(options.models) <= set(MODELS):
        parser.error(f"targets are {', '.join(map(str, LIMITS))}; models are {', '.join(MODELS)}")
    return options


def compile_model(name: str, target: int) -> tuple[list[Row], dict[str, int]]:
    """All kernels of a model for a target, and how many launches a layer of each step takes."""
    recorder, rows, counted = Recorder(target), {}, {}
    for step in STEPS:
        counted[step.name] = run_layer(recorder, MODELS[name], step)
        for kernel, compiled in recorder.launches:
            rows.setdefault((kernel, compiled.hash), Row(name, target, step.name, kernel, *measure(compiled, target)))
        recorder.launches.clear()
    return list(rows.values()), counted


def run_layer(recorder: Recorder, model: Model, step: Step) -> int:
    """A step through one layer, the head and the sampler; the number of the layer's launches."""
    size, layout = model.shape, PageLayout.of(model.shape)
    plan = gpu.plan(describe(step, layout), empty(CONTEXT, size.head_dim // 2), empty(CONTEXT, size.head_dim // 2))
    num_tokens, vector = plan.num_tokens, empty(size.hidden, dtype=torch.bfloat16)
    hidden = empty(num_tokens, size.hidden)
    blocks = 64 * CONTEXT // BLOCK_SIZE
    cache = [empty(blocks, BLOCK_SIZE, size.num_kv_heads, size.head_dim, dtype=torch.bfloat16) for _ in range(2)]
    head_norm = empty(size.head_dim, dtype=torch.bfloat16) if model.has_head_norms else None
    norms = HeadNorms(head_norm, head_norm, 1e-6)
    of_qkv, of_o, of_gate_up, of_down = layout.layers[0]

    def linear(out_features: int, in_features: int) -> gpu.Linear:
        return gpu.Linear(make_weight(out_features, in_features, step.bits, model.group, has_zeros=step.has_zeros))

    x = gpu.begin(hidden, plan, vector, 1e-5)
    before = len(recorder.launches)
    product = gpu.project(linear(size.q_size + 2 * size.kv_size, size.hidden), x, plan, of_qkv)
    q = gpu.finish_qkv(product, cache[0], cache[1], plan, of_qkv, norms, rotates=True)
    attended = gpu.paged_attention(q, cache[0], cache[1], plan)
    product = gpu.project(linear(size.hidden, size.q_size), attended, plan, of_o)
    x = gpu.finish_residual(product, hidden, plan, of_o, vector, 1e-5)
    product = gpu.project(linear(2 * size.intermediate, size.hidden), x, plan, of_gate_up)
    product = gpu.project(
        linear(size.hidden, size.intermediate), gpu.finish_gate_up(product, plan, of_gate_up), plan, of_down
    )
    x = gpu.finish_residual(product, hidden, plan, of_down, vector, 1e-5)
    number = len(recorder.launches) - before
    head = gpu.Linear(make_weight(size.vocab, size.hidden, 8 if step.bits == 4 else 16, model.group))
    logits = gpu.head(head, x, plan)
    gpu.draw(logits, Settings(*(empty(len(step.rows), dtype=torch.float64) for _ in range(6))))
    return number


def describe(step: Step, layout: PageLayout) -> BatchMetadata:
    """The step's metadata; every adapter has pages of its own."""
    starts, pages = [0], []
    for (start, stop), rank in zip(step.rows, step.ranks, strict=True):
        starts.append(starts[-1] + stop - start)
        first = sum(map(len, pages))
        pages.append(tuple(range(first, first + rank // 16)))
    pool = empty(max(1, sum(map(len, pages))), layout.num_elements, dtype=torch.bfloat16)
    most, numbers = max(stop for _, stop in step.rows), torch.zeros(starts[-1], dtype=torch.long)
    return BatchMetadata(
        token_ids=numbers,
        sampled=torch.zeros(len(step.rows), dtype=torch.long),
        positions=numbers,
        kv_slots=numbers,
        num_decode=sum(stop - start == 1 for start, stop in step.rows),
        row_starts=tuple(starts),
        block_tables=torch.zeros(len(step.rows), -(-most // BLOCK_SIZE), dtype=torch.long),
        block_size=BLOCK_SIZE,
        max_seen=most,
        lora=LoraBatch(pool, tuple(pages)) if any(pages) else None,
    )


def make_weight(
    out_features: int, in_features: int, bits: int, group: int, *, has_zeros: bool = False
) -> Tensor | Int4Weight | Int8Weight:
    """A weight without memory."""
    if bits == 4:
        blocks = -(-in_features // 128)
        words, scale = empty(out_features, blocks * 16, dtype=torch.int32), empty(out_features, blocks * 128 // group)
        zeros = empty(*scale.shape, dtype=torch.int8) if has_zeros else None
        return Int4Weight(words, scale, in_features, group, zeros)
    if bits == 8:
        return Int8Weight(empty(out_features, in_features, dtype=torch.int8), empty(out_features))
    return empty(out_features, in_features, dtype=torch.bfloat16)


def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without memory."""
    return torch.empty(size, dtype=dtype, device="meta")


def measure(compiled: Any, target: int) -> Iterator[Any]:
    """Registers, spilled bytes, shared memory, warps, occupancy and kinds of products of a compiled kernel."""
    if compiled.metadata.target.arch != target:
        raise RuntimeError(f"asked for {target}, Triton compiled for {compiled.metadata.target.arch}")
    usage = resource_usage(compiled.asm["cubin"])
    registers, shared, warps = usage["REG"], compiled.metadata.shared, compiled.metadata.num_warps
    yield registers
    yield usage["STACK"] + usage["LOCAL"]
    yield shared
    yield warps
    yield occupancy(LIMITS[target], registers, shared, warps)
    yield "+".join(name for name, pattern in PRODUCTS.items() if re.search(pattern, compiled.asm["ptx"]))


PRODUCTS = {
    "mma": r"\bmma\.sync",
    "wgmma": r"\bwgmma\.mma_async",
    "wgmma from registers": r"\bwgmma\.mma_async\S+\s+\{[^}]*\},\s*\{",  # result, then first operand
    "tcgen05": r"\btcgen05\.mma",
}


def occupancy(limits: Limits, registers: int, shared: int, warps: int) -> float:
    """The share of its warps that a multiprocessor can hold; registers are given to a warp in units of 256."""
    per_warp = -(-registers * 32 // 256) * 256
    blocks = min(
        limits.blocks,
        limits.threads // (32 * warps),
        limits.registers // (per_warp * warps),
        limits.shared // (shared + 1024) if shared else limits.blocks,
    )
    return round(blocks * warps * 32 / limits.threads, 2)


def resource_usage(cubin: bytes) -> dict[str, int]:
    """What `cuobjdump`, which Triton brings along, says of a cubin; a loaded module would tell too, but needs a GPU."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__path__[0]) / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", done.stdout)}
    if "REG" not in found:
        raise RuntimeError(f"cuobjdump did not say how many registers there are: {done.stdout}")
    return found


def print_table(rows: list[Row]) -> None:
    """A line a kernel."""
    columns: list[tuple[str, Callable[[Row], Any]]] = [
        ("model", lambda row: row.model),
        ("sm", lambda row: row.target),
        ("kernel", lambda row: row.kernel.strip("_").removesuffix("_kernel")),
        ("first used in", lambda row: row.step),
        ("registers", lambda row: row.registers),
        ("spilled", lambda row: row.spilled),
        ("shared", lambda row: row.shared),
        ("warps", lambda row: row.warps),
        ("occupancy", lambda row: f"{row.occupancy:.0%}"),
        ("products", lambda row: row.products or "-"),
    ]
    lines = [[title for title, _ in columns], *([str(read(row)) for _, read in columns] for row in rows)]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


if __name__ == "__main__":
    main()
