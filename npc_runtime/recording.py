"""What was said over a daemon's connections, with times: written while it happens, read to be played back.

One JSON document a line. The first says what it is and what `welcome` said of the daemon; every other is a message:

    {"recording": 1, "info": {"version": …, "device": …, "backend": …, "base": {…}}}
    {"at": 3.207, "connection": 1, "from": "client", "message": {"type": "generate", …}}
    {"at": 3.371, "connection": 1, "from": "daemon", "message": {"type": "line.start", …}}

`at` is seconds since the recording began. Tokens are never written.
"""

import json
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from pydantic import BaseModel, ValidationError

from npc_runtime import protocol as wire
from npc_runtime.errors import StartupError
from npc_runtime.line import said_in
from npc_runtime.stage import DaemonInfo

__all__ = ["Piece", "Recorder", "Recording", "Take", "refuse_existing"]

logger = logging.getLogger(__name__)

VERSION = 1
MAX_BYTES = 1 << 28
MAX_LINE = 8 << 20

NOT_KEPT = ("stats", "watched")
"""Said once a second, or said already to somebody else."""

SECRETS = frozenset({"token", "resume", "session"})
"""Fields of messages that let somebody in."""


class Recorder:
    """Writes a recording. What cannot be written any more is said once in the log; the daemon goes on."""

    def __init__(
        self,
        file: TextIO,
        info: DaemonInfo,
        clock: Callable[[], float] = time.monotonic,
        *,
        secret: str | None = None,
    ) -> None:
        """`file` may hold the beginning of a recording already. `secret` is never written, wherever it stands."""
        self._file: TextIO | None = file
        self._clock = clock
        self._secret = secret
        self._began_at = clock()
        self._num_bytes = file.tell()
        if not self._num_bytes:
            self._write({"recording": VERSION, "info": _describe(info)})

    @classmethod
    def open(cls, path: Path, info: DaemonInfo, *, secret: str | None = None, goes_on: bool = False) -> "Recorder":
        """Begin a recording in a new file, or go on with that of the process before this one. Raises `StartupError`; a
        recording that is there is never written over.
        """
        if not goes_on:
            refuse_existing(path)
        try:
            return cls(path.open("a", encoding="utf-8", errors="backslashreplace"), info, secret=secret)
        except OSError as error:
            raise StartupError(
                f"--record {path}: {error.strerror or error}.", "Name a file that can be made."
            ) from error

    def add(self, connection: int, sender: str, message: dict[str, Any]) -> None:
        """Keep a message; `sender` is client or daemon."""
        if self._file is None or message.get("type") in NOT_KEPT:
            return
        if message.get("type") == "hello":
            message = {name: value for name, value in message.items() if name in ("type", "id", "protocol", "client")}
        if not SECRETS.isdisjoint(message):
            message = {name: value for name, value in message.items() if name not in SECRETS}
        at = round(self._clock() - self._began_at, 4)
        self._write({"at": at, "connection": connection, "from": sender, "message": message})

    def close(self) -> None:
        """Write no more."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, document: dict[str, Any]) -> None:
        assert self._file is not None
        try:
            text = json.dumps(document, ensure_ascii=False, separators=(",", ":")) + "\n"
        except (TypeError, ValueError, RecursionError):  # fields that nobody knows may have bytes in them
            return
        if self._secret is not None:
            text = text.replace(self._secret, "[secret]")
        self._num_bytes += len(text.encode(errors="backslashreplace"))
        try:
            if self._num_bytes > MAX_BYTES:
                raise OSError(f"it would be larger than {MAX_BYTES >> 20} MiB")
            self._file.write(text)
            self._file.flush()
        except (OSError, ValueError) as error:
            logger.error("the recording ends here: %s", error)
            file, self._file = self._file, None
            with suppress(OSError):  # it tries to write what it still has
                file.close()


def refuse_existing(path: Path) -> None:
    """Raise `StartupError` if a new recording cannot be made there."""
    if path.exists():
        raise StartupError(f"--record {path}: the file is there already.", "Name another, or remove it.")
    if not path.parent.is_dir():
        raise StartupError(f"--record {path}: there is no folder {path.parent}.", "Make it, or name another.")


class Piece(NamedTuple):
    """Something that a line said: text, and when, in seconds after the line was sent."""

    at: float
    text: str


@dataclass(slots=True)
class Take:
    """One line as it was recorded."""

    persona: str
    said: str  # what the player said, as it joins a history
    sent_at: float
    started_at: float | None = None
    batch_size: int = 1
    pieces: list[Piece] = field(default_factory=list)
    end: wire.LineEnd | None = None
    ended_at: float = 0.0


class Recording:
    """A recording that is read: who it was of, and its lines by what was asked."""

    def __init__(self, info: DaemonInfo, takes: list[Take]) -> None:
        self.info = info
        self._takes: defaultdict[tuple[str, str], list[Take]] = defaultdict(list)
        for take in takes:
            self._takes[take.persona, take.said].append(take)

    def __len__(self) -> int:
        return sum(map(len, self._takes.values()))

    def find(self, persona: str, said: str, number: int) -> Take | None:
        """The line that answered this for the `number`-th time, from 0; where there were fewer, the last one."""
        takes = self._takes.get((persona, said))
        return None if not takes else takes[min(number, len(takes) - 1)]

    @classmethod
    def load(cls, path: Path) -> "Recording":
        """Read a recording. Raises `StartupError` naming the line that is wrong; a last one that is cut off is not."""
        try:
            with path.open(encoding="utf-8") as file:
                documents = list(_read_lines(path, file))
        except (OSError, UnicodeDecodeError) as error:
            raise StartupError(f"--replay {path}: {error}.", "Name a file that serve --record wrote.") from error
        if not documents:
            raise StartupError(f"--replay {path}: the file is empty.", "Name a file that serve --record wrote.")
        info = _read_info(path, documents[0])
        reader = _Reader()
        for number, document in enumerate(documents[1:], 2):
            try:
                reader.take(document)
            except (ValidationError, KeyError, TypeError, ValueError, OverflowError) as error:
                raise _wrong(path, number) from error
        return cls(info, reader.takes)


class _Reader:
    """Puts the messages about a line together; ids are a connection's own, and may be used again."""

    def __init__(self) -> None:
        self._asked: list[Take] = []  # in that order, in which they will be asked for again
        self._offered: dict[tuple[int, wire.Id], tuple[float, list[Any]]] = {}  # batches that are not answered yet
        self._takes: dict[tuple[int, wire.Id], Take] = {}
        self._personas: dict[tuple[int, str], str] = {}  # of NPCs

    @property
    def takes(self) -> list[Take]:
        """The lines that ended; of one that lost its client, or the daemon, nobody knows how it would have."""
        return [take for take in self._asked if take.end is not None]

    def take(self, document: dict[str, Any]) -> None:
        """Read one message."""
        connection, at, message = int(document["connection"]), float(document["at"]), document["message"]
        if not math.isfinite(at):
            raise ValueError("at")
        if document["from"] == "daemon":
            self._take_answer(connection, at, message)
        elif message["type"] == "generate":
            self._offered[connection, message["batch"]] = at, list(message["lines"])
        elif message["type"] == "npc.open":
            self._personas[connection, message["npc"]] = str(message["persona"])

    def _take_answer(self, connection: int, at: float, message: dict[str, Any]) -> None:
        match message["type"]:
            case "accepted":
                self._on_accepted(connection, message)
            case "line.start":
                self._on_start(connection, at, message)
            case "delta":
                for item in message["items"]:
                    take = self._takes.get((connection, item["line"]))
                    if take is not None:
                        take.pieces.append(Piece(at - take.sent_at, str(item["text"])))
            case "line.end":
                self._on_end(connection, at, message)

    def _on_accepted(self, connection: int, message: dict[str, Any]) -> None:
        """Every line of the batch was answered, in the order in which they were sent."""
        at, documents = self._offered.pop((connection, message["batch"]), (0.0, []))
        for document, item in zip(documents, message["items"], strict=False):
            if item["status"] == "queued":
                request = wire.LineRequest.model_validate(document)
                persona = request.persona or self._personas.get((connection, request.npc or ""), "")
                take = self._takes[connection, request.line] = Take(persona, said_in(request), at)
                self._asked.append(take)

    def _on_start(self, connection: int, at: float, message: dict[str, Any]) -> None:
        take = self._takes.get((connection, message["line"]))
        if take is not None:
            take.started_at, take.persona = at - take.sent_at, str(message["persona"])
            take.batch_size = int(message["batch_size"])

    def _on_end(self, connection: int, at: float, message: dict[str, Any]) -> None:
        take = self._takes.pop((connection, message["line"]), None)
        if take is not None:
            take.end, take.ended_at = wire.LineEnd.model_validate(message), at - take.sent_at
            if take.end.reason == "filtered" or take.end.usage.cached > take.end.usage.prompt:
                raise ValueError("an end that no engine makes")


