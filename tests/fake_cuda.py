"""The streams of a GPU that is not there: which of them is current on a thread, and what is asked of them."""

import contextlib
import threading

import torch

LOWEST, HIGHEST = 0, -5


class FakeStream:
    """Notes what it is asked for in `cuda.calls`."""

    def __init__(self, cuda, priority):
        self.cuda, self.priority = cuda, priority

    def record_event(self):
        self.cuda.calls.append("recorded")
        return "the steps so far"

    def wait_event(self, event):
        self.cuda.calls.append(f"waits for {event}")

    def wait_stream(self, stream):
        self.cuda.waits.append((self, stream))

    def synchronize(self):
        self.cuda.calls.append("synchronized")


class FakeCuda:
    def __init__(self, monkeypatch):
        """Take the place of torch's streams, until the test is over."""
        self.calls, self.waits, self.made = [], [], []
        self.default = FakeStream(self, LOWEST)
        self._thread = threading.local()
        cuda = self

        class Stream:
            def __new__(cls, device=None, priority=0):
                cuda.made.append(FakeStream(cuda, priority))
                return cuda.made[-1]

            @staticmethod
            def priority_range():
                return LOWEST, HIGHEST

        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", self.use)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        monkeypatch.setattr(torch.cuda, "default_stream", lambda device=None: self.default)

    @property
    def current(self):
        return getattr(self._thread, "stream", self.default)

    @contextlib.contextmanager
    def use(self, stream):
        before = self.current
        self._thread.stream = before if stream is None else stream
        try:
            yield
        finally:
            self._thread.stream = before
