"""The adapter store: from disk to main memory to pages on the device, with a loader thread of its own.

When it opens, the pool is filled with what fits, so that most games never load again. After that the engine thread
asks (`admit`) and never waits: a load runs on the loader thread, which writes pages that no row reads and then
calls `on_loaded`; the engine thread takes the outcome with `collect`. Which pages those are is decided in `pages`;
what is read from disk, and how much of it stays in main memory, in `host_copies`.

Files may be replaced while lines speak. Then the loader reads the new ones as an adapter of its own, a version, and
`collect` puts it in the place of the old one:

    lines that have spoken     keep the old version; its pages are free when the last of them has ended
    lines that wait            get the new one
    new lines                  get the new one (`version_of`)

The first version of an adapter has the adapter's name, a later one is called `name#2`, `name#3` and so on.
"""

import logging
import queue
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from npc_runtime.engine.core import AdapterEvicted, AdapterLoaded, Admission, Sequence
from npc_runtime.engine.device import make_stream
from npc_runtime.engine.faults import is_device_error, is_out_of_memory
from npc_runtime.engine.host_copies import FilesChanged, HostCopies, Parts
from npc_runtime.engine.model import ModelShape, PageLayout
from npc_runtime.engine.pages import PagePool
from npc_runtime.engine.peft_folder import MAX_RANK, AdapterPages, BaseWeights
from npc_runtime.errors import AdapterIncompatible, OutOfMemory, WireError

__all__ = ["AdapterStore", "FailedLoad", "OnReplaced"]

logger = logging.getLogger(__name__)


class FailedLoad(NamedTuple):
    """An adapter that could not be loaded, and the ids of the requests that waited for it."""

    name: str
    wanted_by: frozenset[int]
    error: WireError


class _Opened(NamedTuple):
    """What there is once the store is open."""

    pages: PagePool
    pool: Tensor  # (num_pages, page_elements)
    multipliers: Tensor | None  # (num_pages, num_outputs) float32


OnReplaced = Callable[[WireError | None], None]
"""Is told, on the engine thread, that new files are in use, or why they are not."""


class _Load(NamedTuple):
    """Asks the loader to write an adapter into pages, which are free once the device has reached `after`.

    The error, if there is one, is the outcome.
    """

    version: str
    pages: list[int]
    after: torch.cuda.Event | None = None
    error: Exception | None = None


class _Replace(NamedTuple):
    """Asks the loader to read new files of an adapter; `version` (None: nothing is new) or `error` is the outcome."""

    name: str
    parts: Parts
    on_done: OnReplaced
    version: str | None = None
    error: Exception | None = None


class _Drop(NamedTuple):
    """Asks the loader to forget a version that was replaced."""

    version: str


