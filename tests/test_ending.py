"""Where a line ends, and that what was spoken on the way is never more than a tail longer than the end."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npc_runtime.engine.core import EndReason, SamplingParams
from npc_runtime.engine.ending import MAX_REPLY_CHARS, LineText
from npc_runtime.engine.tokenizer import IncrementalText


class Pieces:
    """A decoder whose tokens are these byte strings, in order; a cut character shows as U+FFFD."""

    def __init__(self, pieces):
        self.pieces = [piece.encode() if isinstance(piece, str) else piece for piece in pieces]

    def decode(self, token_ids):
        return b"".join(self.pieces[token] for token in token_ids).decode(errors="replace")


class Spoken:
    """A line that was spoken from pieces until it ended, or until the model's end token behind the last."""

    def __init__(self, pieces, **sampling):
        decoder = Pieces(pieces)
        line = LineText(decoder, SamplingParams(**{"seed": 0, "max_tokens": 10_000, **sampling}))
        self.deltas = []
        for token in range(len(decoder.pieces)):
            self.deltas.append(line.push(token))
            if line.end is not None:
                break
        else:
            self.deltas.append(line.finish(EndReason.STOP))
        self.text, self.end, self.num_tokens = line.text, line.end, token + 1

    @property
    def said(self):
        return "".join(self.deltas)


def cut(text, places):
    """The UTF-8 bytes of a text as pieces, cut at these places, also inside characters."""
    data = text.encode()
    borders = [0, *sorted({place % (len(data) + 1) for place in places}), len(data)]
    return [data[start:stop] for start, stop in itertools.pairwise(borders) if stop > start]


# -- characters ----------------------------------------------------------------------------------------------


def test_a_character_in_pieces_is_said_whole():
    spoken = Spoken([bytes([byte]) for byte in "aé水🙂b".encode()])
    assert [delta for delta in spoken.deltas if delta] == ["a", "é", "水", "🙂", "b"]
    assert spoken.text == "aé水🙂b"


def test_bytes_that_are_no_character_do_not_hold_the_rest_up():
    incremental = IncrementalText(Pieces([b"a", b"\xf0\x9f", b"b", b"\xff", b"c"]))
    said = [incremental.push(token) for token in range(5)]
    assert said[0] == "a"
    assert said[2].endswith("b")
    assert said[4].endswith("c")


def test_half_a_character_at_the_end_is_dropped():
    spoken = Spoken(["Hi ", b"\xf0\x9f\x99"], max_tokens=2)
    assert (spoken.text, spoken.said, spoken.end) == ("Hi ", "Hi ", EndReason.LENGTH)


# -- stop strings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pieces", "stop", "expected"),
    [
        (["Hi ##", " more"], ["##"], "Hi "),
        (["Hi #", "# more"], ["##"], "Hi "),
        (["Hi", " ", "<", "|", "e", "nd", "|>x"], ["<|end|>"], "Hi "),
        (["ab", "ac", "ab", "ad"], ["abad"], "abac"),  # the first half comes twice
        (["a", "a", "a", "b"], ["aab"], "a"),
        (["x\n", "\nPlayer", ":"], ["Player:", "\n\n"], "x"),
        (["##"], ["##"], ""),
        (["Hi #"], ["##"], "Hi #"),  # it never came: nothing is lost
        (["水を#", "止"], ["#止"], "水を"),
    ],
)
def test_no_part_of_a_stop_string_is_said(pieces, stop, expected):
    spoken = Spoken(pieces, stop=tuple(stop))
    assert spoken.text == spoken.said == expected
    assert spoken.end is EndReason.STOP


def test_what_is_held_is_no_more_than_what_may_be_the_stop_string():
    assert Spoken(["Hi <", "3 you"], stop=("<|end|>",)).deltas == ["Hi ", "<3 you", ""]


