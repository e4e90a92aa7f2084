"""The session without sockets: what a client is sent for each frame and each event of the engine."""

import itertools
import json

import msgpack
import pytest

from npc_runtime import codec
from npc_runtime import protocol as wire
from npc_runtime.door import Door
from npc_runtime.effects import Close, Send, SendStatus, Stop, Submit
from npc_runtime.engine.core import Ended, EndReason, Spoken, Started
from npc_runtime.errors import AdapterMissing, InternalError, OverloadError
from npc_runtime.persona import Library, Persona
from npc_runtime.session import Session
from npc_runtime.stage import DaemonInfo, Stage

CONTEXT = 10_000
FALLBACK = {"timeout": ["Hm.", "Wait."], "busy": ["Not now."]}


def make_persona(persona_id="brom", **fields):
    document = {"schema": 1, "id": persona_id, "display_name": persona_id.title(), "bio": "Smith.", **fields}
    return Persona.model_validate(document)


BROM = make_persona(
    adapter="lora",
    sampling={"temperature": 0.4, "top_k": 7, "repetition_penalty": 1.2, "stop": ["\n"]},
    limits={"soft_words": 9, "hard_tokens": 40},
    fallback=FALLBACK,
)
MUTE = AdapterMissing("personas/mute/adapter is not there.", "Train it.")


def count_characters(messages):
    """The fake tokenizer: one token for each character of the last message."""
    return tuple(range(len(messages[-1]["content"])))


def count_everything(messages):
    """One token for each character of all messages."""
    return tuple(range(sum(len(message["content"]) for message in messages)))


def make_stage(*personas, problems=None, render=count_characters):
    return Stage(
        info=DaemonInfo("0", "cpu", "torch", wire.BaseModelInfo(name="m", sha256="", context=CONTEXT)),
        library=Library({persona.id: persona for persona in personas or (BROM,)}, problems or {"mute": MUTE}),
        render=render,
        new_request_id=itertools.count(1).__next__,
        new_seed=itertools.count(500).__next__,
    )


class Game:
    """A client's side of a session: sends documents, plays the engine's events, keeps what came back."""

    def __init__(
        self,
        *personas,
        subprotocol="npc.v1.json",
        token=None,
        opens=True,
        problems=None,
        render=count_characters,
        **want,
    ):
        stage = make_stage(*personas, problems=problems, render=render)
        self.session = Session(subprotocol=subprotocol, door=Door(token=token), stage=stage)
        if opens:
            [self.welcome] = messages_of(self.send({"type": "hello", "protocol": 1, "want": want}))

    def send(self, document, now=0.0):
        is_text = self.session.subprotocol == "npc.v1.json"
        frame = json.dumps(document) if is_text else msgpack.packb(document)
        return self.session.receive(frame, now)

    def generate(self, *lines, batch="b", now=0.0, **fields):
        """Send lines (fields over a good one); returns `accepted` and the jobs that were submitted."""
        documents = [{"line": n, "persona": "brom", "input": {"text": "Hi"}, **x} for n, x in enumerate(lines)]
        effects = self.send({"type": "generate", "batch": batch, "lines": documents, **fields}, now)
        submits = [effect for effect in effects if isinstance(effect, Submit)]
        assert len(submits) <= 1
        return messages_of(effects)[0], submits[0].jobs if submits else ()

    def say(self, now, **texts):
        """One step in which these requests (`r1="text"`) spoke."""
        for name, text in texts.items():
            self.session.on_spoken(Spoken(int(name[1:]), text))
        return self.session.after_step(now)

    def end(self, request_id=1, reason=EndReason.STOP, *, now=1.0, **fields):
        return messages_of(self.session.on_ended(Ended(request_id, reason, **fields), now))


def messages_of(effects):
    return [effect.message for effect in effects if isinstance(effect, Send)]


def deltas_of(effects):
    """The items of all delta frames as (line, seq, text)."""
    frames = [message for message in messages_of(effects) if isinstance(message, wire.Delta)]
    return [(item.line, item.seq, item.text) for frame in frames for item in frame.items]


def codes_of(accepted):
    return [item.code or item.status for item in accepted.items]


