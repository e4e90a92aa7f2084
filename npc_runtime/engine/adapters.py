"""Which adapters are in host memory, which in the pool of pages on the device, and who is using them.

Adapters are read from disk when the daemon starts (`add`); the engine thread copies them into the pool when a
line needs them (`acquire`), pushing out the one that was unused the longest.
"""

import hashlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from npc_runtime.engine.model import ModelShape, PageLayout
from npc_runtime.engine.peft_folder import AdapterPages, load_peft_folder
from npc_runtime.errors import AdapterIncompatible

__all__ = ["AdapterStore"]

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Resident:
    pages: list[int]
    num_users: int = 0
    last_used: int = 0


class AdapterStore:
    """Adapters by name. `pool` is made by the first `acquire`, no larger than all adapters together need."""

    def __init__(
        self,
        shape: ModelShape,
        layout: PageLayout,
        *,
        dtype: torch.dtype,
        device: torch.device,
        max_pages: int,
    ) -> None:
        self._shape = shape
        self._layout = layout
        self._dtype = dtype
        self._device = device
        self._max_pages = max_pages
        self._host: dict[str, AdapterPages] = {}
        self._resident: dict[str, _Resident] = {}
        self._pool: Tensor | None = None
        self._free: list[int] = []
        self._uses = 0
        self.version = 0  # changes whenever a page of the pool does

    @property
    def pool(self) -> Tensor:
        """All pages, `(num_pages, page_elements)`."""
        assert self._pool is not None, "no adapter was acquired yet"
        return self._pool

    @property
    def resident(self) -> tuple[str, ...]:
        """Names of the adapters that are in the pool."""
        return tuple(sorted(self._resident))

    def add(self, name: str, parts: Iterable[tuple[Path, float]]) -> AdapterPages:
        """Read an adapter, or several that are applied together, as (folder, scale) pairs.

        Call before the engine starts. Raises `AdapterMissing` or `AdapterIncompatible`; then nothing is added.
        """
        assert self._pool is None, "adapters are added before the first line"
        loaded = [
            load_peft_folder(folder, self._shape, self._layout, dtype=self._dtype, scale=scale)
            for folder, scale in parts
        ]
        whole = AdapterPages(
            pages=torch.cat([part.pages for part in loaded]),
            rank=sum(part.rank for part in loaded),
            digest=hashlib.sha256("".join(part.digest for part in loaded).encode()).hexdigest(),
            made_for=loaded[0].made_for,
        )
        if whole.pages.shape[0] > self._max_pages:
            raise AdapterIncompatible(
                f"The adapter of {name} needs {whole.pages.shape[0]} pages, the pool has {self._max_pages}.",
                "Use fewer or smaller adapters.",
            )
        self._host[name] = whole
        return whole

    def acquire(self, name: str) -> bool:
        """Make the adapter resident and count one more user; False if no pages can be freed for it now."""
        self._uses += 1
        resident = self._resident.get(name) or self._load(name)
        if resident is None:
            return False
        resident.num_users += 1
        resident.last_used = self._uses
        return True

    def release(self, name: str) -> None:
        """Count one user less; the pages stay until somebody needs the room."""
        resident = self._resident[name]
        assert resident.num_users > 0
        resident.num_users -= 1

    def digest_of(self, name: str) -> str:
        """What identifies the adapter's content, for caches."""
        return self._host[name].digest

    def pages_of(self, name: str) -> list[int]:
        """Page numbers of an acquired adapter, in rank order."""
        return self._resident[name].pages

    def check_integrity(self) -> None:
        """Assert that every page is free or has one owner."""
        held = self._free + [page for resident in self._resident.values() for page in resident.pages]
        assert sorted(held) == list(range(len(held))), "an adapter page is lost or owned twice"

    def _load(self, name: str) -> _Resident | None:
        source = self._host[name].pages
        self._make_pool()
        while len(self._free) < len(source):
            idle = [(r.last_used, other) for other, r in self._resident.items() if r.num_users == 0]
            if not idle:
                return None
            self._evict(min(idle)[1])
        pages = self._free[: len(source)]
        self.pool[pages] = source.to(self._device)
        del self._free[: len(source)]
        self.version += 1
        self._resident[name] = _Resident(pages)
        logger.info("adapter %s loaded into pages %s", name, pages)
        return self._resident[name]

    def _evict(self, name: str) -> None:
        self._free.extend(self._resident.pop(name).pages)
        logger.info("adapter %s evicted", name)

    def _make_pool(self) -> None:
        if self._pool is None:
            num_pages = min(self._max_pages, sum(len(adapter.pages) for adapter in self._host.values()))
            size = (num_pages, self._layout.num_elements)
            self._pool = torch.zeros(size, dtype=self._dtype, device=self._device)
            self._free = list(range(num_pages))
