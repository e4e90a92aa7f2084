"""However many tokens steps have, GEMMs see few numbers of rows, or oneDNN would compile and keep one for each."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from npc_kernels import cpu, cpu_exact, reference
from npc_kernels.cpu_gemm import SIZES, PackedLinear, cut_rows
from test_model import load, make_runner, make_sequence
from tiny import make_model

from npc_runtime.engine.scheduler import PlannedRow

MAX_SIZES = 32

STEPS = """
import random, sys, torch
from pathlib import Path
from npc_kernels import cpu
from test_model import load, make_runner, make_sequence
from npc_runtime.engine.scheduler import PlannedRow

torch.set_num_threads(1)
runner, chance = make_runner(load(Path(sys.argv[1]), cpu)), random.Random(0)
print("loaded", flush=True)
for _ in range(120):
    stops = [chance.choice([1, chance.randrange(1, 80)]) for _ in range(chance.randrange(1, 7))]
    rows = [make_sequence([3 + n % 90 for n in range(stop)], 20 * number) for number, stop in enumerate(stops)]
    runner.forward([PlannedRow(row, 0, stop) for row, stop in zip(rows, stops, strict=True)])
"""


def parts_of(num_rows):
    cut = cut_rows(num_rows)
    return [min(cut.size, cut.num_padded - start) for start in range(0, cut.num_padded, cut.size)]


def test_every_part_has_one_of_few_sizes():
    assert len(SIZES) <= MAX_SIZES
    assert {size for num_rows in range(3000) for size in parts_of(num_rows)} == set(SIZES)


@pytest.mark.parametrize(
    ("num_rows", "parts"),
    [
        (0, []),
        (1, [1]),
        (5, [6]),
        (43, [48]),
        (203, [208]),
        (256, [256]),
        (257, [144, 128]),
        (512, [512]),
        (576, [192] * 3),
    ],
)
def test_parts_are_about_equal(num_rows, parts):
    assert parts_of(num_rows) == parts


def test_padding_is_little_and_padded_rows_need_none():
    for num_rows in range(1, 3000):
        cut = cut_rows(num_rows)
        assert 0 <= cut.num_padded - num_rows < (4 if num_rows <= 24 else 8 if num_rows <= 128 else 16)
        assert cut_rows(cut.num_padded) == cut


@pytest.mark.parametrize("num_rows", [0, 5, 100, 300])
def test_parts_are_the_product(num_rows):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(num_rows, 40), torch.randn(24, 40), torch.randn(24)
    parts = PackedLinear(weight, bias).multiply(x, cut_rows(num_rows))
    torch.testing.assert_close(torch.cat(parts)[:num_rows], x @ weight.T + bias)


def test_random_steps_compile_for_few_sizes(tmp_path):
    """As oneDNN itself reports; whatever multiplies, in or beside the base linears, is counted."""
    make_model("llama", tmp_path)
    tests = Path(__file__).parent
    environment = os.environ | {"ONEDNN_VERBOSE": "2", "PYTHONPATH": os.pathsep.join([str(tests), *sys.path[1:]])}
    command = [sys.executable, "-P", "-c", STEPS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    _, steps = done.stdout.split("loaded", maxsplit=1)
    compiled = [line.split(",") for line in steps.splitlines() if "create:cache_miss" in line]
    products = {(fields[5], fields[-2]) for fields in compiled if fields[5] != "reorder"}
    rows = {shape.partition("ic")[0] for _, shape in products}
    assert products, "this test knows nothing of what multiplies here"
    assert len(rows) <= MAX_SIZES
    assert len(products) <= 5 * MAX_SIZES, "four linears of a layer, and the head"


@pytest.mark.parametrize("kernels", [cpu, cpu_exact])
def test_a_step_of_many_parts(kernels, tmp_path):
    """Rows that lie across the bounds of parts, and more logits than one part holds."""
    make_model("llama", tmp_path)
    stops = [1, 119, 110, 73]
    wanted = [range(stop) for stop in stops]
    logits = []
    for module in (reference, kernels):
        rows = [make_sequence([3 + (7 * n + stop) % 90 for n in range(stop)], 0) for stop in stops]
        for number, row in enumerate(rows):
            row.blocks = list(range(30 * number, 30 * number + 30))
        runner = make_runner(load(tmp_path, module))
        logits.append(runner.score([PlannedRow(row, 0, stop) for row, stop in zip(rows, stops, strict=True)], wanted))
    torch.testing.assert_close(logits[1], logits[0], atol=2e-4, rtol=1e-4)
