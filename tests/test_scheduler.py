"""Order, ageing, budgets, preemption and bounds of the scheduler; `test_traces` has what must hold whatever happens."""

import pytest

from npc_runtime.engine.core import Admission, EngineConfig, Request, SamplingParams
from npc_runtime.engine.scheduler import Scheduler
from npc_runtime.errors import ContextOverflow, OverloadError


def make_scheduler(**sizes):
    return Scheduler(EngineConfig(**{"block_size": 4, "kv_tokens": 64, "max_rows": 4, "max_step_tokens": 16, **sizes}))


def make_request(request_id, prompt=4, reply=3, arrival=0.0, first=None, **fields):
    """Prompts of different lines share nothing, unless `first` says what they begin with."""
    sampling = SamplingParams(seed=0, max_tokens=reply)
    ids = range(1000 * request_id, 1000 * request_id + prompt) if first is None else range(first, first + prompt)
    return Request(id=request_id, prompt_ids=tuple(ids), sampling=sampling, arrival=arrival, **fields)


def welcome(sequence):
    return Admission.ADMITTED


def plan(scheduler, admit=welcome, leave=lambda sequence: None):
    return scheduler.plan(admit, leave)


def step(scheduler, admit=welcome, leave=lambda sequence: None, **options):
    """Run one step as the engine does; returns its rows as (id, start, stop)."""
    rows = scheduler.plan(admit, leave, **options)
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
    assert [step(scheduler)[0][0] for _ in range(3)] == [2, 1, 3]


def test_nothing_starves():
    """A line of priority 0 runs although a line of priority 9 arrives in every step."""
    scheduler = make_scheduler(max_rows=1, ageing_s=2.0)
    scheduler.add(make_request(0, reply=1, priority=0))
    for second in range(30):
        scheduler.add(make_request(second + 1, reply=1, priority=9, arrival=float(second)))
        if step(scheduler)[0][0] == 0:
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


def answer(**outcomes):
    """An `admit` that tells these lines (`r1=…`) something else than `ADMITTED`."""
    return lambda sequence: outcomes.get(f"r{sequence.request.id}", Admission.ADMITTED)


def test_a_line_that_waits_for_pages_is_not_overtaken():
    scheduler = make_scheduler()
    scheduler.add(make_request(1))
    scheduler.add(make_request(2))
    assert step(scheduler, admit=answer(r1=Admission.NO_ROOM)) == []
    assert (len(scheduler.waiting), scheduler.blocks.num_used) == (2, 0)
    assert step(scheduler) == [(1, 0, 4), (2, 0, 4)]


def test_a_line_whose_adapter_is_loading_is_passed_and_admitted_when_it_is_there():
    scheduler = make_scheduler()
    for request_id in (1, 2, 3):
        scheduler.add(make_request(request_id))
    assert step(scheduler, admit=answer(r1=Admission.LOADING)) == [(2, 0, 4), (3, 0, 4)]
    assert ids_of(scheduler.waiting) == [1]
    assert step(scheduler) == [(2, 4, 5), (3, 4, 5), (1, 0, 4)]


def test_only_lines_with_a_loaded_adapter_kept_for_them_pass_one_that_waits_for_pages():
    """Else neither could go: 2 holds pages that 1 waits for, and 2 would wait for its turn behind 1."""
    scheduler = make_scheduler()
    scheduler.add(make_request(2))
    assert step(scheduler, admit=answer(r2=Admission.LOADING)) == []
    scheduler.add(make_request(1, priority=9))
    scheduler.add(make_request(3))
    asked = []

    def admit(sequence):
        asked.append(sequence.request.id)
        return answer(r1=Admission.NO_ROOM)(sequence)

    assert step(scheduler, admit) == [(2, 0, 4)]
    assert asked == [1, 2]


def test_a_line_that_waits_for_blocks_stops_those_with_a_loaded_adapter_too():
    scheduler = make_scheduler(kv_tokens=16)
    scheduler.add(make_request(1, prompt=8, reply=5))
    scheduler.add(make_request(2, prompt=2, reply=1))
    step(scheduler, admit=answer(r2=Admission.LOADING))
    scheduler.add(make_request(3, prompt=12, reply=1, priority=9))
    assert step(scheduler) == [(1, 8, 9)]
    assert ids_of(scheduler.waiting) == [3, 2]


def test_a_failing_admission_leaves_no_blocks_behind():
    def admit(sequence):
        raise RuntimeError("defect")

    scheduler = make_scheduler()
    scheduler.add(make_request(1))
    with pytest.raises(RuntimeError, match="defect"):
        plan(scheduler, admit=admit)
    scheduler.check_integrity()
    assert step(scheduler) == [(1, 0, 4)]


def test_admit_is_asked_only_when_everything_else_is_there():
    """It may begin a load, which is for lines that could run."""
    asked = []

    def admit(sequence):
        asked.append(sequence.request.id)
        return Admission.ADMITTED

    scheduler = make_scheduler(kv_tokens=16)
    for request_id in (1, 2, 3):
        scheduler.add(make_request(request_id, prompt=6, reply=2))
    step(scheduler, admit)
    assert asked == [1]
    while scheduler.has_work:
        step(scheduler, admit)
    assert asked == [1, 2, 3]


def test_a_warmup_reads_its_prompt_and_samples_nothing():
    scheduler = make_scheduler(max_step_tokens=6)
    scheduler.add(make_request(1, prompt=10, is_warmup=True))
    first = plan(scheduler)
    assert [(row.stop, row.samples, row.ends_warmup) for row in first] == [(6, False, False)]
    scheduler.computed(first)
    last = plan(scheduler)
    assert [(row.stop, row.samples, row.ends_warmup) for row in last] == [(10, False, True)]


