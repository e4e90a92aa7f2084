"""Order, ageing, budgets, preemption and bounds of the scheduler, and that every line leaves exactly once."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npc_runtime.engine.core import EngineConfig, Request, SamplingParams
from npc_runtime.engine.scheduler import Scheduler
from npc_runtime.errors import ContextOverflow, OverloadError


def make_scheduler(**sizes):
    return Scheduler(EngineConfig(**{"block_size": 4, "kv_tokens": 64, "max_rows": 4, "max_step_tokens": 16, **sizes}))


def make_request(request_id, prompt=4, reply=3, arrival=0.0, first=None, **fields):
    """Prompts of different lines share nothing, unless `first` says what they begin with."""
    sampling = SamplingParams(seed=0, max_tokens=reply)
    ids = range(1000 * request_id, 1000 * request_id + prompt) if first is None else range(first, first + prompt)
    return Request(id=request_id, prompt_ids=tuple(ids), sampling=sampling, arrival=arrival, **fields)


def plan(scheduler, now=0.0, admit=lambda sequence: True, leave=lambda sequence: None):
    return scheduler.plan(now, admit, leave)


def step(scheduler, admit=lambda sequence: True, leave=lambda sequence: None, now=0.0):
    """Run one step as the engine does; returns its rows as (id, start, stop)."""
    rows = scheduler.plan(now, admit, leave)
    done = [(row.sequence.request.id, row.start, row.stop) for row in rows]
    samples = [row.sequence for row in rows if row.samples]
    scheduler.computed(rows)
    for sequence in samples:
        sequence.output_ids.append(7)
    is_over = [s.request.id for s in samples if len(s.output_ids) == s.request.sampling.max_tokens]
    scheduler.remove(is_over)
    scheduler.check_integrity()
    return done


def ids_of(sequences):
    return [sequence.request.id for sequence in sequences]


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


def test_waiting_raises_a_line_by_one_priority_every_two_seconds():
    scheduler = make_scheduler(max_rows=1, ageing_s=2.0)
    scheduler.add(make_request(1, reply=1, priority=3, arrival=0.0))
    scheduler.add(make_request(2, reply=1, priority=5, arrival=3.9))
    scheduler.add(make_request(3, reply=1, priority=5, arrival=4.1))
    assert [step(scheduler, now=5.0)[0][0] for _ in range(3)] == [2, 1, 3]


def test_nothing_starves():
    """A line of priority 0 runs although a line of priority 9 arrives in every step."""
    scheduler = make_scheduler(max_rows=1, ageing_s=2.0)
    scheduler.add(make_request(0, reply=1, priority=0))
    for second in range(30):
        scheduler.add(make_request(second + 1, reply=1, priority=9, arrival=float(second)))
        if step(scheduler, now=float(second))[0][0] == 0:
            break
    assert second == 18


def test_a_line_that_waits_for_blocks_is_not_overtaken():
    scheduler = make_scheduler(kv_tokens=16)
    scheduler.add(make_request(1, prompt=8, reply=1))
    scheduler.add(make_request(2, prompt=12, reply=1))
    scheduler.add(make_request(3, prompt=4, reply=1))
    assert step(scheduler) == [(1, 0, 8)]
    assert step(scheduler) == [(2, 0, 12)]
    assert step(scheduler) == [(3, 0, 4)]


def test_a_line_that_waits_for_its_adapter_is_not_overtaken():
    scheduler = make_scheduler()
    scheduler.add(make_request(1))
    scheduler.add(make_request(2))
    assert step(scheduler, admit=lambda sequence: sequence.request.id != 1) == []
    assert (len(scheduler.waiting), scheduler.blocks.num_used) == (2, 0)
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
    assert asked == [1]
    while scheduler.has_work:
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
    plan(scheduler)
    reading, speaking = scheduler.running
    speaking.num_computed, speaking.output_ids = 2, [7]
    assert step(scheduler) == [(2, 2, 3), (1, 0, 5)]
    assert reading.output_ids == []


def test_only_the_last_chunk_samples():
    scheduler = make_scheduler(max_step_tokens=6)
    scheduler.add(make_request(1, prompt=8))
    assert [row.samples for row in plan(scheduler)] == [False]
    scheduler.running[0].num_computed = 6
    assert [row.samples for row in plan(scheduler)] == [True]


def test_a_known_prefix_is_not_computed_again():
    scheduler = make_scheduler()
    scheduler.add(make_request(1, prompt=10, reply=1, first=5, cache_key="elf"))
    assert step(scheduler) == [(1, 0, 10)]
    scheduler.add(make_request(2, prompt=12, reply=1, first=5, cache_key="elf"))
    scheduler.add(make_request(3, prompt=12, reply=1, first=5, cache_key="dwarf"))
    rows = plan(scheduler)
    assert [(row.sequence.request.id, row.start, row.stop) for row in rows] == [(2, 8, 12), (3, 0, 12)]
    assert [row.sequence.num_cached for row in rows] == [8, 0]


# -- preemption ----------------------------------------------------------------------------------------------


def test_the_lowest_line_makes_room_and_comes_back_with_its_words():
    """Three blocks of 4: two lines fit until both grow; the later one is recomputed from its prompt and reply."""
    scheduler = make_scheduler(kv_tokens=12)
    left = []
    scheduler.add(make_request(1, prompt=3, reply=6))
    assert step(scheduler) == [(1, 0, 3)]
    scheduler.add(make_request(2, prompt=3, reply=6))
    assert step(scheduler) == [(1, 3, 4), (2, 0, 3)]
    assert step(scheduler) == [(1, 4, 5), (2, 3, 4)]
    second = scheduler.running[1]
    assert step(scheduler, leave=left.append) == [(1, 5, 6)]
    assert left == [second]
    assert (scheduler.num_preempted, second.num_computed, second.output_ids) == (1, 0, [7, 7])
    assert step(scheduler)[0] == (1, 6, 7)
    while scheduler.running and scheduler.running[0].request.id == 1:
        step(scheduler)
    assert step(scheduler)[0][0] == 2
    while scheduler.has_work:
        step(scheduler)
    assert second.output_ids == [7] * 6


def test_a_higher_priority_keeps_its_blocks():
    scheduler = make_scheduler(kv_tokens=12)
    scheduler.add(make_request(1, prompt=3, reply=6, priority=1))
    step(scheduler)
    scheduler.add(make_request(2, prompt=3, reply=6, priority=9))
    step(scheduler)
    step(scheduler)
    step(scheduler)
    assert ids_of(scheduler.running) == [2]
    assert ids_of(scheduler.waiting) == [1]


# -- bounds --------------------------------------------------------------------------------------------------


def test_the_queue_is_bounded():
    scheduler = make_scheduler(max_waiting=2)
    scheduler.add(make_request(1))
    scheduler.add(make_request(2))
    with pytest.raises(OverloadError):
        scheduler.add(make_request(3))
    assert len(scheduler.waiting) == 2


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
        self.holding = set()  # what the adapter store counts as users

    def perform(self, name, *arguments):
        getattr(self, name)(*arguments)
        self.scheduler.check_integrity()
        self.holding -= set(self.left)
        assert sorted(self.left + self.present()) == self.accepted
        assert self.holding == set(ids_of(self.scheduler.running))

    def present(self):
        return ids_of(self.scheduler.running) + ids_of(self.scheduler.waiting)

    def add(self, prompt, reply, priority, deadline):
        request_id = len(self.accepted)
        shared = {"first": 5, "cache_key": "ab"[request_id % 2]} if prompt % 2 else {}
        request = make_request(request_id, prompt, reply, priority=priority, deadline=deadline, **shared)
        try:
            self.scheduler.add(request)
        except OverloadError:
            return
        self.accepted.append(request_id)

    def step(self, has_pages):
        before = self.present()

        def admit(sequence):
            assert sequence.request.id not in self.holding
            if has_pages or sequence.request.id % 2 == 0:
                self.holding.add(sequence.request.id)
                return True
            return False

        rows = step(self.scheduler, admit, lambda sequence: self.holding.remove(sequence.request.id))
        assert sum(stop - start for _, start, stop in rows) <= 8
        assert len({request_id for request_id, _, _ in rows}) == len(rows) <= 3
        self.left += set(before) - set(self.present())

    def cancel(self, request_id):
        self.left += ids_of(self.scheduler.remove([request_id]))

    def expire(self, now):
        self.left += ids_of(self.scheduler.remove_expired(now))


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
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
