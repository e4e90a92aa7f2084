"""An engine whose device fails: every line ends once, and what is spoken afterwards is what it would have been."""

import threading
import time

import pytest
import torch
from conftest import MS
from driving import NUM_ADAPTERS, greedy, make_engine, make_store, speak
from fake_cuda import FakeCuda, FakeStream
from test_engine import break_once, lines

import npc_runtime.engine.engine as engine_module
from npc_runtime.engine.core import Degraded, Ended, EndReason, EngineConfig, Spoken
from npc_runtime.engine.engine import MAX_RECOVERIES, Engine
from npc_runtime.engine.faults import DeviceLost


def illegal_access():
    return torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


def assert_device_failed(run, numbers):
    """Each ended once (`run.ended` sees to that), in a way that a game can act on."""
    for number in numbers:
        end = run.ended(number)
        assert (end.reason, end.error.code, end.error.retryable) == (EndReason.ERROR, "internal", True)
        assert "device failed" in end.error.message
        assert "send the line again" in end.error.hint


@pytest.mark.parametrize("after", [0, 3])
def test_running_and_waiting_lines_end_and_the_next_say_what_they_would_have(tiny, monkeypatch, after):
    """Two rows for five lines. Pools and KV cache are spoiled too, as by a stray write of the kernel that failed."""
    base, store = tiny
    config = EngineConfig(kv_tokens=2048, max_rows=2)
    prompts = [greedy(n + 1, range(3, 43 + n), f"a{n}", max_tokens=6) for n in range(5)]
    engine, run = make_engine(base, store, config)
    expected = {n: list(tokens) for n, tokens in speak(engine, run, prompts).tokens.items()}
    cached = [run.ended(n).num_cached for n in range(1, 6)]

    engine, run = make_engine(base, store, config)
    speak(engine, run, [greedy(50, range(3, 43), "a0", max_tokens=6)])
    store.pool.fill_(float("nan"))
    engine._runner._kv.keys.fill_(float("nan"))
    engine._runner._kv.values.fill_(float("nan"))
    engine._runner._recordings["a room"] = None
    break_once(monkeypatch, engine._runner, "forward", illegal_access(), after)
    speak(engine, run, [greedy(60 + n, range(3, 43 + n), None, max_tokens=6) for n in range(5)])
    assert_device_failed(run, range(60, 65))
    assert engine.stats().kv_blocks_used == engine.stats().kv_blocks_cached == 0
    assert not engine._runner._recordings
    assert not engine._runner._kv.keys.any()
    assert not engine._runner._kv.values.any()
    assert [type(item) for item in run.news] == [Degraded]
    assert "answers again" in run.news[0].message
    assert speak(engine, run, prompts).tokens == expected
    assert [run.ended(n).num_cached for n in range(1, 6)] == cached


def test_more_adapters_than_pages_and_a_load_under_way(tiny, tmp_path, monkeypatch):
    """The step fails while the loader writes: its line ends like all others, and its pages are whole afterwards."""
    base, store = tiny
    everybody = [greedy(n + 1, range(3, 12), f"a{n}", max_tokens=4) for n in range(NUM_ADAPTERS)]
    engine, run = make_engine(base, store)
    expected = {n: list(tokens) for n, tokens in speak(engine, run, everybody).tokens.items()}

    tight = make_store(base.decoder, max_pages=5)
    for number in range(NUM_ADAPTERS):
        tight.add(f"a{number}", [(tmp_path / f"a{number}", 1.0)])
    engine, run = make_engine(base, tight)
    is_loading, may_write, right = threading.Event(), threading.Event(), tight._write

    def write(name, pages):
        if threading.current_thread().name == "adapter loader":
            is_loading.set()
            assert may_write.wait(30)
        right(name, pages)

    monkeypatch.setattr(tight, "_write", write)
    resident = tight.resident[0]
    engine.submit([greedy(50, range(3, 12), resident, max_tokens=9), greedy(51, range(3, 12), "a7", max_tokens=9)])
    engine.step()
    assert is_loading.wait(30)
    engine.check_integrity()
    assert (engine.stats().num_running, engine.stats().num_waiting) == (1, 1)
    break_once(monkeypatch, engine._runner, "forward", illegal_access())
    threading.Timer(0.05, may_write.set).start()
    engine.step()
    engine.check_integrity()
    assert_device_failed(run, (50, 51))
    assert may_write.is_set(), "the pool is not made anew while the loader writes"
    assert speak(engine, run, everybody, max_steps=200).tokens == expected
    tight.close(30.0)


