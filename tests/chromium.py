"""A real Chromium for tests of pages: the system's own, driven by Playwright; a developer's machine may lack both.

`NPC_CHROMIUM` names another program. `NPC_REQUIRE_CHROMIUM=1`, as in CI, makes a missing one fail instead of skip.
"""

import contextlib
import os
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import MS

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@contextlib.contextmanager
def launch(*arguments):
    """A browser that may use the loopback addresses only by what `arguments` say."""
    program = os.environ.get("NPC_CHROMIUM") or next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        _miss("there is no Chromium (Debian: apt install chromium)")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _miss("Playwright is not installed (pip install -e '.[dev]')")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", *arguments])
        try:
            yield browser
        finally:
            browser.close()


def _miss(why):
    if os.environ.get("NPC_REQUIRE_CHROMIUM"):
        pytest.fail(f"{why}, and NPC_REQUIRE_CHROMIUM is set", pytrace=False)
    pytest.skip(why)


def until(page, selector, pattern):
    """Wait for a text. Playwright's `wait_for_function` evaluates in the page, which a strict policy forbids."""
    from playwright.sync_api import expect

    expect(page.locator(selector)).to_have_text(re.compile(pattern), timeout=20_000_000 * MS)


class Watched:
    """A page of a new context, and everything it complained about."""

    def __init__(self, browser, **options):
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.complaints = []
        self.page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))


@contextlib.contextmanager
def serve_pages(pages, host="127.0.0.1", port=0):
    """Somebody else's web server: `pages` by path. Yields its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = pages.get(self.path, "").encode()
            self.send_response(200 if body else 404)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer((host, port), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://{host}:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
