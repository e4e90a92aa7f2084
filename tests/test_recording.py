"""Recordings: what is written, what is read, and how what is wrong with a file is said."""

import io
import json

import pytest

from npc_runtime import protocol as wire
from npc_runtime.errors import StartupError
from npc_runtime.line import said_in
from npc_runtime.recording import Recorder, Recording
from npc_runtime.stage import DaemonInfo

INFO = DaemonInfo("1", "cpu", "torch", wire.BaseModelInfo(name="m", sha256="ab", context=2048))
END = wire.LineEnd(
    line=1,
    reason="stop",
    text="Aye, lad.",
    usage=wire.Usage(prompt=9, completion=4),
    timing=wire.Timing(queue_ms=1.0, ttft_ms=20.0, total_ms=90.0, tokens_per_s=44.0, batch_avg=2.0),
    seed=7,
    prompt_hash="0",
)


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


class Kept(io.StringIO):
    """A file whose text outlives it."""

    text = ""

    def flush(self):
        self.text = self.getvalue()


def make_recorder():
    file, clock = Kept(), Clock()
    return Recorder(file, INFO, clock), file, clock


def say(recorder, clock, *, connection=1, line=1, speaker=None, text="Hi", end=END, pieces=("Aye, ", "lad.")):
    """A line from its request to its end, a tenth of a second between all."""
    document = {"line": line, "persona": "odo", "input": {"text": text}, **(speaker or {})}
    lines = [{"line": "bad", "temper": []}, document, {**document, "input": {"text": "twice"}}]
    recorder.add(connection, "client", {"type": "generate", "batch": 1, "lines": lines})
    answers = ("rejected", "queued", "rejected")
    items = [{"line": sent["line"], "status": status} for sent, status in zip(lines, answers, strict=True)]
    recorder.add(connection, "daemon", {"type": "accepted", "batch": 1, "items": items})
    messages = [wire.LineStart(line=line, persona="odo", seed=7, queue_ms=1.0, batch_size=2)]
    messages += [wire.Delta(items=[wire.DeltaItem(line=line, seq=n, text=piece)]) for n, piece in enumerate(pieces)]
    for message in [*messages, end.model_copy(update={"line": line})]:
        clock.now += 0.1
        recorder.add(connection, "daemon", message.model_dump(mode="json", exclude_none=True))


def load(tmp_path, text):
    (tmp_path / "a.jsonl").write_text(text, encoding="utf-8")
    return Recording.load(tmp_path / "a.jsonl")


def test_a_line_is_read_as_it_was_spoken(tmp_path):
    recorder, file, clock = make_recorder()
    clock.now += 3
    say(recorder, clock)
    recording = load(tmp_path, file.text)
    assert (recording.info, len(recording)) == (INFO, 1)
    take = recording.find("odo", "Hi", 0)
    assert (take.started_at, take.ended_at) == (pytest.approx(0.1), pytest.approx(0.4))
    assert [(pytest.approx(piece.at), piece.text) for piece in take.pieces] == [(0.2, "Aye, "), (0.3, "lad.")]
    assert take.end == END
    assert recording.find("odo", "Hello", 0) is recording.find("brom", "Hi", 0) is None


def test_the_second_time_the_second_answer(tmp_path):
    recorder, file, clock = make_recorder()
    for text in ("One.", "Two."):
        say(recorder, clock, end=END.model_copy(update={"text": text}), connection=len(text))
    recording = load(tmp_path, file.text)
    assert [recording.find("odo", "Hi", number).end.text for number in range(4)] == ["One.", "Two.", "Two.", "Two."]


def test_answers_come_in_the_order_of_the_questions(tmp_path):
    """Whoever ended first."""
    recorder, file, _ = make_recorder()
    lines = [{"line": n, "persona": "odo", "input": {"text": "Hi"}} for n in range(3)]
    recorder.add(1, "client", {"type": "generate", "batch": 1, "lines": lines})
    items = [{"line": n, "status": "queued"} for n in range(3)]
    recorder.add(1, "daemon", {"type": "accepted", "batch": 1, "items": items})
    for n in (2, 0):
        end = END.model_copy(update={"line": n, "text": str(n)})
        recorder.add(1, "daemon", end.model_dump(mode="json"))
    recording = load(tmp_path, file.text)
    assert [recording.find("odo", "Hi", number).end.text for number in range(2)] == ["0", "2"]
    assert len(recording) == 2, "the other one lost its client"


def test_npcs_are_found_by_their_persona_and_speakers_by_their_words(tmp_path):
    recorder, file, clock = make_recorder()
    recorder.add(1, "client", {"type": "npc.open", "npc": "n", "persona": "odo"})
    request = {"npc": "n", "persona": None, "input": {"speaker": "Mira", "text": "Hi"}}
    say(recorder, clock, speaker=request)
    assert load(tmp_path, file.text).find("odo", "Mira: Hi", 0) is not None


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"input": {"text": "Hi"}}, "Hi"),
        ({"input": {"text": "Hi", "speaker": "Mira"}}, "Mira: Hi"),
        ({"messages": [{"role": "user", "content": "A"}]}, "A"),
        ({}, ""),
    ],
)
def test_what_a_line_is_found_by(fields, said):
    assert said_in(wire.LineRequest(line=1, **fields)) == said


