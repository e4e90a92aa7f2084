"""The runtime file: found by project, readable by its owner only, removed by its owner only, and never stale."""

import os
import sys
from dataclasses import replace

import pytest

from npc_runtime.discovery import (
    Endpoint,
    hold_project,
    lock_file,
    project_of,
    read_endpoint,
    remove_endpoint,
    runtime_file,
    write_endpoint,
)
from npc_runtime.errors import StartupError

ENDPOINT = Endpoint(port=4711, pid=os.getpid(), token="secret", protocol=1, base="smollm2-135m", log="/a.log")

NOBODY = 2**22 + 1  # more than Linux has

pytestmark = pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="XDG_RUNTIME_DIR is Linux's")


@pytest.fixture(autouse=True)
def runtime_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path


def test_what_was_written_is_read(runtime_dir):
    path = write_endpoint("game", ENDPOINT)
    assert path.is_relative_to(runtime_dir)
    assert read_endpoint("game") == ENDPOINT
    assert read_endpoint("other") is None
    assert "\n" not in ENDPOINT.to_json()


def test_a_newer_daemon_replaces_the_file_and_leaves_no_other():
    write_endpoint("game", replace(ENDPOINT, port=1, token=None, log=None))
    path = write_endpoint("game", ENDPOINT)
    assert read_endpoint("game") == ENDPOINT
    assert list(path.parent.iterdir()) == [path]


def test_only_the_owner_may_read():
    before = os.umask(0)
    try:
        path = write_endpoint("game", ENDPOINT)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_it_is_removed_by_its_own_process_alone():
    path = write_endpoint("game", ENDPOINT)
    remove_endpoint("game", NOBODY)
    assert read_endpoint("game") == ENDPOINT
    remove_endpoint("game", ENDPOINT.pid)
    assert not path.exists()
    remove_endpoint("game", ENDPOINT.pid)


def test_what_a_newer_daemon_adds_is_ignored_and_an_older_one_lacks_the_log():
    text = ENDPOINT.to_json()
    assert Endpoint.from_json(text[:-1] + ',"colour":"red"}') == ENDPOINT
    assert Endpoint.from_json(text.replace(',"log":"/a.log"', "")) == replace(ENDPOINT, log=None)


def test_a_daemon_that_is_gone_is_none():
    """Its process id is no proof, since another process may have it; the lock is one."""
    lock = hold_project("game")
    write_endpoint("game", ENDPOINT)
    assert read_endpoint("game") == ENDPOINT
    lock.release()
    assert runtime_file("game").exists()
    lock_file("game").touch()  # as kill -9 leaves it
    assert read_endpoint("game") is None


def test_without_a_lock_the_process_is_asked_for():
    write_endpoint("game", ENDPOINT)
    assert read_endpoint("game") == ENDPOINT
    write_endpoint("game", replace(ENDPOINT, pid=NOBODY))
    assert read_endpoint("game") is None


def test_a_project_that_is_held_says_by_whom():
    lock = hold_project("game")
    with pytest.raises(
        StartupError, match=f"project 'game' runs already: process {os.getpid()}, still loading, since "
    ):
        hold_project("game")
    write_endpoint("game", ENDPOINT)
    with pytest.raises(StartupError, match=r"port 4711, since \d{4}-\d\d-\d\d \d\d:\d\d\..*another --project"):
        hold_project("game")
    lock_file("game").write_text("")
    with pytest.raises(StartupError, match="a process that does not say who it is, port 4711"):
        hold_project("game")
    lock.release()
    again = hold_project("game")
    assert not runtime_file("game").exists()
    again.release()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"port": 1}', "\x00", "7", "null", '"x"'])
def test_a_damaged_file_is_none(text):
    path = write_endpoint("game", ENDPOINT)
    path.write_text(text)
    assert read_endpoint("game") is None


@pytest.mark.parametrize("project", ["../../etc/passwd", "a/b\\c", "..", "x" * 500, "", "Jürgen's game"])
def test_no_project_name_leaves_the_folder(project):
    assert runtime_file(project).parent == runtime_file("game").parent
    write_endpoint(project, ENDPOINT)
    assert read_endpoint(project) == ENDPOINT


def test_the_default_project_is_the_folder(tmp_path):
    assert project_of(tmp_path / "a") == project_of(tmp_path / "a" / "b" / "..")
    assert project_of(tmp_path / "a") != project_of(tmp_path / "b")