# -- turns ---------------------------------------------------------------------------------------------------


def admitted(scheduler, count):
    """Ids in the order in which they get the one row, each line speaking one token."""
    return [step(scheduler)[0][0] for _ in range(count)]


def test_the_example_of_the_docstring():
    scheduler = make_scheduler(max_rows=1)
    lines = [(9, "A"), (5, "A"), (5, "A"), (5, "A"), (5, "B"), (5, "C"), (0, "B")]
    for request_id, (priority, client) in enumerate(lines):
        scheduler.add(make_request(request_id, reply=1, priority=priority, client=client))
    assert admitted(scheduler, 7) == [0, 1, 4, 5, 2, 3, 6]


@pytest.mark.parametrize("late", [0.0, 30.0], ids=["together", "after half a minute"])
def test_who_sends_256_lines_does_not_keep_another_waiting(late):
    """However long the many have waited: waiting raises priorities, and nobody above his fellows."""
    scheduler = make_scheduler(max_rows=4, kv_tokens=256)
    for request_id in range(256):
        scheduler.add(make_request(request_id, reply=4, client="many"))
    for _ in range(9):
        step(scheduler)
    for request_id in (1_000, 1_001):
        scheduler.add(make_request(request_id, reply=4, client="few", arrival=late))
    begun = []
    while 1_001 not in begun:
        begun += [row[0] for row in step(scheduler) if row[1] == 0]
    assert begun.index(1_000) <= 1
    assert begun.index(1_001) <= 3, "as many as the other"


def test_two_with_many_lines_share_one_row():
    scheduler = make_scheduler(max_rows=1)
    for request_id in range(12):
        scheduler.add(make_request(request_id, reply=1, client="A" if request_id < 8 else "B"))
    assert admitted(scheduler, 12) == [0, 8, 1, 9, 2, 10, 3, 11, 4, 5, 6, 7]


def test_nothing_is_kept_of_clients_that_are_gone():
    scheduler = make_scheduler(max_rows=2)
    for request_id in range(200):
        scheduler.add(make_request(request_id, reply=1, client=f"client {request_id}"))
        step(scheduler)
    assert len(scheduler._turns) <= 2


def test_lines_that_run_count_as_turns_that_were_taken():
    scheduler = make_scheduler(max_rows=4)
    for request_id in (1, 2, 3):
        scheduler.add(make_request(request_id, reply=9, client="A"))
    assert len(step(scheduler)) == 3
    for request_id, client in [(4, "A"), (5, "A"), *((number, "B") for number in range(6, 12))]:
        scheduler.add(make_request(request_id, reply=1, client=client))
    begun = []
    while len(begun) < 8:
        begun += [row[0] for row in step(scheduler) if row[1] == 0]
    assert begun[:3] == [6, 7, 8], "until B had as many as A"
    assert [number for number in begun if number > 5] == [6, 7, 8, 9, 10, 11]
    assert [number for number in begun if number < 6] == [4, 5]


def test_priority_comes_before_turns():
    scheduler = make_scheduler(max_rows=1)
    for request_id in range(4):
        scheduler.add(make_request(request_id, reply=1, priority=6, client="A"))
    scheduler.add(make_request(4, reply=1, priority=5, client="B"))
    assert admitted(scheduler, 5) == [0, 1, 2, 3, 4]


def test_a_stream_of_newcomers_starves_nobody():
    """Every step somebody new comes with one line, as many as there is room for; A's lines are not all overtaken."""
    scheduler = make_scheduler(max_rows=1)
    for request_id in range(5):
        scheduler.add(make_request(request_id, reply=1, client="A"))
    begun = []
    for number in range(100, 130):
        scheduler.add(make_request(number, reply=1, arrival=0.01 * number, client=f"new {number}"))
        begun += [row[0] for row in step(scheduler)]
    assert [number for number in begun if number < 5] == [0, 1, 2, 3, 4]
    assert begun.index(4) < 20


def test_a_low_priority_of_many_clients_comes_at_last():
    """Priority 0 of B runs although A sends a line of priority 9 in every step."""
    scheduler = make_scheduler(max_rows=1, ageing_s=2.0)
    scheduler.add(make_request(0, reply=1, priority=0, client="B"))
    for second in range(30):
        scheduler.add(make_request(second + 1, reply=1, priority=9, arrival=float(second), client="A"))
        if step(scheduler)[0][0] == 0:
            break
    assert second == 18


def test_prompts_are_read_in_turns_too():
    """All have rows already; the first words of B's only line do not wait for three long prompts of A."""
    scheduler = make_scheduler(max_rows=4, kv_tokens=256, max_step_tokens=16)
    for request_id in (1, 2, 3):
        scheduler.add(make_request(request_id, prompt=32, client="A"))
    scheduler.add(make_request(4, prompt=16, client="B"))
    begun = []
    while len(begun) < 4:
        begun += [row[0] for row in step(scheduler) if row[1] == 0]
    assert begun == [1, 2, 4, 3]


def test_prompts_can_be_bounded_beside_lines_that_speak():
    scheduler = make_scheduler()
    for request_id in (1, 2):
        scheduler.add(make_request(request_id, prompt=2, reply=5))
    step(scheduler)
    scheduler.add(make_request(3, prompt=12, reply=1))
    scheduler.add(make_request(4, prompt=2, reply=1))
    assert step(scheduler, max_prompt_tokens=8) == [(1, 2, 3), (2, 2, 3), (3, 0, 8)]
    assert step(scheduler, max_prompt_tokens=8) == [(1, 3, 4), (2, 3, 4), (3, 8, 12), (4, 0, 2)]


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
