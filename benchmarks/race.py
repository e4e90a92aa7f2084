"""Lets systems take turns on one cell of the grid after the other. Knows no system by name."""

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from place import Place
from processes import Group, Skipped
from quiet import Watch
from workload import Cell, Measured, adapter_folder, make_adapter, prompts_of

__all__ = ["Entry", "Race", "System"]

MAX_FOREIGN = 0.1  # share of the processor that others may take before a measurement is repeated
MAX_TRIES = 3
LONG_S = 30.0  # what takes longer is not repeated
QUIET_LIMIT_S = 30.0
LONG_PROMPT = 100  # from here on no rows without adapters or without AVX-512
WARM_PROMPT, WARM_NEW = 32, 4


class System(Protocol):
    """Something that speaks batches. `variant` tells two of a name apart; of those the faster stays after a round."""

    name: str
    variant: str

    @property
    def group(self) -> Group | None:
        """The processes of it that run now."""

    def key(self, cell: Cell) -> Hashable:
        """What it must be started for; while this stays the same it stays open."""

    def set_up(self, on_progress: Any) -> None:
        """Fetch and build what it needs. Raises `Skipped`."""

    def open(self, cell: Cell) -> None:
        """Start it for a cell. Raises `Skipped`."""

    def speak(self, cell: Cell, prompts: list[list[int]], limit_s: float) -> Measured:
        """Speak one batch. Raises `Skipped`."""

    def close(self) -> None:
        """End its processes; may be called twice."""


@dataclass(slots=True)
class Entry:
    """A system on a cell, and what came out. `reason`: why it was not measured to the end."""

    system: System
    cell: Cell
    group: Cell  # what it is compared in; `cell` differs from it where the adapters are left out
    samples: list[Measured] = field(default_factory=list)
    foreign: list[float] = field(default_factory=list)
    reason: str = ""
    is_slower_variant: bool = False

    @property
    def title(self) -> str:
        """The system in words."""
        parts = [self.system.variant, "" if self.cell.rank else "no adapters"]
        notes = ", ".join(part for part in parts if part)
        return f"{self.system.name} ({notes})" if notes else self.system.name

    @property
    def is_out(self) -> bool:
        """Whether it takes no further turns."""
        return bool(self.reason) or self.is_slower_variant