class AdapterStore:
    """Adapters by name. The pool has room for all of them and `spare_pages`, as far as the bounds allow."""

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
        max_rank: int = MAX_RANK,
        base: BaseWeights | None = None,  # where DoRA's factors come from; without it there are no DoRA adapters
        spare_pages: int = 0,  # for adapters that are added, or replaced while the old ones speak
    ) -> None:
        """All adapters are read in `dtype`, for pages of `layout` on `device`."""
        self._most_pages, self._max_pool_bytes = max_pages, max_pool_bytes
        self._spare_pages = spare_pages
        self._layout = layout
        self._dtype = dtype
        self._device = device
        self.host = HostCopies(
            shape,
            layout,
            dtype=dtype,
            max_bytes=max_host_bytes,
            pinned=device.type == "cuda",
            max_rank=max_rank,
            base=base,
        )
        self._opened: _Opened | None = None
        self._versions: dict[str, str] = {}  # name to what new lines get; the engine thread's
        self._latest: dict[str, str] = {}  # name to what was read last; the loader's
        self._num_replaced = 0
        self._reported: tuple[str, ...] = ()  # versions that `news` knows of
        self._wanted: queue.SimpleQueue[_Load | _Replace | _Drop | None] = queue.SimpleQueue()
        self._outcomes: queue.SimpleQueue[_Load | _Replace] = queue.SimpleQueue()
        self._stream: torch.cuda.Stream | None = None  # the loader's, once it has copied to a GPU
        self._num_copies = 0
        self.copy_under_way: int | None = None  # its number, while the loader waits for it
        self._loader: threading.Thread | None = None
        self._closing = False
        self.on_loaded: Callable[[], None] = lambda: None  # called on the loader thread: `collect` has news

    @property
    def pool(self) -> Tensor:
        """All pages, `(num_pages, page_elements)`. Pages that `pages_of` does not name may be written at any time."""
        return self._made.pool

    @property
    def multipliers(self) -> Tensor | None:
        """DoRA's factors, as `LoraBatch` has them: `(num_pages, num_outputs)`; None if no adapter is a DoRA."""
        return self._made.multipliers

    @property
    def resident(self) -> tuple[str, ...]:
        """Names of the adapters that are in the pool; may be read from any thread."""
        versions = self._opened.pages.resident if self._opened is not None else ()
        return tuple(sorted({_name_of(version) for version in versions}))

    @property
    def num_bytes(self) -> int:
        """What the pool takes, or will take when it opens; from when it was opened it may be read from any thread."""
        opened = self._opened
        if opened is None:
            return self._num_pages * self._page_bytes
        return opened.pool.nbytes + (0 if opened.multipliers is None else opened.multipliers.nbytes)

    @property
    def _page_bytes(self) -> int:
        """Of a page, and of the factors that go with it."""
        factors = self._layout.num_outputs * torch.float32.itemsize if self.host.has_dora else 0
        return self._layout.num_elements * self._dtype.itemsize + factors

    @property
    def _max_pages(self) -> int:
        if self._max_pool_bytes is None:
            return self._most_pages
        return min(self._most_pages, self._max_pool_bytes // self._page_bytes)

    @property
    def _num_pages(self) -> int:
        """As many as the largest adapter needs at least: the first DoRA makes all pages larger."""
        sizes = self.host.sizes.values()
        return max(min(self._max_pages, sum(sizes) + self._spare_pages), max(sizes, default=0))

    def add(self, name: str, parts: Iterable[tuple[Path, float]]) -> AdapterPages:
        """Read an adapter, or several that are applied together, as (folder, scale) pairs.

        Call before `open`. Raises `AdapterMissing` or `AdapterIncompatible`; then nothing is added.
        """
        assert self._opened is None, "adapters are added before the pool is made"
        pages = self.host.add(name, parts, max_pages=self._max_pages)
        self._versions[name] = self._latest[name] = name
        return pages

    def open(self) -> None:
        """Make the pool, and fill it with adapters that are in memory, the first added first; again does nothing."""
        if self._opened is None:
            self._open(self._num_pages)
            self._reported = self._made.pages.resident

    def _open(self, num_pages: int) -> None:
        tensor = torch.zeros((num_pages, self._layout.num_elements), dtype=self._dtype, device=self._device)
        multipliers = None
        if self.host.has_dora:
            multipliers = torch.ones((num_pages, self._layout.num_outputs), device=self._device)
        sizes = {version: self.host.size_of(version) for version in self._versions.values()}
        pages = PagePool(num_pages, sizes, self._start_load)
        self._opened = _Opened(pages, tensor, multipliers)
        for version in self.host.names:
            numbers = pages.place(version) if version in sizes else []
            if numbers:
                self._write(version, numbers)
                pages.loaded(version)

    def version_of(self, name: str) -> str:
        """What a new line gets that asks for the adapter; the name by which all that follows knows it."""
        return self._versions[name]

    def digest_of(self, name: str) -> str:
        """What identifies the adapter's content, for caches."""
        return self.host.digest_of(name)

    def replace(self, name: str, parts: Iterable[tuple[Path, float]], on_done: OnReplaced) -> None:
        """Have new files of an adapter read, or those of a new one; `collect` puts them in use and calls `on_done`.

        What is wrong with them is told to `on_done`; then nothing changes.
        """
        self._ask_loader(_Replace(name, tuple(parts), on_done))

    def pages_of(self, name: str) -> list[int]:
        """Page numbers of an adapter that a running line uses, in rank order."""
        return self._made.pages.pages_of(name)

    def admit(self, sequence: Sequence) -> Admission:
        """Give the sequence its adapter, or have it loaded; see `PagePool.admit`."""
        return self._made.pages.admit(sequence)

    def leave(self, sequence: Sequence) -> None:
        """Take back what `admit` gave or promised, if anything."""
        self._made.pages.leave(sequence)

    def suspend(self, sequence: Sequence) -> bool:
        """Take the adapter back from a line that is preempted; see `PagePool.suspend`."""
        return self._made.pages.suspend(sequence)

    def pin(self, name: str) -> None:
        """Let a resident adapter be pushed out after those that are not pinned."""
        self._made.pages.pin(name)

    def collect(self, waiting: Iterable[Sequence] = ()) -> list[FailedLoad]:
        """Take the outcomes of what the loader did; return the loads that failed.

        Lines of `waiting` get what replaced their adapter. Raises the device's own error, if a load met one: it is
        no adapter's, and calls for `reset`.
        """
        failed = []
        while not self._outcomes.empty():
            outcome = self._outcomes.get()
            if isinstance(outcome, _Replace):
                if outcome.version is not None:
                    self._put_in_place(outcome.name, outcome.version, waiting)
                outcome.on_done(None if outcome.error is None else _as_wire(outcome.name, outcome.error))
            elif outcome.error is None:
                self._made.pages.loaded(outcome.version)
            elif is_device_error(outcome.error):
                raise outcome.error
            else:
                name, wanted_by = _name_of(outcome.version), self._made.pages.failed(outcome.version)
                if wanted_by:
                    failed.append(FailedLoad(name, wanted_by, _as_wire(name, outcome.error)))
        return failed

    def news(self) -> list[AdapterLoaded | AdapterEvicted]:
        """Which adapters came and went since this was last asked, or the pool was opened; cheap if there is nothing."""
        reported, self._reported = self._reported, self._made.pages.resident
        if reported is self._reported:
            return []
        before, now = ({_name_of(version) for version in versions} for versions in (reported, self._reported))
        loaded = [AdapterLoaded(name) for name in sorted(now - before)]
        return [*map(AdapterEvicted, sorted(before - now)), *loaded]

    def _put_in_place(self, name: str, version: str, waiting: Iterable[Sequence]) -> None:
        """Make a version that was read the one that lines get, and bring it to the device if there is room."""
        pages, old = self._made.pages, self._versions.get(name)
        self._versions[name] = version
        pages.add(version, self.host.size_of(version))
        is_pinned = False
        if old is not None:
            for sequence in waiting:
                if sequence.request.adapter == old:
                    self._move(sequence, version)
            is_pinned = pages.retire(old)
            self._ask_loader(_Drop(old))  # after whatever load of it was asked for
        numbers = pages.place(version)
        if numbers:
            self._start_load(version, numbers)
            if is_pinned:
                pages.pin(version)
        logger.info("adapter %s: new files are in use, as %s", name, version)

    def _move(self, sequence: Sequence, version: str) -> None:
        """Let a waiting line have the new version, unless it has spoken and the old one is still there for it."""
        if sequence.output_ids and self._made.pages.keep(sequence):
            sequence.is_promised = True
        else:
            self._made.pages.leave(sequence)
            sequence.use_adapter(version, self.host.digest_of(version))

    def reset(self, timeout_s: float) -> None:
        """Make the pool anew, as `open` does, after an error of the device; nobody uses or awaits an adapter.

        Raises `TimeoutError` if the loader does not come out of its load: it could write into the new pool.
        """
        self.close(timeout_s)
        if self._loader is not None and self._loader.is_alive():
            raise TimeoutError(f"an adapter load did not end within {timeout_s:.0f} s")
        wanted, outcomes = self._wanted, self._outcomes
        self._wanted, self._outcomes = queue.SimpleQueue(), queue.SimpleQueue()
        self._loader, self._stream, self._closing = None, None, False
        num_pages, self._opened = len(self.pool), None  # not both pools at once
        self._open(num_pages)
        while not outcomes.empty():  # what was read in main memory is as good as before
            outcome = outcomes.get()
            if isinstance(outcome, _Replace):
                self._outcomes.put(outcome)
        while not wanted.empty():
            item = wanted.get()
            if isinstance(item, (_Replace, _Drop)):
                self._ask_loader(item)

    def close(self, timeout_s: float) -> None:
        """Stop the loader; it finishes the load it is in, if that is soon."""
        self._closing = True
        self._wanted.put(None)
        if self._loader is not None:
            self._loader.join(timeout_s)

    def check_integrity(self, running: Iterable[Sequence], waiting: Iterable[Sequence]) -> None:
        """Assert that no page and no user is lost; see `PagePool.check_integrity`."""
        self._made.pages.check_integrity(running, waiting)

    @property
    def _made(self) -> _Opened:
        assert self._opened is not None, "the store is not open yet"
        return self._opened

    @torch.inference_mode()
    def _write(self, name: str, pages: list[int]) -> None:
        for page, source in zip(pages, self.host.get(name).pages, strict=True):
            self.pool[page].copy_(source, non_blocking=True)  # whoever writes synchronises the stream
        if self.multipliers is not None:
            factors = self.host.multipliers_of(name)
            row = self.multipliers[pages[0]]
            _ = row.fill_(1.0) if factors is None else row.copy_(factors, non_blocking=True)

    def _start_load(self, version: str, pages: list[int]) -> None:
        # A step that samples nothing is not waited for: it may still read the adapter that makes room here.
        after = torch.cuda.current_stream(self._device).record_event() if self._device.type == "cuda" else None
        self._ask_loader(_Load(version, pages, after))

    def _ask_loader(self, wanted: _Load | _Replace | _Drop) -> None:
        if self._loader is None:
            self._loader = threading.Thread(target=self._run_loader, name="adapter loader", daemon=True)
            self._loader.start()
        self._wanted.put(wanted)

    def _run_loader(self) -> None:
        while not self._closing and (wanted := self._wanted.get()) is not None:
            if isinstance(wanted, _Drop):
                self.host.drop(wanted.version)
                continue
            if isinstance(wanted, _Replace):
                self._outcomes.put(self._read(wanted))
            else:
                self._load(wanted)
            self.on_loaded()

    def _load(self, wanted: _Load) -> None:
        version, pages, after, _ = wanted
        try:
            if after is not None and self._stream is None:
                self._stream = make_stream(self._device)
            # On its own stream, so that a copy to the GPU runs beside the step that decodes.
            with torch.cuda.stream(self._stream):
                if self._stream is not None and after is not None:
                    self._stream.wait_event(after)
                self._write(version, pages)
            self._finish_copy()
        except FilesChanged:  # before anybody said so: then the lines that wait for it get the new files
            name = _name_of(version)
            newer = self._read(_Replace(name, self.host.parts_of(version), lambda problem: None))
            self._outcomes.put(newer)
            moved = AdapterIncompatible(f"The adapter of {name} changed while it was read.", "Send the line again.")
            self._outcomes.put(wanted._replace(error=newer.error or moved))
        except Exception as error:  # files come from anywhere; whatever is wrong is this adapter's problem alone
            logger.warning("adapter %s could not be loaded: %s", version, error)
            self._outcomes.put(wanted._replace(error=error))
        else:
            logger.info("adapter %s loaded into pages %s", version, pages)
            self._outcomes.put(wanted)

    def _finish_copy(self) -> None:
        if self._stream is not None:
            self._num_copies += 1
            self.copy_under_way = self._num_copies
            try:
                self._stream.synchronize()
            finally:
                self.copy_under_way = None

    def _read(self, wanted: _Replace) -> _Replace:
        """Read new files as a version of their own; what is wrong with them is part of what is returned."""
        name, latest = wanted.name, self._latest.get(wanted.name)
        self._num_replaced += 1
        version = name if latest is None else f"{name}#{self._num_replaced + 1}"
        try:
            self.host.add_settled(version, wanted.parts, max_pages=len(self.pool))
        except Exception as error:  # as in `_load`
            return wanted._replace(error=error)
        if latest is not None and self.host.is_same(version, latest):
            self.host.drop(version)
            return wanted
        if self.multipliers is None and self.host.multipliers_of(version) is not None:
            self.host.drop(version)
            problem = f"The adapter of {name} is a DoRA, and there was none when the daemon started."
            return wanted._replace(error=AdapterIncompatible(problem, "Restart the daemon to use it."))
        self._latest[name] = version
        return wanted._replace(version=version)


def _name_of(version: str) -> str:
    return version.partition("#")[0]


def _as_wire(name: str, error: Exception) -> WireError:
    if isinstance(error, WireError):
        return error
    if is_out_of_memory(error):
        return OutOfMemory(f"There is no memory to load the adapter of {name}.", "Lower --adapter-memory.")
    return AdapterIncompatible(
        f"The adapter of {name} cannot be read ({type(error).__name__}: {error}).", "Export it again."
    )
