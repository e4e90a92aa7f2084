"""A small server that answers as the Hugging Face hub does, for its real client (`HF_ENDPOINT`)."""

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "5" * 40


@dataclass
class FakeHub:
    """One model, `repo`; what tests change about it are attributes."""

    folder: Path
    repo: str = "Tester/Tiny-Model"
    revisions: tuple[str, ...] = ("main", "v1.0", COMMIT)
    refusal: tuple[int, str] | None = None  # status and code for everything that is asked of the repository
    sizes: dict[str, int] = field(default_factory=dict)  # what the listing says instead of the truth
    cut_after: int | None = None  # bytes of a weight file after which the connection breaks
    cuts_left: int = 0
    stalls: bool = False  # after half of a weight file nothing more comes
    is_over: threading.Event = field(default_factory=threading.Event)
    url: str = ""
    requests: list[str] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)

    def fetched(self) -> list[str]:
        """Names of the files whose bytes were asked for."""
        return [line.rpartition("/")[2] for line in self.requests if line.startswith("GET") and "/resolve/" in line]


class _Handler(BaseHTTPRequestHandler):
    @property
    def hub(self):
        return self.server.hub

    def do_HEAD(self):
        self.answer(has_body=False)

    def do_GET(self):
        self.answer(has_body=True)

    def answer(self, *, has_body):
        self.hub.requests.append(f"{self.command} {self.path}")
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/([^?]+)(?:\?.*)?", self.path)
        info = re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/([^?]+)(?:\?.*)?", self.path)
        found = file or info
        if not found or found[1] != self.hub.repo:
            return self.refuse(401, "RepoNotFound")
        if self.hub.refusal:
            return self.refuse(*self.hub.refusal)
        if found[2] not in self.hub.revisions:
            return self.refuse(404, "RevisionNotFound")
        return self.send_file(self.hub.folder / file[3], has_body) if file else self.send_info()

    def refuse(self, status, code):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send_info(self):
        siblings = [
            {"rfilename": path.relative_to(self.hub.folder).as_posix(), "size": path.stat().st_size, "blobId": "0"}
            for path in sorted(self.hub.folder.rglob("*"))
            if path.is_file()
        ]
        for sibling in siblings:
            sibling["size"] = self.hub.sizes.get(sibling["rfilename"], sibling["size"])
        body = json.dumps({"id": self.hub.repo, "sha": COMMIT, "siblings": siblings}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def send_file(self, path, has_body):
        if not path.is_file():
            return self.refuse(404, "EntryNotFound")
        data = path.read_bytes()
        start = int((re.search(r"bytes=(\d+)-", self.headers.get("Range", "")) or [0, 0])[1])
        if start:
            self.hub.ranges.append(f"{path.name} {start}")
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Linked-Size", str(len(data)))
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if has_body:
            self.send_bytes(path, data[start:])

    def send_bytes(self, path, data):
        if self.hub.cut_after is not None and self.hub.cuts_left and path.suffix == ".safetensors":
            self.hub.cuts_left -= 1
            data = data[: self.hub.cut_after]
            self.close_connection = True
        if self.hub.stalls and path.suffix == ".safetensors":
            self.wfile.write(data[: len(data) // 2])
            self.hub.is_over.wait()
            return
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@contextmanager
def serve_hub(folder):
    hub = FakeHub(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub = hub
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        hub.is_over.set()
        server.shutdown()
        server.server_close()
        thread.join()