def test_a_stop_string_counts_from_min_tokens_on():
    spoken = Spoken(["a", "#", "b", "#", "c"], stop=("#",), min_tokens=4)
    assert spoken.num_tokens == 4
    assert spoken.text == spoken.said == "a#b"


@pytest.mark.parametrize("sampling", [{"stop": ("#",)}, {"trim": "sentence", "soft_words": 1}], ids=str)
def test_nothing_ends_a_line_before_min_tokens(sampling):
    pieces = ["Yes. #", " No. #", " Go. #", " So. #"]
    assert Spoken(pieces, **sampling).num_tokens == 1
    assert Spoken(pieces, min_tokens=3, **sampling).num_tokens == 3


@pytest.mark.parametrize("pieces", [["Hi #", "#"], ["Hi ", "#", "#"], ["Hi", " ##"]])
def test_space_in_front_of_a_stop_string_is_held_too(pieces):
    spoken = Spoken(pieces, stop=("##",), trim="sentence", soft_words=20)
    assert spoken.text == spoken.said == "Hi"


# -- sentences -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "soft_words", "expected"),
    [
        ("One two. Three four. ", 2, "One two."),
        ("One. Two three. Four. ", 2, "One. Two three."),
        ("One two three. Four. ", 2, "One two three."),
        ('She said "Go now!" Then she left. ', 3, 'She said "Go now!"'),
        ("“So be it.” He left. ", 2, "“So be it.”"),
        ("(Quietly.) Yes. ", 1, "(Quietly.)"),
        ("What?! No. ", 1, "What?!"),
        ("Well... maybe so. Yes. ", 1, "Well... maybe so."),
        ("Well... Maybe so. Yes. ", 1, "Well..."),
        ("Wait… no, go. Yes. ", 1, "Wait… no, go."),
        ("Wait… Élan. Yes. ", 1, "Wait…"),
        ("Ah… était-ce toi. Oui. ", 1, "Ah… était-ce toi."),
        ("Pi is 3.14 or so. Yes. ", 3, "Pi is 3.14 or so."),
        ("One line\nanother", 2, "One line"),
        ("\n\n  Hello there.  Bye. ", 2, "Hello there."),
        ("はい。いいえ。", 1, "はい。"),
        ("「はい。」いいえ。", 1, "「はい。」"),
        ("本当！？はい。", 1, "本当！？"),
        ("No end at all ", 1, "No end at all"),
        ("   ", 1, ""),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 1_000])
def test_a_line_ends_at_the_first_sentence_end_after_the_soft_limit(text, soft_words, expected, size):
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    spoken = Spoken(pieces, trim="sentence", soft_words=soft_words)
    assert spoken.text == expected
    assert spoken.end is EndReason.STOP


def test_white_space_that_may_be_the_end_is_not_said():
    spoken = Spoken(["Yes", ". ", "No", "."], trim="sentence", soft_words=2)
    assert spoken.deltas == ["Yes", ".", " No", ".", ""]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One two. Three fo", "One two."),
        ('"One two!" said th', '"One two!"'),
        ("One two. Three four.", "One two. Three four."),
        ("One two\nThree", "One two"),
        ("One two thr", "One two thr"),  # no sentence to go back to
        ("はい。いい", "はい。"),
    ],
)
def test_the_hard_limit_drops_only_an_unfinished_tail(text, expected):
    spoken = Spoken(list(text), trim="sentence", soft_words=50, max_tokens=len(text))
    assert spoken.end is EndReason.LENGTH
    assert spoken.text == expected
    assert spoken.said.startswith(expected)
    assert text.startswith(spoken.said)


@pytest.mark.parametrize("reason", [EndReason.CANCELLED, EndReason.DEADLINE, EndReason.STOP])
def test_a_line_ended_from_outside_keeps_its_tail(reason):
    line = LineText(Pieces(["One. Tw", "o "]), SamplingParams(seed=0, max_tokens=9, trim="sentence", soft_words=9))
    said = line.push(0) + line.push(1) + line.finish(reason)
    assert said == line.text == "One. Two"
    assert line.end is reason


