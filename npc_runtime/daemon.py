"""The daemon: opens its port, serves from then on, loads what it speaks with, and is replaced if need be.

The main thread loads and then waits; the sockets are served by a thread of their own (`serving`). Nothing that computes
is imported before the daemon's first line is out, and with `--replay` nothing is at all.
"""

import logging
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from npc_runtime import __version__
from npc_runtime.daemon_process import DaemonProcess
from npc_runtime.discovery import Endpoint, remove_endpoint, write_endpoint
from npc_runtime.door import Door
from npc_runtime.engine.embedded import OnProgress
from npc_runtime.errors import EngineDied, NpcError, StartupError
from npc_runtime.gate import Gate
from npc_runtime.handover import Handover
from npc_runtime.persona import Library
from npc_runtime.persona_folder import PersonaFolder
from npc_runtime.protocol import PROTOCOL_VERSION, CloseCode
from npc_runtime.recording import Recorder, Recording
from npc_runtime.reload import PersonaWatch
from npc_runtime.replay import replay_voice
from npc_runtime.server import NpcServer
from npc_runtime.serving import Serving
from npc_runtime.settings import LOOPBACK, Settings, check_settings
from npc_runtime.stage import Stage, Voice
from npc_runtime.stopping import StopNote, was_asked_to_stop

__all__ = ["run_daemon"]

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 4.0
"""More than the server takes at most; a loop that hangs must not keep the process."""

ShowProgress = Callable[[], AbstractContextManager[OnProgress]]


def run_daemon(settings: Settings, process: DaemonProcess, progress: ShowProgress) -> None:
    """Serve, load everything, and go on until the process is asked to stop. `progress` is entered while it loads.

    If the engine thread dies, a new process takes the place of this one, and the runtime file stays for it. Raises
    `StartupError` if what was asked for is wrong or cannot be loaded, and `EngineDied` if there can be no new process.
    """
    try:
        successor = _Daemon(settings, process, progress).run()
        if successor is not None:
            process.log.flush()
            successor.replace_process()
    finally:
        remove_endpoint(process.project, os.getpid())


