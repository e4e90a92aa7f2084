"""The daemon: loads what it computes with, opens its port, serves until it is stopped, and is replaced if need be."""

import asyncio
import logging
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from npc_runtime import __version__
from npc_runtime.daemon_process import DaemonProcess
from npc_runtime.discovery import Endpoint, remove_endpoint, write_endpoint
from npc_runtime.door import Door
from npc_runtime.engine.adapters import AdapterStore
from npc_runtime.engine.core import EngineConfig
from npc_runtime.engine.device import choose_threads
from npc_runtime.engine.embedded import OnProgress
from npc_runtime.engine.engine import Engine
from npc_runtime.engine.faults import is_device_error
from npc_runtime.errors import StartupError
from npc_runtime.gate import Gate
from npc_runtime.handover import Handover
from npc_runtime.loading import (
    LoadedBase,
    Settings,
    fit_gpu,
    limit_gpu,
    load_adapters,
    load_base,
    load_library,
    make_config,
    make_store,
)
from npc_runtime.persona import Library
from npc_runtime.persona_folder import PersonaFolder
from npc_runtime.protocol import PROTOCOL_VERSION, BaseModelInfo
from npc_runtime.reload import PersonaWatch
from npc_runtime.server import NpcServer
from npc_runtime.stage import DaemonInfo, Stage
from npc_runtime.stopping import stop_signals

__all__ = ["run_daemon"]

logger = logging.getLogger(__name__)

LOOPBACK = ("127.0.0.1", "localhost", "::1")

SIGNAL_S = 0.02
"""In that time the loop has seen a signal that came before."""


def run_daemon(
    settings: Settings, process: DaemonProcess, progress: Callable[[], AbstractContextManager[OnProgress]]
) -> None:
    """Load everything, serve until the process is asked to stop. `progress` is entered while there is some to show.

    If the engine thread dies, a new process takes the place of this one, and the runtime file stays for it. Raises
    `StartupError` before anything is served, and `EngineDied` if there can be no new process.
    """
    try:
        successor = _load_and_serve(settings, process, progress)
        if successor is not None:
            process.log.flush()
            successor.replace_process()
    except RuntimeError as error:
        if not is_device_error(error):
            raise
        reason = str(error).partition("\n")[0]
        raise StartupError(
            f"The device cannot be used: {reason}.",
            "Look at its driver, or restart it; CUDA_VISIBLE_DEVICES=-1 hides the GPU, and the CPU computes.",
        ) from error
    finally:
        remove_endpoint(process.project, os.getpid())


def _load_and_serve(
    settings: Settings, process: DaemonProcess, progress: Callable[[], AbstractContextManager[OnProgress]]
) -> Handover | None:
    """Serve on the port that was taken over, or on a new one; returns what the next process takes over, if any."""
    torch.set_num_threads(settings.threads or choose_threads())
    loaded_at = time.time()
    library = load_library(settings.personas)
    if settings.host not in LOOPBACK and not settings.needs_token:
        raise StartupError(f"--no-auth is refused on {settings.host}.", "Only loopback may go without a token.")
    handover = process.taken or _open_port(settings, process)
    if handover.token is not None:
        process.log.hide(handover.token)
    limit_gpu(settings)
    with handover.sock:
        gate = _make_gate(settings, handover.sock.getsockname()[1])
        with progress() as on_progress:
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
        door = Door(token=handover.token, project=process.project, owner_pid=process.owner_pid)
        personas = PersonaFolder(settings.personas)
        server = NpcServer(gate=gate, door=door, personas=personas, version=__version__)
        # Not on the loop: what takes long must end at once when Ctrl-C asks for it.
        engine = _make_engine(base, adapters, config, server, progress)
        info = _make_info(base, config)
        return asyncio.run(_serve(settings, process, handover, base, info, library, server, engine, loaded_at))


def _make_gate(settings: Settings, port: int) -> Gate:
    return Gate(settings.host, port, allowed_hosts=settings.allowed_hosts, allowed_origins=settings.allowed_origins)


def _make_info(base: LoadedBase, config: EngineConfig) -> DaemonInfo:
    context = min(base.decoder.shape.context, config.kv_tokens)
    return DaemonInfo(
        version=__version__,
        device=base.device.name,
        backend=base.backend,
        base=BaseModelInfo(name=base.info.name, sha256=base.info.sha256, context=context),
    )


