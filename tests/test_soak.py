"""10,000 short lines through a running engine, with cancels, deadlines and more adapters than pages: memory is flat."""

import gc
import os
import random
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import MS
from driving import NUM_ADAPTERS, greedy, make_store

from npc_runtime.engine.core import Ended, EndReason, EngineConfig
from npc_runtime.engine.engine import Engine

NUM_LINES, NUM_WARM_LINES, MAX_LIVE = 10_000, 2_000, 48
MAX_GROWTH_BYTES, MAX_GROWTH_OBJECTS = 10 << 20, 1_000

STATM = Path("/proc/self/statm")


def resident_bytes():
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if STATM.exists() else 0


class Crowd:
    """Keeps some dozen lines alive and counts how each ends; keeps nothing else."""

    def __init__(self, base, store):
        config = EngineConfig(kv_tokens=2_048, max_rows=32)
        self.engine = Engine(base.decoder, base.tokenizer, store, config, on_step=self.on_step)
        self.chance = random.Random(11)
        self.live, self.reasons, self.num_ends = set(), dict.fromkeys(EndReason, 0), 0
        self.changed = threading.Condition()

    def on_step(self, step):
        with self.changed:
            for event in step.events:
                if isinstance(event, Ended):
                    self.live.remove(event.request_id)  # a second end would raise
                    self.reasons[event.reason] += 1
                    self.num_ends += 1
            self.changed.notify()

    def wait_until(self, is_true):
        with self.changed:
            assert self.changed.wait_for(is_true, 60_000 * MS), "the engine stands still"

    def request(self, number):
        chance = self.chance
        name = chance.choice([None, *(f"a{n}" for n in range(NUM_ADAPTERS))])
        start = chance.choice([3, 3, 40])
        prompt = [*range(start, start + chance.randrange(4, 30)), chance.randrange(90)]
        line = greedy(number, prompt, name, max_tokens=chance.randrange(1, 6), group=None)
        deadline = time.monotonic() + chance.random() if chance.random() < 0.1 else None
        return replace(line, arrival=time.monotonic(), deadline=deadline, is_warmup=chance.random() < 0.05)

    def speak(self, numbers):
        numbers = list(numbers)
        while numbers:
            self.wait_until(lambda: len(self.live) < MAX_LIVE)
            group, numbers = numbers[:8], numbers[8:]
            with self.changed:
                self.live.update(group)
                some = self.chance.sample(sorted(self.live), 2)
            self.engine.submit([self.request(number) for number in group])
            self.engine.cancel([number for number in some if self.chance.random() < 0.5])
        self.wait_until(lambda: not self.live)

    def measure(self):
        gc.collect()
        return resident_bytes(), len(gc.get_objects())


@pytest.fixture
def crowd(tiny, tmp_path):
    """Sixteen pages' worth of adapters, five pages; three pages' worth of copies in main memory."""
    base, _ = tiny
    page_bytes = base.decoder.layout.num_elements * base.decoder.dtype.itemsize
    store = make_store(base.decoder, max_pages=5, max_host_bytes=3 * page_bytes)
    for number in range(NUM_ADAPTERS):
        store.add(f"a{number}", [(tmp_path / f"a{number}", 1.0)])
    crowd = Crowd(base, store)
    crowd.engine.start()
    yield crowd
    crowd.engine.close(30_000 * MS)


def test_ten_thousand_lines_leave_nothing_behind(crowd):
    crowd.speak(range(NUM_WARM_LINES))
    bytes_before, objects_before = crowd.measure()
    crowd.speak(range(NUM_WARM_LINES, NUM_LINES))
    bytes_after, objects_after = crowd.measure()
    assert crowd.num_ends == NUM_LINES
    assert crowd.reasons[EndReason.ERROR] == crowd.reasons[EndReason.OVERLOAD] == 0
    assert min(crowd.reasons[reason] for reason in (EndReason.LENGTH, EndReason.CANCELLED, EndReason.STOP)) > 100
    assert bytes_after - bytes_before < MAX_GROWTH_BYTES
    assert objects_after - objects_before < MAX_GROWTH_OBJECTS
    crowd.engine.close(30_000 * MS)
    crowd.engine.check_integrity()
    assert crowd.engine.stats().kv_blocks_used == 0
    assert not crowd.engine._speech.ids
    assert not crowd.engine._books.open_ids
    assert crowd.engine._commands.empty()