def test_a_load_that_the_device_fails_is_not_the_adapters_fault(tiny, tmp_path, monkeypatch):
    base, _ = tiny
    store = make_store(base.decoder, max_pages=1, max_host_bytes=0)
    for number in (0, 1):
        store.add(f"a{number}", [(tmp_path / f"a{number}", 1.0)])
    engine, run = make_engine(base, store)
    break_once(monkeypatch, store, "_write", illegal_access())
    speak(engine, run, [greedy(1, range(3, 12), "a0", max_tokens=4), greedy(2, range(3, 12), None, max_tokens=400)])
    assert_device_failed(run, (1, 2))
    assert speak(engine, run, [greedy(3, range(3, 12), "a0", max_tokens=4)]).ended(3).reason == EndReason.LENGTH
    store.close(30.0)


def test_no_memory_is_no_fault_of_the_device(tiny, monkeypatch):
    """What waits goes on, and adapters stay; recordings, which hold memory, are dropped."""
    base, store = tiny
    engine, run = make_engine(base, store, EngineConfig(kv_tokens=2048, max_rows=1))
    engine._runner._recordings["a room"] = None
    error = torch.AcceleratorError("CUDA error: out of memory")
    pool = store.pool
    break_once(monkeypatch, engine._runner, "forward", error)
    speak(engine, run, lines(2))
    assert [run.ended(n).reason for n in (1, 2)] == [EndReason.ERROR, EndReason.LENGTH]
    assert run.ended(1).error.code == "out_of_memory"
    assert store.pool is pool
    assert not engine._runner._recordings


def start(base, store, monkeypatch, probe):
    """An engine thread whose every forward fails, what ended, and an event for its death."""
    ended, died, seen = [], threading.Event(), threading.Event()

    def on_step(step):
        ended.extend(event for event in step.events if isinstance(event, Ended))
        if step.events:
            seen.set()

    engine = Engine(
        base.decoder, base.tokenizer, store, EngineConfig(kv_tokens=2048), on_step=on_step, on_death=died.set
    )

    def fail(rows):
        raise illegal_access()

    monkeypatch.setattr(engine._runner, "forward", fail)
    monkeypatch.setattr(engine_module, "probe_device", probe)
    return engine, ended, died, seen


def test_a_device_that_does_not_answer_ends_the_thread_and_all_lines(tiny, monkeypatch):
    """A line that comes while the device is asked ends too."""
    base, store = tiny

    def probe(device):
        engine.submit([greedy(9, range(3, 12), "a1", max_tokens=6)])
        raise DeviceLost("it does not answer")

    engine, ended, died, _ = start(base, store, monkeypatch, probe)
    engine.submit(lines(2))
    engine.start()
    assert died.wait(5.0)
    assert engine.has_died
    assert [event.request_id for event in ended] == [1, 2, 9]
    assert all(event.error.retryable for event in ended)
    engine.close(5.0)


def test_a_device_that_fails_again_and_again_is_given_up(tiny, monkeypatch):
    base, store = tiny
    probes = []
    engine, ended, died, seen = start(base, store, monkeypatch, probes.append)
    engine.start()
    for number in range(MAX_RECOVERIES + 1):
        assert not died.is_set()
        seen.clear()
        engine.submit([greedy(number, range(3, 12), "a1", max_tokens=6)])
        assert seen.wait(5.0)
    assert died.wait(5.0)
    assert len(probes) == MAX_RECOVERIES
    assert [event.request_id for event in ended] == list(range(MAX_RECOVERIES + 1))
    engine.close(5.0)