def _make_engine(
    base: LoadedBase,
    adapters: AdapterStore,
    config: EngineConfig,
    server: NpcServer,
    progress: Callable[[], AbstractContextManager[OnProgress]],
) -> Engine:
    try:
        engine = Engine(
            base.decoder, base.tokenizer, adapters, config, on_step=server.on_step, on_death=server.on_engine_death
        )
        if base.device.torch_device.type == "cuda":
            with progress() as on_progress:
                engine.warm(lambda fraction: on_progress("preparing the GPU", fraction))
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise StartupError(
            "There is no memory for the KV cache, the adapters and a step.", "Lower --kv-memory or --adapter-memory."
        ) from error
    return engine


async def _serve(
    settings: Settings,
    process: DaemonProcess,
    handover: Handover,
    base: LoadedBase,
    info: DaemonInfo,
    library: Library,
    server: NpcServer,
    engine: Engine,
    loaded_at: float,
) -> Handover | None:
    asked = asyncio.Event()
    restore_signals = _stop_on_signals(asked, server.is_over)
    port = handover.sock.getsockname()[1]
    await server.start(handover.sock)
    server.open(
        engine,
        lambda new_request_id, new_seed: Stage(
            info, library, lambda messages: base.tokenizer.render(messages).token_ids, new_request_id, new_seed
        ),
    )
    log_file = None if process.log.path is None else str(process.log.path)
    endpoint = Endpoint(port, os.getpid(), handover.token, PROTOCOL_VERSION, base.info.name, log_file)
    if not handover.replaced_at:  # the first line on stdout is still true, and whoever read it expects no second one
        _announce(endpoint)
    path = _write_runtime_file(process.project, endpoint)
    if settings.host not in LOOPBACK:
        logger.warning("bound to %s: other machines can connect, with the token", settings.host)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    logger.info(
        "%s on %s, %d personas; ws://%s:%d/v1; token and port in %s; log: %s; Ctrl-C stops",
        *(base.info.name, base.device.name, len(library), host, port, path, log_file or "stderr"),
    )
    logger.info("status page: http://%s:%d/ (npc-runtime page prints a link that opens it)", host, port)
    process.log.settle()
    watch = PersonaWatch(
        library,
        settings.personas,
        loaded_at=loaded_at,
        replace_adapter=server.replace_adapter,
        announce=server.announce,
    )
    watch.start()
    await server.is_over.wait()
    await watch.close()
    successor = None
    try:
        if engine.has_died and not asked.is_set():
            successor = handover.successor()
    finally:
        logger.info("stopping: %s", process.why_it_stops if successor is None else "a new process takes over")
        if successor is None:
            remove_endpoint(process.project, os.getpid())
        await server.close(process.why_it_stops if successor is None else "the daemon restarts; connect again")
    if successor is not None:
        restore_signals()  # one that comes from here on ends the process wherever it is
        await asyncio.sleep(SIGNAL_S)
    return None if asked.is_set() else successor


def _open_port(settings: Settings, process: DaemonProcess) -> Handover:
    token = secrets.token_urlsafe(24) if settings.needs_token else None
    lock_fd = None if process.lock is None else process.lock.fd
    return Handover(_bind(settings.host, settings.port), token, lock_fd=lock_fd)


def _write_runtime_file(project: str, endpoint: Endpoint) -> Path | None:
    try:
        return write_endpoint(project, endpoint)
    except OSError as error:
        logger.warning("no runtime file (%s); clients must be told port and token", error)
        return None


def _announce(endpoint: Endpoint) -> None:
    if sys.stdout is None:  # started without any
        return
    try:
        sys.stdout.write(endpoint.to_json() + "\n")
        sys.stdout.flush()
    except OSError:  # whoever started the daemon closed the pipe; the runtime file says the same
        logger.info("stdout is closed")


def _stop_on_signals(*events: asyncio.Event) -> Callable[[], None]:
    """Set the events when asked to stop. What is returned puts back the handlers that were there before."""
    loop = asyncio.get_running_loop()
    numbers = stop_signals()
    before = [(number, signal.getsignal(number)) for number in numbers]

    def set_all() -> None:
        for event in events:
            event.set()

    def restore() -> None:
        for number, handler in before:
            signal.signal(number, handler)

    for number in numbers:
        try:
            loop.add_signal_handler(number, set_all)
        except NotImplementedError:  # Windows
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(set_all))
    return restore


def _bind(host: str, port: int) -> socket.socket:
    """Take the port before the slow loading starts, so that a busy one is said at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        if sys.platform != "win32":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        sock.bind((host, port))
        sock.listen()  # only a listening socket keeps others off the port
    except OSError as error:
        sock.close()
        raise StartupError(
            f"Cannot listen on {host}:{port} ({error.strerror or error}).",
            "If another daemon is running, stop it or use it; --port 0 takes any free port.",
        ) from error
    return sock
