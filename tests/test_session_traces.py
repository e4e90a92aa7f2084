"""Whatever a client and the engine do, in any order: every line and batch of a session ends exactly once, lines of one
NPC take turns, and what it remembers is what was said.
"""

import json
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st
from test_session import FALLBACK, Game, make_persona

from npc_runtime.effects import Dropped, Stop, Submit
from npc_runtime.engine.core import Ended, EndReason, Spoken, Started

NPCS = ("n0", "n1")


def render(messages):
    """All turns but the persona's, readable again."""
    turns = [[message["role"], message["content"]] for message in messages if message["role"] != "system"]
    return tuple(map(ord, json.dumps(turns)))


def make_game():
    game = Game(make_persona(fallback=FALLBACK, limits={"hard_tokens": 1}), render=render, tick_ms=20)
    for npc in NPCS:
        game.send({"type": "npc.open", "npc": npc, "persona": "brom"})
    return game


@dataclass
class World:
    """A client that checks every message against what it was promised, and an engine that obeys."""

    game: Game = field(default_factory=make_game)
    now: float = 0.0
    engine: dict = field(default_factory=dict)  # requests the engine works on -> what the player said
    cancelled: set = field(default_factory=set)
    batch_of: dict = field(default_factory=dict)  # live line -> batch
    texts: dict = field(default_factory=dict)  # live line -> deltas
    spoken: dict = field(default_factory=dict)  # request -> text
    counts: dict = field(default_factory=dict)  # live batch -> [lines, ok, failed]
    npc_of: dict = field(
        default_factory=dict
    )  # what the player said -> npc, its place in the queue, its history's epoch
    said_to: dict = field(default_factory=dict)  # live line -> what the player said
    memories: dict = field(default_factory=lambda: {npc: [] for npc in NPCS})
    epochs: dict = field(default_factory=lambda: dict.fromkeys(NPCS, 0))
    last_turn: dict = field(default_factory=lambda: dict.fromkeys(NPCS, 0))
    num_said: int = 0
    is_gone: bool = False

    def perform(self, effects):
        for effect in effects:
            if isinstance(effect, Submit):
                for job in effect.jobs:
                    self.submit(job)
            elif isinstance(effect, Stop):
                assert set(effect.request_ids) <= self.engine.keys()
                self.cancelled |= set(effect.request_ids)
            elif isinstance(effect, Dropped):
                assert len(effect.personas) == len(self.batch_of)
            else:
                assert not self.is_gone
                getattr(self, "on_" + effect.message.type.replace(".", "_"))(effect.message)

    def submit(self, job):
        *earlier, (role, said) = json.loads("".join(map(chr, job.prompt_ids)))
        assert role == "user"
        if said in self.npc_of:
            npc, turn, _ = self.npc_of[said]
            assert not [other for other in self.engine.values() if self.npc_of.get(other, "-")[0] == npc]
            assert turn > self.last_turn[npc]
            self.last_turn[npc] = turn
            assert earlier == self.memories[npc]
        self.engine[job.request_id] = said

    def on_accepted(self, message):
        assert message.batch not in self.counts
        queued = [item.line for item in message.items if item.status == "queued"]
        assert not set(queued) & self.batch_of.keys()
        self.batch_of.update(dict.fromkeys(queued, message.batch))
        self.texts.update((line, []) for line in queued)
        self.counts[message.batch] = [len(message.items), 0, len(message.items) - len(queued)]
        for item, said in zip(message.items, self.asked, strict=True):
            if item.status == "queued":
                self.said_to[item.line] = said

    def on_error(self, message):
        assert message.code == "invalid"  # a batch that still runs

    def on_event(self, message):
        assert message.kind == "overload"

    def on_reply(self, message):
        pass

    def on_line_start(self, message):
        assert not self.texts[message.line]

    def on_delta(self, message):
        for item in message.items:
            assert item.seq == len(self.texts[item.line])
            assert item.text
            self.texts[item.line].append(item.text)

    def on_line_end(self, message):
        batch, asked = self.batch_of.pop(message.line), self.said_to.pop(message.line)
        said = "".join(self.texts.pop(message.line))
        assert said == ("" if message.fallback else message.text)
        is_ok = message.reason in ("stop", "length")
        self.counts[batch][1 if is_ok else 2] += 1
        npc, _, epoch = self.npc_of.get(asked, (None, 0, 0))
        if is_ok and npc is not None and self.epochs[npc] == epoch and message.text:
            self.memories[npc] += [["user", asked], ["assistant", message.text]]

    def on_batch_end(self, message):
        total, ok, failed = self.counts.pop(message.batch)
        assert message.batch not in self.batch_of.values()
        assert (message.ok, message.failed, message.ok + message.failed) == (ok, failed, total)

    def generate(self, batch, lines):
        documents = [self.document(n) for n in lines]
        self.asked = [document["input"]["text"] for document in documents]
        self.perform(self.game.send({"type": "generate", "batch": batch, "lines": documents}, self.now))

    def document(self, number):
        self.num_said += 1
        said = f"say {self.num_said}"
        speaker = [{"persona": "none"}, {"persona": "brom"}, {"npc": "n0"}, {"npc": "n1"}][number % 4]
        if "npc" in speaker:
            self.npc_of[said] = speaker["npc"], self.num_said, self.epochs[speaker["npc"]]
        deadline = {"deadline_ms": 25.0} if number > 5 else {}
        return {"line": number, **speaker, "input": {"text": said}, **deadline}

    def cancel(self, line, batch):
        selectors = [{"all": True}, {"lines": [line, 99]}, {"batch": batch}, {"npc": NPCS[batch % 2]}]
        self.perform(self.game.send({"type": "cancel", **selectors[line % 4]}, self.now))

    def forget(self, number, how):
        npc = NPCS[number]
        self.memories[npc] = []
        self.epochs[npc] += 1
        if how == "clear":
            self.perform(self.game.send({"type": "npc.history", "npc": npc, "op": "clear"}, self.now))
        else:
            self.perform(self.game.send({"type": "npc.close", "npc": npc}, self.now))
            self.perform(self.game.send({"type": "npc.open", "npc": npc, "persona": "brom"}, self.now))

    def step(self, texts, num_ending):
        """The engine ends what was cancelled, lets some speak and ends some of those, all in one step."""
        session = self.game.session
        for request_id in [request_id for request_id in self.engine if request_id in self.cancelled]:
            self.end(request_id, EndReason.CANCELLED)
        for request_id, text in zip(list(self.engine), texts, strict=False):
            if request_id not in self.spoken:
                self.spoken[request_id] = ""
                self.perform(session.on_started(Started(request_id, 1.0, 2)))
            if text:
                self.spoken[request_id] += text
                session.on_spoken(Spoken(request_id, text))
        reasons = [EndReason.STOP, EndReason.DEADLINE, EndReason.LENGTH, EndReason.ERROR]
        for request_id, reason in zip(list(self.engine)[:num_ending], reasons, strict=False):
            self.end(request_id, reason)
        self.perform(session.after_step(self.now))

    def end(self, request_id, reason):
        del self.engine[request_id]
        text = self.spoken.pop(request_id, "")
        self.perform(self.game.session.on_ended(Ended(request_id, reason, text=text), self.now))

    def tick(self, seconds, is_congested):
        self.now += seconds
        session = self.game.session
        session.set_congested(is_congested, self.now)
        self.perform(session.tick(self.now))
        assert session.wake_at is None or session.wake_at > self.now, "it would be called again and again"

    def disconnect(self):
        running = set(self.engine)
        effects = self.game.session.disconnect(self.now)
        self.is_gone = True
        self.perform(effects)
        assert running <= self.cancelled
        assert self.game.session.wake_at is None

    def finish(self):
        self.perform(self.game.send({"type": "cancel", "all": True}, self.now))
        self.step([], 0)
        assert self.is_gone or not (self.engine or self.batch_of or self.texts or self.counts)


OPERATIONS = st.one_of(
    st.tuples(st.just("generate"), st.integers(0, 2), st.lists(st.integers(1, 11), min_size=1, max_size=5)),
    st.tuples(st.just("step"), st.lists(st.sampled_from(["", "a", " bc"]), max_size=6), st.integers(0, 4)),
    st.tuples(st.just("step"), st.just(["x"] * 6), st.integers(0, 1)),
    st.tuples(st.just("cancel"), st.integers(0, 11), st.integers(0, 2)),
    st.tuples(st.just("tick"), st.sampled_from([0.0, 0.01, 0.03, 6.0]), st.booleans()),
    st.tuples(st.just("forget"), st.integers(0, 1), st.sampled_from(["clear", "close"])),
)


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(st.lists(OPERATIONS, max_size=40), st.none() | st.integers(0, 40))
def test_whatever_happens_every_line_and_batch_ends_exactly_once(operations, leaves_after):
    world = World()
    for number, (name, *arguments) in enumerate(operations):
        if number == leaves_after:
            world.disconnect()
        getattr(world, name)(*arguments)
    world.finish()
