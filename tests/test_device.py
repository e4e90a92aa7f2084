"""What is computed with: the dtype follows what the processor and oneDNN multiply fast."""

import os
import subprocess
import sys

import pytest


def choose(**environment):
    code = "from npc_runtime.engine.device import choose_device; print(choose_device('auto').dtype)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("isa", ["SSE41", "AVX2"])
def test_without_fast_bfloat16_products_float32_is_chosen(isa):
    """bfloat16 would be converted for every product: four times slower than float32."""
    assert choose(ONEDNN_MAX_CPU_ISA=isa) == "torch.float32"
