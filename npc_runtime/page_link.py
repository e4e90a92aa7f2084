"""The link of a daemon's status page, with the token in the fragment, and opening it in a browser."""

import html
import os
import webbrowser
from pathlib import Path
from urllib.parse import quote

from npc_runtime.discovery import read_endpoint, runtime_file
from npc_runtime.errors import StartupError

__all__ = ["find_link", "open_link"]

OPENER = """<!doctype html>
<meta charset="utf-8">
<meta name="referrer" content="no-referrer">
<meta http-equiv="refresh" content="0; url={link}">
<title>npc-runtime</title>
<p><a href="{link}">The status page</a></p>
"""


def find_link(project: str, called: str) -> str:
    """The link of a project's daemon. Raises `StartupError` if none is running; people know it as `called`."""
    endpoint = read_endpoint(project)
    if endpoint is None:
        raise StartupError(f"No daemon is running for {called}.", "Start one: npc-runtime serve.")
    fragment = f"#token={quote(endpoint.token)}" if endpoint.token else ""
    return f"http://127.0.0.1:{endpoint.port}/{fragment}"


def open_link(link: str, project: str) -> None:
    """Open the link in the user's browser. Raises `StartupError` if there is none.

    By way of a file that only the user can read: every user of the machine can see a browser's arguments.
    """
    opener = _write_opener(link, project)
    if not webbrowser.open(opener.as_uri()):
        raise StartupError("No browser was found.", "npc-runtime page prints the link; open it yourself.")


def _write_opener(link: str, project: str) -> Path:
    """Write the file beside the runtime file, mode 0600; the next one replaces it."""
    path = runtime_file(project).with_suffix(".html")
    path.unlink(missing_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(OPENER.format(link=html.escape(link)))
    return path
