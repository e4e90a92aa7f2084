"""What a daemon computes lines with: torch, the base, the adapters and the engine, made for `serve`.

All of it takes its time and can be interrupted at any moment; the sockets are served meanwhile.
"""

import torch

from npc_runtime import __version__
from npc_runtime.engine.adapters import AdapterStore
from npc_runtime.engine.core import EngineConfig
from npc_runtime.engine.device import choose_threads
from npc_runtime.engine.embedded import OnProgress
from npc_runtime.engine.engine import Engine
from npc_runtime.engine.faults import is_device_error
from npc_runtime.errors import StartupError
from npc_runtime.loading import LoadedBase, fit_gpu, limit_gpu, load_adapters, load_base, make_config, make_store
from npc_runtime.persona import Library
from npc_runtime.protocol import BaseModelInfo
from npc_runtime.server import NpcServer
from npc_runtime.settings import Settings
from npc_runtime.stage import DaemonInfo, Voice

__all__ = ["load_voice"]


def load_voice(settings: Settings, library: Library, server: NpcServer, on_progress: OnProgress) -> Voice:
    """Load the base, the personas' adapters and an engine that reports to the server. Raises `StartupError`.

    A persona whose adapter cannot be used is rejected in the library.
    """
    try:
        return _load(settings, library, server, on_progress)
    except RuntimeError as error:
        if not is_device_error(error):
            raise
        reason = str(error).partition("\n")[0]
        raise StartupError(
            f"The device cannot be used: {reason}.",
            "Look at its driver, or restart it; CUDA_VISIBLE_DEVICES=-1 hides the GPU, and the CPU computes.",
        ) from error


def _load(settings: Settings, library: Library, server: NpcServer, on_progress: OnProgress) -> Voice:
    torch.set_num_threads(settings.threads or choose_threads())
    limit_gpu(settings)
    base = load_base(
        settings.base,
        settings.dtype,
        on_progress,
        deterministic=settings.deterministic,
        quantize=settings.quantize,
    )
    config = make_config(settings, base.decoder.shape, base.device)
    adapters = make_store(base.decoder.shape, base.device, config, base.info.folder)
    load_adapters(adapters, library, base.info.name)
    config = fit_gpu(settings, base, adapters, config)
    engine = _make_engine(base, adapters, config, server, on_progress)
    return Voice(engine, _describe(base, config), lambda messages: base.tokenizer.render(messages).token_ids)


def _make_engine(
    base: LoadedBase, adapters: AdapterStore, config: EngineConfig, server: NpcServer, on_progress: OnProgress
) -> Engine:
    try:
        engine = Engine(
            base.decoder, base.tokenizer, adapters, config, on_step=server.on_step, on_death=server.on_engine_death
        )
        if base.device.torch_device.type == "cuda":
            engine.warm(lambda fraction: on_progress("preparing the GPU", fraction))
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise StartupError(
            "There is no memory for the KV cache, the adapters and a step.", "Lower --kv-memory or --adapter-memory."
        ) from error
    return engine


def _describe(base: LoadedBase, config: EngineConfig) -> DaemonInfo:
    context = min(base.decoder.shape.context, config.kv_tokens)
    return DaemonInfo(
        version=__version__,
        device=base.device.name,
        backend=base.backend,
        base=BaseModelInfo(name=base.info.name, sha256=base.info.sha256, context=context),
    )
