"""`make gpu` without a GPU: what it says then, and its proofs in Triton's interpreter, right and broken."""

import dataclasses
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from gpu import replay
from gpu.independence import Independence
from gpu.loading import Loading
from gpu.parity import Parity
from gpu.parts import plain
from gpu.picture import draw
from gpu.report import Report
from gpu.results import Skip, measure_all
from gpu.setup import Setup
from gpu.table import Table, cells_of
from gpu.twins import Twins
from npc_kernels import gpu as kernels
from npc_kernels.gpu_plan import Plan

from npc_runtime.engine.adapters import AdapterStore

# Rows that are left over in a bucket compute with whatever lies in memory, and nobody reads what becomes of it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning"),
]

ROOT = Path(__file__).parents[1]
ALLOWED = {"torch", "triton", "transformers", "peft", "numpy", "safetensors"}
THEIRS = {"tokenizers", "huggingface_hub", "packaging", "psutil", "pip", "regex", "rich", "typer"}
"""Of our requirements, those that the allowed ones bring along."""

BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"{{name}} is not on this machine")

sys.meta_path.insert(0, Blocker())
"""


def one(part, case):
    """The result of the part's item that has these words."""
    return next(result for result in measure_all(Only(part, case)))


class Only:
    """A part without its other items."""

    def __init__(self, part, case):
        self.kind, self.measure = part.kind, part.measure
        self.items = [item for item in part.items if case in item]


def run(*arguments, **environment):
    """The command in a process of its own, on a machine that has only what it may import."""
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "gpu", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture
def bare_machine(tmp_path):
    """The environment of a machine without our other requirements."""
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    ours = {line.partition(";")[0].partition(">")[0].replace("-", "_") for line in wanted} - ALLOWED - THEIRS
    blocked = {*(ours - {"ruamel.yaml"}), "ruamel"}
    assert {"websockets", "msgpack", "pydantic", "numba"} <= blocked
    (tmp_path / "sitecustomize.py").write_text(BLOCKER.format(blocked=blocked), encoding="utf-8")
    return {"PYTHONPATH": str(tmp_path), "TRITON_INTERPRET": "1"}


