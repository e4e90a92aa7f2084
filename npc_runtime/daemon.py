"""Puts a daemon together: from settings to a base in memory, adapters, an engine thread and an open socket."""

import asyncio
import logging
import os
import secrets
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

from npc_runtime import __version__
from npc_runtime.discovery import Endpoint, project_of, remove_endpoint, write_endpoint
from npc_runtime.engine.adapters import AdapterStore
from npc_runtime.engine.core import EngineConfig
from npc_runtime.engine.device import Device, DTypeName, choose_device, explain_unused_gpu
from npc_runtime.engine.embedded import OnProgress
from npc_runtime.engine.engine import Engine
from npc_runtime.engine.model import Decoder, choose_kernels
from npc_runtime.engine.tokenizer import ChatTokenizer
from npc_runtime.engine.weights import BaseInfo, describe_base, iterate_weights, read_config, resolve_base
from npc_runtime.errors import StartupError, WireError
from npc_runtime.persona import Library
from npc_runtime.protocol import PROTOCOL_VERSION, BaseModelInfo
from npc_runtime.server import NpcServer
from npc_runtime.session import DaemonInfo

__all__ = ["LoadedBase", "Settings", "load_adapters", "load_base", "load_library", "run_daemon"]

logger = logging.getLogger(__name__)

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, slots=True)
class Settings:
    """What `npc-runtime serve` was asked for."""

    base: str
    personas: Path
    host: str
    port: int
    dtype: DTypeName
    threads: int | None
    needs_token: bool
    project: str | None


@dataclass(frozen=True, slots=True)
class LoadedBase:
    """A base model that is ready to compute."""

    info: BaseInfo
    device: Device
    decoder: Decoder
    tokenizer: ChatTokenizer


def run_daemon(settings: Settings, on_progress: OnProgress) -> None:
    """Load everything, serve until SIGINT or SIGTERM. Raises `StartupError` before the socket opens."""
    import torch

    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    library = load_library(settings.personas)
    if settings.host not in LOOPBACK and not settings.needs_token:
        raise StartupError(f"--no-auth is refused on {settings.host}.", "Only loopback may go without a token.")
    with _bind(settings.host, settings.port) as sock:
        base = load_base(settings.base, settings.dtype, on_progress)
        config = EngineConfig()
        adapters = load_adapters(base, library, config)
        asyncio.run(_serve(settings, sock, base, library, adapters, config))


def load_library(folder: Path) -> Library:
    """Read the personas, logging what is wrong with any. Raises `StartupError` if the folder is not there."""
    if not folder.is_dir():
        raise StartupError(f"--personas {folder}: there is no such folder.", "Name a folder of persona folders.")
    library = Library.load(folder)
    if not len(library) and not library.problems:
        logger.warning("%s holds no personas (no */persona.yaml): every line will be rejected", folder)
    for persona_id, problem in library.problems.items():
        logger.warning("persona %s cannot be used: %s", persona_id, problem)
    return library


def load_base(name: str, dtype: DTypeName, on_progress: OnProgress) -> LoadedBase:
    """Find the base (fetching the embedded one the first time) and bring it into memory."""
    problem = explain_unused_gpu()
    if problem:
        logger.warning("%s", problem)
    device = choose_device(dtype)
    folder = resolve_base(name, on_progress)
    config = read_config(folder)
    info = describe_base(name, folder)
    tensors = iterate_weights(
        folder,
        dtype=device.dtype,
        device=device.torch_device,
        on_progress=lambda fraction: on_progress(f"loading {info.name}", fraction),
    )
    return LoadedBase(
        info, device, Decoder(config, tensors, choose_kernels(device.torch_device)), ChatTokenizer(folder)
    )


def load_adapters(base: LoadedBase, library: Library, config: EngineConfig) -> AdapterStore:
    """Read every persona's adapter; a persona whose adapter cannot be used gets the reason as its problem."""
    decoder = base.decoder
    store = AdapterStore(
        decoder.shape,
        decoder.layout,
        dtype=decoder.dtype,
        device=decoder.device,
        max_pages=config.max_adapter_pages,
    )
    for persona in library:
        if not persona.adapter:
            continue
        try:
            parts = [(persona.folder / ref.path, ref.scale) for ref in persona.adapter]
            pages = store.add(persona.id, parts)
        except WireError as error:
            library.problems[persona.id] = error
            logger.warning("persona %s cannot be used: %s", persona.id, error)
            continue
        if Path(pages.made_for).name != base.info.name:
            logger.info(
                "the adapter of %s says it was made for %s; its shapes fit %s",
                persona.id,
                pages.made_for,
                base.info.name,
            )
    return store


async def _serve(
    settings: Settings,
    sock: socket.socket,
    base: LoadedBase,
    library: Library,
    adapters: AdapterStore,
    config: EngineConfig,
) -> None:
    stop = asyncio.Event()
    _stop_on_signals(stop)
    port = sock.getsockname()[1]
    token = secrets.token_urlsafe(24) if settings.needs_token else None
    context = min(base.decoder.shape.context, config.kv_tokens)
    server = NpcServer(
        info=DaemonInfo(
            version=__version__,
            device=base.device.name,
            backend=base.device.backend,
            base=BaseModelInfo(name=base.info.name, sha256=base.info.sha256, context=context),
            token=token,
        ),
        library=library,
        render=lambda messages: base.tokenizer.render(messages).token_ids,
        host=settings.host,
        port=port,
    )
    engine = Engine(base.decoder, base.tokenizer, adapters, config, on_step=server.on_step)
    await server.start(sock, engine)
    project = settings.project or project_of(settings.personas)
    endpoint = Endpoint(port, os.getpid(), token, PROTOCOL_VERSION, base.info.name)
    path = write_endpoint(project, endpoint)
    _announce(endpoint)
    if settings.host not in LOOPBACK:
        logger.warning("bound to %s: other machines can connect, with the token", settings.host)
    logger.info(
        "%s on %s, %d personas; ws://%s:%d/v1; token and port in %s; Ctrl-C stops",
        *(base.info.name, base.device.name, len(library), settings.host, port, path),
    )
    await stop.wait()
    logger.info("stopping")
    remove_endpoint(project, os.getpid())
    await server.close()


def _announce(endpoint: Endpoint) -> None:
    try:
        sys.stdout.write(endpoint.to_json() + "\n")
        sys.stdout.flush()
    except OSError:  # whoever started the daemon closed the pipe; the runtime file says the same
        logger.info("stdout is closed")


def _stop_on_signals(stop: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            loop.add_signal_handler(number, stop.set)
        except NotImplementedError:  # Windows
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop.set))


def _bind(host: str, port: int) -> socket.socket:
    """Take the port before the slow loading starts, so that a busy one is said at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        if sys.platform != "win32":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise StartupError(
            f"Cannot listen on {host}:{port} ({error.strerror or error}).",
            "If another daemon is running, stop it or use it; --port 0 takes any free port.",
        ) from error
    return sock