def test_a_loader_that_hangs_cannot_hold_up_the_recovery(tiny, tmp_path, monkeypatch):
    base, _ = tiny
    monkeypatch.setattr(engine_module, "LOADER_TIMEOUT_S", 0.05)
    store = make_store(base.decoder, max_pages=1, max_host_bytes=0)
    for number in (0, 1):
        store.add(f"a{number}", [(tmp_path / f"a{number}", 1.0)])
    engine, run = make_engine(base, store)
    release = threading.Event()
    monkeypatch.setattr(store, "_write", lambda name, pages: release.wait(30))
    break_once(monkeypatch, engine._runner, "forward", illegal_access())
    engine.submit([greedy(1, range(3, 12), "a0", max_tokens=4), greedy(2, range(3, 12), None, max_tokens=4)])
    started = time.monotonic()
    try:
        with pytest.raises(DeviceLost, match="made anew") as caught:
            engine.step()
    finally:
        release.set()
    assert isinstance(caught.value.__cause__, TimeoutError)
    assert time.monotonic() - started < 5.0
    assert_device_failed(run, (1, 2))
    store.close(30.0)


# -- a step that does not come back --------------------------------------------------------------------------


class Hanging:
    """An engine with its thread, whose device hangs in a forward until `release` is set; and all that is told."""

    def __init__(self, base, store, monkeypatch, *, after=3):
        monkeypatch.setattr(engine_module, "TICK_S", 5 * MS)
        monkeypatch.setattr(engine_module, "MAX_STEP_TICKS", {"cpu": 20})
        self.release, self.hangs, self.died = threading.Event(), threading.Event(), threading.Event()
        self.events, self.deaths = [], []
        config = EngineConfig(kv_tokens=2048, max_rows=2)
        self.engine = Engine(base.decoder, base.tokenizer, store, config, on_step=self.take, on_death=self.die)
        self.forward, self.left = self.engine._runner.forward, after
        monkeypatch.setattr(self.engine._runner, "forward", self.hang)

    def take(self, step):
        self.events += step.events

    def die(self):
        self.deaths.append(threading.current_thread().name)
        self.died.set()

    def hang(self, rows):
        self.left -= 1
        if self.left < 0:
            self.hangs.set()
            assert self.release.wait(30)
        return self.forward(rows)

    def check(self, numbers):
        """Each ended once, with what had been said of it, and nothing was said afterwards."""
        ends = {event.request_id: event for event in self.events if isinstance(event, Ended)}
        assert [event.request_id for event in self.events if isinstance(event, Ended)] == list(numbers)
        for number, end in ends.items():
            own = [event for event in self.events if event.request_id == number]
            assert own[-1] is end
            assert end.text == "".join(event.text for event in own if isinstance(event, Spoken))
            assert (end.reason, end.error.code, end.error.retryable) == (EndReason.ERROR, "internal", True)


def test_a_step_that_never_comes_back_ends_all_lines(tiny, monkeypatch, caplog):
    """Two that speak, one that waits, one that no step has seen, one that comes afterwards."""
    case = Hanging(*tiny, monkeypatch)
    case.engine.start()
    case.engine.submit([greedy(n, range(3, 12), "a1", max_tokens=400) for n in (1, 2, 3)])
    assert case.hangs.wait(5_000 * MS)
    case.engine.submit([greedy(4, range(3, 12), None)])
    assert case.died.wait(5_000 * MS)
    assert case.engine.has_died
    assert case.deaths == ["engine watchdog"]
    case.engine.submit([greedy(5, range(3, 12), None)])
    case.check([1, 2, 3, 4, 5])
    assert len([event for event in case.events if isinstance(event, Spoken)]) == 6
    assert "in hang" in caplog.text, "the log says where"
    started = time.monotonic()
    case.engine.close(50 * MS)
    assert time.monotonic() - started < 5.0
    assert case.engine._thread.is_alive()
    case.release.set()


def test_a_step_that_comes_back_late_finds_that_all_is_over(tiny, monkeypatch, caplog):
    case = Hanging(*tiny, monkeypatch)
    case.engine.start()
    case.engine.submit([greedy(n, range(3, 12), "a1", max_tokens=400) for n in (1, 2, 3)])
    assert case.died.wait(5_000 * MS)
    case.release.set()
    case.engine._thread.join(5_000 * MS)
    assert not case.engine._thread.is_alive()
    case.check([1, 2, 3])
    assert case.deaths == ["engine watchdog"], "once"
    assert "came back" in caplog.text
    assert "the engine thread died" not in caplog.text
    case.engine.close(5.0)
    case.check([1, 2, 3])