def test_without_a_gpu_it_says_so_in_one_line():
    done = run(CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.splitlines() == [f"make gpu needs an NVIDIA GPU, and torch {torch.__version__} sees none here."]


def test_it_runs_where_little_is_installed_and_ends_with_json(bare_machine, tmp_path):
    picture = tmp_path / "gpu.svg"
    done = run("--tiny", "--parts", "kernels,prefill int4,peft", "--picture", picture, **bare_machine)
    assert done.returncode == 0, done.stderr
    body = json.loads(done.stdout.splitlines()[-1])
    assert [proof["passed"] for proof in body["proofs"]] == [True]
    assert body["gpu"]["torch"] == torch.__version__
    assert body["prefill"][0]["prefill_ms"] > 0
    assert body["peft"][0]["step_ms"] > 0
    assert body["not_reached"] == []
    ElementTree.parse(picture)


def test_a_part_that_dies_fails_its_proofs_and_says_its_last_words(bare_machine):
    """Here because Triton has neither a GPU nor its interpreter."""
    done = run("--tiny", "--parts", "kernels,peft", **{**bare_machine, "TRITON_INTERPRET": "0"})
    assert done.returncode == 1
    body = json.loads(done.stdout.splitlines()[-1])
    assert [proof["passed"] for proof in body["proofs"]] == [False]
    assert "active drivers" in body["proofs"][0]["skipped"]
    assert body["peft"][0]["step_ms"] > 0, "the others go on"


# -- proofs ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def setup():
    return Setup.for_tests()


def test_kernels_are_compared_with_their_twins(setup, monkeypatch):
    finish = kernels.finish_gate_up
    assert one(Twins(setup), "3 rows").passed

    def one_row_is_off(*arguments):
        out = finish(*arguments)
        out[1] *= 1.1
        return out

    monkeypatch.setattr(kernels, "finish_gate_up", one_row_is_off)
    broken = one(Twins(setup), "3 rows")
    assert (broken.passed, list(broken.numbers["wrong"])) == (False, ["finish gate_up"])


def test_independence_is_proved_bit_by_bit(setup, monkeypatch):
    part, project = Independence(setup, 4), kernels.project
    assert one(part, "preempted").passed

    def depends_on_the_number_of_rows(linear, x, plan, span):
        product = project(linear, x, plan, span)
        if plan.num_tokens > 1:
            product.out[0, 1] *= 1 + 1e-6
        return product

    monkeypatch.setattr(kernels, "project", depends_on_the_number_of_rows)
    broken = one(part, "B = 3")
    assert not broken.passed
    assert broken.numbers["different"] > 0


def test_graphs_are_compared_with_steps_that_were_not_recorded(setup, monkeypatch):
    assert one(replay.Replay(setup), "int4").passed
    refill = Plan.refill

    def keeps_the_pages(plan, batch):
        pages = plan.step.pages.clone()
        refill(plan, batch)
        plan.step.pages.copy_(pages)

    monkeypatch.setattr(Plan, "refill", keeps_the_pages)
    monkeypatch.setattr(replay, "STEPS", replay.STEPS[:2])
    broken = one(replay.Replay(setup), "bf16")
    assert not broken.passed
    assert broken.numbers["wrong"] == ["more segments, other pages"]


def test_parity_is_proved_with_peft(setup, monkeypatch):
    part = Parity(setup)
    assert one(part, "Llama, int4, tokens").passed
    assert one(part, "Llama, int4, bfloat16").passed
    admit = AdapterStore.admit

    def nobody_gets_its_own(store, sequence):
        names = sorted(store.resident)
        own = sequence.request.adapter
        if own is not None:
            request = dataclasses.replace(sequence.request, adapter=names[names.index(own) - 1])
            sequence.request = request
        return admit(store, sequence)

    monkeypatch.setattr(AdapterStore, "admit", nobody_gets_its_own)
    broken = one(Parity(setup), "Llama, dense, tokens")
    assert not broken.passed
    assert set(broken.numbers["different"]) == {"r8", "r16", "r24", "r64"}


# -- measurements ----------------------------------------------------------------------------------------------


def test_a_cell_has_what_the_targets_ask_for(setup):
    machine = {"copy_gb_s": 1000.0, "node_us": 1.0}
    result = one(Table(setup, 4, first=False), "rank mixed, B = 2")
    report = Report({"other cells int4": [result.item]}, {"machine": [as_json("machine", "machine", machine)]})
    report.add("other cells int4", plain(dataclasses.asdict(result)))
    report.add("peft", as_json("peft", "PEFT adapter_names, bf16, prompt 5, rank mixed, B = 2", {"step_ms": 1e6}))
    (row,) = report.table
    shape, ranks = setup.model.shape, 8 + 16
    inputs_and_outputs = 7 * shape.hidden + 2 * (shape.q_size + shape.kv_size) + 3 * shape.intermediate
    assert row["adapter_bytes"] == 4 * ranks * inputs_and_outputs
    assert row["kv_bytes"] == 2 * 2 * (5 + 5) * 4 * shape.kv_size
    floor = (row["base_bytes"] + row["adapter_bytes"] + row["kv_bytes"]) / 1e9
    assert row["floor_ms"] == pytest.approx(floor, abs=1e-4)
    assert row["floor_and_nodes_ms"] == pytest.approx(floor + 12e-3, abs=1e-4)
    assert row["to_floor_and_nodes"] == pytest.approx(row["step_ms"] / (floor + 12e-3), rel=0.01)
    assert row["times_one_at_a_time"] == pytest.approx(2 * row["single_ms"] / row["step_ms"], rel=0.01)
    assert row["over_base"] == pytest.approx(row["step_ms"] / row["base_ms"] - 1, abs=1e-3)
    assert row["times_peft"] == pytest.approx(1e6 / row["step_ms"], rel=0.01)
    assert any("rank mixed" in line for line in report.lines())


def test_an_adapter_is_loaded_beside_rows_that_speak(setup):
    numbers = one(Loading(setup), "as the store has it").numbers
    assert numbers["load_ms"] > 0
    assert numbers["step_while_loading_ms"] > 0


def test_the_cells_of_the_targets_come_first():
    """All of them are planned, whatever there is time for."""
    setup = dataclasses.replace(Setup.for_tests(), rows=(1, 2, 4, 8, 16, 32, 64), prompts=(43, 1000))
    first, others = cells_of(setup, 4)
    assert len(first) + len(others) == 2 * 3 * 7
    assert [(cell.ranks, cell.rows) for cell in first[:2]] == [("16", 8), ("16", 1)]
    assert {(cell.ranks, cell.rows) for cell in first} == {
        (ranks, rows) for ranks in ("16", "64", "mixed") for rows in (1, 8, 32)
    }


# -- the report ------------------------------------------------------------------------------------------------


def as_json(kind, item, numbers=None, *, passed=None, skipped=""):
    return {"kind": kind, "item": item, "passed": passed, "skipped": skipped, "seconds": 1.0, "numbers": numbers or {}}


def test_a_proof_that_was_not_reached_is_no_success():
    report = Report({"parity": ["a", "b"]})
    assert not report.is_good, "nothing was proved"
    report.add("parity", as_json("proof", "a", passed=True))
    assert report.is_good
    assert report.not_reached == ["b"]
    report.ended["parity"] = "the process ended with status 139"
    assert not report.is_good
    assert report.proofs[1] == {"item": "b", "passed": False, "skipped": "the process ended with status 139"}


def test_what_raises_is_over_and_reported():
    class Troubled:
        kind = "proof"
        items = ("no room", "a crash", "fine")

        def measure(self, item):
            if item == "no room":
                raise Skip("32 adapters do not fit")
            if item == "a crash":
                raise RuntimeError("CUDA error: an illegal memory access\nmore")
            return {"passed": True, "count": float("nan")}

    skipped, crashed, fine = measure_all(Troubled())
    assert (skipped.passed, skipped.skipped) == (None, "32 adapters do not fit")
    assert (crashed.passed, crashed.skipped) == (False, "RuntimeError: CUDA error: an illegal memory access")
    assert fine.passed
    assert plain(fine.numbers) == {"count": "nan"}


def test_the_picture_has_a_curve_for_each_system():
    rows = [
        {"bits": 4, "prompt": 43, "ranks": ranks, "rows": rows, "step_ms": 2.0 + rows, "base_ms": 1.5}
        | {"floor_ms": 0.5, "floor_and_nodes_ms": 1.0}
        for ranks in ("16", "64")
        for rows in (1, 8)
    ]
    skipped = {"item": "int4, prompt 43, rank 64, B = 64", "skipped": "no room"}
    drawn = ElementTree.fromstring(draw({"gpu": {"name": "a <card> & more"}, "table": [*rows, skipped]}))
    dots = [element for element in drawn.iter() if element.tag.endswith("circle")]
    assert len(dots) == 4
    assert any("a <card> & more" in (element.text or "") for element in drawn.iter())
