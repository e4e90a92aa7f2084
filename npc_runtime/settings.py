"""What `npc-runtime serve` was asked for, and what is wrong with that as far as it can be told at once.

Before the socket opens only this is looked at: a spawner that reads the daemon's first line knows that the rest will
take its time, and that mistakes which are made by hand were none of its.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from npc_runtime.engine.base_folder import read_raw_config, weight_files
from npc_runtime.engine.bases import find_base
from npc_runtime.errors import StartupError
from npc_runtime.recording import refuse_existing

if TYPE_CHECKING:
    from npc_runtime.engine.device import DTypeName
    from npc_runtime.engine.quantized import Quantize

__all__ = ["LOOPBACK", "Settings", "check_settings"]

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, slots=True)
class Settings:
    """The options of `npc-runtime serve`."""

    base: str
    personas: Path
    host: str
    port: int
    dtype: "DTypeName"
    threads: int | None
    needs_token: bool
    deterministic: bool = False
    quantize: "Quantize" = "auto"
    adapter_mib: int | None = None  # None: `EngineConfig`'s
    kv_mib: int | None = None  # None: `EngineConfig`'s, but at most MAX_DEFAULT_KV_BYTES
    gpu_mib: int | None = None  # of everything on the GPU; None: no bound but what is free
    max_adapter_rank: int | None = None  # None: `EngineConfig`'s
    allowed_hosts: tuple[str, ...] = ()  # names the daemon goes by besides its own
    allowed_origins: tuple[str, ...] = ()  # whose web pages may connect besides its own
    record: Path | None = None
    replay: Path | None = None  # plays this recording, and needs no base
    replay_speed: float = 1.0


def check_settings(settings: Settings) -> None:
    """Raise `StartupError` about whatever can be found wrong without loading anything."""
    if settings.host not in LOOPBACK and not settings.needs_token:
        raise StartupError(f"--no-auth is refused on {settings.host}.", "Only loopback may go without a token.")
    if not settings.personas.is_dir():
        raise StartupError(
            f"--personas {settings.personas}: there is no such folder.", "Name a folder of persona folders."
        )
    if settings.record is not None:
        refuse_existing(settings.record)
    if settings.replay is None:
        _check_base(settings.base)
    elif not settings.replay_speed > 0:
        raise StartupError(
            f"--replay-speed {settings.replay_speed} is no speed.", "1 is as recorded, 2 twice as fast, inf at once."
        )


def _check_base(name: str) -> None:
    """Look at the files of a base that is there; what has to be fetched is only known by its name."""
    folder = find_base(name)
    if folder is not None:
        read_raw_config(folder)
        weight_files(folder)
