"""A recording in place of an engine."""

import asyncio
import math

import pytest
from conftest import MS
from test_recording import END, INFO

from npc_runtime.engine.core import Ended, EndReason, Request, SamplingParams, Spoken, Started
from npc_runtime.recording import Piece, Recording, Take
from npc_runtime.replay import ReplayEngine


def make_take(said="Hi", **fields):
    pieces = [Piece(0.06, "Aye, "), Piece(0.09, "lad.")]
    return Take("odo", said, 0.0, **{"started_at": 0.03, "pieces": pieces, "end": END, "ended_at": 0.12, **fields})


def request(number, said="Hi", **fields):
    return Request(number, (1,), SamplingParams(seed=1, max_tokens=9), 0.0, group="g", asked=("odo", said), **fields)


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
    await asyncio.sleep(300 * MS)
    assert [(event.request_id, event.reason) for event in stage.events] == [(2, "deadline")]
    stage.engine.configure(max_tokens_per_s=None, paused=False)
    events = await stage.until_end(2)
    assert [type(event) for event in events[1:]] == [Started, Spoken, Spoken, Ended]
    assert stage.times[-1] > 0.3


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
