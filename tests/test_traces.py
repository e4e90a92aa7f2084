"""Whatever happens, in whatever order: 10,000 random games over scheduler, KV blocks and adapter pages together.

A game is a string of bytes, read as lines that arrive, warmups, cancels, jumps of the clock and steps; bytes are cheap
to draw and shrink well. Around the three stands what the engine puts there, and a device that notes what is written
where, so that a block or a page that changes hands while it is read is found at once.
"""

import itertools
import os

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from npc_runtime.engine.core import Admission, EndReason, EngineConfig, Request, SamplingParams
from npc_runtime.engine.pages import PagePool
from npc_runtime.engine.scheduler import Scheduler
from npc_runtime.errors import ContextOverflow, OverloadError

NUM_TRACES = int(os.environ.get("NPC_TRACES", "10000"))

CONFIG = EngineConfig(block_size=4, kv_tokens=40, max_rows=3, max_step_tokens=8, max_waiting=10, ageing_s=2.0)
SIZES = {"a": 1, "b": 1, "c": 2, "d": 3}


def size_of(version):
    """Pages of an adapter; the newer versions of `a` and `c` are larger and smaller in turns."""
    name, _, number = version.partition("#")
    return SIZES[name] + (int(number or 0) % 2) * {"a": 1, "c": -1}.get(name, 0)


NAMES = (None, "a", "b", "c", "d")
MAX_STEPS_TO_END = 400
"""What is left when nothing more arrives is at most 13 lines of 35 tokens, with a load for each; measured: 96."""


