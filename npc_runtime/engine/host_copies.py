"""Adapters in main memory: read from disk and checked, kept as far as a budget allows, and read again when wanted.

An adapter is what it was when the daemon first read it: caches know it by its digest, so files that changed since
are refused instead of being mixed with what was computed under the old ones.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from npc_runtime.engine.model import ModelShape, PageLayout
from npc_runtime.engine.peft_folder import AdapterPages, load_peft_folder
from npc_runtime.errors import AdapterIncompatible

__all__ = ["HostCopies"]

Parts = tuple[tuple[Path, float], ...]
"""Folders and scales of the adapters that are applied together under one name."""


@dataclass(frozen=True, slots=True)
class _Known:
    parts: Parts
    digests: tuple[str, ...]  # of each part
    digest: str
    num_pages: int


class HostCopies:
    """Copies by name, the least recently used dropped beyond `max_bytes` (None: never).

    `add` is for the time before the engine runs, `get` for one thread after it; the rest may be read from any.
    """

    def __init__(
        self,
        shape: ModelShape,
        layout: PageLayout,
        *,
        dtype: torch.dtype,
        max_bytes: int | None,
        pinned: bool = False,  # for a GPU, which then copies at the speed of its bus, beside the steps
    ) -> None:
        self._shape = shape
        self._layout = layout
        self._dtype = dtype
        self._max_bytes = max_bytes
        self._pinned = pinned
        self._known: dict[str, _Known] = {}
        self._copies: OrderedDict[str, AdapterPages] = OrderedDict()
        self.num_bytes = 0  # of all copies, never more than the budget; the one that is being loaded may come on top

    @property
    def sizes(self) -> dict[str, int]:
        """Pages that each adapter needs."""
        return {name: known.num_pages for name, known in self._known.items()}

    @property
    def names(self) -> list[str]:
        """Adapters that are in memory now."""
        return list(self._copies)

    def digest_of(self, name: str) -> str:
        """What identifies the adapter's content, for caches."""
        return self._known[name].digest

    def add(self, name: str, parts: Iterable[tuple[Path, float]], *, max_pages: int) -> AdapterPages:
        """Read an adapter for the first time and note what it is. Raises as `load_peft_folder`; then nothing is added.

        `max_pages` is what the pool has: a larger adapter could never be used.
        """
        known_parts = tuple(parts)
        whole, digests = self._read(known_parts)
        if len(whole.pages) > max_pages:
            raise AdapterIncompatible(
                f"The adapter of {name} needs {len(whole.pages)} pages, the pool has {max_pages}.",
                "Use fewer or smaller adapters, or raise --adapter-memory.",
            )
        self._known[name] = _Known(known_parts, digests, whole.digest, len(whole.pages))
        self._keep(name, whole)
        return whole

    def get(self, name: str) -> AdapterPages:
        """The adapter, from its copy or again from disk. Raises as `load_peft_folder`, or if it changed."""
        copy = self._copies.get(name)
        if copy is None:
            known = self._known[name]
            copy, digests = self._read(known.parts)
            for (folder, _), before, now in zip(known.parts, known.digests, digests, strict=True):
                if before != now:
                    raise AdapterIncompatible(
                        f"{folder / 'adapter_model.safetensors'} is not the adapter that the daemon started with.",
                        "Restart the daemon to use the new adapter, or put the old files back.",
                    )
        self._keep(name, copy)
        return copy

    def _read(self, parts: Parts) -> tuple[AdapterPages, tuple[str, ...]]:
        """Read all parts as one adapter, and the digest of each."""
        loaded = [
            load_peft_folder(folder, self._shape, self._layout, dtype=self._dtype, scale=scale)
            for folder, scale in parts
        ]
        digests = tuple(part.digest for part in loaded)
        pages = torch.cat([part.pages for part in loaded]) if len(loaded) > 1 else loaded[0].pages
        whole = AdapterPages(
            pages=pages.pin_memory() if self._pinned else pages,
            rank=sum(part.rank for part in loaded),
            digest=hashlib.sha256("".join(digests).encode()).hexdigest(),
            made_for=loaded[0].made_for,
        )
        return whole, digests

    def _keep(self, name: str, copy: AdapterPages) -> None:
        """Keep the copy as the most recently used one, if it fits at all."""
        known = self._copies.pop(name, None)
        self.num_bytes -= self._bytes_of(known) if known is not None else 0
        if self._max_bytes is not None:
            if self._bytes_of(copy) > self._max_bytes:
                return
            while self.num_bytes + self._bytes_of(copy) > self._max_bytes:
                _, dropped = self._copies.popitem(last=False)
                self.num_bytes -= self._bytes_of(dropped)
        self._copies[name] = copy
        self.num_bytes += self._bytes_of(copy)

    def _bytes_of(self, copy: AdapterPages) -> int:
        """What it takes of main memory: torch rounds pinned memory up to a power of two."""
        return 1 << (copy.pages.nbytes - 1).bit_length() if self._pinned else copy.pages.nbytes
