"""Adapters in main memory: read from disk and checked, kept as far as a budget allows, and read again when wanted.

An entry is what it was when it was first read: caches know it by its digest, so files that changed since are never
mixed with what was computed under the old ones. Newer files become an entry of their own (`add_settled`); `adapters`
knows which entry is whose.
"""

import hashlib
import time
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from npc_runtime.engine.model import ModelShape, PageLayout
from npc_runtime.engine.peft_folder import MAX_RANK, AdapterPages, BaseWeights, load_peft_folder
from npc_runtime.errors import AdapterIncompatible, AdapterMissing

__all__ = ["FilesChanged", "HostCopies", "Parts"]

SETTLE_S = 0.05
"""Files that did not change for so long are taken to be complete; one that still grows is refused as damaged too."""

SETTLE_TIMEOUT_S = 0.5
"""How long a load waits for that. Who saves slower is read at the next change."""

Parts = tuple[tuple[Path, float], ...]
"""Folders and scales of the adapters that are applied together under one name."""


class FilesChanged(Exception):
    """The files of an entry are not those it was read from."""


@dataclass(frozen=True, slots=True)
class _Known:
    parts: Parts
    digests: tuple[str, ...]  # of each part
    digest: str
    num_pages: int
    multipliers: Tensor | None  # DoRA's; small, and dear to compute