class Device:
    """What is written in KV blocks and adapter pages, and whether who reads it finds its own."""

    def __init__(self, num_pages):
        self.pages = [None] * num_pages
        self.slots = {}

    def run(self, row, pages):
        sequence, adapter = row.sequence, row.sequence.request.adapter
        if adapter is not None:
            assert [self.pages[page] for page in pages.pages_of(adapter)] == [adapter] * size_of(adapter)
        tokens = sequence.tokens(0, row.stop)
        said = sequence.request.cache_key
        for position, token in enumerate(tokens):
            said = hash((said, token))
            slot = (sequence.blocks[position // CONFIG.block_size], position % CONFIG.block_size)
            if position < row.start:
                assert self.slots[slot] == said, "another line wrote there, or a prefix was taken that is not its own"
            else:
                self.slots[slot] = said


class Game:
    """A scheduler, its pages and its lines, with the engine's bookkeeping around them."""

    def __init__(self, num_pages, delays):
        self.scheduler = Scheduler(CONFIG)
        self.pages = PagePool(num_pages, SIZES, self.start_load)
        self.device = Device(num_pages)
        self.delays = delays  # steps that each load takes, negative for one that fails
        self.loads = {}  # version -> (steps left, whether it fails)
        self.versions = {name: name for name in SIZES}  # what new lines get
        self.replaced = 0
        self.spoken = {}  # id -> the version that its reply began with
        self.moved = set()  # ids of lines that were preempted and pushed out when their adapter was replaced
        self.now = 0.0
        self.arrived = {}  # id -> request
        self.ended = {}  # id -> reason
        self.started = set()
        self.outcomes = {}  # of the plan that is being made: id -> what it was told, and whether it had a promise
        self.order = {}  # of the plan that is being made: id -> who goes how soon
        self.moments = itertools.count(1)
        self.came, self.turns = {}, {}  # id, or priority and client -> when it came, or had its last turn

    # -- what a client does --

    def add(self, prompt, reply, shares, **fields):
        request_id = len(self.arrived)
        start = 5 if shares else 1_000 * request_id
        request = Request(
            id=request_id,
            prompt_ids=tuple(range(start, start + prompt)),
            sampling=SamplingParams(seed=0, max_tokens=reply),
            arrival=self.now,
            cache_key=self.versions.get(fields["adapter"], ""),
            **{**fields, "adapter": self.versions.get(fields["adapter"])},
        )
        self.arrived[request_id] = request
        self.came[request_id] = next(self.moments)
        try:
            self.scheduler.add(request)
        except OverloadError:
            self.end(request_id, EndReason.OVERLOAD)
        except ContextOverflow:
            self.end(request_id, EndReason.ERROR)

    def cancel(self, request_id):
        for sequence in self.scheduler.remove([request_id]):
            self.leave(sequence, EndReason.CANCELLED)

    def reload(self, name):
        """The files of an adapter were replaced: what `AdapterStore` does when the loader has read the new ones."""
        old, self.replaced = self.versions[name], self.replaced + 1
        self.versions[name] = new = f"{name}#{self.replaced}"
        self.pages.add(new, size_of(new))
        for sequence in self.scheduler.waiting:
            if sequence.request.adapter != old:
                continue
            if sequence.output_ids and self.pages.keep(sequence):
                sequence.is_promised = True
                continue
            if sequence.output_ids:
                self.moved.add(sequence.request.id)
            self.pages.leave(sequence)
            sequence.use_adapter(new, new)
        self.pages.retire(old)
        numbers = self.pages.place(new)
        if numbers:
            self.start_load(new, numbers)
        self.check()

    # -- what the engine does --

    def end(self, request_id, reason):
        assert request_id not in self.ended, "it ended twice"
        self.ended[request_id] = reason

    def leave(self, sequence, reason):
        self.end(sequence.request.id, reason)
        self.pages.leave(sequence)

    def start_load(self, name, pages):
        delay = next(self.delays)
        for page in pages:
            self.device.pages[page] = "half written"
        self.loads[name] = [abs(delay), delay < 0]

    def load(self):
        for name, load in list(self.loads.items()):
            load[0] -= 1
            if load[0] > 0:
                continue
            del self.loads[name]
            if load[1]:
                for sequence in self.scheduler.remove(self.pages.failed(name)):
                    assert sequence.request.adapter == name
                    self.leave(sequence, EndReason.ERROR)
            else:
                for page in self.pages._slots[name].pages:  # those of a replaced one are written too, for nobody
                    self.device.pages[page] = name
                self.pages.loaded(name)

    def admit(self, sequence):
        had_promise = sequence.is_promised
        outcome = self.pages.admit(sequence)
        assert not (had_promise and outcome is Admission.NO_ROOM), "what was promised was given away"
        self.outcomes[sequence.request.id] = outcome, had_promise
        if outcome is Admission.ADMITTED:
            self.turns[queue_of(sequence.request)] = next(self.moments)
        return outcome

    def step(self, max_prompt_tokens=None):
        self.load()
        for sequence in self.scheduler.remove_expired(self.now):
            self.leave(sequence, EndReason.DEADLINE)
        self.outcomes.clear()
        ran_before = {sequence.request.id for sequence in self.scheduler.running}
        self.order = {request.id: number for number, request in enumerate(self.by_turns())}
        rows = self.scheduler.plan(self.admit, self.pages.suspend, max_prompt_tokens=max_prompt_tokens)
        self.check_order(ran_before)
        self.check_rows(rows)
        for row in rows:
            self.device.run(row, self.pages)
            self.started.add(row.sequence.request.id)
        self.scheduler.computed(rows)
        for row in rows:
            sequence = row.sequence
            if row.samples:
                self.check_version(sequence.request)
                sequence.output_ids.append(len(sequence.output_ids))
            is_full = len(sequence.output_ids) == sequence.request.sampling.max_tokens
            if is_full or row.ends_warmup:
                if row.ends_warmup and sequence.request.adapter is not None:
                    self.pages.pin(sequence.request.adapter)
                self.scheduler.remove([sequence.request.id])
                self.leave(sequence, EndReason.LENGTH)
        self.check()

    # -- what must hold --

    def check(self):
        running, waiting = self.scheduler.running, self.scheduler.waiting
        self.scheduler.check_integrity()
        self.pages.check_integrity(running, waiting)
        live = [sequence.request.id for sequence in [*running, *waiting]]
        assert sorted([*live, *self.ended]) == list(self.arrived), "a line was lost, or lives on after its end"

    def check_version(self, request):
        """A reply goes on with what it began with; a line begins with what was the newest when it was let in."""
        began_with = self.spoken.setdefault(request.id, request.adapter)
        assert request.adapter == began_with or request.id in self.moved

    def check_rows(self, rows):
        assert sum(row.num_tokens for row in rows) <= CONFIG.max_step_tokens
        assert len({row.sequence.request.id for row in rows}) == len(rows) <= CONFIG.max_rows
        for row in rows:
            deadline = row.sequence.request.deadline
            assert deadline is None or deadline > self.now, "tokens for a line whose time is over"
        assert rows or not self.scheduler.running, "lines run and nothing moves"
        assert rows or self.loads or not self.scheduler.waiting, "lines wait for nothing: they would wait for ever"

    def check_order(self, ran_before):
        """Nobody was let in before a line that goes first, unless its adapter is loading, or there is no room for one.

        In the second case only those may pass who hold the room that is missing: their adapter was kept for them.
        """
        no_room = [number for number, (told, _) in self.outcomes.items() if told is Admission.NO_ROOM]
        for request_id, (outcome, had_promise) in self.outcomes.items():
            for other in self.scheduler.waiting if outcome is Admission.ADMITTED else ():
                other_id = other.request.id
                if other_id in ran_before or self.order[other_id] > self.order[request_id]:
                    continue
                told, _ = self.outcomes.get(other_id, (None, False))
                is_blocked = any(self.order[other_id] >= self.order[number] for number in no_room)
                assert told is Admission.LOADING or (is_blocked and had_promise)

    def by_turns(self):
        """Who waits, in the order in which they are to go, as slowly as one likes.

        Places are by priority, of which waiting `ageing_s` is worth one, and arrival. Those of a priority are given out
        one by one: to the client with the fewest lines that run or have a place already, and of several such to the one
        whose last turn, or whose line, is the oldest.
        """
        waiting = [sequence.request for sequence in self.scheduler.waiting]
        waiting.sort(key=lambda request: (request.arrival / CONFIG.ageing_s - request.priority, request.id))
        running = [queue_of(sequence.request) for sequence in self.scheduler.running]
        present = {*running, *map(queue_of, waiting)}
        self.turns = {queue: at for queue, at in self.turns.items() if queue in present}
        order = []
        left = list(waiting)
        for place in waiting:
            firsts = {}
            for request in left:
                if request.priority == place.priority:
                    firsts.setdefault(request.client, request)
            chosen = min(firsts.values(), key=lambda r: (running.count(queue_of(r)), self.waits_since(r)))
            running.append(queue_of(chosen))
            left.remove(chosen)
            order.append(chosen)
        return order

    def waits_since(self, request):
        return max(self.came[request.id], self.turns.get(queue_of(request), 0))

    def finish(self):
        for _ in range(MAX_STEPS_TO_END):
            if not self.scheduler.has_work and not self.loads:
                break
            self.step()
            self.now += 0.05
        assert list(self.arrived) == sorted(self.ended), "a line starves"
        assert self.scheduler.blocks.num_used == 0
        assert all(slot.is_idle for slot in self.pages._slots.values())
        assert self.pages._sizes.keys() == set(self.versions.values()), "an old adapter is kept for nobody"
        for request_id in self.arrived.keys() - self.started:
            assert self.ended[request_id] not in (EndReason.LENGTH, EndReason.STOP)


def queue_of(request):
    return request.priority, request.client


class Player:
    """Reads bytes as what happens in a game."""

    def __init__(self, data):
        self.data = iter(data)
        first = next(self.data, 0)
        self.game = Game(3 + first % 4, itertools.cycle([1, 3, -2, 1, 9, 2, 1, 5][first % 8 :] or [1]))

    def byte(self):
        return next(self.data, 0)

    def play(self):
        for byte in self.data:
            match byte % 13:
                case 0 | 1 | 2:
                    self.add(byte // 13)
                case 3:
                    self.add(byte // 13, is_warmup=True)
                case 4:
                    self.game.cancel(len(self.game.arrived) - 1 - byte // 13)
                case 5:
                    self.game.now += (0.1, 0.5, 2.0, 7.0, 100.0)[byte // 13 % 5]
                case 6:
                    for _ in range(byte // 13 % 6):
                        self.game.step(max_prompt_tokens=(None, 1, 3)[byte // 78 % 3])
                case 7:
                    self.game.reload("abcd"[byte // 13 % 4])
                case _:
                    self.game.step()
                    self.game.now += 0.05
        self.game.finish()

    def add(self, priority, **fields):
        size, who, deadline = self.byte(), self.byte(), self.byte()
        self.game.add(
            prompt=1 + size % 23,
            reply=1 + size // 23,
            shares=who % 2 == 0,
            adapter=NAMES[who // 2 % 5],
            client=who // 10 % 3,
            priority=priority % 10 if size % 3 == 0 else 5,
            deadline=self.game.now + deadline / 16 if deadline < 60 else None,
            **fields,
        )


@settings(
    max_examples=NUM_TRACES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
@given(st.binary(min_size=40, max_size=200))
def test_every_line_ends_once_and_nothing_leaks_starves_or_is_late(data):
    Player(data).play()