class Race:
    """All entries of a run. Systems stay open, stopped, until a cell needs them started in another way."""

    def __init__(
        self, place: Place, systems: list[System], *, limit_s: float, minutes: float, say: Callable[[str], None]
    ) -> None:
        self.entries: list[Entry] = []
        self._place, self._systems, self._say = place, systems, say
        self._limit_s, self._end = limit_s, time.monotonic() + 60 * minutes
        self._open: dict[int, Hashable] = {}  # by place in `systems`

    def run(self, cell: Cell, *, upcoming: list[Cell]) -> None:
        """Measure a cell; what the upcoming one does not need as it is gets closed behind it."""
        for name in cell.adapters:
            make_adapter(adapter_folder(self._place.root, name), self._place.config, name=name)
        entries = self._enter(cell)
        self.entries += entries
        for number in range(cell.rounds):
            if number and time.monotonic() > self._end:
                break
            for turn in range(len(entries)):
                entry = entries[(turn + number) % len(entries)]
                if not entry.is_out:
                    self._attempt(entry, lambda entry=entry, number=number: self._measure(entry, number))
            _drop_slower_variants(entries)
        self.close(keep=upcoming)

    def close(self, *, keep: list[Cell] = ()) -> None:
        """End the systems' processes but those that the cells in `keep` will need."""
        for number, system in enumerate(self._systems):
            if number in self._open and not any(self._open[number] == system.key(cell) for cell in keep):
                del self._open[number]
                system.close()

    def _enter(self, cell: Cell) -> list[Entry]:
        is_plain = cell.rank == 16 and cell.prompt_tokens < LONG_PROMPT
        entries = []
        for number, system in enumerate(self._systems):
            is_avx2 = system.variant == "AVX2"
            if is_avx2 and not is_plain:
                continue
            entry = Entry(system, cell, cell)
            entries.append(entry)
            self._attempt(entry, lambda number=number: self._prepare(number, cell))
            if number == 0 and is_plain and not entry.is_out:
                entries.append(Entry(system, replace(cell, rank=0), cell))
        return entries

    def _prepare(self, number: int, cell: Cell) -> None:
        """Open the system as the cell needs it, let it speak a few words, and stop it."""
        system = self._systems[number]
        if self._open.get(number) != system.key(cell):
            system.close()
            self._say(f"starting {system.name} {system.variant}")
            self._open[number] = system.key(cell)
            system.open(cell)
        assert system.group is not None
        system.group.resume()
        warm = replace(cell, prompt_tokens=min(WARM_PROMPT, cell.prompt_tokens), new_tokens=WARM_NEW)
        system.speak(warm, self._prompts(warm, "warm"), self._limit_s)
        system.group.pause()

    def _measure(self, entry: Entry, number: int) -> None:
        """One sample; the least disturbed of a few tries."""
        tries = []
        for attempt in range(MAX_TRIES):
            foreign, sample = self._try(entry, f"{number}.{attempt}")
            tries.append((foreign, sample))
            if foreign <= MAX_FOREIGN or sample.last_line_s > LONG_S or time.monotonic() > self._end:
                break
        foreign, sample = min(tries, key=lambda pair: pair[0])
        entry.samples.append(sample)
        entry.foreign.append(foreign)
        speed = entry.cell.npcs * entry.cell.new_tokens / sample.last_line_s
        noise = f", others took {foreign:.0%} of the processor" if foreign > MAX_FOREIGN else ""
        self._say(f"{entry.cell.title}, round {number + 1}: {entry.title} {speed:.1f} tokens/s{noise}")

    def _try(self, entry: Entry, salt: str) -> tuple[float, Measured]:
        group = entry.system.group
        if group is None:  # it failed in its other entry of this cell
            raise Skipped("it was ended before")
        wait_for_quiet(self._end)
        group.resume()
        watch = Watch(group.process.pid)
        sample = entry.system.speak(entry.cell, self._prompts(entry.cell, salt), self._limit_s)
        foreign = watch.foreign_share()
        group.pause()
        if problem := sample.explain_wrong_counts(entry.cell):
            raise Skipped(problem)
        return foreign, sample

    def _attempt(self, entry: Entry, act: Callable[[], None]) -> None:
        """Act; if the system cannot, it is out of this cell and its process is ended."""
        try:
            act()
        except (Skipped, OSError) as error:
            entry.reason = str(error)
            self._say(f"{entry.cell.title}: {entry.title} is out: {entry.reason}")
            self._open.pop(self._systems.index(entry.system), None)
            entry.system.close()

    def _prompts(self, cell: Cell, salt: str) -> list[list[int]]:
        return prompts_of(cell, salt, vocabulary=self._place.config["vocab_size"])


def wait_for_quiet(end: float) -> None:
    """Wait until nobody uses the processor, half a minute at most; all systems are stopped now."""
    limit = min(time.monotonic() + QUIET_LIMIT_S, end)
    while time.monotonic() < limit:
        watch = Watch(None)
        time.sleep(0.3)
        if watch.foreign_share() <= MAX_FOREIGN:
            return


def _drop_slower_variants(entries: list[Entry]) -> None:
    """Of entries of one name that were all measured, keep the one that spoke fastest."""
    for entry in entries:
        rivals = [
            other
            for other in entries
            if other.system.name == entry.system.name
            and other.system.variant != entry.system.variant
            and "AVX2" not in (entry.system.variant, other.system.variant)
            and other.samples
        ]
        if entry.samples and any(rival.samples[0].last_line_s < entry.samples[0].last_line_s for rival in rivals):
            entry.is_slower_variant = True