def test_an_end_says_to_the_server_whose_line_it_was():
    game = Game()
    game.generate({})
    effects = game.session.on_ended(Ended(1, EndReason.STOP), 1.0)
    ends = [effect for effect in effects if isinstance(effect, Send) and isinstance(effect.message, wire.LineEnd)]
    assert [effect.persona for effect in ends] == ["brom"]


# -- hello ---------------------------------------------------------------------------------------------------

HELLO = {"type": "hello", "protocol": 1}


@pytest.mark.parametrize("subprotocol", wire.SUBPROTOCOLS)
def test_hello_is_answered_with_what_the_daemon_is(subprotocol):
    welcome = Game(BROM, subprotocol=subprotocol).welcome
    assert (len(welcome.session), welcome.protocol, welcome.base.context) == (16, 1, CONTEXT)
    assert welcome.caps == list(wire.CAPS)
    assert welcome.limits == {**wire.LIMITS, "context": CONTEXT}
    assert [(info.id, info.adapter, info.error and info.error.code) for info in welcome.personas] == [
        ("brom", "brom", None),
        ("mute", None, "adapter_missing"),
    ]


@pytest.mark.parametrize(
    ("document", "code", "reason"),
    [
        ({"type": "bye"}, 4400, "must be hello, not bye"),
        ({"type": "world.set"}, 4400, "world.set"),
        ({"type": "hello", "protocol": 2}, 4400, "not 2"),
        ({"type": "hello", "protocol": 1, "token": 7}, 4400, "token"),
        ({"type": "hello", "protocol": 1, "token": "sesame!"}, 4401, "token is wrong"),
        ({"type": "hello", "protocol": 1, "token": "sésame"}, 4401, "token is wrong"),
        (HELLO, 4401, "no token"),
        ([], 4400, "map"),
        ({"type": "é" * 200}, 4400, "é"),
    ],
)
def test_anything_but_a_good_hello_closes(document, code, reason):
    game = Game(token="sesame", opens=False)
    [close] = game.send(document)
    assert (type(close), close.code) == (Close, code)
    assert reason in close.reason
    assert len(close.reason.encode()) <= 123
    assert game.send({**HELLO, "token": "sesame"}) == []
    assert not game.session.is_open


def test_the_right_token_opens():
    game = Game(token="sesame", opens=False)
    [welcome] = messages_of(game.send({**HELLO, "token": "sesame"}))
    assert welcome.type == "welcome"
    assert game.session.is_open


def test_a_second_hello_is_an_error_and_the_session_stays_open():
    game = Game()
    [error] = messages_of(game.send({**HELLO, "id": 7}))
    assert (error.code, error.re) == ("protocol", 7)
    assert game.session.is_open


@pytest.mark.parametrize("subprotocol", wire.SUBPROTOCOLS)
def test_a_welcome_with_too_many_personas_is_cut_to_the_frame(subprotocol):
    personas = [make_persona(f"p{number:03}", display_name="é" * 90) for number in range(400)]
    game = Game(*personas, subprotocol=subprotocol, problems={})
    assert 50 < len(game.welcome.personas) < 400
    assert codec.frame_size(game.welcome, subprotocol) <= wire.MAX_SERVER_FRAME


# -- generate ------------------------------------------------------------------------------------------------


