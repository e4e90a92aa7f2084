"""The adapter store: from disk to main memory to pages on the device, with a loader thread of its own.

When it opens, the pool is filled with what fits, so that most games never load again. After that the engine thread
asks (`admit`) and never waits: a load runs on the loader thread, which writes pages that no row reads and then
calls `on_loaded`; the engine thread takes the outcome with `collect`. Which pages those are is decided in `pages`;
what is read from disk, and how much of it stays in main memory, in `host_copies`.
"""

import logging
import queue
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from npc_runtime.engine.core import Admission, Sequence
from npc_runtime.engine.faults import is_device_error, is_out_of_memory
from npc_runtime.engine.host_copies import HostCopies
from npc_runtime.engine.model import ModelShape, PageLayout
from npc_runtime.engine.pages import PagePool
from npc_runtime.engine.peft_folder import AdapterPages
from npc_runtime.errors import AdapterIncompatible, OutOfMemory, WireError

__all__ = ["AdapterStore", "FailedLoad"]

logger = logging.getLogger(__name__)


class FailedLoad(NamedTuple):
    """An adapter that could not be loaded, and the ids of the requests that waited for it."""

    name: str
    wanted_by: frozenset[int]
    error: WireError


class _Load(NamedTuple):
    """An adapter and the pages it is to have, free once the device has reached `after`."""

    name: str
    pages: list[int]
    after: torch.cuda.Event | None


