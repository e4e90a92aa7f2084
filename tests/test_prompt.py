"""What the model reads: in this order, the same for what trained the shipped adapters, and cut where it must be."""

import json
from pathlib import Path

import pytest
from families import FAMILIES, make_base, speak
from hypothesis import given, settings
from hypothesis import strategies as st

from npc_runtime.engine.tokenizer import ChatTokenizer
from npc_runtime.persona import Persona, shipped_personas
from npc_runtime.prompt import Context, count_parts, fit_prompt

PROMPTS = Path(__file__).parent / "prompts"


def guard(**fields):
    return Persona.model_validate(
        {"schema": 1, "id": "g", "display_name": "Guard", "bio": "Watches the gate", **fields}
    )


def system(**fields):
    return guard(**fields).messages([], "Hi")[0]["content"]


def said(persona, text="Hi", **options):
    return persona.messages([], text, **options)[-1]["content"]


# -- golden renders ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", json.loads((PROMPTS / "shipped.json").read_text(encoding="utf-8")))
def test_the_shipped_prompts_are_those_the_adapters_were_trained_with(case, float_base):
    """Written by the version that trained them; never generated again."""
    expected = json.loads((PROMPTS / "shipped.json").read_text(encoding="utf-8"))[case]
    persona_id, kind = case.split(".")
    persona = Persona.load(shipped_personas() / persona_id)
    if kind == "plain":
        messages = persona.messages([], "The king is dead!")
    else:
        history = [{"role": "user", "content": "Good evening."}, {"role": "assistant", "content": "Evening."}]
        facts = ("The king is dead.", "It rains")
        context = Context(scene="The taproom, late", mood="tense", nearby=("Brom", "a stranger"), facts=facts)
        messages = persona.messages(history, "Is it true?", speaker="Ada", context=context)
    prompt = float_base.tokenizer.render(messages)
    assert prompt.text == expected["text"]
    assert list(prompt.token_ids) == expected["token_ids"]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_prompt_of_every_family(name, tmp_path):
    """`make generate` writes them anew; read the difference."""
    prompt = speak(ChatTokenizer(make_base(name, tmp_path)))
    assert prompt.text == (PROMPTS / f"{name}.txt").read_text(encoding="utf-8")


# -- the persona's words -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ""),
        ({"personality": "Proud"}, "Proud. "),
        ({"scenario": "A gate"}, "Scenario: A gate. "),
        ({"goals": ["sleep", "more pay"]}, "You want: sleep; more pay. "),
        ({"knows": [{"id": "a", "text": "It is late"}, {"id": "b", "text": "No."}]}, "You know: It is late. No. "),
        ({"never_says": ["okay", "cool"]}, 'Never say: "okay", "cool". '),
        ({"guardrails": {"avoid": ["dice", "war"]}}, "Never talk about: dice; war. "),
        ({"locale": "en-GB"}, ""),
        ({"locale": "pt-BR"}, "Speak Portuguese. "),
        ({"locale": "gsw"}, "Speak the language with the code gsw. "),
        ({"notes": "x", "tags": ["x"], "greetings": ["x"], "voice": {"id": "x"}, "emotions": ["x"]}, ""),
    ],
)
def test_fields_that_are_set_are_said(fields, expected):
    closing = "Reply in character, in one or two sentences."
    assert system(**fields) == f"You are Guard. Watches the gate. {expected}{closing}"


def test_a_system_prompt_of_its_own_replaces_the_closing_words():
    assert system(system_prompt="Rhyme.") == "You are Guard. Watches the gate. Rhyme."
    closing = "Reply in character, in one or two sentences."
    assert system(system_prompt="{{original}} Rhyme, {{char}}.").endswith(f"{closing} Rhyme, Guard.")


def test_names_stand_in_for_macros_in_authored_text_only():
    persona = guard(examples=[{"player": "{{USER}}?", "npc": "{{char}}!"}], post_history_instructions="As {{char}}")
    messages = persona.messages([{"role": "user", "content": "{{char}}"}], "{{char}}", context=Context(mood="{{user}}"))
    contents = [message["content"] for message in messages[1:]]
    assert contents == ["the player?", "Guard!", "{{char}}", "(Mood: {{user}}. As Guard.)\n{{char}}"]