def test_good_lines_are_submitted_together_and_bad_ones_refused_each_with_its_reason():
    long = {"text": "x" * 8_001}
    turn = [{"role": "user", "content": "Hi"}]
    refused = [
        ({"persona": "bron"}, "persona_unknown"),
        ({"persona": "mute"}, "adapter_missing"),
        ({"persona": None}, "invalid"),
        ({"input": {"text": " \n"}}, "invalid"),
        ({"input": long}, "invalid"),
        ({"input": None, "messages": [{"role": "user", "content": "x" * 4_001}] * 2}, "invalid"),
        ({"messages": turn}, "invalid"),
        ({"input": None}, "invalid"),
        ({"input": None, "messages": []}, "invalid"),
        ({"input": None, "messages": [*turn, {"role": "assistant", "content": "Hm."}]}, "invalid"),
        ({"line": 0}, "invalid"),
        ({"line": None}, "invalid"),
        ({"npc": "n1"}, "invalid"),
        ({"persona": None, "npc": "n1"}, "npc_unknown"),
        ({"persona": "brom", "draft": {}}, "invalid"),
        ({"format": {"kind": "regex", "value": "a+"}}, "format_unsupported"),
        ({"sampling": {"min_tokens": 41}}, "invalid"),
        ({"sampling": {"max_tokens": 1_024, "trim": "none"}, "input": {"text": "x" * 8_000}}, "queued"),
    ]
    accepted, jobs = Game().generate({}, *(fields for fields, _ in refused), {"line": "last"}, id="g")
    assert codes_of(accepted) == ["queued", *(code for _, code in refused), "queued"]
    assert (accepted.batch, accepted.re) == ("b", "g")
    assert len({job.request_id for job in jobs}) == 3
    for item in accepted.items:
        assert item.status == "queued" or (item.message and item.hint)
    assert [item.line for item in accepted.items][-2:] == [18, "last"]


def test_what_is_no_line_at_all_is_refused_without_an_id():
    game = Game()
    effects = game.send({"type": "generate", "batch": 1, "lines": [None, 7, [], {"line": [1]}]})
    accepted, batch_end = messages_of(effects)
    assert codes_of(accepted) == ["invalid"] * 4
    assert [item.line for item in accepted.items] == [None] * 4
    assert (batch_end.ok, batch_end.failed, batch_end.forwards) == (0, 4, 0)


def test_what_the_engine_gets():
    _, [job] = Game().generate(
        {
            "input": {"speaker": "Ada", "text": "Hi"},
            "context": {"facts": ["Rain"]},
            "deadline_ms": 250,
            "priority": 8,
        }
    )
    assert job.prompt_ids == tuple(range(len("(Rain.)\nAda: Hi")))
    assert (job.batch, job.adapter, job.soft_words, job.priority, job.deadline_ms) == ("b", "brom", 9, 8, 250)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (
            {},
            {
                "temperature": 0.4,
                "top_k": 7,
                "top_p": 0.95,
                "stop": ["\n"],
                "max_tokens": 40,
                "trim": "sentence",
            },
        ),
        (
            {"temperature": 2, "stop": [], "top_k": 0},
            {"temperature": 2.0, "top_k": 0, "stop": [], "top_p": 0.95},
        ),
        # Asked to be greedy, nothing authored bends the choice.
        (
            {"temperature": 0},
            {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, "stop": ["\n"]},
        ),
        ({"temperature": 0, "repetition_penalty": 1.1}, {"repetition_penalty": 1.1, "max_tokens": 40}),
        ({"max_tokens": 10}, {"max_tokens": 10}),
        ({"max_tokens": 900}, {"max_tokens": 40}),
        ({"max_tokens": 900, "trim": "none"}, {"max_tokens": 900}),
        ({"trim": "none"}, {"max_tokens": 40, "trim": "none"}),
        ({"seed": 0}, {"seed": 0}),
        ({}, {"seed": 500}),
    ],
)
def test_sampling_is_the_lines_else_the_personas(asked, expected):
    game = Game()
    _, [job] = game.generate({"sampling": asked})
    resolved = job.sampling.model_dump()
    assert {name: resolved[name] for name in expected} == expected
    assert None not in resolved.values()
    [start] = messages_of(game.session.on_started(Started(1, 0.0, 1)))
    assert start.seed == game.end()[0].seed == resolved["seed"]


def test_a_prompt_and_reply_larger_than_the_context_are_refused():
    fits = {
        "context": {"facts": ["x" * 980] * 2},
        "input": {"text": "x" * 7_990},
        "sampling": {"max_tokens": 24},
    }
    room = CONTEXT - 24 - len("(. .)\n") - 2 * 980 - 7_990
    assert room > 0
    game = Game()
    more = {**fits, "context": {"facts": ["x" * 980, "x" * 980, "x" * (room - 2)]}}
    overflow = {**more, "sampling": {"max_tokens": 25}}
    accepted, [job] = game.generate(more, overflow)
    assert len(job.prompt_ids) + 24 == CONTEXT
    assert codes_of(accepted) == ["queued", "context_overflow"]
    assert str(CONTEXT) in accepted.items[1].message


