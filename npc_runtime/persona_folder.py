"""The folder of personas as clients may change it: get, put, validate and delete, on disk and nothing else.

Hot reload finds out by itself what was written here. What a client sends is bounded and checked before anything is
touched; nothing is written or read outside of the folder, nothing that somebody else wrote meanwhile is lost, and
nothing is ever deleted. Calls block on the disk: they belong into a thread.
"""

import hashlib
import os
import re
import threading
import time
from pathlib import Path, PureWindowsPath
from typing import Any

from npc_runtime.document import MAX_BYTES
from npc_runtime.draft import check_document
from npc_runtime.errors import InvalidError, PersonaInvalid, PersonaUnknown, WireError
from npc_runtime.persona import FILE_NAME, Persona, Reading, read_bytes, read_file
from npc_runtime.problems import MAX_PROBLEMS, Problem, find_place
from npc_runtime.schema import ID
from npc_runtime.whole_file import replace_file
from npc_runtime.wire_document import to_wire

__all__ = ["MAX_PERSONAS", "MAX_TRASH", "TRASH_NAME", "PersonaFolder"]

MAX_PERSONAS = 1_000
MAX_TRASH = 1_000
TRASH_NAME = ".trash"
"""Hidden, and no persona itself: neither the library nor hot reload looks into it."""

_DEVICES = re.compile(r"con|prn|aux|nul|com[0-9]|lpt[0-9]")
"""What Windows takes for a device, wherever a file has that name."""


