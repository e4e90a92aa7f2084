"""NPCs on the wire: what a session answers, what their lines read, what they remember."""

import json

import pytest
from test_session import FALLBACK, Game, codes_of, make_persona, make_stage, messages_of

from npc_runtime.door import Door
from npc_runtime.effects import Close, Stop, Submit, Supersede
from npc_runtime.engine.core import Ended, EndReason
from npc_runtime.errors import OverloadError
from npc_runtime.session import Session

KNOWING = make_persona(knows=[{"id": "king", "text": "The king is dead.", "when": "king == 'dead'"}], fallback=FALLBACK)


def render(messages):
    return tuple(map(ord, json.dumps([[turn["role"], turn["content"]] for turn in messages])))


def read(job):
    """The turns of a prompt, without the persona's."""
    return json.loads("".join(map(chr, job.prompt_ids)))[1:]


def make_game(**options):
    game = Game(KNOWING, make_persona("odo"), render=render, **options)
    game.ask = lambda kind, **fields: messages_of(game.send({"type": kind, "id": 9, "npc": "n1", **fields}))
    return game


def body_of(messages):
    [reply] = messages
    assert reply.re == 9
    return reply.body


def say(game, text="Hi", *, line=1, reply="Hm.", reason=EndReason.STOP, **fields):
    """One line of n1 from its request to its end; returns what it read."""
    _, jobs = game.generate({"line": line, "persona": None, "npc": "n1", "input": {"text": text}, **fields}, batch=line)
    game.end(jobs[0].request_id, reason, text=reply)
    return read(jobs[0])


def test_a_line_reads_what_was_said_before_and_is_remembered():
    game = make_game()
    assert body_of(game.ask("npc.open", persona="brom")) == {"npc": "n1", "persona": "brom", "num_messages": 0}
    assert say(game, "Hi", line=1) == [["user", "Hi"]]
    said = {"input": {"text": "Who?", "speaker": "Mira"}, "context": {"scene": "At night"}}
    assert say(game, line=2, **said)[:2] == [["user", "Hi"], ["assistant", "Hm."]]
    assert say(game, "So?", line=3, history="none")[2:4] == [["user", "Mira: Who?"], ["assistant", "Hm."]]
    assert len(body_of(game.ask("npc.history", op="get"))["messages"]) == 4


@pytest.mark.parametrize("reason", [EndReason.CANCELLED, EndReason.DEADLINE, EndReason.ERROR, EndReason.OVERLOAD])
def test_a_line_that_failed_leaves_no_trace(reason):
    game = make_game()
    game.ask("npc.open", persona="brom")
    say(game, reason=reason, reply="Half a")
    say(game, line=2, reply="")
    assert body_of(game.ask("npc.history", op="get"))["messages"] == []


def test_lines_take_turns_and_other_npcs_do_not_wait():
    game = make_game()
    game.ask("npc.open", persona="brom")
    game.send({"type": "npc.open", "npc": "n2", "persona": "odo"})
    lines = [
        {"line": n, "persona": None, "npc": npc, "input": {"text": f"say {n}"}}
        for n, npc in enumerate(["n1", "n2", "n1", "n1"])
    ]
    accepted, jobs = game.generate(*lines)
    assert codes_of(accepted) == ["queued"] * 4
    assert [read(job)[-1][1] for job in jobs] == ["say 0", "say 1"]
    effects = game.session.on_ended(Ended(jobs[0].request_id, EndReason.STOP, text="Aye."), 1.0)
    [submit] = [effect for effect in effects if isinstance(effect, Submit)]
    assert read(submit.jobs[0]) == [["user", "say 0"], ["assistant", "Aye."], ["user", "say 2"]]
    assert [message.type for message in messages_of(effects)] == ["line.end"]


def test_a_held_line_ends_by_its_deadline_unstarted():
    game = make_game()
    game.ask("npc.open", persona="brom")
    game.generate(*({"line": n, "persona": None, "npc": "n1", "deadline_ms": 500.0} for n in (1, 2)), now=3.0)
    assert game.session.wake_at == 3.5
    assert game.session.tick(3.4) == []
    [end] = messages_of(game.session.tick(3.5))
    assert (end.line, end.reason, end.usage.completion, end.fallback) == (2, "deadline", 0, True)
    assert end.timing.queue_ms == 500.0
    assert game.session.wake_at is None


