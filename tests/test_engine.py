"""The engine's loop: whatever fails in a step, every line ends exactly once and the next lines are spoken."""

import queue
import statistics
import threading
import time
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from conftest import MS
from driving import NUM_ADAPTERS, FakeTokenizer, greedy, hold, make_engine, make_store, speak

from npc_runtime.engine.core import AdapterEvicted, AdapterLoaded, Ended, EndReason, EngineConfig, Spoken
from npc_runtime.engine.engine import Engine


def end_of(run, request_id):
    return run.ended(request_id)


def break_once(monkeypatch, target, name, error, after=0):
    """Let `target.name` raise once, on its call number `after`."""
    calls, right = [], getattr(target, name)

    def broken(*arguments, **options):
        calls.append(name)
        if len(calls) == after + 1:
            raise error
        return right(*arguments, **options)

    monkeypatch.setattr(target, name, broken)


def lines(count, **options):
    return [greedy(n + 1, range(3, 12 + n), f"a{n}", max_tokens=6, **options) for n in range(count)]


@pytest.mark.parametrize(
    ("error", "code"),
    [(RuntimeError("defect"), "internal"), (torch.OutOfMemoryError("full"), "out_of_memory")],
)
@pytest.mark.parametrize("after", [0, 3])
def test_a_failed_forward_ends_the_running_lines_and_no_more(tiny, monkeypatch, error, code, after):
    base, store = tiny
    engine, run = make_engine(base, store)
    break_once(monkeypatch, engine._runner, "forward", error, after)
    speak(engine, run, lines(3))
    assert [end_of(run, n).reason for n in (1, 2, 3)] == [EndReason.ERROR] * 3
    assert {end_of(run, n).error.code for n in (1, 2, 3)} == {code}
    again = [greedy(9, range(3, 12), "a0", max_tokens=6)]
    assert speak(engine, run, again).ended(9).reason == EndReason.LENGTH


def test_a_failed_admission_ends_what_waits(tiny, monkeypatch):
    """No memory for the adapter pages: nothing runs yet, so the queue itself is the trouble."""
    base, store = tiny
    engine, run = make_engine(base, store)
    break_once(monkeypatch, store, "admit", torch.OutOfMemoryError("full"))
    speak(engine, run, lines(2))
    assert {end_of(run, n).error.code for n in (1, 2)} == {"out_of_memory"}
    assert speak(engine, run, [greedy(9, range(3, 12), "a0", max_tokens=6)]).ended(9).reason == EndReason.LENGTH


class FailingTokenizer(FakeTokenizer):
    def decode(self, ids):
        if len(ids) == 2:
            raise RuntimeError("a defect in one line's text")
        return super().decode(ids)


def test_one_lines_text_fails_alone(tiny, monkeypatch):
    """A neighbour that ends in the very step still gets its end."""
    base, store = tiny
    base.tokenizer = FailingTokenizer()
    engine, run = make_engine(base, store)
    short = greedy(1, range(3, 12), "a0", max_tokens=1)
    speak(engine, run, [short, greedy(2, range(3, 13), "a1", max_tokens=6)])
    assert end_of(run, 1).reason == EndReason.LENGTH
    assert end_of(run, 2).error.code == "internal"


def test_numbers_that_overflow_end_their_line_and_spare_the_neighbours(tiny):
    """A diverged adapter in the batch, and afterwards its KV blocks in other hands."""
    base, store = tiny
    engine, run = make_engine(base, store, EngineConfig(kv_tokens=64))
    healthy = greedy(1, range(3, 12), "a1", max_tokens=6)
    alone = list(speak(engine, run, [healthy]).tokens[1])
    holder = hold(store, "a0")
    store.pool[store.pages_of("a0")] *= 1e36
    store.leave(holder)
    engine, run = make_engine(base, store, EngineConfig(kv_tokens=64))
    speak(engine, run, [greedy(2, range(3, 12), "a1", max_tokens=6), greedy(3, range(3, 12), "a0", max_tokens=6)])
    assert end_of(run, 3).error.message == "The numbers of the adapter of a0 overflowed."
    assert run.tokens[2] == alone
    for number in range(4, 8):
        speak(engine, run, [greedy(number, range(3, 12), "a1", max_tokens=6)])
        assert run.tokens[number] == alone


