"""Puts a daemon together: from settings to a base in memory, adapters, an engine thread and an open socket."""

import asyncio
import logging
import os
import secrets
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from npc_runtime import __version__
from npc_runtime.discovery import Endpoint, project_of, remove_endpoint, write_endpoint
from npc_runtime.engine.adapters import AdapterStore
from npc_runtime.engine.checkpoints import read_scheme
from npc_runtime.engine.codes import read_codes
from npc_runtime.engine.core import EngineConfig
from npc_runtime.engine.device import Device, DTypeName, choose_device, choose_threads, explain_unused_gpu
from npc_runtime.engine.embedded import OnProgress
from npc_runtime.engine.engine import Engine
from npc_runtime.engine.faults import is_device_error
from npc_runtime.engine.memory import MIN_KV_TOKENS, fit_kv_tokens, keep_within, measure_gpu, step_bytes
from npc_runtime.engine.model import Decoder, Kernels, ModelShape, PageLayout, choose_kernels
from npc_runtime.engine.quantized import Quantize, has_code_kernels, is_to_be_quantized, load_quantized
from npc_runtime.engine.tokenizer import ChatTokenizer
from npc_runtime.engine.weights import BaseInfo, describe_base, iterate_weights, read_config, resolve_base
from npc_runtime.errors import AdapterIncompatible, StartupError, WireError
from npc_runtime.handover import Handover
from npc_runtime.persona import Library, Persona
from npc_runtime.protocol import PROTOCOL_VERSION, BaseModelInfo
from npc_runtime.server import NpcServer
from npc_runtime.session import DaemonInfo

__all__ = [
    "LoadedBase",
    "Settings",
    "check_personas",
    "fit_gpu",
    "load_adapters",
    "load_base",
    "load_library",
    "make_config",
    "make_store",
    "run_daemon",
]

logger = logging.getLogger(__name__)

LOOPBACK = ("127.0.0.1", "localhost", "::1")

SIGNAL_S = 0.02
"""In that time the loop has seen a signal that came before."""

MAX_DEFAULT_KV_BYTES = 1 << 30


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
    deterministic: bool = False
    quantize: Quantize = "auto"
    adapter_mib: int | None = None  # None: `EngineConfig`'s
    kv_mib: int | None = None  # None: `EngineConfig`'s, but at most MAX_DEFAULT_KV_BYTES
    gpu_mib: int | None = None  # of everything on the GPU; None: no bound but what is free


@dataclass(frozen=True, slots=True)
class LoadedBase:
    """A base model that is ready to compute."""

    info: BaseInfo
    device: Device
    decoder: Decoder
    tokenizer: ChatTokenizer
    is_int4: bool = False

    @property
    def backend(self) -> str:
        """What computes, for `welcome` and for whoever reads a measurement."""
        kernels, dtype = self.decoder.kernels.__name__, str(self.device.dtype)
        weights = ", int4 weights" if self.is_int4 else ""
        return f"torch {torch.__version__}, {kernels}, {dtype.removeprefix('torch.')}{weights}"


def run_daemon(settings: Settings, progress: Callable[[], AbstractContextManager[OnProgress]]) -> None:
    """Load everything, serve until SIGINT or SIGTERM. `progress` is entered only while there is something to show.

    If the engine thread dies, a new process takes the place of this one, and the runtime file stays for it. Raises
    `StartupError` before anything is served, and `EngineDied` if there can be no new process.
    """
    try:
        successor = _load_and_serve(settings, Handover.take(), progress)
        if successor is not None:
            successor.replace_process()
    except RuntimeError as error:
        if not is_device_error(error):
            raise
        reason = str(error).partition("\n")[0]
        raise StartupError(f"The device cannot be used: {reason}.", "Look at its driver, or restart it.") from error
    finally:
        remove_endpoint(_project_of(settings), os.getpid())


