"""Order, budgets and bounds of the scheduler, and that no block is ever lost (blocks.py included)."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npc_runtime.engine.blocks import BlockAllocator
from npc_runtime.engine.core import EngineConfig, Request, SamplingParams, Sequence
from npc_runtime.engine.scheduler import Scheduler
from npc_runtime.errors import ContextOverflow, OverloadError


def make_scheduler(**sizes):
    return Scheduler(EngineConfig(**{"block_size": 4, "kv_tokens": 64, "max_rows": 4, "max_step_tokens": 16, **sizes}))


def make_request(request_id, prompt=4, reply=3, **fields):
    sampling = SamplingParams(seed=0, max_tokens=reply)
    return Request(id=request_id, prompt_ids=(1,) * prompt, sampling=sampling, arrival=0.0, **fields)


def step(scheduler, admit=lambda sequence: True):
    """Run one step as the engine does; returns its rows as (id, start, stop)."""
    rows = scheduler.plan(admit)
    done = [(row.sequence.request.id, row.start, row.stop) for row in rows]
    for row in rows:
        samples = row.samples
        row.sequence.num_computed = row.stop
        if samples:
            row.sequence.output_ids.append(7)
    is_over = [s.request.id for s in scheduler.running if len(s.output_ids) == s.request.sampling.max_tokens]
    scheduler.remove(is_over)
    scheduler.check_integrity()
    return done


def ids_of(sequences):
    return [sequence.request.id for sequence in sequences]


# -- blocks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prompt", "reply", "expected"), [(1, 1, 1), (4, 1, 1), (4, 2, 2), (5, 3, 2), (9, 8, 4)])
def test_blocks_for_all_but_the_last_sampled_token(prompt, reply, expected):
    assert BlockAllocator(8, 4).num_needed(Sequence(make_request(1, prompt, reply))) == expected


def test_blocks_are_owned_by_one_sequence_and_come_back():
    blocks = BlockAllocator(4, 4)
    first, second, third = (Sequence(make_request(number, 8, 1)) for number in range(3))
    blocks.allocate(first)
    blocks.allocate(second)
    assert sorted(first.blocks + second.blocks) == [0, 1, 2, 3]
    assert not blocks.can_allocate(third)
    blocks.free(first)
    blocks.free(first)
    assert blocks.num_used == 2
    blocks.allocate(third)
    blocks.check_integrity([second, third])


@pytest.mark.parametrize("damage", [lambda s: s.blocks.pop(), lambda s: s.blocks.append(s.blocks[0])])
def test_lost_and_doubled_blocks_are_noticed(damage):
    blocks, sequence = BlockAllocator(4, 4), Sequence(make_request(1, 8, 1))
    blocks.allocate(sequence)
    damage(sequence)
    with pytest.raises(AssertionError):
        blocks.check_integrity([sequence])


# -- order ---------------------------------------------------------------------------------------------------


def test_priority_first_then_arrival():
    scheduler = make_scheduler(max_rows=1)
    for request_id, priority in [(1, 5), (2, 5), (3, 9), (4, 0), (5, 9)]:
        scheduler.add(make_request(request_id, reply=1, priority=priority))
    assert [step(scheduler)[0][0] for _ in range(5)] == [3, 5, 1, 2, 4]
    assert not scheduler.has_work


def test_a_running_line_is_not_pushed_out():
    scheduler = make_scheduler(max_rows=1)
    scheduler.add(make_request(1, reply=3, priority=0))
    step(scheduler)
    scheduler.add(make_request(2, reply=1, priority=9))
    assert [step(scheduler)[0][0] for _ in range(3)] == [1, 1, 2]


def test_a_line_that_waits_for_blocks_is_not_overtaken():
    scheduler = make_scheduler(kv_tokens=16)
    scheduler.add(make_request(1, prompt=8, reply=1))
    step_ids = [(1, 0, 8)]
    scheduler.add(make_request(2, prompt=12, reply=1))
    scheduler.add(make_request(3, prompt=4, reply=1))
    assert step(scheduler) == step_ids
    assert step(scheduler) == [(2, 0, 12), (3, 0, 4)]


def test_a_line_that_waits_for_its_adapter_is_not_overtaken():
    scheduler = make_scheduler()
    scheduler.add(make_request(1))
    scheduler.add(make_request(2))
    assert step(scheduler, admit=lambda sequence: sequence.request.id != 1) == []
    assert (scheduler.num_waiting, scheduler.blocks.num_used) == (2, 0)
    assert step(scheduler) == [(1, 0, 4), (2, 0, 4)]


def test_admit_is_asked_only_when_everything_else_is_there():
    """It counts a user of the adapter, so that a second question for one line would leak one."""
    asked = []

    def admit(sequence):
        asked.append(sequence.request.id)
        return True

    scheduler = make_scheduler(kv_tokens=16)
    for request_id in (1, 2, 3):
        scheduler.add(make_request(request_id, prompt=6, reply=2))
    step(scheduler, admit)
    step(scheduler, admit)
    assert asked == [1, 2]
    step(scheduler, admit)
    assert asked == [1, 2, 3]


# -- steps ---------------------------------------------------------------------------------------------------


def test_a_long_prompt_comes_in_chunks_beside_rows_that_speak():
    scheduler = make_scheduler(max_step_tokens=6)
    scheduler.add(make_request(1, prompt=4, reply=5))
    assert step(scheduler) == [(1, 0, 4)]
    scheduler.add(make_request(2, prompt=12, reply=1))
    assert step(scheduler) == [(1, 4, 5), (2, 0, 5)]
    assert step(scheduler) == [(1, 5, 6), (2, 5, 10)]
    assert step(scheduler) == [(1, 6, 7), (2, 10, 12)]
    assert step(scheduler) == [(1, 7, 8)]
    assert not scheduler.has_work


def test_speaking_rows_come_before_an_older_row_that_still_reads():
    scheduler = make_scheduler(max_step_tokens=6)
    scheduler.add(make_request(1, prompt=20, reply=1))
    scheduler.add(make_request(2, prompt=2, reply=5))
    scheduler.plan(lambda sequence: True)
    reading, speaking = scheduler.running
    speaking.num_computed, speaking.output_ids = 2, [7]
    assert step(scheduler) == [(2, 2, 3), (1, 0, 5)]
    assert reading.output_ids == []


def test_only_the_last_chunk_samples():
    scheduler = make_scheduler(max_step_tokens=6)
    scheduler.add(make_request(1, prompt=8))
    assert [row.samples for row in scheduler.plan(lambda sequence: True)] == [False]
    scheduler.running[0].num_computed = 6
    assert [row.samples for row in scheduler.plan(lambda sequence: True)] == [True]


def test_groups_are_those_of_the_running_rows():
    scheduler = make_scheduler(max_rows=2)
    for request_id, group in [(1, "a"), (2, "b"), (3, "c")]:
        scheduler.add(make_request(request_id, group=group))
    step(scheduler)
    assert scheduler.groups == {"a", "b"}


# -- bounds --------------------------------------------------------------------------------------------------


def test_the_queue_is_bounded():
    scheduler = make_scheduler(max_waiting=2)
    scheduler.add(make_request(1))
    scheduler.add(make_request(2))
    with pytest.raises(OverloadError):
        scheduler.add(make_request(3))
    assert scheduler.num_waiting == 2


def test_a_line_that_can_never_fit_is_refused():
    scheduler = make_scheduler(kv_tokens=16)
    with pytest.raises(ContextOverflow, match="16 tokens"):
        scheduler.add(make_request(1, prompt=15, reply=3))
    assert not scheduler.has_work
    scheduler.add(make_request(2, prompt=15, reply=2))
    assert step(scheduler) == [(2, 0, 15)]


# -- leaving -------------------------------------------------------------------------------------------------


def test_deadlines_take_out_running_and_waiting_lines():
    scheduler = make_scheduler(max_rows=2)
    for request_id, deadline in [(1, 1.0), (2, None), (3, 1.0), (4, 2.0)]:
        scheduler.add(make_request(request_id, reply=9, deadline=deadline))
    step(scheduler)
    assert scheduler.remove_expired(0.99) == []
    assert ids_of(scheduler.remove_expired(1.0)) == [1, 3]
    scheduler.check_integrity()
    assert [row[0] for row in step(scheduler)] == [2, 4]


def test_removed_lines_leave_wherever_they_are_and_keep_the_order():
    scheduler = make_scheduler(max_rows=1)
    for request_id in (1, 2, 3, 4):
        scheduler.add(make_request(request_id, reply=1 if request_id > 1 else 9))
    step(scheduler)
    assert ids_of(scheduler.remove([3, 1, 99])) == [1, 3]
    assert scheduler.blocks.num_used == 0
    assert scheduler.remove([3, 1]) == []
    assert [step(scheduler)[0][0] for _ in range(2)] == [2, 4]


def test_remove_all():
    scheduler = make_scheduler(max_rows=1)
    for request_id in (1, 2, 3):
        scheduler.add(make_request(request_id, reply=9))
    step(scheduler)
    assert sorted(ids_of(scheduler.remove_all())) == [1, 2, 3]
    assert not scheduler.has_work
    assert scheduler.blocks.num_used == 0


OPERATIONS = st.one_of(
    st.tuples(
        st.just("add"),
        st.integers(1, 24),
        st.integers(1, 12),
        st.integers(0, 9),
        st.one_of(st.none(), st.integers(1, 60)),
    ),
    st.tuples(st.just("step"), st.booleans()),
    st.tuples(st.just("step"), st.just(True)),
    st.tuples(st.just("cancel"), st.integers(0, 30)),
    st.tuples(st.just("expire"), st.integers(0, 60)),
)


class Trace:
    """A scheduler with the engine's bookkeeping around it: who was let in, who left."""

    def __init__(self):
        self.scheduler = make_scheduler(kv_tokens=48, max_rows=3, max_step_tokens=8, max_waiting=6)
        self.accepted = []
        self.left = []

    def perform(self, name, *arguments):
        getattr(self, name)(*arguments)
        self.scheduler.check_integrity()
        assert sorted(self.left + self.present()) == self.accepted

    def present(self):
        running = ids_of(self.scheduler.running)
        return running + [sequence.request.id for _, _, sequence in self.scheduler._waiting]

    def add(self, prompt, reply, priority, deadline):
        request_id = len(self.accepted)
        try:
            self.scheduler.add(make_request(request_id, prompt, reply, priority=priority, deadline=deadline))
        except OverloadError:
            return
        self.accepted.append(request_id)

    def step(self, has_pages):
        before = self.present()
        rows = step(self.scheduler, lambda sequence: has_pages or sequence.request.id % 2 == 0)
        assert sum(stop - start for _, start, stop in rows) <= 8
        assert len({request_id for request_id, _, _ in rows}) == len(rows) <= 3
        self.left += set(before) - set(self.present())

    def cancel(self, request_id):
        self.left += ids_of(self.scheduler.remove([request_id]))

    def expire(self, now):
        self.left += ids_of(self.scheduler.remove_expired(now))


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.lists(OPERATIONS, max_size=60))
def test_every_line_leaves_once_and_all_blocks_come_back(operations):
    trace = Trace()
    for operation in operations:
        trace.perform(*operation)
    for _ in range(400):
        trace.perform("step", True)
        if not trace.scheduler.has_work:
            break
    assert sorted(trace.left) == trace.accepted
    assert trace.scheduler.blocks.num_used == 0