class _Daemon:
    """One run, on the port that was taken over or on a new one."""

    def __init__(self, settings: Settings, process: DaemonProcess, progress: ShowProgress) -> None:
        if process.taken is None:  # otherwise the process before this one has looked, and may have begun a recording
            check_settings(settings)
        self._settings = settings
        self._process = process
        self._progress = progress
        self._recording = None if settings.replay is None else Recording.load(settings.replay)
        self._handover = process.taken or _open_port(settings, process)
        if self._handover.token is not None:
            process.log.hide(self._handover.token)
        self._server = self._make_server()
        self._serving = Serving(self._server, self._handover.sock, lambda: process.why_it_stops)
        self._watch: PersonaWatch | None = None

    def run(self) -> Handover | None:
        """Serve until it is over; returns what the next process takes over, if there is to be one."""
        successor, error = None, None
        with self._handover.sock:
            self._serving.start()
            try:
                self._announce()
                self._process.log.shield_stderr()
                voice = self._load()
                self._process.log.settle()
                self._serving.wait()
                if voice.engine.has_died:
                    successor = self._handover.successor()
            except BaseException as caught:
                error = caught
                raise
            finally:
                with StopNote() as note:
                    self._close(successor, error)
        return None if note.was_asked else successor

    def _make_server(self) -> NpcServer:
        settings, port = self._settings, self._handover.sock.getsockname()[1]
        hosts, origins = settings.allowed_hosts, settings.allowed_origins
        gate = Gate(settings.host, port, allowed_hosts=hosts, allowed_origins=origins)
        door = Door(token=self._handover.token, project=self._process.project, owner_pid=self._process.owner_pid)
        return NpcServer(gate=gate, door=door, personas=PersonaFolder(settings.personas), version=__version__)

    def _announce(self) -> None:
        """Say where the daemon is, which serves from now on."""
        settings, process, handover = self._settings, self._process, self._handover
        base = settings.base if self._recording is None else self._recording.info.base.name
        log_file = None if process.log.path is None else str(process.log.path)
        port = handover.sock.getsockname()[1]
        endpoint = Endpoint(port, os.getpid(), handover.token, PROTOCOL_VERSION, base, log_file)
        if not handover.replaced_at:  # the first line on stdout is still true, and who read it expects no second one
            _print(endpoint)
        path = _write_runtime_file(process.project, endpoint)
        if settings.host not in LOOPBACK:
            logger.warning("bound to %s: other machines can connect, with the token", settings.host)
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        logger.info(
            "listening on ws://%s:%d/v1; token and port in %s; log: %s; Ctrl-C stops",
            *(host, port, path, log_file or "stderr"),
        )
        logger.info("status page: http://%s:%d/ (npc-runtime page prints a link that opens it)", host, port)

    def _load(self) -> Voice:
        """Load what lines are spoken with, and have the server open with it."""
        settings, server, started_at = self._settings, self._server, time.monotonic()
        loaded_at = time.time()
        library = _load_library(settings.personas)
        voice = self._find_voice(library)
        self._watch = PersonaWatch(
            library,
            settings.personas,
            loaded_at=loaded_at,
            replace_adapter=server.replace_adapter,
            announce=server.announce,
        )
        if settings.record is not None:
            secret, goes_on = self._handover.token, bool(self._handover.replaced_at)
            server.recorder = Recorder.open(settings.record, voice.info, secret=secret, goes_on=goes_on)
        self._serving.run(_open(server, voice, library, self._watch))
        logger.info(
            "%s on %s, %d personas: ready after %.1f s",
            *(voice.info.base.name, voice.info.device, len(library), time.monotonic() - started_at),
        )
        return voice

    def _find_voice(self, library: Library) -> Voice:
        if self._recording is not None:
            return replay_voice(self._recording, on_step=self._server.on_step, speed=self._settings.replay_speed)
        from npc_runtime.computing import load_voice

        with self._progress() as show:

            def report(label: str, fraction: float) -> None:
                show(label, fraction)
                self._serving.report(label, fraction)

            return load_voice(self._settings, library, self._server, report)

    def _close(self, successor: Handover | None, error: BaseException | None) -> None:
        """Tell every client why, and leave nothing behind."""
        code, reason = CloseCode.RESTART, self._process.why_it_stops
        if successor is not None:
            reason = "the daemon restarts; connect again"
        elif _is_failure(error):
            code, reason = CloseCode.FAILED, _describe_failure(error)
        logger.info("stopping: %s", "a new process takes over" if successor is not None else reason)
        if successor is None:
            remove_endpoint(self._process.project, os.getpid())
        try:
            self._serving.run(_close(self._server, self._watch, code, reason), CLOSE_TIMEOUT_S)
        except Exception:  # a defect must not hide why it stops
            logger.exception("the sockets could not be closed as they should")
        self._serving.leave()
        if self._server.recorder is not None:
            self._server.recorder.close()


async def _open(server: NpcServer, voice: Voice, library: Library, watch: PersonaWatch) -> None:
    server.open(
        voice.engine,
        lambda new_request_id, new_seed: Stage(voice.info, library, voice.render, new_request_id, new_seed),
    )
    watch.start()


async def _close(server: NpcServer, watch: PersonaWatch | None, code: int, reason: str) -> None:
    if watch is not None:
        await watch.close()
    await server.close(reason, code=code)


def _is_failure(error: BaseException | None) -> bool:
    """Whether the daemon could not be brought to speak; one whose device is lost is stopped, as clients see it."""
    return isinstance(error, Exception) and not isinstance(error, EngineDied) and not was_asked_to_stop()


def _describe_failure(error: BaseException | None) -> str:
    return error.message if isinstance(error, NpcError) else "the daemon failed; its log says how"


def _load_library(folder: Path) -> Library:
    """Read the personas, logging what is wrong with any."""
    library = Library.load(folder)
    if not len(library) and not library.problems:
        logger.warning("%s holds no personas (no */persona.yaml): every line will be rejected", folder)
    for persona_id, problem in library.problems.items():
        logger.warning("persona %s cannot be used: %s", persona_id, problem)
    return library


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


def _print(endpoint: Endpoint) -> None:
    if sys.stdout is None:  # started without any
        return
    try:
        sys.stdout.write(endpoint.to_json() + "\n")
        sys.stdout.flush()
    except OSError:  # whoever started the daemon closed the pipe; the runtime file says the same
        logger.info("stdout is closed")


def _bind(host: str, port: int) -> socket.socket:
    """Take the port. Raises `StartupError`."""
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