def test_a_history_too_long_loses_its_oldest_turns_and_says_so():
    def talk(num_turns):
        turns = [{"role": role, "content": "x" * 250} for _ in range(num_turns) for role in ("user", "assistant")]
        messages = [*turns, {"role": "user", "content": "Well?"}]
        return {"input": None, "messages": messages, "context": {"facts": ["y" * 900] * 4}}

    game = Game(render=count_everything)
    accepted, [short, long] = game.generate(talk(2), talk(14))
    assert codes_of(accepted) == ["queued", "queued"]
    assert accepted.items[0].message is None
    assert accepted.items[1].message == "Left out of the prompt: the 8 oldest messages."
    assert len(long.prompt_ids) - len(short.prompt_ids) == (28 - 8 - 4) * 250


def test_a_form_that_cannot_be_kept_is_refused():
    document = {"schema": 1, "id": "brom", "display_name": "Brom", "bio": "A smith."}
    shy = Persona.model_validate({**document, "format": {"kind": "choice", "value": ["Aye.", "No."]}})
    accepted, _ = Game(shy).generate({}, {"format": {"kind": "text"}})
    assert codes_of(accepted) == ["format_unsupported", "queued"]
    assert "'format'" in accepted.items[0].hint


def test_knowledge_comes_with_this_turns_context():
    knows = [{"id": "a", "text": "He lies", "when": '"Odo" in nearby and "gold" in said'}]
    document = {"schema": 1, "id": "brom", "display_name": "Brom", "bio": "A smith.", "knows": knows}
    game = Game(Persona.model_validate(document))
    near = {"context": {"nearby": ["Odo"]}, "input": {"text": "Gold?"}}
    _, jobs = game.generate({**near, "context": {}}, near)
    assert [len(job.prompt_ids) for job in jobs] == [len("Gold?"), len("(He lies. Nearby: Odo.)\nGold?")]


@pytest.mark.parametrize(
    ("fields", "code"),
    [({"mode": "turns"}, "unsupported"), ({"batch": "running"}, "invalid"), ({"batch": {}}, "invalid")],
)
def test_a_batch_that_is_refused_as_a_whole_starts_nothing(fields, code):
    game = Game()
    game.generate({"line": "a"}, batch="running")
    document = {
        "type": "generate",
        "batch": 1,
        "lines": [{"line": "c", "persona": "brom"}],
        "id": 3,
        **fields,
    }
    [error] = game.send(document)
    assert (error.message.code, error.message.re) == (code, 3)


def test_ids_can_be_used_again_when_their_line_is_over():
    game = Game()
    game.generate({"line": "a"})
    assert codes_of(game.generate({"line": "a"}, batch=2)[0]) == ["invalid"]
    game.end(1)
    assert codes_of(game.generate({"line": "a"})[0]) == ["queued"]


def test_the_lines_of_a_connection_are_bounded():
    game = Game()
    for batch in range(4):
        game.generate(*({"line": f"{batch}-{number}"} for number in range(64)), batch=batch)
    assert codes_of(game.generate({"line": "more"}, batch="more")[0]) == ["overload"]
    game.end(1)
    assert codes_of(game.generate({"line": "more"}, batch="more")[0]) == ["queued"]


@pytest.mark.parametrize("subprotocol", wire.SUBPROTOCOLS)
@pytest.mark.parametrize("line", [{"persona": "x" * 64}, {"persona": "mute"}, {"sampling": {"\x01" * 64: 1}}])
def test_a_batch_of_bad_lines_is_answered_within_the_frame(line, subprotocol):
    personas = [make_persona(f"a-smith-with-a-rather-long-name-{number:02}") for number in range(30)]
    problem = {"mute": AdapterMissing(f"{'/a/deep/folder' * 20}/adapter is not there.", "Train it, or leave it out.")}
    game = Game(*personas, problems=problem, subprotocol=subprotocol)
    lines = [{"line": f"{number:064}", **line} for number in range(64)]
    effects = game.send({"type": "generate", "batch": 1, "lines": lines})
    items = [item for message in messages_of(effects) for item in getattr(message, "items", ())]
    assert [item.line for item in items] == [line["line"] for line in lines]
    for message in messages_of(effects):
        assert codec.frame_size(message, subprotocol) <= wire.MAX_SERVER_FRAME


