"""An engine whose device fails: every line ends once, and what is spoken afterwards is what it would have been."""

import threading
import time

import pytest
import torch
from driving import NUM_ADAPTERS, greedy, make_engine, make_store, speak
from test_engine import break_once, lines

import npc_runtime.engine.engine as engine_module
from npc_runtime.engine.core import Ended, EndReason, EngineConfig
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