def _load_and_serve(
    settings: Settings, taken: Handover | None, progress: Callable[[], AbstractContextManager[OnProgress]]
) -> Handover | None:
    """Serve on the port that was taken over, or on a new one; returns what the next process takes over, if any."""
    torch.set_num_threads(settings.threads or choose_threads())
    library = load_library(settings.personas)
    if settings.host not in LOOPBACK and not settings.needs_token:
        raise StartupError(f"--no-auth is refused on {settings.host}.", "Only loopback may go without a token.")
    handover = taken or Handover(_bind(settings.host, settings.port), _new_token(settings))
    with handover.sock:
        with progress() as on_progress:
            base = load_base(
                settings.base,
                settings.dtype,
                on_progress,
                deterministic=settings.deterministic,
                quantize=settings.quantize,
            )
        config = make_config(settings, base.decoder.shape, base.device)
        adapters = make_store(base.decoder.shape, base.device, config)
        load_adapters(adapters, library, base.info.name)
        config = fit_gpu(settings, base, adapters, config)
        return asyncio.run(_serve(settings, handover, base, library, adapters, config, progress))


def load_library(folder: Path) -> Library:
    """Read the personas, logging what is wrong with any. Raises `StartupError` if the folder is not there."""
    library = Library.load(folder)
    if not len(library) and not library.problems:
        logger.warning("%s holds no personas (no */persona.yaml): every line will be rejected", folder)
    for persona_id, problem in library.problems.items():
        logger.warning("persona %s cannot be used: %s", persona_id, problem)
    return library


def load_base(
    name: str,
    dtype: DTypeName,
    on_progress: OnProgress,
    *,
    deterministic: bool = False,
    quantize: Quantize = "auto",
    kernels: Kernels | None = None,
) -> LoadedBase:
    """Find the base (fetching the embedded one the first time) and bring it into memory.

    `kernels` None takes the fastest for the device, or with `deterministic` those whose rows are independent.
    `quantize` auto makes 4 bits of a large base where the kernels compute with them.
    """
    problem = explain_unused_gpu()
    if problem:
        logger.warning("%s", problem)
    device = choose_device(dtype)
    kernels = kernels or choose_kernels(device.torch_device, device.dtype, deterministic=deterministic)
    kernels.prepare(device.dtype, lambda fraction: on_progress("preparing kernels", fraction))
    folder = resolve_base(name, on_progress)
    config = read_config(folder)
    info = describe_base(name, folder)
    tokenizer = ChatTokenizer(folder)
    reads_codes = has_code_kernels(kernels)
    is_quantized = is_to_be_quantized(quantize, folder, ModelShape.from_config(config), kernels)
    if is_quantized:
        tensors = load_quantized(info, dtype=device.dtype, device=device.torch_device, on_progress=on_progress)
    else:
        tensors = iterate_weights(
            folder,
            dtype=device.dtype,
            device=device.torch_device,
            on_progress=lambda fraction: on_progress(f"loading {info.name}", fraction),
            keeps_codes=reads_codes,
        )
    decoder = Decoder(config, tensors, kernels, read_codes(folder))
    is_int4 = is_quantized or (reads_codes and read_scheme(folder) is not None)
    return LoadedBase(info, device, decoder, tokenizer, is_int4)