# -- deltas --------------------------------------------------------------------------------------------------


def test_the_first_delta_goes_out_at_once_and_later_ones_wait_for_the_tick():
    game = Game(tick_ms=30)
    game.generate({"line": "a"}, {"line": "b"})
    assert deltas_of(game.say(0.0, r1="One")) == [("a", 0, "One")]
    assert game.session.wake_at is None
    assert deltas_of(game.say(0.010, r1=" two", r2="Yes")) == [("b", 0, "Yes")]
    assert game.session.wake_at == pytest.approx(0.040)
    assert game.say(0.020, r1=" three", r2=" no") == []
    assert game.session.tick(0.039) == []
    [send] = game.session.tick(0.041)
    assert deltas_of([send]) == [("a", 1, " two three"), ("b", 1, " no")]
    assert game.session.wake_at is None
    assert game.session.tick(9.0) == []


def test_deltas_wait_and_merge_while_the_client_does_not_keep_up():
    game = Game()
    game.generate({"line": "a"})
    game.session.set_congested(True, 0.0)
    assert game.say(0.0, r1="One") == []
    assert game.say(4.0, r1=" two") == []
    assert game.session.tick(4.9) == []
    game.session.set_congested(False, 0.0)
    assert deltas_of(game.session.tick(6.0)) == [("a", 0, "One two")]


def test_a_client_that_does_not_read_loses_its_lines_and_is_told_so():
    game = Game(make_persona(fallback=FALLBACK))
    game.send({"type": "npc.open", "npc": "n", "persona": "brom"})
    game.generate({"line": "a"}, *({"line": name, "persona": None, "npc": "n"} for name in "bc"))
    game.say(0.0, r1="One")
    game.session.set_congested(True, 1.0)
    game.session.set_congested(True, 2.0)
    game.say(5.0, r1=" two")
    assert game.session.wake_at == 6.0
    assert game.session.tick(5.9) == []
    effects = game.session.tick(6.0)
    assert [effect for effect in effects if isinstance(effect, Stop)] == [Stop((1, 2))]
    [held] = [message for message in messages_of(effects) if message.type == "line.end"]
    assert (held.line, held.reason, held.text, held.fallback) == ("c", "overload", "Not now.", True)
    assert game.session.tick(6.5) == [], "once is enough"
    assert game.end(2, EndReason.STOP, text="Aye.")[0].reason == "stop", "it was faster"
    delta, end, event, batch_end = game.end(1, EndReason.CANCELLED, text="One two")
    assert (delta.items[0].text, end.reason, end.text) == (" two", "overload", "One two")
    assert (end.error.code, end.error.retryable) == ("overload", True)
    assert (event.kind, batch_end.type) == ("overload", "batch.end")
    game.generate({"line": "d"}, batch="later")
    assert game.session.wake_at == 11.0
    game.session.set_congested(False, 7.0)
    assert game.session.tick(7.0) == []
    assert game.session.wake_at is None


def test_the_end_brings_what_still_waits_in_front_of_it():
    game = Game()
    game.generate({"line": "a"})
    game.say(0.0, r1="One")
    game.session.set_congested(True, 0.0)
    game.say(0.0, r1=" two")
    delta, end, _ = game.end(text="One two")
    assert (delta.items[0].seq, delta.items[0].text) == (1, " two")
    assert (end.text, end.reason) == ("One two", "stop")
    game.session.set_congested(False, 0.0)
    assert game.session.after_step(1.0) == game.session.tick(9.0) == []


@pytest.mark.parametrize("subprotocol", wire.SUBPROTOCOLS)
def test_delta_frames_keep_to_the_size_that_was_asked_for(subprotocol):
    game = Game(subprotocol=subprotocol)
    game.generate(*({"line": f"{number:064}"} for number in range(64)))
    texts = {f"r{number}": "\x01🙂" * (60 * number % 1_999) for number in range(1, 65)}
    effects = game.say(0.0, **texts)
    assert all(codec.frame_size(message, subprotocol) <= wire.MAX_SERVER_FRAME for message in messages_of(effects))
    assert [text for _, _, text in deltas_of(effects)] == [text for text in texts.values() if text]
    assert len(effects) < 64


