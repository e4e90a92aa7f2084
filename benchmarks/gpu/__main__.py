"""python benchmarks/gpu: runs from a checkout, with whatever python has torch, triton, transformers and peft."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

if __name__ == "__main__":
    # In place of this folder, whose modules are not top-level ones. Nothing of ours need be installed.
    sys.path[0:1] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]
    from gpu.command import main

    sys.exit(main())
