"""Who owns which adapter page, who uses which adapter, and which adapter makes room for another. No torch.

As `blocks.BlockPool` is for KV blocks, but an adapter comes and goes as a whole. Its pages are taken when its load
begins; a loader in another thread writes them while nobody reads them, and `loaded` or `failed` is called when it
is done. Which pages can be given to another adapter:

    loading                        none: they are being written
    used by running lines          none: every step reads them
    promised to a waiting line     none, or two lines could push out each other's adapter before either spoke
    idle                           yes, the least recently used first
    idle and pinned                yes, after all that are not pinned
    replaced by newer content      as soon as no line uses it and it is promised to none

A pin is an order of leaving and never a claim: were pinned pages kept for nobody, a line whose adapter needs them
would wait for ever. So a pin ends when its adapter is pushed out after all.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from npc_runtime.engine.core import Admission, Sequence

__all__ = ["PagePool", "StartLoad"]

StartLoad = Callable[[str, list[int]], None]
"""Has an adapter (name) written into pages, in rank order; `loaded` or `failed` is called when that is done."""


@dataclass(slots=True)
class _Slot:
    """An adapter that owns pages."""

    pages: list[int]
    is_ready: bool = False
    is_pinned: bool = False
    is_retired: bool = False
    users: set[int] = field(default_factory=set)  # ids of requests that run
    promised: set[int] = field(default_factory=set)  # ids of requests that wait for it
    last_used: int = 0

    @property
    def is_idle(self) -> bool:
        return self.is_ready and not self.users and not self.promised


class PagePool:
    """`num_pages` pages; `sizes` says how many each adapter needs, none of them more than there are."""

    def __init__(self, num_pages: int, sizes: Mapping[str, int], start_load: StartLoad) -> None:
        assert all(0 < size <= num_pages for size in sizes.values())
        self.num_pages = num_pages
        self._sizes = dict(sizes)
        self._start_load = start_load
        self._slots: dict[str, _Slot] = {}
        self._free = list(range(num_pages))
        self._uses = 0
        self.resident: tuple[str, ...] = ()
        """Names of the adapters that are loaded, another tuple when they change; may be read from any thread."""

    @property
    def num_free(self) -> int:
        """Pages that no adapter owns."""
        return len(self._free)

    def pages_of(self, name: str) -> list[int]:
        """Page numbers of a loaded adapter, in rank order."""
        slot = self._slots[name]
        assert slot.is_ready, f"{name} is still being loaded"
        return slot.pages

    def admit(self, sequence: Sequence) -> Admission:
        """Give the sequence its adapter, or begin to load it; whoever is promised one asks again or leaves."""
        name, request_id = sequence.request.adapter, sequence.request.id
        if name is None:
            return Admission.ADMITTED
        slot = self._slots.get(name)
        if slot is None:
            slot = self._reserve(name)
            if slot is None:
                return Admission.NO_ROOM
            self._start_load(name, slot.pages)
        self._touch(slot)
        if not slot.is_ready:
            slot.promised.add(request_id)
            return Admission.LOADING
        slot.promised.discard(request_id)
        slot.users.add(request_id)
        return Admission.ADMITTED

    def place(self, name: str) -> list[int]:
        """Take free pages for an adapter before there are lines; empty if there are too few. `loaded` comes next."""
        if len(self._free) < self._sizes[name]:
            return []
        slot = self._reserve(name)
        assert slot is not None
        return slot.pages

    def leave(self, sequence: Sequence) -> None:
        """Take back what `admit` gave or promised, if anything; the adapter stays until its room is needed."""
        name = sequence.request.adapter or ""
        slot = self._slots.get(name)
        if slot is not None:
            slot.users.discard(sequence.request.id)
            slot.promised.discard(sequence.request.id)
            self._touch(slot)
            self._free_if_retired(name, slot)

    def suspend(self, sequence: Sequence) -> bool:
        """Take the adapter back from a line that is preempted.

        True: it stays promised to the line, because it was replaced and could not be loaded a second time.
        """
        slot = self._slots.get(sequence.request.adapter or "")
        if slot is None or not slot.is_retired:
            self.leave(sequence)
            return False
        slot.users.discard(sequence.request.id)
        slot.promised.add(sequence.request.id)
        return True

    def add(self, name: str, size: int) -> None:
        """Let there be one more adapter; it has no pages yet."""
        assert name not in self._sizes
        assert 0 < size <= self.num_pages
        self._sizes[name] = size

    def keep(self, sequence: Sequence) -> bool:
        """Promise a loaded adapter to a line that was preempted, before it is retired; False if it is not there."""
        slot = self._slots.get(sequence.request.adapter or "")
        if slot is None or not slot.is_ready:
            return False
        slot.promised.add(sequence.request.id)
        return True

    def retire(self, name: str) -> bool:
        """The adapter was replaced: nobody asks for it any more but those to whom it is promised.

        Its pages are free when the last line with it has left. Returns whether it was pinned.
        """
        slot = self._slots.get(name)
        if slot is None:
            del self._sizes[name]
            return False
        slot.is_retired = True
        self._free_if_retired(name, slot)
        return slot.is_pinned

    def pin(self, name: str) -> None:
        """Let a loaded adapter be pushed out only after those that are not pinned."""
        self._slots[name].is_pinned = True

    def loaded(self, name: str) -> None:
        """The adapter's pages are written."""
        slot = self._slots[name]
        slot.is_ready = True
        self._note_resident()
        self._free_if_retired(name, slot)

    def failed(self, name: str) -> frozenset[int]:
        """The adapter could not be loaded: its pages are free again. Returns the ids of who waited for it."""
        slot = self._slots.pop(name)
        assert not slot.is_ready
        self._free.extend(slot.pages)
        if slot.is_retired:
            del self._sizes[name]
        return frozenset(slot.promised)

    def check_integrity(self, running: Iterable[Sequence], waiting: Iterable[Sequence]) -> None:
        """Assert that every page is free or has one owner, and that who uses and awaits what agrees with the queues."""
        held = self._free + [page for slot in self._slots.values() for page in slot.pages]
        assert sorted(held) == list(range(self.num_pages)), "an adapter page is lost or owned twice"
        users = {(s.request.adapter, s.request.id) for s in running if s.request.adapter is not None}
        promised = {(s.request.adapter, s.request.id) for s in waiting if s.is_promised}
        slots = self._slots.items()
        assert users == {(name, user) for name, slot in slots for user in slot.users}, "a user is lost or left over"
        assert promised == {(name, user) for name, slot in slots for user in slot.promised}, "a promise is lost"
        assert self.resident == tuple(sorted(name for name, slot in slots if slot.is_ready))
        for name, slot in slots:
            assert slot.is_ready or not slot.users, f"{name} is used before it is loaded"
            assert len(slot.pages) == self._sizes[name]
            assert not (slot.is_retired and slot.is_idle), f"the pages of {name} are kept for nobody"

    def _reserve(self, name: str) -> _Slot | None:
        """Take pages for the adapter, pushing others out; None, and nobody is pushed out, if that is not enough."""
        size = self._sizes[name]
        idle = [other for other, slot in self._slots.items() if slot.is_idle]
        if len(self._free) + sum(len(self._slots[other].pages) for other in idle) < size:
            return None
        idle.sort(key=lambda other: (self._slots[other].is_pinned, self._slots[other].last_used))
        for other in idle:
            if len(self._free) >= size:
                break
            self._free.extend(self._slots.pop(other).pages)
        self._note_resident()
        slot = _Slot([self._free.pop() for _ in range(size)])
        self._slots[name] = slot
        return slot

    def _free_if_retired(self, name: str, slot: _Slot) -> None:
        if slot.is_retired and slot.is_idle:
            self._free.extend(self._slots.pop(name).pages)
            del self._sizes[name]
            self._note_resident()

    def _note_resident(self) -> None:
        self.resident = tuple(sorted(name for name, slot in self._slots.items() if slot.is_ready))

    def _touch(self, slot: _Slot) -> None:
        self._uses += 1
        slot.last_used = self._uses