def test_a_line_that_does_not_stream_says_nothing_before_its_end():
    game = Game()
    game.generate({"stream": False})
    assert game.say(0.0, r1="One two") == []
    assert game.session.tick(9.0) == []
    assert [message.type for message in game.end(text="One two.")] == ["line.end", "batch.end"]


# -- ends ----------------------------------------------------------------------------------------------------


def test_a_line_ends_once_and_is_not_heard_of_again():
    game = Game()
    game.generate({"line": "a"}, {"line": "b"})
    [end] = game.end(1, text="Hm.", num_prompt=5, num_completion=2, queue_ms=0.12345, first_text_ms=3.0)
    assert (end.line, end.text, end.fallback, end.error) == ("a", "Hm.", False, None)
    assert (end.usage.prompt, end.usage.completion) == (5, 2)
    assert (end.timing.queue_ms, end.timing.ttft_ms) == (0.123, 3.0)
    assert game.end(1) == []
    assert game.session.on_started(Started(1, 0.0, 1)) == []
    assert game.say(2.0, r1="More") == []


def test_prompt_hash_tells_prompts_apart():
    game = Game()
    game.generate({}, {}, {"input": {"text": "Hello"}})
    same, again, other = (game.end(number)[0].prompt_hash for number in (1, 2, 3))
    assert same == again != other


def test_the_batch_ends_with_its_last_line_and_counts_all():
    game = Game()
    game.generate({}, {"persona": "none"}, {}, {}, now=1.0)
    game.generate({"line": "other"}, batch="b2")
    game.session.on_forward(["b", "b2"])
    game.session.on_forward(["b", "long over"])
    assert [message.type for message in game.end(1, EndReason.STOP)] == ["line.end"]
    assert [message.type for message in game.end(2, EndReason.LENGTH)] == ["line.end"]
    end, batch_end = game.end(3, EndReason.CANCELLED, now=1.5)
    assert end.reason == "cancelled"
    assert (batch_end.batch, batch_end.ok, batch_end.failed) == ("b", 2, 2)
    assert (batch_end.forwards, batch_end.wall_ms) == (2, 500.0)
    assert game.end(4)[-1].forwards == 1


@pytest.mark.parametrize(
    ("reason", "line", "spoken", "expected"),
    [
        ("deadline", {}, "", "Wait."),
        ("error", {}, "", "Wait."),
        ("overload", {}, "", "Not now."),
        ("cancelled", {}, "", ""),
        ("stop", {}, "", ""),
        ("deadline", {"sampling": {"seed": 2}}, "", "Hm."),
        ("deadline", {"fallback": False}, "", ""),
        ("deadline", {}, "One", "One"),
        ("error", {}, "One", "One"),
    ],
)
def test_fallback_only_for_a_failure_before_the_first_word(reason, line, spoken, expected):
    game = Game()
    game.generate({"sampling": {"seed": 1}, **line})
    if spoken:
        game.say(0.0, r1=spoken)
    end = game.end(1, EndReason(reason), text=spoken)[0]
    assert (end.text, end.reason) == (expected, reason)
    assert end.fallback == (expected not in ("", spoken))


def test_a_persona_without_fallback_lines_ends_with_what_there_is():
    game = Game(make_persona())
    game.generate({})
    assert game.end(1, EndReason.DEADLINE)[0].fallback is False


@pytest.mark.parametrize("error", [OverloadError("Full.", "Wait."), InternalError("Broken.", "Report it.")])
def test_an_error_is_beside_the_text_never_in_it(error):
    game = Game(make_persona())
    game.generate({})
    end = game.end(1, EndReason.ERROR, error=error)[0]
    assert end.text == ""
    assert end.error.model_dump() == {
        "code": error.code,
        "message": error.message,
        "hint": error.hint,
        "retryable": error.retryable,
    }


