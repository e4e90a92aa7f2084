"""Requests to stop that interrupt, and those that only leave a note."""

import signal

import pytest

from npc_runtime.stopping import StopNote, leave_when_asked, stop_signals, was_asked_to_stop


@pytest.fixture(autouse=True)
def handlers():
    before = [(number, signal.getsignal(number)) for number in (*stop_signals(), signal.SIGHUP)]
    yield
    for number, handler in before:
        signal.signal(number, handler)


def test_a_request_leaves_through_all_finallys_once():
    leave_when_asked()
    assert not was_asked_to_stop()
    with pytest.raises(SystemExit):
        signal.raise_signal(signal.SIGTERM)
    assert was_asked_to_stop()
    signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("number", stop_signals())
def test_a_note_is_taken_and_nobody_interrupted(number):
    leave_when_asked()
    before = signal.getsignal(number)
    with StopNote() as note:
        assert not note.was_asked
        signal.raise_signal(number)
        signal.raise_signal(number)
        assert note.was_asked
    assert signal.getsignal(number) is before


def test_who_ignores_hangups_goes_on_to():
    """As under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopNote() as note:
        signal.raise_signal(signal.SIGHUP)
    assert not note.was_asked