def _read_lines(path: Path, file: TextIO) -> Iterator[dict[str, Any]]:
    number = 0
    while text := file.readline(MAX_LINE):
        number += 1
        try:
            document = json.loads(text)
            if not isinstance(document, dict):
                raise ValueError
        except (ValueError, RecursionError) as error:
            if not text.endswith("\n") and len(text) < MAX_LINE:
                return  # the daemon was killed while it wrote
            raise _wrong(path, number) from error
        yield document


def _read_info(path: Path, document: dict[str, Any]) -> DaemonInfo:
    version = document.get("recording")
    if type(version) is int and version > VERSION:
        raise StartupError(f"--replay {path}: version {version} is newer than this program reads.", "Update it.")
    try:
        if version != VERSION:
            raise ValueError("version")
        info = document["info"]
        base = wire.BaseModelInfo.model_validate(info["base"])
        return DaemonInfo(str(info["version"]), str(info["device"]), str(info["backend"]), base)
    except (ValidationError, ValueError, KeyError, TypeError) as error:
        raise _wrong(path, 1) from error


def _wrong(path: Path, number: int) -> StartupError:
    return StartupError(f"--replay {path}, line {number}: this is not of a recording.", "Record the session again.")


def _describe(info: DaemonInfo) -> dict[str, Any]:
    base: BaseModel = info.base
    return {
        "version": info.version,
        "device": info.device,
        "backend": info.backend,
        "base": base.model_dump(mode="json"),
    }
