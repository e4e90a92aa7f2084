"""One process at a time, told by the system: nothing of it can be stale."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import MS

from npc_runtime import project_lock
from npc_runtime.project_lock import ProjectLock, holder_of, is_held

fcntl = pytest.importorskip("fcntl", reason="written for Windows too, and not tested there")

HOLD = """
import sys
from pathlib import Path
from npc_runtime import project_lock
from npc_runtime.project_lock import ProjectLock
lock = ProjectLock.take(Path(sys.argv[1]))
print("has it" if lock else "has it not", flush=True)
input()
if "release" in sys.argv:
    lock.release()
if "exec" in sys.argv:
    import os
    os.set_inheritable(lock.fd, True)
    os.execv(sys.executable, [sys.executable, "-c", "print('replaced', flush=True); input()"])
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "game.lock"


@pytest.fixture
def hold(path):
    running = []

    def start(*options):
        command = [sys.executable, "-P", "-c", HOLD, str(path), *options]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        running.append(process)
        assert process.stdout.readline() in ("has it\n", "has it not\n")
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate()


def test_the_second_does_not_get_it(path):
    lock = ProjectLock.take(path)
    assert is_held(path)
    assert holder_of(path) == os.getpid()
    assert ProjectLock.take(path) is None
    assert path.stat().st_mode & 0o777 == 0o600
    lock.release()
    assert not path.exists()
    assert is_held(path) is None
    again = ProjectLock.take(path)
    assert again is not None
    again.release()


def test_it_ends_with_its_process(path, hold):
    process = hold()
    assert is_held(path)
    assert holder_of(path) == process.pid
    assert ProjectLock.take(path) is None
    process.kill()
    process.wait()
    assert path.exists()
    assert not is_held(path)
    lock = ProjectLock.take(path)
    assert lock is not None
    assert holder_of(path) == os.getpid()
    lock.release()


def test_it_goes_on_where_a_process_is_replaced(path, hold):
    process = hold("exec")
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "replaced\n"
    assert is_held(path)
    assert holder_of(path) == process.pid
    process.kill()
    process.wait()
    assert not is_held(path)


def test_of_many_one_gets_it(path):
    with ThreadPoolExecutor(16) as pool:  # an open file is an owner of its own, in one process too
        got = [lock for lock in pool.map(lambda _: ProjectLock.take(path), range(64)) if lock is not None]
    assert len(got) == 1
    got[0].release()


def test_a_file_that_was_removed_in_the_last_moment_is_not_the_lock(path, monkeypatch):
    """Opened, then its holder goes and another process makes a new one: two would believe that they have it."""
    lock, others = project_lock._lock, []

    def late(fd, *, shared):
        if not others:
            path.unlink()
            others.append(None)
            others[0] = ProjectLock.take(path)
        return lock(fd, shared=shared)

    monkeypatch.setattr(project_lock, "_lock", late)
    assert ProjectLock.take(path) is None
    assert others[0] is not None
    others[0].release()


def test_asking_keeps_nobody_from_it(path):
    """Whoever asks has it for a moment, here for a long one."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        threading.Timer(70 * MS, fcntl.flock, (file, fcntl.LOCK_UN)).start()
        lock = ProjectLock.take(path)
    assert lock is not None
    lock.release()


def test_a_file_that_others_have_replaced_is_left_to_them(path):
    first = ProjectLock.take(path)
    path.unlink()
    second = ProjectLock.take(path)
    first.release()
    assert path.exists()
    assert is_held(path)
    second.release()


def test_where_there_can_be_no_lock(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        ProjectLock.take(tmp_path / "missing" / "game.lock")
    assert is_held(tmp_path / "missing" / "game.lock") is None
    assert holder_of(tmp_path / "missing") is None
    (tmp_path / "odd.lock").write_text("no number")
    assert holder_of(tmp_path / "odd.lock") is None