@pytest.mark.parametrize("reason", ["cancelled", "error", "deadline", "length"])
def test_every_end_is_kept(tmp_path, reason):
    recorder, file, clock = make_recorder()
    say(recorder, clock, end=END.model_copy(update={"reason": reason}))
    assert load(tmp_path, file.text).find("odo", "Hi", 0).end.reason == reason


def test_a_line_that_was_rejected_takes_nobodys_place(tmp_path):
    recorder, file, _ = make_recorder()
    again = {"type": "generate", "batch": 2, "lines": [{"line": 1, "persona": "odo", "input": {"text": "Other"}}]}
    recorder.add(1, "client", {**again, "batch": 1, "lines": [{**again["lines"][0], "input": {"text": "Hi"}}]})
    item = {"line": 1, "status": "queued"}
    recorder.add(1, "daemon", {"type": "accepted", "batch": 1, "items": [item]})
    recorder.add(1, "client", again)
    recorder.add(1, "daemon", {"type": "accepted", "batch": 2, "items": [{**item, "status": "rejected"}]})
    recorder.add(1, "daemon", END.model_dump(mode="json", exclude_none=True))
    recording = load(tmp_path, file.text)
    assert recording.find("odo", "Hi", 0) is not None
    assert recording.find("odo", "Other", 0) is None


def test_what_json_cannot_say_is_left_out():
    recorder, file, _ = make_recorder()
    recorder.add(1, "client", {"type": "status", "filler": b"bytes"})
    recorder.add(1, "client", {"type": "bye"})
    assert len(file.text.splitlines()) == 2


def test_no_secret_is_written(tmp_path):
    recorder = Recorder.open(tmp_path / "a", INFO, secret="s3cret")
    recorder.add(1, "client", {"type": "hello", "protocol": 1, "token": "another", "resume": "abcdef"})
    recorder.add(1, "daemon", {"type": "welcome", "session": "abcdef", "protocol": 1})
    recorder.add(1, "client", {"type": "status", "token": "s3cret", "note": "my token is s3cret"})
    recorder.add(1, "daemon", {"type": "stats", "active": 1})
    recorder.close()
    text = (tmp_path / "a").read_text()
    assert len(text.splitlines()) == 4
    for secret in ("s3cret", "another", "abcdef"):
        assert secret not in text


def test_a_recording_is_bounded_and_a_full_disk_ends_it(caplog, monkeypatch):
    monkeypatch.setattr("npc_runtime.recording.MAX_BYTES", 400)
    recorder, file, _ = make_recorder()
    for number in range(20):
        recorder.add(1, "client", {"type": "bye", "id": number})
    assert 0 < len(file.text) <= 400
    assert [record.message for record in caplog.records] == ["the recording ends here: it would be larger than 0 MiB"]
    recorder.close()


def test_a_recording_that_is_there_is_not_written_over(tmp_path):
    Recorder.open(tmp_path / "a", INFO).close()
    for path, what in ((tmp_path / "a", "there already"), (tmp_path / "no" / "a", "no folder")):
        with pytest.raises(StartupError, match=what):
            Recorder.open(path, INFO)
    with pytest.raises(StartupError, match="Is a directory"):
        Recorder.open(tmp_path, INFO, goes_on=True)


def test_the_next_process_goes_on_with_it(tmp_path):
    for number in range(2):
        recorder = Recorder.open(tmp_path / "a", INFO, goes_on=bool(number))
        say(recorder, Clock(), end=END.model_copy(update={"text": str(number)}))
        recorder.close()
    recording = Recording.load(tmp_path / "a")
    assert [recording.find("odo", "Hi", number).end.text for number in range(2)] == ["0", "1"]


GOOD = json.dumps(
    {"recording": 1, "info": {"version": "1", "device": "c", "backend": "t", "base": INFO.base.model_dump()}}
)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "empty"),
        ("{}\n", "line 1"),
        ("[]\n", "line 1"),
        ('{"recording": 2}\n', "version 2 is newer"),
        (GOOD + "\n{\n", "line 2"),
        (GOOD + "\n{}\n", "line 2"),
        (GOOD + '\n{"at": 1, "connection": 1, "from": "client", "message": {"type": "generate"}}\n', "line 2"),
        (
            GOOD + '\n{"at": 1, "connection": 1, "from": "daemon", "message": {"type": "line.start", "line": []}}\n',
            "line 2",
        ),
        ("[" * 100_000 + "\n", "line 1"),
        (GOOD + '\n{"at": 1e999, "connection": 1, "from": "client", "message": {"type": "bye"}}\n', "line 2"),
        (GOOD + '\n{"at": 1, "connection": 1e999, "from": "client", "message": {"type": "bye"}}\n', "line 2"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, what):
    with pytest.raises(StartupError, match=what):
        load(tmp_path, text)


def test_what_is_no_text_or_not_there_is_said(tmp_path):
    (tmp_path / "a").write_bytes(b"\xff\xfe\x00")
    for name in ("a", "b"):
        with pytest.raises(StartupError, match="--replay"):
            Recording.load(tmp_path / name)


def test_a_last_line_that_was_cut_off_is_left_out(tmp_path):
    recorder, file, clock = make_recorder()
    say(recorder, clock)
    assert len(load(tmp_path, file.text + '{"at": 1, "conn')) == 1
