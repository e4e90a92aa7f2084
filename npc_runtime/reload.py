"""Edits of personas and adapters put in use while the daemon runs: which files concern whom, and what is told of it.

A persona is replaced as a whole, file and adapter together, or not at all: what cannot be used leaves the old one
speaking, with the reason in the log, in `persona.list` and in the event that every client gets. What the new files
mean for lines that run is the engine's affair.
"""

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

from npc_runtime.errors import PersonaInvalid, WireError
from npc_runtime.persona import Library, Persona, is_text

__all__ = ["PersonaWatch"]

logger = logging.getLogger(__name__)

STEP_MS = 50
"""Changes that follow each other faster are one."""

DEBOUNCE_MS = 200
"""How long such a sequence may put a reload off."""

PAUSE_S = 0.05
"""After which a file that could not be read is read once more: its editor may have been half way through."""

CLOSE_TIMEOUT_S = 0.5

PERSONA_FILE = "persona.yaml"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")

ReplaceAdapter = Callable[[str, list[tuple[Path, float]]], Awaitable[None]]
"""Puts new files of an adapter in use. Raises `WireError`; then nothing changed."""


class PersonaWatch:
    """Follows the folder of a library. `replace_adapter` and `announce` are the server's."""

    def __init__(
        self,
        library: Library,
        folder: Path,
        *,
        loaded_at: float,  # seconds since the epoch, when the library was read
        replace_adapter: ReplaceAdapter,
        announce: Callable[[str], None],
    ) -> None:
        self._library = library
        self._folder = folder.resolve()
        self._loaded_at = loaded_at
        self._replace_adapter = replace_adapter
        self._announce = announce
        self._authored = {persona.id: persona for persona in library.authored}  # as their files have them now
        self._stop = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to watch, in a task of its own."""
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Stop watching."""
        self._stop.set()  # the thread that waits for changes looks at it; cancelling the task would not reach it
        if self._task is not None:
            await asyncio.wait([self._task], timeout=CLOSE_TIMEOUT_S)
            self._task.cancel()

    async def _run(self) -> None:
        try:
            await self._reload(self._changed_since_loading())
            while not self._stop.is_set():
                await self._follow([self._folder, *self._outside()])
        except (OSError, RuntimeError) as error:
            logger.warning("%s is not watched (%s): restart the daemon to use edits", self._folder, error)

    async def _follow(self, roots: list[Path]) -> None:
        """Reload what changes below these folders, until others have to be watched."""
        from watchfiles import awatch

        changes = awatch(*roots, debounce=DEBOUNCE_MS, step=STEP_MS, stop_event=self._stop, watch_filter=None)
        async for paths in changes:
            await self._reload(self._concerned_by(Path(path) for _, path in paths))
            if self._outside() != roots[1:]:
                return

    async def _reload(self, persona_ids: set[str]) -> None:
        for persona_id in sorted(persona_ids):
            try:
                await self._reload_one(persona_id)
            except Exception:  # a defect: the next edit is another chance
                logger.exception("persona %s could not be reloaded", persona_id)

    async def _reload_one(self, persona_id: str) -> None:
        started = time.monotonic()
        try:
            persona = await self._read(persona_id)
            if persona is None:
                self._library.remove(persona_id)
                self._authored.pop(persona_id, None)
            else:
                self._authored[persona_id] = persona
                if persona.adapter:
                    await self._replace_adapter(persona_id, persona.adapter_parts)
                self._library.put(persona)
        except WireError as error:
            self._library.object_to(persona_id, error)
            logger.warning("persona %s stays as it was: %s", persona_id, error)
        else:
            what = "is gone" if persona is None else "is in use as its files have it"
            logger.info("persona %s %s (%.0f ms)", persona_id, what, 1000 * (time.monotonic() - started))
        self._announce(persona_id)

    async def _read(self, persona_id: str) -> Persona | None:
        """Read the persona's file; None if there is none any more. Raises `PersonaInvalid`."""
        folder = self._folder / persona_id
        for is_last in (False, True):
            try:
                if not os.path.lexists(folder / PERSONA_FILE):
                    problem = None
                else:
                    return await asyncio.to_thread(Persona.load, folder)
            except PersonaInvalid as error:
                problem = error
            if is_last and problem is not None:
                raise problem
            await asyncio.sleep(PAUSE_S)
        return None

    def _concerned_by(self, paths: Iterable[Path]) -> set[str]:
        """The personas that changed paths belong to, known ones and new ones."""
        adapters = {folder: persona.id for persona in self._authored.values() for folder in _adapter_folders(persona)}
        concerned = set()
        for path in paths:
            folder = path.parent if path.name in (PERSONA_FILE, *ADAPTER_FILES) else path
            if folder.parent == self._folder and (folder.name in self._authored or (folder / PERSONA_FILE).exists()):
                concerned.add(folder.name)
            concerned |= {persona_id for known, persona_id in adapters.items() if known == folder}
        return {persona_id for persona_id in concerned if is_text(persona_id)}

    def _outside(self) -> list[Path]:
        """Folders of adapters that do not lie below the one that is watched anyway."""
        folders = {folder for persona in self._authored.values() for folder in _adapter_folders(persona)}
        return sorted(folder for folder in folders if self._folder not in folder.parents and folder.is_dir())

    def _changed_since_loading(self) -> set[str]:
        """Personas with files that were saved while the daemon was starting."""
        files = [path / PERSONA_FILE for path in self._folder.iterdir()]
        files += [
            folder / name
            for persona in self._authored.values()
            for folder in _adapter_folders(persona)
            for name in ADAPTER_FILES
        ]
        return self._concerned_by(path for path in files if _saved_at(path) > self._loaded_at)


def _adapter_folders(persona: Persona) -> set[Path]:
    """Where the persona's adapters are, as written and with links followed."""
    folders = [folder for folder, _ in persona.adapter_parts]
    return {Path(os.path.normpath(folder)) for folder in folders} | {folder.resolve() for folder in folders}


def _saved_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