# -- cancel and leaving --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ({"lines": ["b1", 0]}, {1, 2}),
        ({"lines": ["b1", "nobody", 99]}, {2}),
        ({"lines": []}, set()),
        ({"batch": "b"}, {1, 2}),
        ({"batch": "nobody"}, set()),
        ({"npc": "nobody"}, set()),
        ({"all": True}, {1, 2, 3}),
    ],
)
def test_cancel_stops_what_is_named(selector, expected):
    game = Game()
    game.generate({}, {"line": "b1"})
    game.generate({"line": "c0"}, batch="c")
    effects = game.send({"type": "cancel", **selector})
    assert all(isinstance(effect, Stop) for effect in effects)
    assert {request_id for effect in effects for request_id in effect.request_ids} == expected


@pytest.mark.parametrize(
    ("selector", "code"),
    [
        ({}, "invalid"),
        ({"lines": [0], "batch": "b"}, "invalid"),
        ({"batch": "b", "all": True}, "invalid"),
        ({"lines": [], "all": True}, "invalid"),
        ({"npc": "n1", "all": True}, "invalid"),
    ],
)
def test_cancel_needs_exactly_one_selector(selector, code):
    game = Game()
    game.generate({})
    [error] = game.send({"type": "cancel", "id": 5, **selector})
    assert (error.message.code, error.message.re) == (code, 5)


def test_cancel_is_idempotent_and_the_end_comes_from_the_engine():
    game = Game()
    game.generate({})
    cancel = {"type": "cancel", "all": True}
    assert game.send(cancel) == game.send(cancel) == [Stop((1,))]
    assert [message.type for message in game.end(1, EndReason.CANCELLED)] == ["line.end", "batch.end"]
    assert game.send(cancel) == []


@pytest.mark.parametrize("is_polite", [True, False])
def test_leaving_cancels_everything_and_nothing_more_is_sent(is_polite):
    game = Game()
    game.generate({}, {})
    game.say(0.0, r1="One")
    stop, dropped, *close = game.send({"type": "bye"}) if is_polite else game.session.disconnect(0.0)
    assert sorted(stop.request_ids) == [1, 2]
    assert dropped.personas == ("brom", "brom")
    assert close == ([Close(1000, "bye")] if is_polite else [])
    assert game.session.disconnect(0.0) == []
    assert game.end(1) == game.say(1.0, r2="Two") == game.session.tick(9.0) == game.send({"type": "status"}) == []


# -- questions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "frame", ["", "[]", b"\x80", '{"type":"status","id":"' + "x" * 65 + '"}', '{"type":"nonsense"}']
)
def test_a_bad_frame_is_answered_and_the_session_goes_on(frame):
    game = Game()
    [error] = messages_of(game.session.receive(frame, 0.0))
    assert error.type == "error"
    assert error.re is None
    assert game.send({"type": "status", "id": 1}) == [SendStatus(1)]


def test_persona_list():
    [reply] = messages_of(Game().send({"type": "persona.list", "id": "p"}))
    brom, mute = reply.body["personas"]
    assert (reply.re, brom) == ("p", {"id": "brom", "display_name": "Brom", "adapter": "brom"})
    assert (mute["id"], mute["error"]["hint"]) == ("mute", "Train it.")


@pytest.mark.parametrize("subprotocol", wire.SUBPROTOCOLS)
@pytest.mark.parametrize("filler", ["x", '"', "\x01", "é", "🙂", "\\"])
def test_a_reply_that_is_too_large_comes_in_parts(subprotocol, filler):
    game = Game(subprotocol=subprotocol)
    body = {"personas": [{"id": number, "display_name": filler * 1_000} for number in range(100)]}
    parts = messages_of(game.session.reply("p", body))
    assert [(part.part, part.parts, part.re) for part in parts] == [(n, len(parts), "p") for n in range(len(parts))]
    assert all(codec.frame_size(part, subprotocol) <= wire.MAX_SERVER_FRAME for part in parts)
    assert json.loads("".join(part.data for part in parts)) == body


def test_a_larger_frame_can_be_asked_for():
    game = Game(max_frame=wire.MAX_CLIENT_FRAME)
    body = {"text": "x" * 500_000}
    assert [message.body for message in messages_of(game.session.reply(1, body))] == [body]