# -- what changes from turn to turn ---------------------------------------------------------------------------


KNOWING = {
    "knows": [
        {"id": "dead", "text": "The dragon is dead", "when": 'quest.dragon == "dead"'},
        {"id": "always", "text": "The gate is old"},
        {"id": "tower", "text": "The tower burns", "when": '"TOWER" in said', "priority": 1},
        {"id": "bert", "text": "Bert owes you", "when": '"Bert" in nearby and mood == "angry"'},
        {"id": "ada", "text": "Ada is your sister", "when": 'speaker == "Ada"'},
        {"id": "facts", "text": "It is wet", "when": '"It rains." in facts'},
        {"id": "scene", "text": "Your post", "when": '"gate" in scene'},
    ]
}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "Hi"),
        ({"facts": {"quest.dragon": "dead"}}, "(The dragon is dead.)\nHi"),
        ({"facts": {"quest": {"dragon": "dead"}}}, "(The dragon is dead.)\nHi"),
        ({"facts": {"quest.dragon": "asleep"}}, "Hi"),
        ({"text": "Tower!", "facts": {"quest.dragon": "dead"}}, "(The tower burns. The dragon is dead.)\nTower!"),
        ({"speaker": "Ada"}, "(Ada is your sister.)\nAda: Hi"),
        ({"context": {"mood": "angry", "nearby": ["Bert"]}}, "(Bert owes you. Mood: angry. Nearby: Bert.)\nHi"),
        ({"context": {"facts": ["It rains."], "scene": "Gate"}}, "(It is wet. Your post. Scene: Gate. It rains.)\nHi"),
        ({"facts": {"said": "tower", "speaker": "Ada"}}, "Hi"),  # the turn's own come first
    ],
)  # fmt: skip
def test_knowledge_comes_with_its_facts(options, expected):
    context = Context.model_validate(options.pop("context", {}))
    text = options.pop("text", "Hi")
    persona = guard(**KNOWING)
    assert said(persona, text, context=context, **options) == expected
    assert "You know: The gate is old." in persona.messages([], "x")[0]["content"]


def test_what_changes_every_turn_leaves_what_precedes_alone():
    """The prefix cache serves persona, examples and earlier turns, whatever the facts are now."""
    persona = guard(**KNOWING, examples=[{"player": "a", "npc": "b"}])
    history = [{"role": "user", "content": "One."}, {"role": "assistant", "content": "Two."}]
    plain = persona.messages(history, "Hi")
    told = persona.messages(
        history, "Tower", facts={"quest.dragon": "dead"}, speaker="Ada", context=Context(mood="sad")
    )
    assert plain[:-1] == told[:-1]


def test_knowledge_of_a_turn_has_a_bound():
    entries = [{"id": f"k{n}", "text": f"{n} b c", "when": "not no", "priority": n} for n in range(5)]
    prompt = guard(knows=entries, limits={"knowledge_words": 7}).prompt([], "Hi")
    assert prompt.knowledge == ("4 b c", "3 b c")
    assert prompt.omitted == ("2 b c", "1 b c", "0 b c")


# -- prompts that are too long --------------------------------------------------------------------------------


def render(messages):
    """A token for each character, and three for each message."""
    return tuple(range(sum(len(message["content"]) + 3 for message in messages)))


def talk(num_messages, first="user"):
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[n % 2], "content": f"{n:>7}"} for n in range(num_messages)]


