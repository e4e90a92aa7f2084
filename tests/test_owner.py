"""A process is told from later ones of the same id, and its end is noticed once."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import MS

from npc_runtime.errors import StartupError
from npc_runtime.owner import OwnerWatch, find_owner


@pytest.fixture
def owner():
    """A process that waits, in whatever way it is to end."""
    process = subprocess.Popen([sys.executable, "-P", "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_it_is_gone_however_it_ended(owner, number):
    is_alive = find_owner(owner.pid)
    assert is_alive()
    owner.send_signal(number)
    owner.wait()
    assert not is_alive()
    assert not is_alive()


def test_a_zombie_is_gone(owner):
    is_alive = find_owner(owner.pid)
    owner.kill()
    os.waitid(os.P_PID, owner.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has asked how
    assert not is_alive()
    with pytest.raises(StartupError, match=f"process {owner.pid}, is not running"):
        find_owner(owner.pid)


def test_a_later_process_with_its_id_is_another(monkeypatch, owner):
    """psutil compares the time of creation, which this makes another one from the second look on."""
    import psutil

    is_alive = find_owner(owner.pid)
    assert is_alive()
    real = psutil.Process._get_ident
    monkeypatch.setattr(psutil.Process, "_get_ident", lambda self: (self.pid, real(self)[1] + 60.0))
    assert not is_alive()


@pytest.mark.parametrize("pid", [2**22 + 1, 2**31, 2**63, 2**70, -1])
def test_an_owner_that_is_not_there_is_said(pid):
    with pytest.raises(StartupError, match=f"The owner, process {pid}, is not running"):
        find_owner(pid)


class Watched:
    """An owner that lives for so many looks, and what its watch did."""

    def __init__(self, looks):
        self.looks = looks
        self.calls = []
        self.is_over = threading.Event()

    def is_alive(self):
        self.looks -= 1
        return self.looks >= 0

    def watch(self, **options):
        settings = {"look_every_s": 1 * MS, "grace_s": 1 * MS, **options}
        return OwnerWatch(self.is_alive, on_gone=lambda: self.calls.append("gone"), on_late=self.end, **settings)

    def end(self):
        self.calls.append("late")
        self.is_over.set()


def test_what_does_not_stop_is_ended():
    owner = Watched(looks=3)
    watch = owner.watch()
    assert not watch.has_ended
    watch.start()
    assert owner.is_over.wait(2_000 * MS)
    assert owner.calls == ["gone", "late"]
    assert watch.has_ended


def test_what_stops_in_time_is_left_alone():
    owner = Watched(looks=0)
    watch = owner.watch(grace_s=60.0)
    watch.start()
    while not owner.calls:
        time.sleep(1 * MS)
    watch.stop()
    watch._thread.join(2_000 * MS)
    assert not watch._thread.is_alive()
    assert owner.calls == ["gone"]


def test_a_watch_that_was_stopped_looks_no_more():
    owner = Watched(looks=10**9)
    watch = owner.watch(look_every_s=60.0)
    watch.start()
    watch.stop()
    watch._thread.join(2_000 * MS)
    assert not watch._thread.is_alive()
    assert owner.calls == []