class PersonaFolder:
    """One folder of personas. What lies below `package`, the installed program, is not changed. For any thread."""

    def __init__(self, folder: Path, *, package: Path = Path(__file__).parent) -> None:
        self._folder = Path(os.path.realpath(folder))
        self._is_installed = Path(os.path.realpath(package)) in (self._folder, *self._folder.parents)
        self._lock = threading.Lock()

    def get(self, persona_id: str) -> dict[str, Any]:
        """Return a persona's file: `persona`, `etag`, `doc` if it is a map, and `problems` if there are any.

        Raises `PersonaUnknown`, `InvalidError` about the id, `PersonaInvalid` if the file cannot be opened.
        """
        folder = self._find(persona_id)
        data = _read(folder)
        if data is None:
            raise _unknown(persona_id)
        reading = read_file(data, folder)
        body: dict[str, Any] = {"persona": persona_id, "etag": _etag(data)}
        if reading.fields is not None:
            body["doc"] = to_wire(reading.fields)
        if reading.problems:
            body["problems"] = [problem.to_wire() for problem in reading.problems]
        return body

    def validate(self, document: Any, persona_id: str | None = None) -> dict[str, Any]:
        """Say what `put` would object to: `ok`, and `problems` with place, message and hint. Raises nothing.

        Without `persona_id` the document's own id is meant.
        """
        chosen = document.get("id") if persona_id is None and isinstance(document, dict) else persona_id
        try:
            folder = self._find(chosen) if isinstance(chosen, str) else None
            problems = self._check(document, folder, None if folder is None else _read(folder)).problems
        except WireError as error:
            named = Problem(("id",), error.message.removesuffix("."), error.hint)
            found = check_document(document).problems
            problems = found if any(each.path == named.path for each in found) else [named, *found]
        return {"ok": not problems, "problems": [problem.to_wire() for problem in problems[:MAX_PROBLEMS]]}

    def put(self, persona_id: str, document: Any, *, etag: str | None = None) -> dict[str, Any]:
        """Save a persona, comments and order of its file kept; returns `persona` and the new `etag`.

        `etag` is what `get` gave: another file on disk is then not overwritten. An empty one means that there must be
        none yet; without any, whatever is there is changed. Raises `PersonaInvalid` about the document, `InvalidError`
        about all else.
        """
        with self._lock:
            folder = self._find(persona_id)
            self._refuse_if_installed()
            old = _read(folder)
            persona = self._check(document, folder, old).usable()
            _compare(persona_id, etag, old)
            if old is None:
                self._refuse_new(persona_id)
            data = _write_over(persona, folder, old)
            if data != old:
                _replace(folder, data, old)
        return {"persona": persona_id, "etag": _etag(data)}

    def delete(self, persona_id: str, *, now: float | None = None) -> dict[str, Any]:
        """Move a persona's folder into the trash; returns `persona` and `trash`, where it is.

        `now` is seconds since the epoch. Raises `PersonaUnknown` and `InvalidError`.
        """
        with self._lock:
            folder = self._find(persona_id)
            self._refuse_if_installed()
            if not os.path.lexists(folder / FILE_NAME):
                raise _unknown(persona_id)
            stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now))
            try:
                target = self._place_in_trash(f"{persona_id}-{stamp}")
                folder.rename(target)
            except OSError as error:
                raise _unwritable(folder, error, "moved") from error
        return {"persona": persona_id, "trash": str(target)}

    def _find(self, persona_id: str) -> Path:
        """The persona's folder, whether it is there or not. Raises `InvalidError` if it would be elsewhere."""
        if not re.fullmatch(ID, persona_id):
            shown = persona_id[:64].encode(errors="backslashreplace").decode()
            raise InvalidError(f"persona: '{shown}' cannot be an id.", "An id has small letters, digits, - and _.")
        folder = self._folder / persona_id
        for path in (folder, folder / FILE_NAME):
            if os.path.islink(path) or os.path.realpath(path) != str(path):  # the second finds Windows' other kinds too
                raise InvalidError(
                    f"persona: {path} is a link, and clients see only what is in {self._folder} itself.",
                    "Put the files themselves there.",
                )
        if os.path.lexists(folder / FILE_NAME) and not os.path.isfile(folder / FILE_NAME):
            raise InvalidError(f"persona: {folder / FILE_NAME} is not a file.", "Move it away.")
        return folder

    def _check(self, document: Any, folder: Path | None, old: bytes | None) -> Reading:
        """All that is wrong with a document that is to take the place of a file."""
        there = Reading({}, None, []) if folder is None or old is None else read_file(old, folder)
        reading = check_document(document, folder, there.fields)
        more = [] if folder is None or there.fields is not None else [_unreadable(folder, there.problems[0])]
        if folder is not None and reading.persona is not None and there.fields is not None:
            more += self._find_strange_adapters(reading.persona, folder, reading.fields, there.fields)
            more += reading.persona.find_locked(there.fields, lambda path: None)
        return reading._replace(problems=[*reading.problems, *more])

    def _find_strange_adapters(self, persona: Persona, folder: Path, fields: Any, before: Any) -> list[Problem]:
        """Adapters that the file does not name and that lie elsewhere: no client says what else the daemon reads."""
        named = _adapter_paths(before.get("adapter"))
        return [
            Problem(
                find_place(("adapter", number, "path"), fields),
                f"adapter.{number}.path: '{ref.path[:200]}' is not below the folder of the personas",
                "Put the adapter into the persona's folder, or write its path into the file by hand.",
            )
            for number, ref in enumerate(persona.adapter)
            if ref.path not in named and not self._holds(folder, ref.path)
        ]

    def _holds(self, folder: Path, path: str) -> bool:
        """Whether a path that starts in a persona's folder ends below the personas, on this system and on Windows."""
        if PureWindowsPath(path).anchor or ":" in path:
            return False
        places = [Path(os.path.realpath(folder / spelled)) for spelled in (path, path.replace("\\", "/"))]
        return all(self._folder in place.parents for place in places)

    def _refuse_if_installed(self) -> None:
        if self._is_installed:
            command = (
                f'xcopy /e /i "{self._folder}" personas' if os.name == "nt" else f"cp -r '{self._folder}' personas"
            )
            raise InvalidError(
                f"persona: the personas in {self._folder} came with the program and are not changed.",
                f"Copy them into your game ({command}), and start npc-runtime serve --personas personas.",
            )

    def _refuse_new(self, persona_id: str) -> None:
        """Raise `InvalidError` if no persona may be added, or none of this name."""
        if _DEVICES.fullmatch(persona_id):
            raise InvalidError(f"persona: Windows can have no folder '{persona_id}'.", "Choose another id.")
        num_there = sum(1 for path in self._folder.glob(f"*/{FILE_NAME}"))
        if num_there >= MAX_PERSONAS:
            raise InvalidError(f"persona: {self._folder} has {num_there} personas.", "Delete some first.")

    def _place_in_trash(self, name: str) -> Path:
        """A path in the trash that is not taken. Raises `InvalidError`, `OSError`."""
        trash = self._folder / TRASH_NAME
        trash.mkdir(exist_ok=True)
        if os.path.realpath(trash) != str(trash):
            raise InvalidError(f"persona: {trash} is a link.", "Put a folder there.")
        taken = {path.name for path in trash.iterdir()}
        if len(taken) >= MAX_TRASH:
            raise InvalidError(f"persona: {trash} has {len(taken)} entries.", "Empty it first.")
        numbered = (f"{name}-{number}" for number in range(2, MAX_TRASH + 2))
        return trash / next(each for each in (name, *numbered) if each not in taken)


