"""The runtime file: found by project, readable by its owner only, removed by its owner only."""

import os
import sys

import pytest

from npc_runtime.discovery import (
    Endpoint,
    project_of,
    read_endpoint,
    remove_endpoint,
    runtime_file,
    write_endpoint,
)

ENDPOINT = Endpoint(port=4711, pid=42, token="secret", protocol=1, base="smollm2-135m")

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
    write_endpoint("game", Endpoint(port=1, pid=1, token=None, protocol=1, base="x"))
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
    remove_endpoint("game", 43)
    assert read_endpoint("game") == ENDPOINT
    remove_endpoint("game", 42)
    assert not path.exists()
    remove_endpoint("game", 42)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"port": 1}', "\x00", "7"])
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
