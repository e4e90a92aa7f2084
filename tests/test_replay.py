"""A recording in place of an engine."""

import asyncio
import math
import time

import pytest
from conftest import MS
from test_recording import END, INFO

from npc_runtime.engine.core import Ended, EndReason, Request, SamplingParams, Spoken, Started
from npc_runtime.recording import Piece, Recording, Take
from npc_runtime.replay import ReplayEngine, replay_voice


def make_take(said="Hi", **fields):
    pieces = [Piece(0.06, "Aye, "), Piece(0.09, "lad.")]
    return Take("odo", said, 0.0, **{"started_at": 0.03, "pieces": pieces, "end": END, "ended_at": 0.12, **fields})


def request(number, said="Hi", arrival=None, **fields):
    arrival = time.monotonic() if arrival is None else arrival
    sampling = SamplingParams(seed=1, max_tokens=9)
    return Request(number, (1,), sampling, arrival, group="g", asked=("odo", said), **fields)


class Stage:
    """What came out, and when."""

    def __init__(self, *takes, speed=1.0):
        self.engine = ReplayEngine(Recording(INFO, list(takes)), on_step=self.on_step, speed=speed)
        self.events, self.times = [], []
        self.loop = asyncio.get_running_loop()
        self.began_at = self.loop.time()
        self.engine.start()

    def on_step(self, step):
        self.events += step.events
        self.times += [self.loop.time() - self.began_at] * len(step.events)

    async def until_end(self, count=1):
        async with asyncio.timeout(5_000 * MS):
            while sum(isinstance(event, Ended) for event in self.events) < count:
                await asyncio.sleep(5 * MS)
        return self.events


async def test_a_line_is_spoken_at_its_times():
    stage = Stage(make_take())
    stage.engine.submit([request(5)])
    events = await stage.until_end()
    assert [type(event) for event in events] == [Started, Spoken, Spoken, Ended]
    assert {event.request_id for event in events} == {5}
    assert [event.text for event in events[1:]] == ["Aye, ", "lad.", "Aye, lad."]
    for planned, at in zip((0.03, 0.06, 0.09, 0.12), stage.times, strict=True):
        assert planned <= at + 0.002
        assert at < planned + 0.5
    assert (events[-1].reason, events[-1].num_completion) == ("stop", 4)


async def test_a_line_that_had_to_wait_for_its_turn_keeps_its_times():
    """They count from when it was sent; what it waited for may have taken longer this time."""
    in_time, late = make_take(said="A"), make_take(said="B")
    stage = Stage(in_time, late)
    await asyncio.sleep(20 * MS)
    stage.engine.submit([request(1, "A", arrival=stage.began_at)])
    stage.engine.submit([request(2, "B", arrival=stage.began_at - 5)])
    await stage.until_end(2)
    times = {1: [], 2: []}
    for event, at in zip(stage.events, stage.times, strict=True):
        times[event.request_id].append(at)
    assert times[1][0] == pytest.approx(0.03, abs=0.015)
    assert times[2][0] == pytest.approx(0.02, abs=0.015)
    for number in (1, 2):
        assert times[number][-1] - times[number][0] == pytest.approx(0.09, abs=0.03)


async def test_at_once_and_the_second_answer():
    stage = Stage(make_take(), make_take(end=END.model_copy(update={"text": "No."}), pieces=[]), speed=math.inf)
    for number in range(3):
        stage.engine.submit([request(number)])
    events = await stage.until_end(3)
    ends = {event.request_id: event.text for event in events if isinstance(event, Ended)}
    assert ends == {0: "Aye, lad.", 1: "No.", 2: "No."}
    assert stage.times[-1] < 0.1


async def test_what_was_not_recorded_is_an_error_that_names_it():
    stage = Stage(make_take())
    stage.engine.submit([request(1, "Who are you?")])
    [event] = await stage.until_end()
    assert (event.reason, event.error.code) == ("error", "invalid")
    assert "odo" in event.error.message
    assert "Who are you?" in event.error.message


async def test_an_error_is_played_as_one():
    error = {"code": "overload", "message": "Too many.", "hint": "Wait."}
    end = END.model_copy(update={"reason": "overload", "text": "Not now.", "fallback": True}).model_copy(
        update={"error": type(END).model_validate({**END.model_dump(), "error": error}).error}
    )
    stage = Stage(make_take(end=end, pieces=[], started_at=None), speed=math.inf)
    stage.engine.submit([request(1)])
    [event] = await stage.until_end()
    assert (event.reason, event.text) == ("overload", "")
    assert (event.error.code, event.error.retryable, event.error.hint) == ("overload", True, "Wait.")


