"""A client's batch: events in order, none lost, whoever reads and whenever it stops."""

import asyncio

import pytest
from conftest import MS

from npc_runtime import protocol as wire
from npc_runtime.batch import Batch
from npc_runtime.errors import DisconnectedError

END = wire.BatchEnd(batch=1, ok=1, failed=0, wall_ms=1.0, forwards=1)


def item(number):
    return wire.DeltaItem(line=1, seq=number, text="x")


async def send(message):
    raise AssertionError


async def test_events_come_in_order_until_the_end():
    batch = Batch(1, send)
    for number in range(3):
        await batch.put(item(number))
    await batch.put(END)
    assert [event async for event in batch] == [item(0), item(1), item(2), END]
    assert [event async for event in batch] == []


async def test_a_reader_that_is_cancelled_as_an_event_comes_loses_none():
    batch = Batch(1, send)
    reader = asyncio.ensure_future(anext(aiter(batch)))
    await asyncio.sleep(0)
    await batch.put(item(0))
    reader.cancel()
    await asyncio.gather(reader, return_exceptions=True)
    await batch.put(END)
    assert [event async for event in batch] == [item(0), END]


async def test_a_full_batch_waits_for_its_reader(monkeypatch):
    monkeypatch.setattr("npc_runtime.batch.MAX_BATCH_EVENTS", 2)
    batch = Batch(1, send)
    writer = asyncio.ensure_future(asyncio.wait_for(put_all(batch, 5), 2_000 * MS))
    await asyncio.sleep(10 * MS)
    assert not writer.done()
    assert [event async for event in batch] == [*map(item, range(5)), END]
    await writer


async def put_all(batch, count):
    for number in range(count):
        await batch.put(item(number))
    await batch.put(END)


async def test_what_came_before_a_failure_is_read_first():
    batch = Batch(1, send)
    await batch.put(item(0))
    batch.fail(DisconnectedError("Gone."))
    batch.fail(DisconnectedError("Later."))
    events = aiter(batch)
    assert await anext(events) == item(0)
    with pytest.raises(DisconnectedError, match="Gone"):
        await anext(events)