@pytest.mark.parametrize("first", ["user", "assistant"])
@pytest.mark.parametrize("num_messages", [0, 1, 2, 5, 12, 40, 41])
def test_the_oldest_turns_go_and_the_persona_stays(num_messages, first):
    persona = guard(examples=[{"player": "a", "npc": "b"}])
    history = talk(num_messages, first)
    prompt = persona.prompt(history, "Hi")
    whole, least = len(render(prompt.messages)), len(render(persona.messages([], "Hi")))
    for room in range(least - 2, whole + 2):
        fitted = fit_prompt(prompt, render, room)
        assert fitted.prompt.system == prompt.system
        assert fitted.prompt.examples == prompt.examples
        assert fitted.prompt.said == "Hi"
        assert list(fitted.prompt.history) == history[fitted.num_dropped :]
        assert fitted.token_ids == render(fitted.prompt.messages)
        assert (len(fitted.token_ids) <= room) == (room >= least)
        assert (fitted.num_dropped == 0) == (room >= whole or not history)
        assert (fitted.left_out is None) == (fitted.num_dropped == 0)
        if fitted.num_dropped and fitted.prompt.history:
            assert fitted.prompt.history[0]["role"] == "user"


def test_the_cut_stays_where_it_is_for_some_turns():
    """Each cut makes the cached prefix useless: of 40 turns in a full context fewer than a third may cut anew."""
    cuts = set()
    for turn in range(20, 60):
        prompt = guard().prompt(talk(2 * turn), "Hi")
        cuts.add(fit_prompt(prompt, render, 400).num_dropped)
    assert len(cuts) < 13


def test_knowledge_goes_after_history_and_the_least_important_first():
    entries = [{"id": f"k{n}", "text": "x" * 40, "when": "not no", "priority": n} for n in range(3)]
    entries[0]["text"], entries[2]["text"] = "least", "most"
    persona = guard(knows=entries)
    prompt = persona.prompt(talk(4), "Hi")
    room = len(render(persona.messages([], "Hi"))) - 3
    fitted = fit_prompt(prompt, render, room)
    assert fitted.num_dropped == 4
    assert fitted.dropped_knowledge == ("least",)
    assert fitted.left_out == "Left out of the prompt: the 4 oldest messages and 1 things it knows now."


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(0, 60), max_size=40), st.integers(0, 900), st.integers(0, 60))
def test_what_is_expected_changes_nothing(lengths, room, expected):
    turns = [{"role": ("user", "assistant")[n % 2], "content": "x" * size} for n, size in enumerate(lengths)]
    knows = [{"id": f"k{n}", "text": "y" * 30, "when": "not no"} for n in range(3)]
    prompt = guard(knows=knows).prompt(turns, "Hi")
    fitted = fit_prompt(prompt, render, room)
    assert fit_prompt(prompt, render, room, expected=expected) == fitted
    history = fitted.prompt.history
    assert not history or history[0]["role"] == "user"
    if len(fitted.token_ids) > room:
        assert not history
        assert not fitted.prompt.knowledge


def test_fitting_renders_seldom():
    calls = []
    prompt = guard().prompt(talk(200), "Hi")
    fitted = fit_prompt(prompt, lambda messages: calls.append(1) or render(messages), 300)
    assert len(calls) <= 6
    calls.clear()
    expected = fitted.num_dropped
    again = fit_prompt(prompt, lambda messages: calls.append(1) or render(messages), 300, expected=expected)
    assert (again.token_ids, len(calls)) == (fitted.token_ids, 2)
    calls.clear()
    fit_prompt(prompt, lambda messages: calls.append(1) or render(messages), 10_000)
    assert len(calls) == 1


def test_parts_are_counted():
    persona = guard(**KNOWING, examples=[{"player": "aaaa", "npc": "bbb"}])
    prompt = persona.prompt(talk(2), "Hello", context=Context(mood="sad"), facts={"quest.dragon": "dead"})
    parts = count_parts(prompt, lambda messages: len(render(messages)))
    assert sum(parts.values()) == len(render(prompt.messages))
    assert parts["examples"] == 7 + 6
    assert parts["history"] == 14 + 6
    assert parts["persona"] == len(prompt.system)
    assert parts["words"] == 5
    assert parts["knowledge"] == len("The dragon is dead. ")
    assert parts["context"] == len(" Mood: sad.")
