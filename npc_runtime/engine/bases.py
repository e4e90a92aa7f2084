"""Which base `--base` means: the embedded one, a folder, or a model of the Hugging Face hub."""

from difflib import get_close_matches
from pathlib import Path

from npc_runtime.engine.embedded import EMBEDDED_BASE, OnProgress, embedded_folder, ensure_embedded_base
from npc_runtime.engine.hub import HubId, fetch_snapshot, find_snapshot, parse_hub_id
from npc_runtime.errors import StartupError

__all__ = ["base_name", "find_base", "resolve_base"]


def resolve_base(name: str, on_progress: OnProgress) -> Path:
    """Turn `--base` into a model folder, fetching what is not there yet. Raises `StartupError`.

    A folder goes before a model of the hub that is named like it.
    """
    found = find_base(name)
    if found is not None:
        return found
    hub_id = _hub_id(name)
    return fetch_snapshot(hub_id, on_progress) if hub_id else ensure_embedded_base(on_progress)


def find_base(name: str) -> Path | None:
    """The folder of `--base`; None if it would have to be fetched. Raises `StartupError` if it cannot be anything."""
    if name == EMBEDDED_BASE:
        folder = embedded_folder()
        return folder if folder.is_dir() else None
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    hub_id = _hub_id(name)
    if hub_id is None:
        meant = get_close_matches(name, [EMBEDDED_BASE], cutoff=0.7)
        raise StartupError(
            f"--base {name}: there is no such folder, and no embedded base of that name."
            + (f" Did you mean {meant[0]}?" if meant else ""),
            f"Use {EMBEDDED_BASE}, the folder of a Llama-family model (config.json and *.safetensors), "
            "or ORG/NAME of one on the Hugging Face hub.",
        )
    return find_snapshot(hub_id)


def base_name(name: str, folder: Path) -> str:
    """What adapters call the base that `name` was resolved to: `org/name` for the hub's, else one word."""
    hub_id = _hub_id(name)
    if name == EMBEDDED_BASE:
        return name
    return hub_id.repo if hub_id else folder.resolve().name


def _hub_id(name: str) -> HubId | None:
    return None if Path(name).expanduser().is_dir() else parse_hub_id(name)
