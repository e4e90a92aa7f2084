"""More adapters than the device holds: lines wait for theirs, and nobody who speaks waits for a load."""

import random
import shutil
import threading

import pytest
from conftest import MS
from driving import TinyBase, greedy, make_engine, make_store, speak
from test_model import load
from tiny import make_adapter, make_model

from npc_runtime.engine.core import Ended, EndReason, EngineConfig
from npc_runtime.engine.engine import Engine

NUM_ADAPTERS, NUM_PAGES = 64, 8


@pytest.fixture(scope="module")
def crowd(tmp_path_factory):
    """A tiny base, and 64 adapters of one, two and four pages."""
    folder = tmp_path_factory.mktemp("crowd")
    model = make_model("llama", folder / "model")
    ranks = (8, 16, 8, 24, 8, 16, 8, 64)
    for number in range(NUM_ADAPTERS):
        make_adapter(model, folder / f"a{number}", rank=ranks[number % 8], seed=number)
    return TinyBase(load(folder / "model")), folder


@pytest.fixture
def stock(crowd):
    """Make stores of some of the crowd; their loaders are gone after the test."""
    base, folder = crowd
    made = []

    def make(numbers=range(NUM_ADAPTERS), max_pages=NUM_PAGES, **budgets):
        made.append(make_store(base.decoder, max_pages, **budgets))
        for number in numbers:
            made[-1].add(f"a{number}", [(folder / f"a{number}", 1.0)])
        return made[-1]

    yield make
    for store in made:
        store.close(30_000 * MS)


class Gate:
    """Holds the loader back until it is opened."""

    def __init__(self, store, monkeypatch):
        self._right, self._open = store.host.get, threading.Event()
        self.wanted = []
        monkeypatch.setattr(store.host, "get", self._get)

    def open(self):
        self._open.set()

    def _get(self, name):
        self.wanted.append(name)
        assert self._open.wait(30_000 * MS)
        return self._right(name)


def line(number, name, **options):
    return greedy(number, range(3, 12), name, **{"max_tokens": 6, **options})


def test_64_adapters_through_8_pages_all_say_what_they_say_alone(crowd, stock):
    base, _ = crowd
    engine, run = make_engine(base, stock(max_pages=200))
    alone = {}
    for number in range(NUM_ADAPTERS):
        alone[number] = list(speak(engine, run, [line(number, f"a{number}")]).tokens[number])
    assert len({tuple(tokens) for tokens in alone.values()}) > NUM_ADAPTERS // 2
    # It speaks on while all others come and go, and nothing may be written under it.
    steady = greedy(9_000, range(3, 12), "a0", max_tokens=110)
    alone[9_000] = list(speak(engine, run, [steady]).tokens[9_000])

    page_bytes = base.decoder.layout.num_elements * 4
    store = stock(max_host_bytes=20 * page_bytes)
    engine, run = make_engine(base, store)
    chance = random.Random(3)
    requests = [line(1000 * turn + number, f"a{number}") for turn in range(1, 4) for number in range(NUM_ADAPTERS)]
    chance.shuffle(requests)
    cancelled = {request.id for request in chance.sample(requests, 40)}
    engine.submit([steady])
    tokens = {}
    while requests or engine._scheduler.has_work:
        for _ in range(min(len(requests), chance.randrange(12))):
            engine.submit([requests.pop()])
        engine.cancel(chance.sample(sorted(cancelled), 2))
        engine.step(wait=engine._scheduler.has_work)
        engine.check_integrity()
        assert len(store.resident) <= NUM_PAGES
        assert store.host.num_bytes <= 20 * page_bytes
        tokens.update({sequence.request.id: sequence.output_ids for sequence in engine._scheduler.running})
    ends = {request_id: run.ended(request_id) for request_id in run.events}
    assert len(ends) == 3 * NUM_ADAPTERS + 1
    for request_id, end in ends.items():
        expected = alone[request_id if request_id == steady.id else request_id % 1000]
        if end.reason == EndReason.CANCELLED:
            assert request_id in cancelled
            assert tokens.get(request_id, []) == expected[: len(tokens.get(request_id, []))]
        else:
            assert (end.reason, tokens[request_id]) == (EndReason.LENGTH, expected)
    assert sum(end.reason == EndReason.LENGTH for end in ends.values()) > 2 * NUM_ADAPTERS


def test_lines_that_speak_do_not_wait_for_a_slow_load(crowd, stock, monkeypatch):
    """19 steps are made while the load stands still; the line that wants it starts as soon as it is done."""
    base, _ = crowd
    store = stock([0, 2, 4], max_pages=2)
    engine, run = make_engine(base, store)
    assert store.resident == ("a0", "a2")
    gate = Gate(store, monkeypatch)
    engine.submit([line(1, "a0", max_tokens=20), line(2, "a4"), line(3, None, max_tokens=40)])
    for _ in range(20):
        engine.step()
        engine.check_integrity()
    assert (run.ended(1).num_completion, run.ended(2)) == (20, None)
    assert 2 not in run.events
    gate.open()
    while not run.ended(2):
        engine.step(wait=True)
    assert run.ended(2).reason == EndReason.LENGTH
    assert not run.ended(3), "it was spoken beside the line that went on"
    assert gate.wanted == ["a4"]


