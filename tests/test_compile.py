"""The tools around the GPU kernels: what `make compile` fails on, and that the benchmark compares like with like."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import bench as kernel_bench
import compile as compiler
import pytest
import torch
from shapes import Model, shape

ROOT = Path(__file__).parent.parent
GOOD = compiler.Row("Llama-3.2-3B", 86, "decode int4", "_project_kernel", 96, 0, 30_000, 4, 0.25, "mma")


def run(script, *arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "kernels" / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_a_model_is_compiled_for_gpus_that_are_not_there():
    """Nine launches a layer with adapters and without, ten where a row is longer than a chunk.

    Two targets in one process: the second one must not get what was compiled for the first.
    """
    done = run("compile.py", "--targets", "86,90", "--models", "SmolLM2-135M", "--jobs", "1")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["problems"] == []
    assert found["launches"] == {
        "decode": 9,
        "decode, long, rank 64": 10,
        "prefill": 9,
        "decode, base only": 9,
        "decode int4": 9,
        "prefill int4": 9,
        "decode int4, zeros": 9,
        "prefill int4, zeros": 9,
    }
    kernels = {row["kernel"] for row in found["compile"]}
    assert {"_project_kernel", "_attend_kernel", "_combine_kernel", "_qkv_kernel", "_draw_kernel"} <= kernels
    assert all(0 < row["registers"] <= 255 and 0 < row["occupancy"] <= 1 for row in found["compile"])
    assert {row["target"] for row in found["compile"] if "wgmma" in row["products"]} == {90}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, None),
        ({"spilled": 8}, "8 bytes of registers spilled"),
        ({"shared": 102_000}, "102000 bytes of shared memory, the target has 101376"),
        ({"shared": 102_000, "target": 80}, None),
        ({"products": ""}, "no tensor-core instruction"),
        ({"products": "", "kernel": "_draw_kernel"}, None),
        ({"products": "wgmma", "target": 90}, None),
        ({"products": "wgmma+wgmma from registers"}, "a warp-group product with an operand in registers"),
    ],
)
def test_what_make_compile_fails_on(change, problem):
    found = dataclasses.replace(GOOD, **change).problem
    assert found == problem or (problem and found.startswith(problem))


def test_an_unknown_model_or_target_is_refused():
    done = run("compile.py", "--targets", "75")
    assert done.returncode == 2
    assert "targets are 80, 86, 89, 90, 120" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_without_a_gpu_the_benchmark_says_so_in_one_line():
    done = run("bench.py")
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "torch sees none here" in done.stderr


TINY = Model(shape(64, 80, 4, 2, 16, 150), 32, has_head_norms=True)


@pytest.mark.parametrize("rank", [16, 64])
def test_the_benchmark_compares_like_with_like(rank):
    """Every case, in the interpreter: kernel and twin compute the same, whatever is moved."""
    torch.manual_seed(0)
    cases = list(kernel_bench.Bench(TINY, 3, rank, torch.device("cpu"), torch.float32).cases())
    assert len(cases) == 17
    for case in cases:
        assert case.num_bytes > 0
        assert kernel_bench.difference(case) < 1e-4, case.name