def test_a_full_queue_ends_a_line_as_overload(tiny):
    base, store = tiny
    engine, run = make_engine(base, store, EngineConfig(kv_tokens=2048, max_rows=1, max_waiting=1))
    speak(engine, run, lines(2))
    assert end_of(run, 2).reason == EndReason.OVERLOAD
    assert end_of(run, 2).error.retryable


class EagerQueue(queue.SimpleQueue):
    """The engine takes a command before whoever gave it does anything else."""

    def __init__(self, engine):
        self.engine = engine

    def put(self, command):
        super().put(command)
        self.engine.step()


def test_a_line_that_ends_while_it_is_submitted(tiny):
    base, store = tiny
    engine, run = make_engine(base, store, EngineConfig(kv_tokens=64))
    engine._commands = EagerQueue(engine)
    engine.submit([greedy(1, range(3, 60), None, max_tokens=60)])
    assert run.ended(1).error.code == "context_overflow"
    engine.check_integrity()


def test_cancel_is_known_before_the_next_step(tiny):
    base, store = tiny
    engine, run = make_engine(base, store)
    engine.submit(lines(2))
    engine.step()
    engine.cancel([1, 77])
    engine.step()
    assert end_of(run, 1).reason == EndReason.CANCELLED
    assert end_of(run, 1).num_completion == 1
    engine.check_integrity()
    assert engine.stats().num_running == 1


def test_the_thread_reports_its_own_death(tiny, monkeypatch):
    base, store = tiny
    died = threading.Event()

    def on_step(step):
        raise RuntimeError("nobody can be told")

    engine = Engine(base.decoder, base.tokenizer, store, EngineConfig(), on_step=on_step, on_death=died.set)
    engine.start()
    engine.submit(lines(1))
    assert died.wait(5.0)
    assert engine.has_died


def test_closing_ends_every_line(tiny):
    base, store = tiny
    ended, is_running = [], threading.Event()

    def on_step(step):
        is_running.set()
        ended.extend(event for event in step.events if isinstance(event, Ended))

    engine = Engine(base.decoder, base.tokenizer, store, EngineConfig(kv_tokens=4096), on_step=on_step)
    engine.start()
    engine.submit([greedy(n, range(3, 12), None, max_tokens=500) for n in range(1, 4)])
    assert is_running.wait(5.0)
    engine.close(5.0)
    assert sorted(event.request_id for event in ended) == [1, 2, 3]
    assert {event.reason for event in ended} == {EndReason.CANCELLED}


def test_a_second_turn_finds_the_first_ones_prefix(tiny):
    """Same persona, same beginning: cached, and the same words; another adapter: not cached."""
    base, store = tiny
    engine, run = make_engine(base, store)
    prompt = tuple(range(3, 43))
    first = list(speak(engine, run, [greedy(1, prompt, "a1", max_tokens=8)]).tokens[1])
    speak(engine, run, [greedy(2, prompt, "a1", max_tokens=8), greedy(3, prompt, "a2", max_tokens=8)])
    assert [end_of(run, n).num_cached for n in (1, 2, 3)] == [0, 32, 0]
    assert run.tokens[2] == first
    fresh, fresh_run = make_engine(base, store)
    assert speak(fresh, fresh_run, [greedy(3, prompt, "a2", max_tokens=8)]).tokens[3] == run.tokens[3]


def test_preempted_lines_say_the_same(tiny):
    """Six lines in a cache for three: they are recomputed, and nobody can tell."""
    base, store = tiny
    requests = [greedy(n + 1, range(3 + n, 23 + n), f"a{n}", max_tokens=30) for n in range(6)]
    engine, run = make_engine(base, store)
    roomy = {n: list(tokens) for n, tokens in speak(engine, run, requests).tokens.items()}
    engine, run = make_engine(base, store, EngineConfig(kv_tokens=160, block_size=4))
    assert speak(engine, run, requests).tokens == roomy
    assert engine.stats().num_preempted > 0


# -- warmups -------------------------------------------------------------------------------------------------


def warmup(number, prompt, adapter):
    return replace(greedy(number, prompt, adapter, max_tokens=1, group=None), is_warmup=True)