def test_a_sentence_ends_a_line_from_min_tokens_on():
    """One that was over before does not count, else the reply would be shorter than asked."""
    spoken = Spoken(["Yes.", " No.", " Go.", " Now", ".", " So"], trim="sentence", soft_words=1, min_tokens=4)
    assert spoken.text == "Yes. No. Go. Now."


def test_trim_none_gives_the_text_as_it_is():
    spoken = Spoken([" One. ", "Two\n", " "], soft_words=1)
    assert spoken.text == spoken.said == " One. Two\n "


# -- length --------------------------------------------------------------------------------------------------


def test_max_tokens_ends_with_length_at_that_token():
    spoken = Spoken(["a"] * 9, max_tokens=3)
    assert (spoken.text, spoken.end, spoken.num_tokens) == ("aaa", EndReason.LENGTH, 3)


def test_the_last_token_is_said_too():
    assert Spoken(["a", "b", "c"], max_tokens=3).deltas == ["a", "b", "c"]
    assert Spoken(["a", "#"], stop=("##",), max_tokens=2).deltas == ["a", "#"]


@pytest.mark.parametrize("trim", ["none", "sentence"])
def test_a_reply_has_a_bound_in_characters(trim):
    spoken = Spoken(["x" * 999] * 9, trim=trim, soft_words=50)
    assert (spoken.text, spoken.end) == ("x" * MAX_REPLY_CHARS, EndReason.LENGTH)
    assert spoken.said == spoken.text


# -- any text ------------------------------------------------------------------------------------------------

TEXTS = st.lists(
    st.sampled_from([*"ab.!?…\"'”)#\n  éÉ水。」🙂\x00", "One ", "two. ", "...", " ##", "3.14"]), max_size=40
).map("".join)
CUTS = st.lists(st.integers(0, 200), max_size=60)
SOFT_WORDS = st.integers(0, 6)
CHECKED = settings(max_examples=300, deadline=None, derandomize=True, database=None)


@CHECKED
@given(TEXTS, CUTS)
def test_untrimmed_deltas_are_the_text(text, places):
    spoken = Spoken(["", *cut(text, places)])
    assert spoken.said == spoken.text == text


@CHECKED
@given(TEXTS, CUTS, st.lists(st.sampled_from(["##", "#\n", "a.b", "水。", "ab"]), max_size=3))
def test_an_untrimmed_line_with_stop_strings_is_the_text_before_the_first(text, places, stop):
    spoken = Spoken(["", *cut(text, places)], stop=tuple(stop))
    found = [text.find(string) for string in stop if string in text]
    assert len(found) == 0 or spoken.said == spoken.text
    assert spoken.text == (text[: min(found)] if found else text)


@CHECKED
@given(TEXTS, CUTS, SOFT_WORDS, st.integers(1, 30), st.integers(0, 10))
def test_trimmed_deltas_start_with_the_final_text(text, places, soft_words, max_tokens, min_tokens):
    sampling = {"soft_words": soft_words, "max_tokens": max_tokens, "min_tokens": min_tokens}
    spoken = Spoken(["", *cut(text, places)], trim="sentence", stop=("##",), **sampling)
    assert spoken.said.startswith(spoken.text)
    assert spoken.text == spoken.text.strip()
    assert "\ufffd" not in spoken.said
    assert spoken.num_tokens <= max_tokens


@CHECKED
@given(TEXTS.filter(lambda text: not set(text) & set("。」")), CUTS, SOFT_WORDS)
def test_where_a_line_ends_does_not_depend_on_token_borders(text, places, soft_words):
    sampling = {"trim": "sentence", "soft_words": soft_words}
    assert Spoken(["", *cut(text, places)], **sampling).text == Spoken(["", *text], **sampling).text
