"""The GPU path: the functions of `reference.py` as Triton kernels, nine launches a layer.

    1 qkv GEMM and shrink    3 attention               5 residual and o's expand       8 down GEMM and shrink
    2 RoPE, KV, expand       4 o GEMM and shrink       6 gate_up GEMM and shrink       9 residual and expand
                                                       7 SiLU · up and expand

One more, which combines the attention's chunks, where a row is longer than 256 tokens. Adapters add none.
"""

from npc_kernels.attention import paged_attention
from npc_kernels.fused import begin, embed, finish_gate_up, finish_qkv, finish_residual
from npc_kernels.gemm import Linear, head, project
from npc_kernels.gpu_plan import plan, room
from npc_kernels.reference import prepare
from npc_kernels.sampling import draw

__all__ = [
    "Linear",
    "begin",
    "draw",
    "embed",
    "finish_gate_up",
    "finish_qkv",
    "finish_residual",
    "head",
    "paged_attention",
    "plan",
    "prepare",
    "project",
    "room",
]