def test_a_warmup_speaks_nothing_and_the_first_line_finds_its_prompt(tiny):
    base, store = tiny
    prompt = tuple(range(3, 45))
    fresh, run = make_engine(base, store)
    expected = list(speak(fresh, run, [greedy(1, prompt, "a1", max_tokens=8)]).tokens[1])

    engine, run = make_engine(base, store)
    speak(engine, run, [warmup(1, prompt[:40], "a1")])
    end = run.ended(1)
    assert (end.reason, end.text, end.num_completion) == (EndReason.STOP, "", 0)
    assert (end.num_prompt, end.num_cached) == (40, 32)
    assert run.forwards == {}, "it is no part of any batch"
    assert (engine.stats().num_tokens, engine.stats().tokens_per_s, engine.stats().num_forwards) == (0, 0.0, 1)
    speak(engine, run, [greedy(2, prompt, "a1", max_tokens=8), greedy(3, prompt, "a2", max_tokens=8)])
    assert [run.ended(number).num_cached for number in (2, 3)] == [32, 0]
    assert run.tokens[2] == expected
    assert run.tokens[3] != expected


def test_personas_with_one_text_and_other_adapters_never_share(tiny):
    """Warmed with the same words: each says what it says alone, computed by an engine that knows nothing."""
    base, store = tiny
    prompt = tuple(range(3, 45))
    names = [None, *(f"a{number}" for number in range(NUM_ADAPTERS))]
    engine, run = make_engine(base, store)
    speak(engine, run, [warmup(number, prompt[:32], name) for number, name in enumerate(names)])
    speak(engine, run, [greedy(100 + n, prompt, name, max_tokens=8) for n, name in enumerate(names)])
    warm = {number: list(run.tokens[100 + number]) for number in range(len(names))}
    assert {run.ended(100 + number).num_cached for number in range(len(names))} == {32}
    for number, name in enumerate(names):
        engine, alone = make_engine(base, store)
        assert speak(engine, alone, [greedy(1, prompt, name, max_tokens=8)]).tokens[1] == warm[number]
    assert len({tuple(tokens) for tokens in warm.values()}) == len(names)


def test_a_warmup_changes_nothing_for_the_line_beside_it(tiny):
    base, store = tiny
    engine, run = make_engine(base, store)
    alone = list(speak(engine, run, lines(1)).tokens[1])
    engine, run = make_engine(base, store)
    speak(engine, run, [*lines(1), warmup(50, range(3, 80), "a3"), warmup(51, range(3, 20), None)])
    assert run.tokens[1] == alone
    assert run.forwards == {"batch": 6}
    assert engine.stats().num_tokens == 6
    assert run.ended(50).reason == run.ended(51).reason == EndReason.STOP


def test_a_warmup_loads_and_pins_its_adapter(tiny, tmp_path):
    """Pages for two adapters: the warm one stays while the others take turns beside it."""
    base, _ = tiny
    store = make_store(base.decoder, max_pages=2, max_host_bytes=0)
    for number in (0, 1, 4, 5):
        store.add(f"a{number}", [(tmp_path / f"a{number}", 1.0)])
    engine, run = make_engine(base, store)
    speak(engine, run, [warmup(1, range(3, 30), "a4")])
    assert store.resident == ("a4",)
    for number, name in enumerate(("a0", "a1", "a5", "a0"), 2):
        speak(engine, run, [greedy(number, range(3, 12), name, max_tokens=2)])
        assert store.resident == tuple(sorted(("a4", name)))
    store.close(5.0)


def test_a_cancelled_warmup_leaves_nothing(tiny):
    base, store = tiny
    engine, run = make_engine(base, store, EngineConfig(kv_tokens=2048, max_step_tokens=16))
    engine.submit([warmup(1, range(3, 60), "a1")])
    engine.step()
    engine.cancel([1])
    engine.step()
    engine.check_integrity()
    assert run.ended(1).reason == EndReason.CANCELLED
    assert engine.stats().kv_blocks_used == 0


# -- pace and pause ------------------------------------------------------------------------------------------


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def slow_down(engine, limit=None, *, paused=False):
    engine.configure(max_tokens_per_s=limit, paused=paused)