async def test_a_line_can_be_cancelled_and_ends_once():
    stage = Stage(make_take())
    stage.engine.submit([request(1), request(2)])
    await asyncio.sleep(75 * MS)
    stage.engine.cancel([1, 99])
    stage.engine.cancel([1])
    events = await stage.until_end(2)
    ends = [event for event in events if isinstance(event, Ended)]
    assert [(event.request_id, event.reason, event.text) for event in ends] == [
        (1, "cancelled", "Aye, "),
        (2, "stop", "Aye, lad."),
    ]
    assert stage.engine.stats().num_running == 0


async def test_paused_it_waits_and_deadlines_pass():
    stage = Stage(make_take())
    stage.engine.configure(max_tokens_per_s=None, paused=True)
    stage.engine.submit([request(1), request(2, deadline=stage.loop.time() + 0.1)])
    assert stage.engine.stats().paused
    await asyncio.sleep(300 * MS)
    assert [(event.request_id, event.reason) for event in stage.events] == [(2, "deadline")]
    stage.engine.configure(max_tokens_per_s=9.0, paused=False)
    stage.engine.configure(max_tokens_per_s=9.0, paused=False)
    assert (stage.engine.stats().paused, stage.engine.stats().max_tokens_per_s) == (False, 9.0)
    events = await stage.until_end(2)
    assert [type(event) for event in events[1:]] == [Started, Spoken, Spoken, Ended]
    for planned, at in zip((0.33, 0.36, 0.39, 0.42), stage.times[1:], strict=True):
        assert planned - 0.01 <= at < planned + 0.5


async def test_a_pause_in_the_middle_moves_what_is_left():
    stage = Stage(make_take())
    stage.engine.submit([request(1)])
    await asyncio.sleep(45 * MS)
    stage.engine.configure(max_tokens_per_s=None, paused=True)
    await asyncio.sleep(100 * MS)
    stage.engine.configure(max_tokens_per_s=None, paused=False)
    await stage.until_end()
    started, first, _, ended = stage.times
    assert started < 0.06
    assert 0.09 < first - started < 0.5
    assert 0.045 < ended - first < 0.5


async def test_a_deadline_that_comes_before_the_next_text_is_kept():
    stage = Stage(make_take(pieces=[], ended_at=30.0))
    stage.engine.submit([request(1, deadline=stage.loop.time() + 0.1)])
    events = await stage.until_end()
    assert [type(event) for event in events] == [Started, Ended]
    assert events[-1].reason == "deadline"
    assert stage.times[-1] < 0.6


async def test_a_recorded_cancel_is_played_and_may_come_earlier():
    takes = [make_take(said=said, end=END.model_copy(update={"reason": "cancelled"})) for said in "AB"]
    stage = Stage(*takes)
    stage.engine.submit([request(1, "A"), request(2, "B")])
    await asyncio.sleep(75 * MS)
    stage.engine.cancel([2])
    events = await stage.until_end(2)
    ends = {event.request_id: (event.reason, event.text) for event in events if isinstance(event, Ended)}
    assert ends == {1: ("cancelled", "Aye, lad."), 2: ("cancelled", "Aye, ")}


def test_a_prompt_is_its_digest():
    """Of any length, within any context, and another one for every other prompt."""
    voice = replay_voice(Recording(INFO, []), on_step=print, speed=1.0)
    assert (voice.info.base, voice.info.device) == (INFO.base, "cpu")
    assert voice.info.backend == "replay of torch"
    prompts = [[{"role": "user", "content": text}] for text in ("a", "b", "a" * 100_000)]
    rendered = [voice.render(messages) for messages in prompts]
    assert len({*rendered, voice.render(prompts[0])}) == 3
    assert {len(ids) for ids in rendered} == {8}


async def test_a_warmup_is_over_at_once():
    stage = Stage()
    stage.engine.submit([request(1, is_warmup=True)])
    [event] = await stage.until_end()
    assert event.reason == EndReason.STOP


@pytest.mark.parametrize("num_lines", [0, 2])
async def test_closing_ends_what_is_left(num_lines):
    stage = Stage(make_take())
    stage.engine.submit([request(number) for number in range(num_lines)])
    await asyncio.to_thread(stage.engine.close, 1.0)
    assert [event.reason for event in stage.events] == ["cancelled"] * num_lines
