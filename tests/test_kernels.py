"""Every kernel module against plain float64 formulas, row by row: the torch twins, the CPU paths, and Triton's kernels
in its interpreter."""

import math
import os
import subprocess
import sys

import pytest
import torch
from npc_kernels import cpu, cpu_exact, gpu, openmp, reference
from npc_kernels.batch import BatchMetadata, Codes, LoraBatch, LoraSpan
from npc_kernels.cpu_codes import LANES
from npc_kernels.gemm import Activations
from npc_kernels.reference import HeadNorms
from test_codes import weights_of

MODULES = [reference, cpu, cpu_exact, gpu]
DTYPES = [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)]
BLOCK_SIZE = 4


@pytest.fixture(params=MODULES, ids=lambda module: module.__name__.rpartition(".")[2])
def kernels(request):
    return request.param


def close(got, expected, tolerance):
    torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)


def rows_of(x):
    """What a linear would take, with its norm."""
    return x.normalised() if isinstance(x, Activations) else x


def plain_norm(x, weight, eps=1e-5):
    x = x.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()


class Step:
    """A step of rows given as (start, stop), those of one token first, and its plan for a kernel module."""

    def __init__(self, kernels, rows, *, lora=None, head_dim=8, token_ids=None, sampled=None):
        self.rows = rows
        self.tables = [[3, 1, 9, 8], [0, 5, 11, 7], [2, 6, 10, 4]][: len(rows)]
        self.tokens = [(row, position) for row, (start, stop) in enumerate(rows) for position in range(start, stop)]
        num_blocks = max(-(-stop // BLOCK_SIZE) for _, stop in rows)
        needed = [-(-stop // BLOCK_SIZE) for _, stop in rows]
        tables = [
            (table[:count] + table[:1] * num_blocks)[:num_blocks]
            for table, count in zip(self.tables, needed, strict=True)
        ]
        self.slots = [self.slot(row, position) for row, position in self.tokens]
        starts = [0]
        for start, stop in rows:
            starts.append(starts[-1] + stop - start)
        count = len(self.tokens)
        self.batch = BatchMetadata(
            token_ids=torch.arange(count) if token_ids is None else token_ids,
            sampled=torch.tensor(starts[1:]) - 1 if sampled is None else sampled,
            positions=torch.tensor([position for _, position in self.tokens]),
            kv_slots=torch.tensor(self.slots),
            num_decode=sum(stop - start == 1 for start, stop in rows),
            row_starts=tuple(starts),
            block_tables=torch.tensor(tables),
            block_size=BLOCK_SIZE,
            max_seen=max(stop for _, stop in rows),
            lora=lora,
        )
        angles = torch.arange(64)[:, None] * torch.tensor([1.0, 0.3, 0.05, 0.7])[: head_dim // 2]
        self.angles = angles[self.batch.positions]
        self.plan = kernels.plan(self.batch, angles.cos(), angles.sin(), None)

    def slot(self, row, position):
        return self.tables[row][position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE


ROWS = {
    "decode": [(6, 7), (4, 5), (0, 1)],
    "mixed": [(6, 7), (2, 7), (0, 3)],
    "tiles": [(14, 15), (0, 11), (3, 11)],
}


@pytest.fixture(params=ROWS)
def rows(request):
    return ROWS[request.param]


# -- adapters ------------------------------------------------------------------------------------------------


class Adapters:
    """Live pages for three rows: two pages, one page, none; and a page that nobody uses."""

    def __init__(self, span, rows, dtype):
        self.span = span
        self.pool = torch.randn(7, span.stop + 5, dtype=dtype) * 0.2
        self.owned = [(1, 5), (4,), ()]
        sizes = [stop - start for start, stop in rows]
        self.of_token = [pages for pages, size in zip(self.owned, sizes, strict=True) for _ in range(size)]
        self.batch = LoraBatch(self.pool, tuple(self.owned))

    def expected(self, x):
        """What they add to every token, in float64."""
        added = torch.zeros(len(x), sum(self.span.out_features), dtype=torch.float64)
        for token, pages in enumerate(self.of_token):
            for page in self.pool[list(pages)]:
                column, offset = 0, self.span.b_start
                for index, width in enumerate(self.span.out_features):
                    start = self.span.start + index * 16 * self.span.in_features
                    a = page[start : start + 16 * self.span.in_features].view(16, -1).double()
                    b = page[offset : offset + 16 * width].view(16, width).double()
                    added[token, column : column + width] += (x[token].double() @ a.T) @ b
                    column, offset = column + width, offset + 16 * width
        return added


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_finish_residual(rows, dtype, tolerance, kernels):
    torch.manual_seed(0)
    adapters = Adapters(LoraSpan(3, 10, (17,)), rows, dtype)
    step = Step(kernels, rows, lora=adapters.batch)
    x, base = torch.randn(len(step.tokens), 10, dtype=dtype), torch.randn(17, 10, dtype=dtype) / 3
    hidden, weight = torch.randn(len(step.tokens), 17), torch.randn(17, dtype=dtype)
    expected = hidden.double() + x.double() @ base.double().T + adapters.expected(x)
    product = kernels.project(kernels.Linear(base), x, step.plan, adapters.span)
    normed = rows_of(kernels.finish_residual(product, hidden, step.plan, adapters.span, weight, 1e-5))
    close(hidden, expected, 4 * tolerance)
    close(normed, plain_norm(expected, weight), 4 * tolerance)
    assert normed.dtype == dtype


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_finish_gate_up(rows, dtype, tolerance, kernels):
    torch.manual_seed(0)
    adapters = Adapters(LoraSpan(0, 9, (7, 7)), rows, dtype)
    step = Step(kernels, rows, lora=adapters.batch)
    x, base = torch.randn(len(step.tokens), 9, dtype=dtype), 7 * torch.randn(14, 9, dtype=dtype)
    gate, up = (x.double() @ base.double().T + adapters.expected(x)).split(7, dim=1)
    product = kernels.project(kernels.Linear(base), x, step.plan, adapters.span)
    got = kernels.finish_gate_up(product, step.plan, adapters.span)
    torch.testing.assert_close(got.double(), gate / (1 + (-gate).exp()) * up, atol=20 * tolerance, rtol=4 * tolerance)


@pytest.mark.parametrize("rotates", [True, False])
@pytest.mark.parametrize("is_normed", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_finish_qkv(rows, is_normed, rotates, dtype, tolerance, kernels):
    """Queries come back, keys and values lie in their slots, and nothing else was written."""
    torch.manual_seed(0)
    heads, kv_heads, size = 6, 2, 8
    adapters = Adapters(LoraSpan(2, 9, (heads * size, kv_heads * size, kv_heads * size)), rows, dtype)
    step = Step(kernels, rows, lora=adapters.batch)
    num_tokens = len(step.tokens)
    x, base = torch.randn(num_tokens, 9, dtype=dtype), torch.randn(10 * size, 9, dtype=dtype) / 3
    bias = torch.randn(10 * size, dtype=dtype)
    expected = (x.double() @ base.double().T + adapters.expected(x) + bias.double()).view(num_tokens, 10, size)
    norms = HeadNorms(None, None, 1e-5)
    if is_normed:
        norms = HeadNorms(torch.randn(size, dtype=dtype), torch.randn(size, dtype=dtype), 1e-5)
        expected[:, :heads] = plain_norm(expected[:, :heads], norms.q)
        expected[:, heads:-2] = plain_norm(expected[:, heads:-2], norms.k)
    if rotates:
        turn = torch.polar(torch.ones_like(step.angles), step.angles)[:, None]
        pairs = torch.complex(expected[:, :-2, : size // 2], expected[:, :-2, size // 2 :]) * turn
        expected[:, :-2] = torch.cat((pairs.real, pairs.imag), dim=-1)
    keys = torch.full((12, BLOCK_SIZE, kv_heads, size), 7.0, dtype=dtype)
    values = keys.clone()
    product = kernels.project(kernels.Linear(base, bias), x, step.plan, adapters.span)
    q = kernels.finish_qkv(product, keys, values, step.plan, adapters.span, norms, rotates=rotates)
    close(q, expected[:, :heads], 6 * tolerance)
    close(keys.flatten(0, 1)[step.slots], expected[:, heads : heads + 2], 6 * tolerance)
    close(values.flatten(0, 1)[step.slots], expected[:, heads + 2 :], 6 * tolerance)
    untouched = sorted(set(range(12 * BLOCK_SIZE)) - set(step.slots))
    assert (keys.flatten(0, 1)[untouched] == 7).all()
    assert (values.flatten(0, 1)[untouched] == 7).all()


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_dora_scales_base_and_adapter_but_not_the_bias(rows, dtype, tolerance, kernels):
    """The factors lie in the row of an adapter's first page; a row without an adapter has none."""
    torch.manual_seed(0)
    adapters = Adapters(LoraSpan(0, 9, (7, 7), first_output=5), rows, dtype)
    factors = torch.rand(7, 21) + 0.5
    step = Step(kernels, rows, lora=LoraBatch(adapters.pool, tuple(adapters.owned), factors))
    x, base = torch.randn(len(step.tokens), 9, dtype=dtype), 3 * torch.randn(14, 9, dtype=dtype)
    bias = torch.randn(14, dtype=dtype)
    of_token = torch.stack([factors[pages[0], 5:19] if pages else torch.ones(14) for pages in adapters.of_token])
    expected = (x.double() @ base.double().T + adapters.expected(x)) * of_token + bias.double()
    gate, up = expected.split(7, dim=1)
    product = kernels.project(kernels.Linear(base, bias), x, step.plan, adapters.span)
    got = kernels.finish_gate_up(product, step.plan, adapters.span)
    torch.testing.assert_close(got.double(), gate / (1 + (-gate).exp()) * up, atol=20 * tolerance, rtol=6 * tolerance)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
def test_a_neighbours_overflow_stays_with_the_neighbour(kernels):
    """One adapter of infinities; its own rows say so, the others are as if it were not there."""
    rows = ROWS["mixed"]
    span = LoraSpan(0, 9, (7, 7))
    adapters = Adapters(span, rows, torch.float32)
    x, linear = torch.randn(9, 9), kernels.Linear(torch.randn(14, 9))
    plan = Step(kernels, rows, lora=adapters.batch).plan
    clean = kernels.finish_gate_up(kernels.project(linear, x, plan, span), plan, span)
    adapters.pool[4, : span.b_start] = torch.inf
    plan = Step(kernels, rows, lora=adapters.batch).plan
    dirty = kernels.finish_gate_up(kernels.project(linear, x, plan, span), plan, span)
    hit = torch.tensor([4 in pages for pages in adapters.of_token])
    assert not torch.isfinite(dirty[hit]).any()
    assert torch.equal(dirty[~hit], clean[~hit])


def test_pages_that_changed_are_seen(kernels):
    """The pool is written while the daemon runs; what a module keeps from step to step must follow."""
    rows, span = ROWS["decode"], LoraSpan(0, 9, (7, 7))
    adapters = Adapters(span, rows, torch.float32)
    x, linear = torch.randn(3, 9), kernels.Linear(torch.randn(14, 9))
    step = Step(kernels, rows, lora=adapters.batch)
    before = kernels.finish_gate_up(kernels.project(linear, x, step.plan, span), step.plan, span)
    adapters.pool.normal_(0, 0.2)
    plan = kernels.plan(step.batch, torch.zeros(64, 4), torch.zeros(64, 4), step.plan)
    after = kernels.finish_gate_up(kernels.project(linear, x, plan, span), plan, span)
    assert not torch.allclose(before[:2], after[:2])
    assert torch.equal(before[2], after[2])


# -- norms and attention ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("size", [8, 2049])
def test_begin(size, dtype, tolerance, kernels):
    step = Step(kernels, ROWS["mixed"])
    hidden, weight = torch.randn(len(step.tokens), size), torch.randn(size, dtype=dtype)
    got = rows_of(kernels.begin(hidden, step.plan, weight, 1e-5))
    close(got[: len(step.tokens)], plain_norm(hidden, weight), tolerance)
    assert not got[len(step.tokens) :].any()


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_paged_attention_is_causal_attention_of_each_row(rows, num_threads, dtype, tolerance, kernels):
    """Decode, a chunk in the middle of a prompt, and a whole prompt, in one batch; NaN in slots of nobody."""
    torch.manual_seed(0)
    heads, kv_heads, size = 6, 2, 8
    step = Step(kernels, rows)
    k_cache = torch.full((12 * BLOCK_SIZE, kv_heads, size), torch.nan, dtype=dtype)
    v_cache = k_cache.clone()
    for row, (_, stop) in enumerate(rows):
        slots = [step.slot(row, position) for position in range(stop)]
        k_cache[slots] = torch.randn(stop, kv_heads, size, dtype=dtype)
        v_cache[slots] = torch.randn(stop, kv_heads, size, dtype=dtype)
    q = torch.randn(len(step.tokens), heads, size, dtype=dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        shape = (12, BLOCK_SIZE, kv_heads, size)
        got = kernels.paged_attention(q, k_cache.view(shape), v_cache.view(shape), step.plan)
    finally:
        torch.set_num_threads(before)
    for token, (row, position) in enumerate(step.tokens):
        seen = [step.slot(row, p) for p in range(position + 1)]
        for head in range(heads):
            k_row, v_row = k_cache[seen, head // 3].double(), v_cache[seen, head // 3].double()
            weights = torch.softmax(k_row @ q[token, head].double() / math.sqrt(size), dim=0)
            close(got[token].view(heads, size)[head], weights @ v_row, tolerance)


def test_a_key_that_is_no_number_reaches_the_logits(kernels):
    """Or a line whose adapter overflowed would speak nonsense instead of ending with an error."""
    step = Step(kernels, [(6, 7)])
    cache = torch.randn(12, BLOCK_SIZE, 2, 8)
    broken = cache.clone()
    broken.flatten(0, 1)[step.slot(0, 2)] = torch.nan
    assert torch.isnan(kernels.paged_attention(torch.randn(1, 6, 8), broken, cache, step.plan)).all()


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_embed(dtype, tolerance, kernels):
    table = torch.randn(20, 40, dtype=dtype)
    token_ids = torch.tensor([19, 0, 7])
    got = kernels.embed(table, Step(kernels, ROWS["decode"], token_ids=token_ids).plan)
    assert torch.equal(got, table[token_ids].float())


# -- linears ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_rows", [0, 1, 3, 4, 5, 16, 17, 40])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_head(num_rows, has_bias, dtype, tolerance, kernels):
    """Any number of rows, picked from more, in any order."""
    torch.manual_seed(0)
    weight, x = torch.randn(24, 48, dtype=dtype) / 7, torch.randn(num_rows, 48, dtype=dtype)
    bias = torch.randn(24, dtype=dtype) if has_bias else None
    expected = x.double() @ weight.double().T + (bias.double() if has_bias else 0)
    more, tokens = torch.randn(num_rows + 2, 48, dtype=dtype), torch.arange(num_rows, 0, -1)
    more[tokens] = x
    plan = Step(kernels, ROWS["decode"], sampled=tokens).plan
    got = kernels.head(kernels.Linear(weight, bias), more, plan)
    close(got, expected, tolerance)
    assert got.dtype == torch.float32


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("num_rows", [1, 3, 4, 9])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_codes_are_the_weight(num_rows, bits, dtype, tolerance):
    """Codes with their scales and minima, against the dense weight they stand for."""
    torch.manual_seed(0)
    num_out, num_groups = 2 * LANES, 3
    scale, minimum = torch.rand(num_out, num_groups) * 0.02, torch.randn(num_out, num_groups) * 0.05
    if bits == 4:
        codes = Codes(torch.randint(0, 256, (num_out, num_groups, 16), dtype=torch.uint8), scale, minimum)
    else:
        codes = Codes(torch.randint(-128, 128, (num_out, num_groups, 32), dtype=torch.int8), scale / 16, None)
    dense = weights_of(codes).double()
    x = torch.randn(num_rows, 32 * num_groups, dtype=dtype)
    got = cpu.Linear(torch.zeros_like(dense, dtype=dtype), None, codes)(x)
    if num_rows > cpu.MAX_CODE_ROWS[dtype]:
        assert not got.any(), "many rows take the dense weight, which is zero here"
    else:
        close(got, x.double() @ dense.T, tolerance)


def test_threads_that_share_out_the_work_are_torchs_own():
    """Two OpenMP libraries in one process would keep each other from the cores."""
    assert len({path for path in openmp._loaded_libraries() if "/torch/" in path}) == 1
    assert openmp._fork().__name__ == "GOMP_parallel"


def test_threads_sleep_while_they_wait():
    """Processor time of work of two threads with pauses in between: a thread that spins would use up these too."""
    program = """
import time
from npc_kernels.openmp import sleep_while_waiting
sleep_while_waiting()
import torch
torch.set_num_threads(2)
x = torch.ones(100_000)
x + x
began = time.process_time()
for _ in range(50):
    x + x
    time.sleep(0.01)
print(time.process_time() - began)
"""
    environment = {name: value for name, value in os.environ.items() if name not in openmp.SLEEP}
    command = [sys.executable, "-P", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert float(done.stdout) < 0.05


def test_one_thread_does_all_the_work_where_openmp_is_another(monkeypatch):
    monkeypatch.setattr(openmp, "_loaded_libraries", list)
    openmp._fork.cache_clear()
    try:
        hidden, weight = torch.randn(5, 40), torch.randn(40)
        step = Step(cpu, [(0, 5)])
        close(cpu.begin(hidden, step.plan, weight, 1e-5)[:5], plain_norm(hidden, weight), 2e-5)
    finally:
        openmp._fork.cache_clear()