def test_the_thread_sleeps_while_all_lines_wait_for_a_load(crowd, stock, monkeypatch):
    base, _ = crowd
    store = stock([0], max_host_bytes=0)
    gate = Gate(store, monkeypatch)
    ends, has_ended = [], threading.Event()

    def on_step(step):
        ends.extend(event for event in step.events if isinstance(event, Ended))
        if ends:
            has_ended.set()

    engine = Engine(base.decoder, base.tokenizer, store, EngineConfig(kv_tokens=4096), on_step=on_step)
    steps, plan = [], engine._scheduler.plan
    monkeypatch.setattr(engine._scheduler, "plan", lambda *args, **options: steps.append(1) or plan(*args, **options))
    engine.start()
    engine.submit([line(1, "a0")])
    threading.Event().wait(200 * MS)
    assert not ends
    assert len(steps) <= 3
    gate.open()
    assert has_ended.wait(30_000 * MS)
    engine.close(30_000 * MS)
    assert [end.reason for end in ends] == [EndReason.LENGTH]


@pytest.mark.parametrize("reason", [EndReason.CANCELLED, EndReason.DEADLINE])
def test_a_line_that_goes_while_its_adapter_loads_leaves_it_to_others(crowd, stock, monkeypatch, reason):
    base, _ = crowd
    now = [0.0]
    store = stock([7, 15], max_pages=4, max_host_bytes=0)  # four pages each
    engine, run = make_engine(base, store, clock=lambda: now[0])
    gate = Gate(store, monkeypatch)
    engine.submit([line(1, "a7", deadline=None if reason == EndReason.CANCELLED else 1.0), line(2, "a15")])
    engine.step()
    if reason == EndReason.CANCELLED:
        engine.cancel([1])
    now[0] = 1.0
    engine.step()
    engine.check_integrity()
    assert (run.ended(1).reason, run.ended(1).num_completion) == (reason, 0)
    gate.open()
    while not run.ended(2):
        engine.step(wait=True)
        engine.check_integrity()
    assert run.ended(2).reason == EndReason.LENGTH
    assert gate.wanted == ["a7", "a15"]


def test_two_lines_that_want_all_pages_both_speak(crowd, stock, monkeypatch):
    """Each one's adapter fills the pool; ten rounds, and no adapter is loaded twice for one line."""
    base, _ = crowd
    store = stock([7, 15], max_pages=4, max_host_bytes=0)
    engine, run = make_engine(base, store)
    loads, write = [], store._write
    monkeypatch.setattr(store, "_write", lambda name, pages: (loads.append(name), write(name, pages)))
    speak(engine, run, [line(number, ("a7", "a15")[number % 2], max_tokens=2) for number in range(1, 21)])
    assert 2 <= len(loads) <= 20


def test_a_load_that_fails_ends_its_lines_and_spares_the_others(crowd, stock, tmp_path):
    base, folder = crowd
    store = stock([1], max_host_bytes=0)
    shutil.copytree(folder / "a0", tmp_path / "a0")
    store.add("lost", [(tmp_path / "a0", 1.0)])
    engine, run = make_engine(base, store)
    speak(engine, run, [line(1, "a1"), line(2, None)])
    shutil.rmtree(tmp_path / "a0")
    speak(engine, run, [line(3, "lost"), line(4, "a1"), line(5, "lost")])
    for number in (3, 5):
        end = run.ended(number)
        assert (end.reason, end.num_completion, end.error.code) == (EndReason.ERROR, 0, "adapter_missing")
        assert str(tmp_path / "a0") in end.error.message
        assert end.error.hint
    assert run.ended(4).reason == EndReason.LENGTH
    shutil.copytree(folder / "a0", tmp_path / "a0")
    assert speak(engine, run, [line(6, "lost")]).ended(6).reason == EndReason.LENGTH


def test_closing_ends_lines_that_wait_for_a_load(crowd, stock, monkeypatch):
    base, _ = crowd
    store = stock([0], max_host_bytes=0)
    gate = Gate(store, monkeypatch)
    ends = []
    engine = Engine(
        base.decoder, base.tokenizer, store, EngineConfig(kv_tokens=4096), on_step=lambda step: ends.extend(step.events)
    )
    engine.start()
    engine.submit([line(1, "a0")])
    threading.Event().wait(50 * MS)
    engine.close(100 * MS)
    assert [(end.request_id, end.reason) for end in ends] == [(1, EndReason.CANCELLED)]
    gate.open()
