"""The engine's loop: whatever fails in a step, every line ends exactly once and the next lines are spoken."""

import threading
from dataclasses import replace

import pytest
import torch
from driving import NUM_ADAPTERS, FakeTokenizer, greedy, hold, make_engine, make_store, speak

from npc_runtime.engine.core import Ended, EndReason, EngineConfig
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