class AdapterStore:
    """Adapters by name. The pool is no larger than all adapters together need."""

    def __init__(
        self,
        shape: ModelShape,
        layout: PageLayout,
        *,
        dtype: torch.dtype,
        device: torch.device,
        max_pages: int,
        max_pool_bytes: int | None = None,
        max_host_bytes: int | None = None,
    ) -> None:
        page_bytes = layout.num_elements * dtype.itemsize
        self._max_pages = max_pages if max_pool_bytes is None else min(max_pages, max_pool_bytes // page_bytes)
        self._page_size = layout.num_elements
        self._dtype = dtype
        self._device = device
        self.host = HostCopies(shape, layout, dtype=dtype, max_bytes=max_host_bytes, pinned=device.type == "cuda")
        self._opened: tuple[PagePool, Tensor] | None = None
        self._wanted: queue.SimpleQueue[_Load | None] = queue.SimpleQueue()
        self._outcomes: queue.SimpleQueue[tuple[str, Exception | None]] = queue.SimpleQueue()
        self._loader: threading.Thread | None = None
        self._closing = False
        self.on_loaded: Callable[[], None] = lambda: None  # called on the loader thread: `collect` has news

    @property
    def pool(self) -> Tensor:
        """All pages, `(num_pages, page_elements)`. Pages that `pages_of` does not name may be written at any time."""
        return self._made[1]

    @property
    def resident(self) -> tuple[str, ...]:
        """Names of the adapters that are in the pool; may be read from any thread."""
        return self._opened[0].resident if self._opened is not None else ()

    @property
    def num_bytes(self) -> int:
        """What the pool takes, or will take when it opens."""
        num_pages = min(self._max_pages, sum(self.host.sizes.values()))
        return num_pages * self._page_size * self._dtype.itemsize

    def add(self, name: str, parts: Iterable[tuple[Path, float]]) -> AdapterPages:
        """Read an adapter, or several that are applied together, as (folder, scale) pairs.

        Call before `open`. Raises `AdapterMissing` or `AdapterIncompatible`; then nothing is added.
        """
        assert self._opened is None, "adapters are added before the pool is made"
        return self.host.add(name, parts, max_pages=self._max_pages)

    def open(self) -> None:
        """Make the pool, and fill it with adapters that are in memory, the first added first; again does nothing."""
        if self._opened is not None:
            return
        sizes = self.host.sizes
        num_pages = min(self._max_pages, sum(sizes.values()))
        tensor = torch.zeros((num_pages, self._page_size), dtype=self._dtype, device=self._device)
        pages = PagePool(num_pages, sizes, self._start_load)
        self._opened = pages, tensor
        for name in self.host.names:
            numbers = pages.place(name)
            if numbers:
                self._write(name, numbers)
                pages.loaded(name)

    def digest_of(self, name: str) -> str:
        """What identifies the adapter's content, for caches."""
        return self.host.digest_of(name)

    def pages_of(self, name: str) -> list[int]:
        """Page numbers of an adapter that a running line uses, in rank order."""
        return self._made[0].pages_of(name)

    def admit(self, sequence: Sequence) -> Admission:
        """Give the sequence its adapter, or have it loaded; see `PagePool.admit`."""
        return self._made[0].admit(sequence)

    def leave(self, sequence: Sequence) -> None:
        """Take back what `admit` gave or promised, if anything."""
        self._made[0].leave(sequence)

    def pin(self, name: str) -> None:
        """Let a resident adapter be pushed out after those that are not pinned."""
        self._made[0].pin(name)

    def collect(self) -> list[FailedLoad]:
        """Take the outcomes of the loads that are done; return those that failed.

        Raises the device's own error, if a load met one: it is no adapter's, and calls for `reset`.
        """
        failed = []
        while not self._outcomes.empty():
            name, error = self._outcomes.get()
            if error is None:
                self._made[0].loaded(name)
            elif is_device_error(error):
                raise error
            else:
                failed.append(FailedLoad(name, self._made[0].failed(name), _as_wire(name, error)))
        return failed

    def reset(self, timeout_s: float) -> None:
        """Make the pool anew, as `open` does, after an error of the device; nobody uses or awaits an adapter.

        Raises `TimeoutError` if the loader does not come out of its load: it could write into the new pool.
        """
        self.close(timeout_s)
        if self._loader is not None and self._loader.is_alive():
            raise TimeoutError(f"an adapter load did not end within {timeout_s:.0f} s")
        self._wanted, self._outcomes = queue.SimpleQueue(), queue.SimpleQueue()
        self._loader, self._closing, self._opened = None, False, None
        self.open()

    def close(self, timeout_s: float) -> None:
        """Stop the loader; it finishes the load it is in, if that is soon."""
        self._closing = True
        self._wanted.put(None)
        if self._loader is not None:
            self._loader.join(timeout_s)

    def check_integrity(self, running: Iterable[Sequence], waiting: Iterable[Sequence]) -> None:
        """Assert that no page and no user is lost; see `PagePool.check_integrity`."""
        self._made[0].check_integrity(running, waiting)

    @property
    def _made(self) -> tuple[PagePool, Tensor]:
        assert self._opened is not None, "the store is not open yet"
        return self._opened

    @torch.inference_mode()
    def _write(self, name: str, pages: list[int]) -> None:
        for page, source in zip(pages, self.host.get(name).pages, strict=True):
            self.pool[page].copy_(source, non_blocking=True)  # whoever writes synchronises the stream

    def _start_load(self, name: str, pages: list[int]) -> None:
        if self._loader is None:
            self._loader = threading.Thread(target=self._run_loader, name="adapter loader", daemon=True)
            self._loader.start()
        # A step that samples nothing is not waited for: it may still read the adapter that makes room here.
        after = torch.cuda.current_stream(self._device).record_event() if self._device.type == "cuda" else None
        self._wanted.put(_Load(name, pages, after))

    def _run_loader(self) -> None:
        stream: torch.cuda.Stream | None = None
        while (load := self._wanted.get()) is not None and not self._closing:
            name, pages, after = load
            try:
                if after is not None and stream is None:
                    stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
                # On its own stream, so that a copy to the GPU runs beside the step that decodes.
                with torch.cuda.stream(stream):
                    if stream is not None and after is not None:
                        stream.wait_event(after)
                    self._write(name, pages)
                if stream is not None:
                    stream.synchronize()
            except Exception as error:  # files come from anywhere; whatever is wrong is this adapter's problem alone
                logger.warning("adapter %s could not be loaded: %s", name, error)
                self._outcomes.put((name, error))
            else:
                logger.info("adapter %s loaded into pages %s", name, pages)
                self._outcomes.put((name, None))
            self.on_loaded()


def _as_wire(name: str, error: Exception) -> WireError:
    if isinstance(error, WireError):
        return error
    if is_out_of_memory(error):
        return OutOfMemory(f"There is no memory to load the adapter of {name}.", "Lower --adapter-memory.")
    return AdapterIncompatible(
        f"The adapter of {name} cannot be read ({type(error).__name__}: {error}).", "Export it again."
    )