@pytest.mark.parametrize(
    ("message", "ends"),
    [
        ({"type": "cancel", "npc": "n1"}, [2, 3]),
        ({"type": "cancel", "lines": [3]}, [3]),
        ({"type": "cancel", "all": True}, [2, 3]),
        ({"type": "npc.close", "npc": "n1"}, [2, 3]),
        ({"type": "npc.restore", "npc": "n1", "state": '{"npc":1,"persona":"odo","vars":{},"messages":[]}'}, [2, 3]),
    ],
)
def test_cancelling_ends_what_is_held_at_once_and_the_rest_in_the_engine(message, ends):
    game = make_game()
    game.ask("npc.open", persona="brom")
    _, [job] = game.generate(*({"line": n, "persona": None, "npc": "n1"} for n in (1, 2, 3)))
    effects = game.send(message)
    stops = [effect for effect in effects if isinstance(effect, Stop)]
    assert stops == ([] if ends == [3] else [Stop((job.request_id,))])
    cancelled = [m for m in messages_of(effects) if m.type == "line.end"]
    assert [(end.line, end.reason) for end in cancelled] == [(line, "cancelled") for line in ends]


def test_vars_are_facts_for_what_the_persona_knows():
    game = make_game()
    game.ask("npc.open", persona="brom", vars={"king": "alive"})
    assert "dead" not in say(game)[-1][1]
    game.ask("npc.open", persona="brom", vars={"king": "dead"})
    assert "The king is dead." in say(game, line=2)[-1][1]


def test_messages_take_the_place_of_the_history_for_one_line():
    game = make_game()
    game.ask("npc.open", persona="brom", history=[{"role": "user", "content": "Old"}])
    turns = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}, {"role": "user", "content": "C"}]
    assert say(game, input=None, messages=turns) == [["user", "A"], ["assistant", "B"], ["user", "C"]]
    assert [turn["content"] for turn in body_of(game.ask("npc.history", op="get"))["messages"]] == ["Old", "C", "Hm."]


def test_the_history_can_be_read_and_changed():
    game = make_game()
    game.ask("npc.open", persona="brom")
    turns = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]
    assert body_of(game.ask("npc.history", op="set", messages=turns))["messages"] == turns
    assert body_of(game.ask("npc.history", op="append", messages=turns))["messages"] == turns * 2
    assert body_of(game.ask("npc.history", op="pop"))["messages"] == turns
    assert body_of(game.ask("npc.history", op="get"))["messages"] == turns
    assert body_of(game.ask("npc.history", op="clear"))["messages"] == []


@pytest.mark.parametrize(
    ("kind", "fields", "code"),
    [
        ("npc.open", {"persona": "nobody"}, "persona_unknown"),
        ("npc.open", {"persona": "mute"}, "adapter_missing"),
        ("npc.open", {"persona": "brom", "npc": ""}, "invalid"),
        ("npc.open", {"persona": "brom", "npc": "x" * 65}, "invalid"),
        ("npc.open", {"persona": "brom", "vars": {"a": [1]}}, "invalid"),
        ("npc.open", {"persona": "brom", "vars": {str(n): n for n in range(65)}}, "invalid"),
        ("npc.open", {"persona": "brom", "history": [{"role": "system", "content": "Obey."}]}, "invalid"),
        ("npc.history", {"npc": "n2", "op": "get"}, "npc_unknown"),
        ("npc.history", {"op": "get", "messages": []}, "invalid"),
        ("npc.history", {"op": "set"}, "invalid"),
        ("npc.history", {"op": "forget"}, "invalid"),
        ("npc.close", {"npc": "n2"}, "npc_unknown"),
        ("npc.snapshot", {"npc": "n2"}, "npc_unknown"),
        ("npc.restore", {"state": "{}"}, "invalid"),
    ],
)
def test_what_cannot_be_done_is_named(kind, fields, code):
    game = make_game()
    game.ask("npc.open", persona="brom")
    [error] = game.ask(kind, **fields)
    assert (error.type, error.code, error.re) == ("error", code, 9)
    assert error.message
    assert error.hint


def test_a_snapshot_restores_to_the_same_prompt_in_another_process():
    game, other = make_game(), make_game()
    game.ask("npc.open", persona="brom", vars={"king": "dead"})
    for number in range(30):
        say(game, f"say {number}", line=number)
    state = body_of(game.ask("npc.snapshot"))["state"]
    assert body_of(other.ask("npc.restore", state=state))["num_messages"] == 60
    assert say(other, "And?", line="x") == say(game, "And?", line="x")


def test_a_long_history_loses_its_oldest_turns_and_never_the_persona():
    game = make_game()
    turns = [{"role": role, "content": f"{n} " + "x" * 200} for n in range(100) for role in ("user", "assistant")]
    game.ask("npc.open", persona="brom", history=turns)
    accepted, jobs = game.generate({"persona": None, "npc": "n1"})
    assert "Left out of the prompt" in accepted.items[0].message
    whole = json.loads("".join(map(chr, jobs[0].prompt_ids)))
    assert whole[0][0] == "system"
    assert whole[-2][1].startswith("99 ")
    assert len(jobs[0].prompt_ids) <= 10_000


# -- resume ----------------------------------------------------------------------------------------------------


def hello(session, **fields):
    return session.receive(json.dumps({"type": "hello", "protocol": 1, **fields}), 0.0)


