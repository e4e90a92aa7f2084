"""make gpu: proofs and measurements on the NVIDIA GPU at hand, in less than nine minutes, without anybody watching.

    make gpu                        or: python benchmarks/gpu
    make gpu MINUTES=4 PICTURE=benchmarks/gpu.svg

Each part has a process of its own, so that one that crashes or hangs stops nobody. Proofs run side by side where there
are processors and memory for it; what is measured runs alone. Progress on stderr; tables on stdout, and one JSON line
last. Exit status 1 if a proof failed or there is no GPU.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch

from gpu.parts import PARTS, compute
from gpu.picture import draw
from gpu.processes import Process
from gpu.report import PROOFS, Report
from gpu.setup import Setup

__all__ = ["main", "run"]

ROOM_FOR_ALL = 32 << 30
"""Device memory from which proofs run side by side."""

MIN_CAPABILITY = (8, 0)
"""Of the GPU: before it there is no bfloat16."""

RESERVE_S = 5.0
"""What the last words take."""


def main(arguments: list[str] | None = None) -> int:
    """Run, print, and return the exit status."""
    options = parse_options(arguments)
    missing = "" if options.tiny else what_is_missing()
    if missing:
        print(missing, file=sys.stderr)
        return 1
    setup = Setup.for_tests() if options.tiny else Setup.for_gpu()
    if options.part:
        compute(options.part, setup)
        return 0
    report = run(setup, options.parts or list(PARTS), until=time.monotonic() + 60 * options.minutes - RESERVE_S)
    for line in report.lines():
        print(line)
    if options.picture:
        options.picture.write_text(draw(report.body()), encoding="utf-8")
    print(json.dumps(report.body()), flush=True)
    return 0 if report.is_good else 1


def what_is_missing() -> str:
    """Why nothing can be measured here, in one line, or an empty string."""
    if not torch.cuda.is_available():
        return f"make gpu needs an NVIDIA GPU, and torch {torch.__version__} sees none here."
    if torch.cuda.get_device_capability() < MIN_CAPABILITY:
        name = torch.cuda.get_device_name()
        return f"make gpu needs an NVIDIA GPU of 2020 or newer (RTX 30, A100); this one is a {name}."
    return ""


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.5, help="for everything (8.5)")
    parser.add_argument("--parts", type=lambda text: text.split(","), help=f"some of: {', '.join(PARTS)}")
    parser.add_argument("--picture", type=Path, help="draw step times and floors into this SVG")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # what a process is told
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # what tests do without a GPU
    options = parser.parse_args(arguments)
    unknown = set(options.parts or []) - set(PARTS)
    if unknown:
        parser.error(f"unknown parts: {', '.join(sorted(unknown))}")
    return options


def run(setup: Setup, names: list[str], *, until: float) -> Report:
    """All parts in their order, as far as the time goes."""
    # The machine's speeds come first: without them there are no floors.
    report = Report({name: list(PARTS[name].make(setup).items) for name in ["machine", *names]})
    width = _num_side_by_side(setup)
    proofs = [name for name in names if name in PROOFS]
    groups = [["machine"], *(proofs[first : first + width] for first in range(0, len(proofs), width))]
    groups += [[name] for name in names if name not in PROOFS and name != "machine"]
    started = time.monotonic()
    for group in groups:
        if until - time.monotonic() < 1:
            break
        begins = time.monotonic()
        processes = [Process(name, _command(setup, name), report, started) for name in group]
        for process in processes:
            process.wait(min(until, begins + PARTS[process.name].max_seconds))
    return report


def _num_side_by_side(setup: Setup) -> int:
    if not setup.on_gpu or torch.cuda.get_device_properties(0).total_memory < ROOM_FOR_ALL:
        return 1
    return max(1, min(len(PROOFS), (os.cpu_count() or 1) // 2))


def _command(setup: Setup, name: str) -> list[str]:
    hidden = [] if setup.on_gpu else ["--tiny"]
    return [sys.executable, str(Path(__file__).parent), "--part", name, *hidden]