class HostCopies:
    """Copies by name, the least recently used dropped beyond `max_bytes` (None: never).

    `add` is for the time before the engine runs, what else reads files or drops copies for one thread after it; the
    rest may be read from any.
    """

    def __init__(
        self,
        shape: ModelShape,
        layout: PageLayout,
        *,
        dtype: torch.dtype,
        max_bytes: int | None,
        pinned: bool = False,  # for a GPU, which then copies at the speed of its bus, beside the steps
        max_rank: int = MAX_RANK,
        base: BaseWeights | None = None,  # None: there are no DoRA adapters
    ) -> None:
        self._shape = shape
        self._layout = layout
        self._dtype = dtype
        self._max_bytes = max_bytes
        self._pinned = pinned
        self._max_rank = max_rank
        self._base = base
        self._known: dict[str, _Known] = {}
        self._copies: OrderedDict[str, AdapterPages] = OrderedDict()
        self.num_bytes = 0  # of all copies, never more than the budget; the one that is being loaded may come on top

    @property
    def sizes(self) -> dict[str, int]:
        """Pages that each adapter needs."""
        return {name: known.num_pages for name, known in self._known.items()}

    def size_of(self, name: str) -> int:
        """Pages that the adapter needs."""
        return self._known[name].num_pages

    @property
    def names(self) -> list[str]:
        """Adapters that are in memory now."""
        return list(self._copies)

    @property
    def has_dora(self) -> bool:
        """Whether any adapter has factors for the outputs of the base."""
        return any(known.multipliers is not None for known in self._known.values())

    def multipliers_of(self, name: str) -> Tensor | None:  # (num_outputs,) float32
        """DoRA's factors of an adapter; None if it is no DoRA."""
        return self._known[name].multipliers

    def digest_of(self, name: str) -> str:
        """What identifies the adapter's content, for caches."""
        return self._known[name].digest

    def add(self, name: str, parts: Iterable[tuple[Path, float]], *, max_pages: int) -> AdapterPages:
        """Read an adapter for the first time and note what it is. Raises as `load_peft_folder`; then nothing is added.

        `max_pages` is what the pool has: a larger adapter could never be used.
        """
        known_parts = tuple(parts)
        whole, digests = self._read(known_parts, self._base)
        if len(whole.pages) > max_pages:
            raise AdapterIncompatible(
                f"The adapter of {name} needs {len(whole.pages)} pages, the pool has {max_pages}.",
                "Use fewer or smaller adapters, raise --adapter-memory, or restart the daemon if this one is new.",
            )
        multipliers = whole.multipliers
        if whole.is_dora and multipliers is None:
            raise AdapterIncompatible(
                f"The adapter of {name} is a DoRA, for which the weights of the base are needed.",
                "Serve it from a base folder.",
            )
        if multipliers is not None and self._pinned:
            multipliers = multipliers.pin_memory()
        self._known[name] = _Known(known_parts, digests, whole.digest, len(whole.pages), multipliers)
        self._keep(name, replace(whole, multipliers=None))
        return whole

    def add_settled(self, name: str, parts: Parts, *, max_pages: int) -> None:
        """As `add`, for files that somebody may be writing. Raises `AdapterIncompatible` if that does not end soon."""
        until = time.monotonic() + SETTLE_TIMEOUT_S
        stamps = _stamps(parts)
        while True:
            time.sleep(SETTLE_S)
            before, stamps = stamps, _stamps(parts)
            problem: Exception | None = None
            if before == stamps:
                try:
                    self.add(name, parts, max_pages=max_pages)
                except (AdapterMissing, AdapterIncompatible) as error:
                    problem = error
                if _stamps(parts) == stamps:
                    if problem is not None:
                        raise problem
                    return
                self.drop(name)
            if time.monotonic() > until:
                folders = " and ".join(str(folder) for folder, _ in parts)
                raise AdapterIncompatible(f"{folders} is still being written.", "It is read again when it changes.")

    def parts_of(self, name: str) -> Parts:
        """Where the adapter was read from."""
        return self._known[name].parts

    def is_same(self, name: str, other: str) -> bool:
        """Whether two entries have the same content, from the same files."""
        one, two = self._known[name], self._known[other]
        return one.digest == two.digest and one.parts == two.parts

    def drop(self, name: str) -> None:
        """Forget an entry, if there is one, and its copy; nobody asks for it any more."""
        self._known.pop(name, None)
        copy = self._copies.pop(name, None)
        self.num_bytes -= self._bytes_of(copy) if copy is not None else 0

    def get(self, name: str) -> AdapterPages:
        """The adapter, from its copy or again from disk. Raises as `load_peft_folder`, or `FilesChanged`."""
        copy = self._copies.get(name)
        if copy is None:
            known = self._known[name]
            copy, digests = self._read(known.parts, None)  # the factors are known
            if digests != known.digests:
                raise FilesChanged
        self._keep(name, copy)
        return copy

    def _read(self, parts: Parts, base: BaseWeights | None) -> tuple[AdapterPages, tuple[str, ...]]:
        """Read all parts as one adapter, and the digest of each."""
        loaded = [
            load_peft_folder(
                folder,
                self._shape,
                self._layout,
                dtype=self._dtype,
                scale=scale,
                max_rank=self._max_rank,
                base=base,
            )
            for folder, scale in parts
        ]
        if len(loaded) > 1 and any(part.is_dora for part in loaded):
            raise AdapterIncompatible(
                f"A DoRA adapter among {', '.join(str(folder) for folder, _ in parts)} cannot be applied together with "
                "others: each would rescale what the others add.",
                "Name it alone, or merge adapters into a base of their own (npc-runtime adapter merge).",
            )
        digests = tuple(part.digest for part in loaded)
        pages = torch.cat([part.pages for part in loaded]) if len(loaded) > 1 else loaded[0].pages
        whole = AdapterPages(
            pages=pages.pin_memory() if self._pinned else pages,
            rank=sum(part.rank for part in loaded),
            digest=hashlib.sha256("".join(digests).encode()).hexdigest(),
            made_for=loaded[0].made_for,
            is_dora=loaded[0].is_dora,
            multipliers=loaded[0].multipliers,
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


def _stamps(parts: Parts) -> tuple[tuple[int, int, int] | None, ...]:
    """What changes whenever one of the files is written or replaced."""
    return tuple(
        _stamp(folder / name) for folder, _ in parts for name in ("adapter_config.json", "adapter_model.safetensors")
    )


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
