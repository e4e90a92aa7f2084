"""The figures of a running daemon, as `status`, `stats`, /healthz and /metrics give them."""

from typing import Any

import psutil

from npc_runtime.engine.core import EngineStats, MemoryBytes

__all__ = ["engine_figures"]

MIB = 2**20


def engine_figures(stats: EngineStats) -> dict[str, Any]:
    """The fields of `wire.Stats` that the engine and the process have; memory in MiB."""
    return {
        "active": stats.num_running,
        "queued": stats.num_waiting,
        "tokens_per_s": round(stats.tokens_per_s, 1),
        "tokens": stats.num_tokens,
        "forwards": stats.num_forwards,
        "kv_used": stats.kv_blocks_used / stats.kv_blocks_total,
        "kv_cached": stats.kv_blocks_cached / stats.kv_blocks_total,
        "preempted": stats.num_preempted,
        "adapters": list(stats.adapters_resident),
        "memory": _memory_mib(stats.memory),
        "paused": stats.paused,
        "max_tokens_per_s": stats.max_tokens_per_s,
    }


def _memory_mib(memory: MemoryBytes) -> dict[str, float]:
    sizes = {
        "process": psutil.Process().memory_info().rss,
        "kv_cache": memory.kv_cache,
        "adapter_pool": memory.adapter_pool,
        "adapter_copies": memory.adapter_copies,
    }
    if memory.gpu is not None:
        sizes["gpu"] = memory.gpu
    return {name: round(size / MIB, 1) for name, size in sizes.items()}
