"""The status page's link: found by the runtime file, printed, or opened without anybody seeing the token."""

import os
import subprocess
import sys

import pytest

from npc_runtime.discovery import Endpoint, write_endpoint
from npc_runtime.errors import StartupError
from npc_runtime.page_link import find_link, open_link


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A runtime folder with the file of a daemon called `tavern`."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    tmp_path.chmod(0o700)
    write_endpoint("tavern", Endpoint(4780, os.getpid(), "se-cr_et", 1, "base"))
    return "tavern"


def test_the_link_has_the_token_in_its_fragment(project):
    assert find_link(project, "it") == "http://127.0.0.1:4780/#token=se-cr_et"
    write_endpoint("open", Endpoint(4781, os.getpid(), None, 1, "base"))
    assert find_link("open", "it") == "http://127.0.0.1:4781/"
    with pytest.raises(StartupError, match=r"No daemon is running for project 'x'.*npc-runtime serve"):
        find_link("x", "project 'x'")


def run(*arguments, browser):
    command = [sys.executable, "-P", "-m", "npc_runtime", "page", "--project", "tavern", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "BROWSER": browser})


@pytest.mark.skipif(os.name != "posix", reason="the browser is a shell script")
def test_a_browser_is_given_a_file_that_only_its_user_can_read(project, tmp_path):
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\n')
    browser.chmod(0o755)
    for _ in range(2):
        done = run("--open", browser=f"{browser} %s")
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
    arguments = (tmp_path / "arguments").read_text().strip()
    assert "se-cr_et" not in arguments
    opener = tmp_path / "npc-runtime" / "tavern.html"
    assert arguments == opener.as_uri()
    assert opener.stat().st_mode & 0o777 == 0o600
    assert "http://127.0.0.1:4780/#token=se-cr_et" in opener.read_text(encoding="utf-8")


def test_the_command_prints_the_link_and_nothing_else(project):
    done = run(browser="/bin/false")
    assert (done.returncode, done.stdout, done.stderr) == (0, "http://127.0.0.1:4780/#token=se-cr_et\n", "")


def test_no_browser_is_an_error_with_a_remedy(project, monkeypatch):
    import webbrowser

    class None_:
        def open(self, *_):
            return False

    monkeypatch.setattr(webbrowser, "open", None_().open)
    with pytest.raises(StartupError, match="npc-runtime page"):
        open_link("http://127.0.0.1:4780/", "tavern")
