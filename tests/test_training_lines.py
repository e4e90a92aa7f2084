"""What is wrong with training lines is said at once, with file and line; what is alike is found cheaply."""

import json
import random
import time

import pytest
from conftest import MS

from npc_runtime.errors import PersonaInvalid
from npc_runtime.persona import Persona
from npc_runtime.training_lines import read_training_set

WORDS = [
    "iron",
    "ale",
    "hammer",
    "barrel",
    "moss",
    "river",
    "king",
    "tower",
    "wolf",
    "bread",
    "candle",
    "rope",
    "stone",
]


def reply(number, length=14):
    """Words in an order of their own; two of these share little."""
    return " ".join(random.Random(number).choices(WORDS, k=length)) + f" {number}."


def exchanges(start, stop):
    return [{"player": f"Question {number}?", "npc": reply(number)} for number in range(start, stop)]


def count_words(text):
    return len(text.split())


@pytest.fixture
def write(make_persona):
    """A persona with these lines; a line may be a map or raw text."""

    def write_lines(lines, heldout=None, **fields):
        folder = make_persona("guard", **fields)
        for name, content in (("lines.jsonl", lines), ("heldout.jsonl", heldout)):
            if content is not None:
                rows = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in content]
                (folder / name).write_text("\n".join(rows), encoding="utf-8")
        return Persona.load(folder)

    return write_lines


def refusal(persona):
    with pytest.raises(PersonaInvalid) as caught:
        read_training_set(persona, count_words)
    return caught.value.message


def test_sound_lines_are_read_in_order_with_what_was_said_before(write):
    history = [{"player": "Who are you?", "npc": "The guard."}]
    last = {"player": "Still here?", "npc": reply(99), "history": history, "topic": "gate"}
    lines = read_training_set(write([*exchanges(0, 20), "", last], exchanges(30, 34)), count_words)
    assert [line.number for line in lines.train] == [*range(1, 21), 22]
    assert [line.player for line in lines.heldout] == [f"Question {number}?" for number in range(30, 34)]
    assert lines.train[-1].earlier == [
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": "The guard."},
    ]
    assert not lines.was_split


def test_everything_wrong_is_said_at_once(write):
    bad = [
        "{",
        '["a"]',
        {"player": "Hello?"},
        {"player": " ", "npc": "Halt."},
        {"player": "Hi.", "npc": "Halt.", "history": "no"},
        {"player": "Hi.", "npc": "Halt.", "history": [{"player": "Hi."}]},
        {"player": "Tell me more.", "npc": reply(50, 80)},
        {"player": "Another one?", "npc": f"  {reply(3).upper()}"},
        {"player": "And this?", "npc": reply(4).replace("4.", "four.")},
    ]
    message = refusal(write([*exchanges(0, 20), *bad], [*exchanges(30, 33), {"player": "Eh?", "npc": reply(5)}]))
    for said in (
        "lines.jsonl, line 21: is no JSON",
        "lines.jsonl, line 22: the line is no map",
        "lines.jsonl, line 23: the line has no text in 'npc'",
        "lines.jsonl, line 24: the line has no text in 'player'",
        "lines.jsonl, line 25: 'history' is no list",
        "lines.jsonl, line 26: entry 1 of 'history' has no text in 'npc'",
        "lines.jsonl, line 27: the reply has 81 tokens, and this persona is cut off at 60",
        "lines.jsonl, line 28: the reply repeats lines.jsonl, line 4; remove it",
        "lines.jsonl, line 29: the reply is nearly the same as lines.jsonl, line 5; say it otherwise",
        "heldout.jsonl, line 4: the reply repeats lines.jsonl, line 6; remove it: a loss on lines that were learned",
    ):
        assert said in message
    assert message.count("\n  ") == 10


def test_the_limit_is_the_persona_s_own(write):
    assert "cut off at 10" in refusal(write(exchanges(0, 20), limits={"hard_tokens": 10}))


@pytest.mark.parametrize(
    ("lines", "heldout", "said"),
    [
        (None, None, "lines.jsonl is missing"),
        (exchanges(0, 19), None, "lines.jsonl has 19 lines; at least 20 are needed, 100 to 200 are better"),
        (exchanges(0, 20), [], "heldout.jsonl has no lines"),
    ],
)
def test_too_few_lines_are_refused_with_advice(write, lines, heldout, said):
    assert said in refusal(write(lines, heldout))


def test_what_is_no_text_is_named(write, tmp_path):
    persona = write(exchanges(0, 20))
    (persona.folder / "lines.jsonl").write_bytes(b"\xff\xfe{}")
    assert "lines.jsonl cannot be read" in refusal(persona)


def test_a_long_list_of_problems_is_cut(write):
    message = refusal(write(["{"] * 100))
    assert "… and 70 more" in message


def test_short_replies_may_be_said_again_to_another_question(write):
    barks = [{"player": "May I pass?", "npc": "Halt!"}, {"player": "Let me in at once, fool.", "npc": "Halt!"}]
    assert len(read_training_set(write([*exchanges(0, 20), *barks]), count_words).train) == 20


def test_a_short_exchange_may_not(write):
    bark = {"player": "May I pass?", "npc": "Halt!"}
    assert "lines.jsonl, line 22: the reply repeats" in refusal(write([*exchanges(0, 20), bark, bark]))


GATE = "The gate is shut until dawn, traveller, and I have no key for it, nor would I give it to a stranger like you."
CHINESE = "门在黎明之前都是关着的旅行者我没有钥匙也不会给你这样的陌生人开门"


@pytest.mark.parametrize(
    ("one", "other", "is_refused"),
    [
        (GATE, GATE.lower().replace(",", " "), True),
        (GATE, GATE.replace("dawn", "noon"), True),
        (GATE, GATE.replace("dawn", "noon").replace("stranger", "bishop"), False),
        (CHINESE, CHINESE.replace("都是", ",都是") + "!", True),
        (CHINESE, CHINESE.replace("这样", "那样").replace("黎明", "天亮"), False),
    ],
)
def test_what_counts_as_alike(write, one, other, is_refused):
    persona = write([*exchanges(0, 20), {"player": "A?", "npc": one}, {"player": "B?", "npc": other}])
    if is_refused:
        assert "lines.jsonl, line 22: the reply" in refusal(persona)
    else:
        assert len(read_training_set(persona, count_words).train) == 20


def test_without_held_out_lines_an_eighth_is_split_off_whatever_the_order(write, tmp_path):
    persona = write(exchanges(0, 40))
    first = read_training_set(persona, count_words)
    assert (len(first.train), len(first.heldout), first.was_split) == (35, 5, True)
    rows = (persona.folder / "lines.jsonl").read_text().splitlines()
    more = [json.dumps(row) for row in exchanges(40, 48)]
    (persona.folder / "lines.jsonl").write_text("\n".join([*more, *reversed(rows)]))
    second = read_training_set(persona, count_words)
    assert len(second.heldout) == 6
    assert len({line.npc for line in first.heldout} & {line.npc for line in second.heldout}) >= 4


def test_thousands_of_lines_are_compared_in_seconds(write):
    letters = random.Random(1)
    words = ["".join(letters.choices("abcdefghilmnoprstuvw", k=5)) for _ in range(2_000)]
    texts = [" ".join(letters.choices(words, k=20)) for _ in range(4_000)]
    persona = write([{"player": "And then?", "npc": text} for text in texts])
    started = time.monotonic()
    read_training_set(persona, count_words)
    assert time.monotonic() - started < 20_000 * MS