def test_a_thread_that_comes_back_with_nothing_to_say_ends_too(tiny, monkeypatch):
    """It hangs where the loader's news are taken, and no line is there."""
    case = Hanging(*tiny, monkeypatch, after=0)
    monkeypatch.setattr(case, "forward", lambda rows: None)
    monkeypatch.setattr(case.engine, "_end_unloadable", lambda events: None if case.hangs.is_set() else case.hang([]))
    case.engine.start()
    case.engine.cancel([])
    assert case.hangs.wait(5_000 * MS)
    assert case.died.wait(5_000 * MS)
    case.release.set()
    case.engine._thread.join(5_000 * MS)
    assert not case.engine._thread.is_alive()
    assert case.events == []


@pytest.mark.parametrize("late_ms", [95, 100, 105, 110, 115])
def test_whoever_is_first_ends_a_line_once(tiny, monkeypatch, late_ms):
    """The step comes back at the very moment in which it is given up."""
    case = Hanging(*tiny, monkeypatch)
    case.engine.start()
    case.engine.submit([greedy(n, range(3, 12), "a1", max_tokens=6) for n in (1, 2)])
    assert case.hangs.wait(5_000 * MS)
    time.sleep(late_ms * MS)
    case.left = 1_000
    case.release.set()
    case.engine._thread.join(300 * MS)
    case.engine.close(5.0)
    ends = [event.request_id for event in case.events if isinstance(event, Ended)]
    assert sorted(ends) == [1, 2]
    over = set()
    for event in case.events:
        assert event.request_id not in over
        over |= {event.request_id} if isinstance(event, Ended) else set()
    assert len(case.deaths) == case.engine.has_died


def test_a_slow_step_and_a_long_sleep_are_no_hang(tiny, monkeypatch):
    """Half of the patience, again and again; a pause; nothing to do."""
    case = Hanging(*tiny, monkeypatch, after=10**6)
    forward = case.forward
    monkeypatch.setattr(case, "forward", lambda rows: (time.sleep(30 * MS), forward(rows))[1])
    case.engine.start()
    case.engine.submit([greedy(1, range(3, 12), None, max_tokens=8)])
    assert not case.died.wait(400 * MS)
    case.engine.configure(max_tokens_per_s=None, paused=True)
    case.engine.submit([greedy(2, range(3, 12), None, max_tokens=8)])
    assert not case.died.wait(300 * MS)
    case.engine.close(5.0)
    assert not case.engine.has_died


def test_closing_does_not_wait_for_a_step_that_hangs(tiny, monkeypatch):
    """Before the watchdog noticed: every line is cancelled, once, and the thread is left behind."""
    case = Hanging(*tiny, monkeypatch)
    case.engine._watchdog.stop()
    case.engine.start()
    case.engine.submit([greedy(n, range(3, 12), "a1", max_tokens=400) for n in (1, 2, 3)])
    assert case.hangs.wait(5_000 * MS)
    case.engine.close(50 * MS)
    ends = [(event.request_id, event.reason) for event in case.events if isinstance(event, Ended)]
    assert ends == [(n, EndReason.CANCELLED) for n in (1, 2, 3)]
    case.release.set()
    case.engine._thread.join(5_000 * MS)
    assert [event.request_id for event in case.events if isinstance(event, Ended)] == [1, 2, 3]
    assert not case.deaths


def test_a_copy_that_never_comes_back_ends_all_lines_too(tiny, tmp_path, monkeypatch):
    """No step hangs: there is none, the only line waits for its adapter."""
    base, _ = tiny
    store = make_store(base.decoder, max_pages=1, max_host_bytes=0)
    store.add("a0", [(tmp_path / "a0", 1.0)])
    case = Hanging(base, store, monkeypatch)
    cuda = FakeCuda(monkeypatch)
    monkeypatch.setattr(FakeStream, "synchronize", lambda stream: case.release.wait(30))
    store._device = torch.device("cuda:0")
    case.engine.start()
    case.engine.submit([greedy(1, range(3, 12), "a0")])
    assert case.died.wait(5_000 * MS)
    case.check([1])
    assert (case.deaths, cuda.calls) == (["engine watchdog"], ["recorded", "waits for the steps so far"])
    case.engine.close(50 * MS)
    case.release.set()
    store.close(5.0)
