"""The `warmup` message through a session: what the engine gets for each persona, and the one answer."""

import pytest
from test_session import BROM, Game, make_persona, messages_of

from npc_runtime.effects import Dropped, Stop, Submit
from npc_runtime.engine.core import Ended, EndReason
from npc_runtime.errors import AdapterIncompatible, OverloadError

ODO = make_persona("odo")


def render(messages):
    """A token for each character of the whole prompt."""
    return tuple(ord(character) for message in messages for character in f"{message['role']}: {message['content']}\n")


def play(*personas, **options):
    return Game(*(personas or (BROM, ODO)), **{"render": render, **options})


def warm(game, *personas, **fields):
    """Send a warmup; returns its jobs, and what is answered at once."""
    effects = game.send({"type": "warmup", "personas": list(personas), **fields})
    jobs = [job for effect in effects if isinstance(effect, Submit) for job in effect.jobs]
    return jobs, messages_of(effects)


def end(game, request_id, reason=EndReason.STOP, **fields):
    return messages_of(game.session.on_ended(Ended(request_id, reason, **fields), 1.0))


def test_the_engine_gets_what_is_the_same_whatever_the_player_says():
    jobs, answers = warm(play(), "brom", "odo", id=5)
    assert answers == []
    for job, persona in zip(jobs, (BROM, ODO), strict=True):
        same = render(persona.messages([], ""))[:-1]
        assert job.prompt_ids == same
        for text in ("Hello?", "4", "Who goes there?", "¿Qué?"):
            assert render(persona.messages([], text))[: len(same)] == same
    assert [(job.batch, job.adapter, job.priority, job.deadline_ms) for job in jobs] == [
        (None, "brom", 0, None),
        (None, None, 0, None),
    ]
    assert None not in jobs[0].sampling.model_dump().values()


def test_a_base_whose_prompts_have_nothing_in_common_still_gets_a_token():
    game = play(render=lambda messages: tuple(map(ord, messages[-1]["content"])))
    [job], _ = warm(game, "odo")
    assert len(job.prompt_ids) == 1


def test_one_answer_when_all_are_done_in_the_order_of_the_question():
    game = play()
    jobs, _ = warm(game, "brom", "nobody", "odo", "mute", "brom", id="w")
    assert len(jobs) == 2
    assert end(game, jobs[1].request_id, num_prompt=60, num_cached=48) == []
    [reply] = end(game, jobs[0].request_id, num_prompt=70, num_cached=64)
    assert reply.re == "w"
    items = reply.body["personas"]
    assert items[0] == {"persona": "brom", "status": "ready", "prompt_tokens": 70, "cached_tokens": 64}
    assert items[2] == {"persona": "odo", "status": "ready", "prompt_tokens": 60, "cached_tokens": 48}
    assert [(item["persona"], item["status"], item.get("code")) for item in items] == [
        ("brom", "ready", None),
        ("nobody", "rejected", "persona_unknown"),
        ("odo", "ready", None),
        ("mute", "rejected", "adapter_missing"),
    ]
    assert all(item["message"] and item["hint"] for item in items if item["status"] == "rejected")
    assert end(game, jobs[0].request_id) == []


def test_personas_that_cannot_be_warmed_at_all_are_answered_at_once():
    jobs, [reply] = warm(play(), "nobody", id=1)
    assert jobs == []
    assert [item["code"] for item in reply.body["personas"]] == ["persona_unknown"]


@pytest.mark.parametrize(
    ("ended", "code"),
    [
        (
            {"reason": EndReason.ERROR, "error": AdapterIncompatible("a/b is damaged.", "Copy it.")},
            "adapter_incompatible",
        ),
        ({"reason": EndReason.OVERLOAD, "error": OverloadError("The queue is full.", "Wait.")}, "overload"),
        ({"reason": EndReason.CANCELLED}, "overload"),
    ],
)
def test_what_the_engine_could_not_do_is_rejected_with_its_reason(ended, code):
    game = play()
    jobs, _ = warm(game, "brom", "odo")
    end(game, jobs[1].request_id)
    [reply] = end(game, jobs[0].request_id, **ended)
    assert [(item["status"], item.get("code")) for item in reply.body["personas"]] == [
        ("rejected", code),
        ("ready", None),
    ]
    assert reply.body["personas"][0]["hint"]


def test_a_prompt_that_cannot_be_rendered_is_this_personas_problem_alone():
    def refuse(messages):
        if "Odo" in messages[0]["content"]:
            raise ValueError("a template that is broken")
        return render(messages)

    game = play(render=refuse)
    [job], _ = warm(game, "odo", "brom")
    [reply] = end(game, job.request_id)
    assert [item.get("code") for item in reply.body["personas"]] == ["internal", None]


@pytest.mark.parametrize("personas", [[], ["x"] * 65, "odo", [7], ["x" * 65], None])
def test_a_warmup_that_is_no_list_of_names_is_refused(personas):
    [error] = messages_of(play().send({"type": "warmup", "id": 3, "personas": personas}))
    assert (error.type, error.code, error.re) == ("error", "invalid", 3)
    assert "personas" in error.message


def test_lines_and_warmups_of_a_connection_are_bounded_together():
    game = play()
    for batch in range(3):
        game.generate(*({"line": f"{batch}-{number}"} for number in range(64)), batch=batch)
    game.generate(*({"line": f"last-{number}"} for number in range(63)), batch="last")
    jobs, _ = warm(game, "brom", "odo")
    assert len(jobs) == 1
    accepted, _ = game.generate({"line": "more"}, batch="more")
    assert [item.code for item in accepted.items] == ["overload"]
    [reply] = end(game, jobs[0].request_id)
    assert [item.get("code") for item in reply.body["personas"]] == [None, "overload"]
    assert game.generate({"line": "more"}, batch="again")[0].items[0].status == "queued"


def test_leaving_cancels_a_warmup_and_nothing_more_is_said():
    game = play()
    jobs, _ = warm(game, "brom", "odo")
    game.generate({"line": 1})
    [stop, dropped] = game.session.disconnect(0.0)
    assert dropped == Dropped(("brom",))
    assert isinstance(stop, Stop)
    assert set(stop.request_ids) == {*(job.request_id for job in jobs), 3}
    assert [end(game, job.request_id, EndReason.CANCELLED) for job in jobs] == [[], []]


def test_cancelling_lines_leaves_warmups_alone():
    game = play()
    jobs, _ = warm(game, "brom")
    assert game.send({"type": "cancel", "all": True}) == []
    assert len(end(game, jobs[0].request_id)) == 1


def test_a_large_answer_comes_in_parts():
    problem = OverloadError("x" * 1_000, "y" * 1_000)
    game = play(problems={f"p{number}": problem for number in range(64)})
    _, answers = warm(game, *(f"p{number}" for number in range(64)), id=4)
    assert len(answers) > 1
    assert {(answer.re, answer.parts) for answer in answers} == {(4, len(answers))}


def test_clients_are_told_that_it_is_served():
    assert "warmup" in play().welcome.caps
    assert play().welcome.limits["warmup"] == 64