def test_a_pause_stops_every_step_and_loses_nothing(tiny):
    """In the midst of a prompt and of replies; lines that come meanwhile queue up, and all say what they would have."""
    base, store = tiny
    config = EngineConfig(kv_tokens=4096, max_step_tokens=32)
    everybody = [*lines(3), greedy(10, range(3, 90), "a5", max_tokens=6)]
    late = greedy(11, range(3, 20), None, max_tokens=6)
    engine, run = make_engine(base, store, config)
    expected = {n: list(tokens) for n, tokens in speak(engine, run, [*everybody, late]).tokens.items()}

    engine, run = make_engine(base, store, config)
    engine.submit(everybody)
    engine.step()
    engine.step()
    held, forwards = engine.stats().kv_blocks_used, engine.stats().num_forwards
    slow_down(engine, paused=True)
    engine.submit([late])
    for _ in range(5):
        engine.step()
        engine.check_integrity()
    stats = engine.stats()
    assert (stats.paused, stats.num_running, stats.num_waiting) == (True, 4, 1)
    assert (stats.kv_blocks_used, stats.num_forwards) == (held, forwards)
    assert not any(run.ended(n) for n in expected)
    slow_down(engine)
    while engine._scheduler.has_work:
        engine.step()
    decode = base.tokenizer.decode
    assert {n: run.ended(n).text for n in expected} == {n: decode(tokens) for n, tokens in expected.items()}
    assert not engine.stats().paused


def test_cancels_and_deadlines_are_kept_in_a_pause(tiny):
    base, store = tiny
    clock = Clock()
    engine, run = make_engine(base, store, EngineConfig(kv_tokens=4096, max_rows=2), clock=clock)
    slow_down(engine, paused=True)
    engine.submit([greedy(n, range(3, 12), None, deadline=deadline) for n, deadline in ((1, None), (2, 5.0), (3, 9.0))])
    engine.step()
    engine.cancel([1])
    engine.step()
    assert run.ended(1).reason == EndReason.CANCELLED
    clock.now = 6.0
    engine.step()
    assert run.ended(2).reason == EndReason.DEADLINE
    assert run.ended(3) is None
    engine.check_integrity()


def test_a_paused_thread_answers_at_once(tiny):
    """A cancel, a deadline, a change of mind: none waits for anything but the thread's waking up."""
    base, store = tiny
    ends, changed = {}, threading.Condition()

    def on_step(step):
        with changed:
            ends.update((e.request_id, (e.reason, time.monotonic())) for e in step.events if isinstance(e, Ended))
            changed.notify()

    def wait_for(number):
        with changed:
            assert changed.wait_for(lambda: number in ends, 5_000 * MS)
        return ends[number]

    engine = Engine(base.decoder, base.tokenizer, store, EngineConfig(kv_tokens=4096), on_step=on_step)
    slow_down(engine, paused=True)
    engine.start()
    deadline = time.monotonic() + 0.15
    endless = [greedy(n, range(3, 12), None, max_tokens=500) for n in (1, 2, 3)]
    engine.submit([endless[0], replace(endless[1], deadline=deadline), greedy(3, range(3, 12), "a1", max_tokens=3)])
    asked = time.monotonic()
    engine.cancel([1])
    reason, at = wait_for(1)
    assert reason == EndReason.CANCELLED
    assert at - asked < 100 * MS
    reason, at = wait_for(2)
    assert reason == EndReason.DEADLINE
    assert 0.0 <= at - deadline < 100 * MS
    slow_down(engine, 0.001)
    engine.submit([replace(endless[0], id=4)])
    slow_down(engine)
    assert wait_for(3)[0] == EndReason.LENGTH, "a debt of hours is lifted with the bound"
    engine.cancel([4])
    wait_for(4)
    engine.close(5.0)


@pytest.mark.parametrize("limit", [3.0, 40.0])
def test_a_bound_changes_when_lines_speak_and_not_what_they_say(tiny, limit):
    """By a clock that goes a hundredth of a second at a time. Prompts come in smaller pieces."""
    base, store = tiny
    everybody = [*lines(3), greedy(10, range(3, 90), "a5", max_tokens=6)]
    engine, run = make_engine(base, store)
    expected = {n: list(tokens) for n, tokens in speak(engine, run, everybody).tokens.items()}

    clock = Clock()
    engine, run = make_engine(base, store, clock=clock)
    slow_down(engine, limit)
    engine.submit(everybody)
    sequences, counts = {}, []
    while not all(run.ended(line.id) for line in everybody):
        engine.step()
        engine.check_integrity()
        sequences |= {s.request.id: s for s in engine._scheduler.running}
        counts.append(engine.stats().num_tokens)
        clock.now += 0.01
        assert clock.now < 100.0
    assert {n: s.output_ids for n, s in sequences.items()} == expected
    assert max(after - before for before, after in pairwise(counts)) <= 4
    for first in range(0, len(counts), 25):
        for last in range(first, len(counts), 25):
            assert counts[last] - counts[first] <= limit * (last - first) / 100 + 4 + 1e-6
    assert clock.now > sum(map(len, expected.values())) / limit
    assert engine.stats().max_tokens_per_s == limit
    assert 0.3 * limit < engine.stats().tokens_per_s <= limit