@pytest.fixture
def connect():
    """Open sessions of one daemon."""
    door = Door(token=None, project="tavern", owner_pid=77)

    def make(**fields):
        session = Session(subprotocol="npc.v1.json", door=door, stage=make_stage())
        return session, hello(session, **fields)

    return make


def send(session, **message):
    return session.receive(json.dumps(message), 0.0)


def test_npcs_come_back_with_resume(connect):
    session, [welcome] = connect()
    assert welcome.message.resumed is False
    send(session, type="npc.open", npc="n1", persona="brom", history=[{"role": "user", "content": "Hi"}])
    session.disconnect(0.0)
    again, [welcome] = connect(resume=session.name)
    assert (welcome.message.resumed, welcome.message.session) == (True, session.name)
    [reply] = send(again, type="npc.history", npc="n1", op="get")
    assert reply.message.body["messages"] == [{"role": "user", "content": "Hi"}]


def test_who_resumes_takes_the_connection_from_who_has_it(connect):
    session, _ = connect()
    send(session, type="npc.open", npc="n1", persona="brom")
    send(session, type="generate", batch=1, lines=[{"line": 1, "npc": "n1", "input": {"text": "Hi"}}])
    again, [supersede, welcome] = connect(resume=session.name)
    assert supersede == Supersede(session)
    assert welcome.message.resumed
    stop, _, close = session.supersede(0.0)
    assert isinstance(stop, Stop)
    assert close == Close(1000, "another connection resumed this session")
    session.disconnect(0.0)
    [reply] = send(again, type="npc.snapshot", npc="n1")
    assert reply.message.type == "reply"


def test_a_session_that_is_not_there_any_more_is_a_new_one(connect):
    _, [welcome] = connect(resume="0123456789abcdef")
    assert welcome.message.resumed is False


@pytest.mark.parametrize(("fields", "is_open"), [({"project": "tavern"}, True), ({"project": "castle"}, False)])
def test_another_project_is_refused(connect, fields, is_open):
    session, [effect] = connect(**fields)
    assert session.is_open == is_open
    assert is_open or (effect.code == 4400 and "tavern" in effect.reason)


# -- other messages -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("owner_pid", "kinds"), [(77, ["reply"]), (78, ["error"]), (None, ["error"])])
def test_only_the_owner_may_shut_down(connect, owner_pid, kinds):
    session, _ = connect(**({"owner_pid": owner_pid} if owner_pid else {}))
    effects = send(session, type="shutdown", id=1)
    assert [message.type for message in messages_of(effects)] == kinds
    assert len(effects) - len(messages_of(effects)) == (kinds == ["reply"])


def test_while_the_base_is_loaded_clients_are_told_how_far_it_is():
    session = Session(subprotocol="npc.v1.json", door=Door(token=None), stage=None)
    [loading] = messages_of(hello(session))
    assert (loading.kind, loading.progress) == ("model.loading", 0.0)
    [error] = messages_of(send(session, type="status", id=1))
    assert (error.code, error.retryable) == ("overload", True)
    assert messages_of(session.on_loading("weights", 0.51234))[0].progress == 0.512
    ready, welcome = messages_of(session.on_loaded(make_stage()))
    assert (ready.kind, welcome.type) == ("model.ready", "welcome")
    assert session.on_loading("weights", 1.0) == session.on_loaded(make_stage()) == []


def test_a_connection_that_leaves_during_loading_is_gone():
    session = Session(subprotocol="npc.v1.json", door=Door(token=None), stage=None)
    hello(session)
    assert session.disconnect(0.0) == session.on_loaded(make_stage()) == []


def test_when_the_daemon_stops_what_is_held_ends_and_what_comes_is_rejected():
    game = make_game()
    game.ask("npc.open", persona="brom")
    _, [job] = game.generate(*({"line": n, "persona": None, "npc": "n1"} for n in (1, 2)))
    [end] = messages_of(game.session.refuse(OverloadError("The daemon is stopping.", "Wait."), 1.0))
    assert (end.line, end.reason) == (2, "cancelled")
    accepted, jobs = game.generate({"line": 3}, batch="c")
    assert (codes_of(accepted), jobs) == (["overload"], ())
    assert accepted.items[0].retryable
    assert [message.type for message in game.end(job.request_id, EndReason.CANCELLED)] == ["line.end", "batch.end"]


def test_questions_about_files_are_bounded():
    game = make_game()
    asked = [game.send({"type": "persona.get", "id": n, "persona": "brom"}) for n in range(9)]
    assert [len(messages_of(effects)) for effects in asked] == [0] * 8 + [1]
    assert asked[-1][0].message.code == "overload"
    [reply] = messages_of(game.session.on_managed(0, {"persona": "brom"}))
    assert (reply.re, reply.body) == (0, {"persona": "brom"})
    assert messages_of(game.send({"type": "persona.get", "id": 9, "persona": "brom"})) == []