def _read(folder: Path) -> bytes | None:
    """The bytes of the persona's file; None if there is none."""
    return read_bytes(folder) if os.path.lexists(folder / FILE_NAME) else None


def _etag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _compare(persona_id: str, etag: str | None, old: bytes | None) -> None:
    """Raise `InvalidError` if the file is another one than the client knows."""
    if etag is None or etag == ("" if old is None else _etag(old)):
        return
    what = {
        (True, False): (f"there is a persona '{persona_id}' already", "Choose another id, or persona.get it first."),
        (False, True): (f"'{persona_id}' is not there any more", "Send an empty etag to save it anew."),
    }.get(
        (not etag, old is None),
        (f"the file of '{persona_id}' was changed since", "persona.get it again, and make your changes to that."),
    )
    raise InvalidError(f"etag: {what[0]}.", what[1])


def _write_over(persona: Persona, folder: Path, old: bytes | None) -> bytes:
    """The file with the persona in it. Raises `PersonaInvalid` if there is no such file."""
    data = persona.to_file(folder / FILE_NAME, old)
    if len(data) > MAX_BYTES:
        what = f"the document: its file would have {len(data) // 1024} KiB, and {MAX_BYTES // 1024} are read."
        raise PersonaInvalid(what, "Shorten it.")
    written = read_file(data, folder).persona
    if written is None or written.to_document() != persona.to_document():
        raise PersonaInvalid("the document: YAML does not give back what is in it.", "Take out unusual characters.")
    return data


def _replace(folder: Path, data: bytes, old: bytes | None) -> None:
    """Put the file in place, unless somebody else did meanwhile. Raises `InvalidError`."""
    path = folder / FILE_NAME
    try:
        if old is not None and not path.stat().st_mode & 0o222:  # renaming would not mind
            raise InvalidError(f"persona: {path} is write-protected.", "Check it out, or make it writable.")
        folder.mkdir(exist_ok=True)
        if _read(folder) != old:
            raise InvalidError(f"etag: {path} is just being changed by somebody else.", "persona.get it again.")
        replace_file(path, data)
    except OSError as error:
        raise _unwritable(path, error, "written") from error


def _unreadable(folder: Path, first: Problem) -> Problem:
    """What is wrong with a file that cannot be changed, for nobody can tell what it says."""
    remedy = f"{first.remedy} Or delete the persona, which keeps its folder in {TRASH_NAME}, and save it then."
    return Problem((), f"{folder / FILE_NAME}: {first.what}", remedy, first.line)


def _adapter_paths(value: Any) -> set[str]:
    """The paths that the field `adapter` of a file has, as far as it can be read."""
    entries = value if isinstance(value, list) else [value]
    paths = [entry.get("path") if isinstance(entry, dict) else entry for entry in entries]
    return {path for path in paths if isinstance(path, str)}


def _unknown(persona_id: str) -> PersonaUnknown:
    return PersonaUnknown(f"There is no persona '{persona_id}'.", "persona.list has those that there are.")


def _unwritable(path: Path, error: OSError, done: str) -> InvalidError:
    reason = error.strerror or str(error)
    return InvalidError(f"persona: {path} cannot be {done}: {reason}.", "Make the folder writable, or try again.")