def test_warmups_keep_to_the_bound(tiny):
    base, store = tiny
    clock = Clock()
    engine, run = make_engine(base, store, clock=clock)
    slow_down(engine, 4.0)
    engine.submit([warmup(1, range(3, 83), "a1")])
    while run.ended(1) is None:
        engine.step()
        clock.now += 0.01
    assert clock.now > 80 / 8 / 4.0 - 0.3, "eight tokens of a prompt are one"
    slow_down(engine, paused=True)
    engine.submit([warmup(2, range(3, 83), "a2")])
    for _ in range(10):
        engine.step()
    assert run.ended(2) is None


def test_the_thread_sleeps_between_paced_steps(tiny):
    """Half a second at 100 tokens a second: as many tokens, one by one."""
    base, store = tiny
    times = []

    def on_step(step):
        times.extend(time.monotonic() for event in step.events if isinstance(event, Spoken))

    engine = Engine(base.decoder, base.tokenizer, store, EngineConfig(kv_tokens=4096), on_step=on_step)
    looks, look = [], engine._plan
    engine._plan = lambda: (looks.append(1), look())[1]
    slow_down(engine, 100.0)
    engine.start()
    started = time.monotonic()
    engine.submit([greedy(1, range(3, 5), None, max_tokens=500)])
    time.sleep(0.5)
    engine.close(5.0)
    so_far = [at for at in times if at - started <= 0.5]
    assert 20 <= len(so_far) <= 52 + 1
    assert len(looks) <= 3 * len(so_far)
    assert 0.005 < statistics.median(after - before for before, after in pairwise(times)) < 0.02


# -- news and figures ----------------------------------------------------------------------------------------


def make_tight_store(base, folder, names, **sizes):
    store = make_store(base.decoder, **sizes)
    for name in names:
        store.add(name, [(folder / name, 1.0)])
    return store


def test_adapters_that_come_and_go_are_news(tiny, tmp_path):
    """Two pages; not those that are there from the start, and nothing while lines speak."""
    base, _ = tiny
    store = make_tight_store(base, tmp_path, ("a0", "a1", "a4"), max_pages=2)
    engine, run = make_engine(base, store)
    speak(engine, run, [greedy(1, range(3, 12), "a0", max_tokens=6)])
    assert run.news == []
    speak(engine, run, [greedy(2, range(3, 12), "a4", max_tokens=6), greedy(3, range(3, 12), "a0", max_tokens=6)])
    assert run.news == [AdapterEvicted("a1"), AdapterLoaded("a4")]
    speak(engine, run, [greedy(4, range(3, 12), "a4", max_tokens=6)])
    assert len(run.news) == 2
    store.close(5.0)


def test_a_version_that_takes_anothers_place_is_no_news(tiny, tmp_path):
    base, _ = tiny
    store = make_tight_store(base, tmp_path, ("a0", "a1"), max_pages=3, spare_pages=1)
    engine, run = make_engine(base, store)
    answers = []
    engine.submit([greedy(1, range(3, 12), "a0", max_tokens=300)])
    engine.step()
    engine.replace_adapter("a0", [(tmp_path / "a4", 1.0)], answers.append)
    while len(store._made.pages.resident) < 3:
        engine.step()
    assert store._made.pages.resident == ("a0", "a0#2", "a1")
    engine.cancel([1])
    engine.step()
    engine.step()
    assert (answers, store._made.pages.resident) == ([None], ("a0#2", "a1"))
    assert run.news == []
    store.close(5.0)


def test_what_memory_goes_to(tiny):
    base, store = tiny
    engine, run = make_engine(base, store, EngineConfig(kv_tokens=1024))
    memory = engine.stats().memory
    shape = base.decoder.shape
    assert memory.kv_cache == 1024 * 2 * shape.num_layers * shape.kv_size * 4
    assert memory.adapter_pool == store.pool.nbytes > 0
    assert memory.adapter_copies == store.host.num_bytes > 0
    assert memory.gpu is None
    assert speak(engine, run, lines(2)).ended(1).error is None