def make_config(settings: Settings, shape: ModelShape, device: Device) -> EngineConfig:
    """The engine's sizes from the user's budgets. Raises `StartupError` if the KV cache would be too small to use."""
    config = EngineConfig()
    token_bytes = _kv_token_bytes(shape, device)
    if settings.kv_mib is None:
        num_tokens = min(config.kv_tokens, max(MAX_DEFAULT_KV_BYTES // token_bytes, MIN_KV_TOKENS))
    else:
        num_tokens = settings.kv_mib * 2**20 // token_bytes
    if num_tokens < MIN_KV_TOKENS:
        needed = -(-MIN_KV_TOKENS * token_bytes // 2**20)
        raise StartupError(
            f"--kv-memory {settings.kv_mib} holds {num_tokens} tokens of this base.", f"Use {needed} or more."
        )
    config = replace(config, kv_tokens=num_tokens // config.block_size * config.block_size)
    if settings.adapter_mib is not None:
        num_bytes = settings.adapter_mib * 2**20
        config = replace(config, adapter_pool_bytes=num_bytes, adapter_host_bytes=num_bytes)
    return config


def fit_gpu(settings: Settings, base: LoadedBase, adapters: AdapterStore, config: EngineConfig) -> EngineConfig:
    """The configuration with as much KV cache as the GPU, or the budget for it, has room for; on a CPU as it is.

    Raises `StartupError` if that is too little to use, or less than was asked for.
    """
    if base.device.torch_device.type != "cuda":
        if settings.gpu_mib is not None:
            raise StartupError("--gpu-memory is for a GPU, and this daemon computes on the CPU.", "Leave it out.")
        return config
    memory = measure_gpu(base.device.torch_device)
    budget = None if settings.gpu_mib is None else settings.gpu_mib * 2**20
    token_bytes = _kv_token_bytes(base.decoder.shape, base.device)
    num_tokens = fit_kv_tokens(
        memory,
        budget=budget,
        pool=adapters.num_bytes,
        step=step_bytes(base.decoder.shape, config),
        token=token_bytes,
        wanted=config.kv_tokens,
    )
    if settings.kv_mib is not None and num_tokens < config.kv_tokens:
        fits = num_tokens * token_bytes // 2**20
        raise StartupError(f"--kv-memory {settings.kv_mib} does not fit on the GPU, {fits} does.", "Lower it.")
    if num_tokens < config.kv_tokens:
        logger.warning("the KV cache has room for %d tokens instead of %d", num_tokens, config.kv_tokens)
    if budget is not None:
        keep_within(budget, memory, base.device.torch_device)
    return replace(config, kv_tokens=num_tokens // config.block_size * config.block_size)


def _kv_token_bytes(shape: ModelShape, device: Device) -> int:
    """A key and a value in every layer."""
    return 2 * shape.num_layers * shape.kv_size * device.dtype.itemsize


def make_store(shape: ModelShape, device: Device, config: EngineConfig) -> AdapterStore:
    """An empty adapter store for a base."""
    return AdapterStore(
        shape,
        PageLayout.of(shape),
        dtype=device.dtype,
        device=device.torch_device,
        max_pages=config.max_adapter_pages,
        max_pool_bytes=config.adapter_pool_bytes,
        max_host_bytes=config.adapter_host_bytes,
    )


def load_adapters(store: AdapterStore, library: Library, base_name: str) -> dict[str, str]:
    """Read every persona's adapter into the store; a persona whose adapter cannot be used gets the reason.

    Returns a note for each persona that can speak.
    """
    notes = {}
    for persona in list(library):
        if not persona.adapter:
            notes[persona.id] = "prompt only"
            continue
        try:
            pages = store.add(persona.id, [(persona.folder / ref.path, ref.scale) for ref in persona.adapter])
        except Exception as error:  # files come from anywhere; whatever is wrong is this persona's problem alone
            problem = error if isinstance(error, WireError) else _unreadable(persona, error)
            library.reject(persona.id, problem)
            logger.warning("persona %s cannot be used: %s", persona.id, problem)
            continue
        notes[persona.id] = f"adapter of rank {pages.rank}"
        if not Path(pages.made_for).name.startswith(base_name):
            notes[persona.id] += f", made for '{pages.made_for}'; its shapes fit {base_name}"
            logger.info("persona %s: %s", persona.id, notes[persona.id])
    return notes


def check_personas(library: Library, base: str, on_progress: OnProgress) -> dict[str, str]:
    """Check all adapters as the daemon would, without loading the base's weights; notes as `load_adapters`."""
    device = choose_device("auto")
    folder = resolve_base(base, on_progress)
    config = EngineConfig(adapter_host_bytes=0)  # nothing is going to speak
    store = make_store(ModelShape.from_config(read_config(folder)), device, config)
    return load_adapters(store, library, describe_base(base, folder).name)


def _unreadable(persona: Persona, error: Exception) -> AdapterIncompatible:
    return AdapterIncompatible(
        f"The adapter of {persona.id} cannot be read ({type(error).__name__}: {error}).", "Export it again."
    )


async def _serve(
    settings: Settings,
    handover: Handover,
    base: LoadedBase,
    library: Library,
    adapters: AdapterStore,
    config: EngineConfig,
    progress: Callable[[], AbstractContextManager[OnProgress]],
) -> Handover | None:
    asked, over = asyncio.Event(), asyncio.Event()  # to stop; for that or another reason
    loop = asyncio.get_running_loop()
    restore_signals = _stop_on_signals(asked, over)
    port = handover.sock.getsockname()[1]
    context = min(base.decoder.shape.context, config.kv_tokens)
    server = NpcServer(
        info=DaemonInfo(
            version=__version__,
            device=base.device.name,
            backend=base.backend,
            base=BaseModelInfo(name=base.info.name, sha256=base.info.sha256, context=context),
            token=handover.token,
        ),
        library=library,
        render=lambda messages: base.tokenizer.render(messages).token_ids,
        host=settings.host,
        port=port,
    )

    def on_death() -> None:
        loop.call_soon_threadsafe(over.set)

    try:
        engine = Engine(base.decoder, base.tokenizer, adapters, config, on_step=server.on_step, on_death=on_death)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise StartupError(
            "There is no memory for the KV cache and the adapters.", "Lower --kv-memory or --adapter-memory."
        ) from error
    if base.device.torch_device.type == "cuda":
        with progress() as on_progress:
            engine.warm(lambda fraction: on_progress("preparing the GPU", fraction))
    await server.start(handover.sock, engine)
    endpoint = Endpoint(port, os.getpid(), handover.token, PROTOCOL_VERSION, base.info.name)
    if not handover.replaced_at:  # the first line on stdout is still true, and whoever read it expects no second one
        _announce(endpoint)
    path = _write_runtime_file(_project_of(settings), endpoint)
    if settings.host not in LOOPBACK:
        logger.warning("bound to %s: other machines can connect, with the token", settings.host)
    logger.info(
        "%s on %s, %d personas; ws://%s:%d/v1; token and port in %s; Ctrl-C stops",
        *(base.info.name, base.device.name, len(library), settings.host, port, path),
    )
    await over.wait()
    successor = None
    try:
        if engine.has_died and not asked.is_set():
            successor = handover.successor()
    finally:
        logger.info("stopping" if successor is None else "a new process takes over")
        if successor is None:
            remove_endpoint(_project_of(settings), os.getpid())
        await server.close("the daemon was stopped" if successor is None else "the daemon restarts; connect again")
    if successor is not None:
        restore_signals()  # one that comes from here on ends the process wherever it is
        await asyncio.sleep(SIGNAL_S)
    return None if asked.is_set() else successor


def _project_of(settings: Settings) -> str:
    return settings.project or project_of(settings.personas)


def _new_token(settings: Settings) -> str | None:
    return secrets.token_urlsafe(24) if settings.needs_token else None


def _write_runtime_file(project: str, endpoint: Endpoint) -> Path | None:
    try:
        return write_endpoint(project, endpoint)
    except OSError as error:
        logger.warning("no runtime file (%s); clients must be told port and token", error)
        return None


def _announce(endpoint: Endpoint) -> None:
    try:
        sys.stdout.write(endpoint.to_json() + "\n")
        sys.stdout.flush()
    except OSError:  # whoever started the daemon closed the pipe; the runtime file says the same
        logger.info("stdout is closed")


def _stop_on_signals(*events: asyncio.Event) -> Callable[[], None]:
    """Set the events on SIGINT and SIGTERM. What is returned puts back the handlers that were there before."""
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM)
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
