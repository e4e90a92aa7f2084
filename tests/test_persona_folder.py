"""What clients do to a folder of personas: nothing outside of it, nothing lost, nothing by halves."""

import asyncio
import hashlib
import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
from conftest import MS
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML
from test_persona import WHOLE

from npc_runtime import persona_folder
from npc_runtime.errors import InvalidError, PersonaInvalid, PersonaUnknown, WireError
from npc_runtime.persona import Library, Persona
from npc_runtime.persona_folder import PersonaFolder
from npc_runtime.reload import PersonaWatch

DOCUMENT = {"schema": 1, "id": "guard", "display_name": "Guard", "bio": "Watches the gate."}
COMMENTED = b"""\
# The guard.
schema: 1
id: guard   # the folder
display_name: 'Guard'
bio: Watches the gate.   # in two words

knows:
  - id: gate
    text: The gate is old.   # very
  # - id: later
adapter: ../../shared/lora
"""


@pytest.fixture
def place(tmp_path):
    """The folder on disk, with one persona in it, and something beside it that is nobody's business."""
    folder = tmp_path / "game" / "personas"
    (folder / "guard").mkdir(parents=True)
    (folder / "guard" / "persona.yaml").write_bytes(COMMENTED)
    (folder / "guard" / "lines.jsonl").write_text("{}\n")
    (tmp_path / "game" / "secret").mkdir()
    (tmp_path / "game" / "secret" / "persona.yaml").write_text(json.dumps({**DOCUMENT, "id": "secret"}))
    return folder


@pytest.fixture
def personas(place):
    return PersonaFolder(place)


def contents(folder):
    """Every file and link below a folder, except what is in the trash."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if ".trash" not in path.parts and (path.is_symlink() or path.is_file())
    }


def fields(problems):
    return [problem["field"] for problem in problems]


# -- get -----------------------------------------------------------------------------------------------------


def test_a_persona_is_got_as_its_file_has_it(personas):
    assert personas.get("guard") == {
        "persona": "guard",
        "etag": hashlib.sha256(COMMENTED).hexdigest()[:16],
        "doc": {
            **DOCUMENT,
            "knows": [{"id": "gate", "text": "The gate is old."}],
            "adapter": "../../shared/lora",
        },
    }


@pytest.mark.parametrize(
    ("data", "doc", "field", "line"),
    [
        (b"schema: 1\nid: guard\ndisplay_name: G\nbio: B\nmood: 3\n", {"mood": 3}, "/mood", 5),
        (b"schema: 2\nid: guard\nnewer: {a: [1]}\n", {"newer": {"a": [1]}}, "/schema", 1),
        (b"schema: 1\nid: guard\ndisplay_name: G\nbio: 1e400\n", {"bio": "inf"}, "/bio", 4),
        (b"- schema\n", None, "", None),
        (b"", None, "", None),
        (b"schema: 1\nid: *x\n", None, "", 2),
        (b"\xff\xfe", None, "", 1),
        (b"#" * 300_000, None, "", None),
    ],
)
def test_a_file_with_problems_is_got_too(personas, place, data, doc, field, line):
    (place / "guard" / "persona.yaml").write_bytes(data)
    body = personas.get("guard")
    assert body["etag"] == hashlib.sha256(data).hexdigest()[:16]
    assert ("doc" in body) == (doc is not None)
    assert (doc or {}).items() <= body.get("doc", {}).items()
    problem = body["problems"][0]
    assert (problem["field"], problem.get("line")) == (field, line)
    assert problem["message"]
    assert problem["hint"]
    json.dumps(body, allow_nan=False)


def test_an_unknown_persona(personas):
    for call in (personas.get, personas.delete):
        with pytest.raises(PersonaUnknown, match="'nobody'"):
            call("nobody")


# -- validate ------------------------------------------------------------------------------------------------


def test_validate_tells_all_problems_and_writes_nothing(personas, place):
    before = contents(place)
    assert personas.validate(DOCUMENT, "guard") == {"ok": True, "problems": []}
    assert personas.validate(DOCUMENT) == {"ok": True, "problems": []}
    assert personas.validate({**DOCUMENT, "id": "new"})["ok"]
    body = personas.validate({**DOCUMENT, "id": "other", "biography": "x", "knows": [{"id": "a", "text": 7}]}, "guard")
    assert not body["ok"]
    assert fields(body["problems"]) == ["/id", "/knows/0/text", "/biography"]
    assert all(problem["message"].endswith(".") and problem["hint"] for problem in body["problems"])
    assert contents(place) == before


@pytest.mark.parametrize("document", [None, 7, "x", [], {}, {"id": 7}, {"id": "../x"}, {"id": "x" * 10_000}])
@pytest.mark.parametrize("persona_id", [None, "guard", "../guard", "\ud800", ""])
def test_validate_raises_nothing(personas, document, persona_id):
    body = personas.validate(document, persona_id)
    assert body["ok"] is False
    assert body["problems"]
    assert len(json.dumps(body).encode()) < 20_000


def test_validate_objects_to_what_put_objects_to(personas, place):
    (place / "guard" / "persona.yaml").write_bytes(COMMENTED + b"locked: [bio, adapter]\n")
    document = {**DOCUMENT, "locked": ["bio", "adapter"], "bio": "Another.", "adapter": ["lora", "../../secret"]}
    body = personas.validate(document)
    assert fields(body["problems"]) == ["/adapter/1/path", "/adapter", "/bio"] or fields(body["problems"]) == [
        "/adapter/1",
        "/adapter",
        "/bio",
    ]
    with pytest.raises(PersonaInvalid, match=r"adapter\.1\.path.*2 more: persona\.validate"):
        personas.put("guard", document)


def test_problems_are_bounded(personas):
    body = personas.validate({**DOCUMENT, **{f"x{number}" * 1_000: 1 for number in range(60)}})
    assert len(body["problems"]) == 50
    assert len(json.dumps(body)) < 100_000


# -- put -----------------------------------------------------------------------------------------------------


def test_put_changes_what_changed_and_keeps_comments(personas, place):
    got = personas.get("guard")
    document = {**got["doc"], "bio": "Patrols the gate."}
    body = personas.put("guard", document, etag=got["etag"])
    assert (place / "guard" / "persona.yaml").read_bytes() == COMMENTED.replace(b"Watches", b"Patrols")
    assert body == {"persona": "guard", "etag": personas.get("guard")["etag"]}
    assert body["etag"] != got["etag"]
    assert sorted(path.name for path in (place / "guard").iterdir()) == ["lines.jsonl", "persona.yaml"]


def test_put_of_what_is_there_writes_nothing(personas, place):
    got = personas.get("guard")
    before = (place / "guard" / "persona.yaml").stat()
    assert personas.put("guard", got["doc"], etag=got["etag"])["etag"] == got["etag"]
    assert (place / "guard" / "persona.yaml").stat() == before


def test_a_new_persona_is_a_folder_with_a_file(personas, place):
    body = personas.put("cook", {**DOCUMENT, "id": "cook"}, etag="")
    assert Persona.load(place / "cook").display_name == "Guard"
    assert personas.get("cook")["etag"] == body["etag"]
    with pytest.raises(InvalidError, match="etag: there is a persona 'cook' already"):
        personas.put("cook", {**DOCUMENT, "id": "cook"}, etag="")
    assert {persona.id for persona in Library.load(place)} == {"guard", "cook"}


def test_a_folder_without_a_file_becomes_a_persona(personas, place):
    (place / "cook").mkdir()
    (place / "cook" / "lines.jsonl").write_text("{}")
    personas.put("cook", {**DOCUMENT, "id": "cook"}, etag="")
    assert sorted(path.name for path in (place / "cook").iterdir()) == ["lines.jsonl", "persona.yaml"]


@pytest.mark.parametrize(
    ("document", "named"),
    [
        ({**DOCUMENT, "id": "other"}, "id 'other' is not the folder's name 'guard'"),
        ({**DOCUMENT, "bio": None}, "bio: has no text"),
        ({**DOCUMENT, "limits": {"hard_tokens": 10_000}}, "limits.hard_tokens"),
        ({**DOCUMENT, "card": {"a": {"b": float("nan")}}}, "card.a.b: this number"),
        ([], "not a map"),
    ],
)
def test_a_bad_document_is_refused_with_the_field_and_nothing_is_written(personas, place, document, named):
    before = contents(place)
    with pytest.raises(PersonaInvalid) as caught:
        personas.put("guard", document)
    assert named in caught.value.message
    assert contents(place) == before
    with pytest.raises(PersonaInvalid):
        personas.put("new", document if document == [] else {**document, "id": "new", "bio": ""})
    assert contents(place) == before
    assert not (place / "new").exists()


def test_locked_fields_are_not_changed(personas, place):
    path = place / "guard" / "persona.yaml"
    path.write_bytes(COMMENTED + b"locked: [bio]\n")
    document = personas.get("guard")["doc"]
    with pytest.raises(PersonaInvalid, match=r"'bio' is locked\. Take it off"):
        personas.put("guard", {**document, "bio": "x", "locked": []})
    with pytest.raises(PersonaInvalid, match="'bio' is locked"):
        personas.put("guard", {**document, "bio": "x"})
    personas.put("guard", {**document, "display_name": "Bert"})
    personas.put("guard", {**document, "locked": []})
    personas.put("guard", {**document, "bio": "x", "locked": []})
    assert Persona.load(place / "guard").bio == "x"


def test_what_somebody_else_wrote_is_not_lost(personas, place):
    path = place / "guard" / "persona.yaml"
    etag = personas.get("guard")["etag"]
    theirs = COMMENTED.replace(b"old", b"new")
    path.write_bytes(theirs)
    with pytest.raises(InvalidError, match=r"etag: the file of 'guard' was changed since\. persona\.get it again"):
        personas.put("guard", DOCUMENT, etag=etag)
    assert path.read_bytes() == theirs
    path.unlink()
    with pytest.raises(InvalidError, match="etag: 'guard' is not there any more"):
        personas.put("guard", DOCUMENT, etag=etag)
    assert not path.exists()
    with pytest.raises(InvalidError, match="etag"):
        personas.put("cook", {**DOCUMENT, "id": "cook"}, etag=etag)
    assert not (place / "cook").exists()


class Meddling(dict):
    """A document during whose check somebody else saves the persona."""

    path = Path()

    def items(self):
        self.path.parent.mkdir(exist_ok=True)
        self.path.write_bytes(b"theirs")
        return super().items()


@pytest.mark.parametrize("persona_id", ["guard", "cook"])
@pytest.mark.parametrize("has_etag", [True, False])
def test_what_somebody_else_writes_meanwhile_is_not_lost_either(personas, place, persona_id, has_etag):
    document = Meddling({**DOCUMENT, "id": persona_id})
    document.path = place / persona_id / "persona.yaml"
    etag = ("" if persona_id == "cook" else personas.get("guard")["etag"]) if has_etag else None
    with pytest.raises(InvalidError, match=r"etag: .* is just being changed by somebody else"):
        personas.put(persona_id, document, etag=etag)
    assert document.path.read_bytes() == b"theirs"


def test_of_many_who_save_at_once_one_wins_and_the_others_know(personas, place):
    etag = personas.get("guard")["etag"]
    told, torn, is_over = [], [], threading.Event()

    def save(number):
        try:
            told.append(personas.put("guard", {**DOCUMENT, "bio": f"{number} " * 2_000}, etag=etag))
        except InvalidError as error:
            told.append(error)

    def look():
        while not is_over.is_set():
            data = (place / "guard" / "persona.yaml").read_bytes()
            if data != COMMENTED and len(set(data.decode().split("bio: ")[1].split()[:1_900])) != 1:
                torn.append(data)

    threads = [threading.Thread(target=save, args=(number,)) for number in range(8)]
    watcher = threading.Thread(target=look)
    for thread in (watcher, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    is_over.set()
    watcher.join()
    [won] = [each for each in told if isinstance(each, dict)]
    assert won["etag"] == personas.get("guard")["etag"]
    assert [str(each) for each in told if each is not won] == [str(told[-1])] * 7
    assert not torn


def test_a_wrong_file_can_be_put_right(personas, place):
    path = place / "guard" / "persona.yaml"
    path.write_bytes(b"# mine\nschema: 1\nid: guard\nbio: 7   # a number\nspeach_style: x\n")
    got = personas.get("guard")
    document = {key: value for key, value in got["doc"].items() if key != "speach_style"}
    personas.put("guard", {**document, "bio": "x", "display_name": "G"}, etag=got["etag"])
    assert path.read_text().startswith("# mine\n")
    assert Persona.load(place / "guard").bio == "x"


@pytest.mark.parametrize("data", [b"schema: 1\n\tid: guard\n", b"- a\n", b"# only a comment\n"])
def test_a_file_that_nobody_can_read_is_not_overwritten(personas, place, data):
    path = place / "guard" / "persona.yaml"
    path.write_bytes(data)
    etag = personas.get("guard")["etag"]
    assert personas.validate(DOCUMENT)["problems"][0]["field"] == ""
    with pytest.raises(PersonaInvalid, match=r"persona\.yaml.*Or delete the persona") as caught:
        personas.put("guard", DOCUMENT, etag=etag)
    assert caught.value.message.count("persona.yaml") == 1
    assert path.read_bytes() == data
    personas.delete("guard")
    personas.put("guard", DOCUMENT)
    assert personas.get("guard")["doc"] == DOCUMENT


def test_large_numbers_of_a_file_survive_clients_that_cannot_hold_them(personas, place):
    path = place / "guard" / "persona.yaml"
    path.write_bytes(COMMENTED + b"card: {user: 123456789012345678901234567890, name: a}\n")
    got = personas.get("guard")
    assert got["doc"]["card"]["user"] == "123456789012345678901234567890"
    personas.put("guard", {**got["doc"], "bio": "x"})
    assert path.read_bytes().endswith(b"card: {user: 123456789012345678901234567890, name: a}\n")
    personas.put("guard", {**got["doc"], "card": {**got["doc"]["card"], "name": "b"}})
    assert path.read_bytes().endswith(b"card: {user: 123456789012345678901234567890, name: b}\n")


def test_no_more_than_so_many_personas(personas, place, monkeypatch):
    monkeypatch.setattr(persona_folder, "MAX_PERSONAS", 2)
    personas.put("cook", {**DOCUMENT, "id": "cook"})
    with pytest.raises(InvalidError, match="has 2 personas"):
        personas.put("smith", {**DOCUMENT, "id": "smith"})
    personas.put("cook", {**DOCUMENT, "id": "cook", "bio": "Cooks."})


def test_a_document_is_small(personas, place):
    texts = [{"id": f"k{number}", "text": "x" * 4_000} for number in range(70)]
    with pytest.raises(PersonaInvalid, match="256 KiB"):
        personas.put("guard", {**DOCUMENT, "knows": texts})
    deep = {"a": {"b": {"c": {"d": {"e": {"f": {"g": ["x"] * 19_000}}}}}}}
    with pytest.raises(PersonaInvalid, match=r"file would have \d+ KiB, and 256 are read"):
        personas.put("guard", {**DOCUMENT, "card": deep})
    assert (place / "guard" / "persona.yaml").read_bytes() == COMMENTED


# -- paths ---------------------------------------------------------------------------------------------------

BAD_IDS = ["", ".", "..", "a/b", "../secret", "/etc", "a\\b", "C:", "c:\\x", "a\0", "guard\n", "Guard", "gu ard", "-a"]
BAD_IDS += [".trash", "guard/", "guard/.", "ɡuard", "guard\u200b", "ⅽon", "guard.", "a" * 65, "x" * 100_000, "\ud800"]


@pytest.mark.parametrize("persona_id", BAD_IDS, ids=lambda text: ascii(text)[:20])
def test_what_is_no_id_is_refused(personas, place, persona_id):
    before = contents(place.parent)
    for call in (
        lambda: personas.get(persona_id),
        lambda: personas.put(persona_id, {**DOCUMENT, "id": persona_id}),
        lambda: personas.put(persona_id, DOCUMENT),
        lambda: personas.delete(persona_id),
    ):
        with pytest.raises(InvalidError, match="cannot be an id") as caught:
            call()
        assert len(str(caught.value).encode()) < 1_000
    assert contents(place.parent) == before


@pytest.mark.parametrize("persona_id", ["con", "nul", "aux", "prn", "com1", "lpt9"])
def test_names_of_windows_devices_are_not_made_and_used_where_they_are(personas, place, persona_id):
    document = {**DOCUMENT, "id": persona_id}
    with pytest.raises(InvalidError, match="Windows"):
        personas.put(persona_id, document)
    Persona.model_validate(document).save(place / persona_id)
    personas.put(persona_id, {**document, "bio": "x"})
    assert personas.get(persona_id)["doc"]["bio"] == "x"


def link(target, place, kind):
    """A persona `linked` that lies elsewhere, wholly, or its file, or neither."""
    path = place / "linked"
    if kind == "folder":
        path.symlink_to(target, target_is_directory=True)
    elif kind == "file":
        path.mkdir()
        (path / "persona.yaml").symlink_to(target / "persona.yaml")
    elif kind == "nowhere":
        path.mkdir()
        (path / "persona.yaml").symlink_to(target / "nowhere")
    else:
        path.symlink_to(path)


@pytest.mark.parametrize("kind", ["folder", "file", "nowhere", "loop"])
@pytest.mark.parametrize("target", ["../secret", "guard"])
def test_links_are_not_followed(personas, place, kind, target):
    link((place / target).resolve(), place, kind)
    before = contents(place.parent)
    for call in (
        lambda: personas.get("linked"),
        lambda: personas.put("linked", {**DOCUMENT, "id": "linked"}),
        lambda: personas.delete("linked"),
    ):
        with pytest.raises(InvalidError, match=r"is a link.*Put the files themselves there"):
            call()
    assert not personas.validate({**DOCUMENT, "id": "linked"})["ok"]
    assert contents(place.parent) == before


def test_the_folder_itself_may_be_a_link(place, tmp_path):
    (tmp_path / "here").symlink_to(place, target_is_directory=True)
    personas = PersonaFolder(tmp_path / "here")
    personas.put("guard", {**personas.get("guard")["doc"], "bio": "x"})
    assert Persona.load(place / "guard").bio == "x"


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_is_no_file_is_not_opened(personas, place, kind):
    path = place / "odd" / "persona.yaml"
    path.parent.mkdir()
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    for call in (lambda: personas.get("odd"), lambda: personas.put("odd", {**DOCUMENT, "id": "odd"})):
        with pytest.raises(InvalidError, match="is not a file"):
            call()


STRANGE = [
    "/etc",
    "../../secret",
    "..",
    "../",
    "../..",
    "C:\\lora",
    "c:lora",
    "..\\..\\secret",
    "\\lora",
    "lora:stream",
]
STRANGE += ["lora/../../../secret", "../guard/../../secret", "link", "link/x", "../linked/x", "~/../../../x"]


@pytest.mark.parametrize("path", STRANGE)
def test_no_client_makes_the_daemon_read_elsewhere(personas, place, path):
    (place / "guard" / "link").symlink_to(place.parent / "secret")
    (place / "linked").symlink_to(place.parent / "secret")
    (place / "new").mkdir()
    (place / "new" / "link").symlink_to(place.parent / "secret")
    got = personas.get("guard")
    for adapter, field in (
        (path, "/adapter"),
        ({"path": path, "scale": 0.5}, "/adapter/path"),
        ([got["doc"]["adapter"], path], "/adapter/1"),
    ):
        document = {**got["doc"], "adapter": adapter}
        [problem] = personas.validate(document)["problems"]
        assert problem["field"] == field
        with pytest.raises(PersonaInvalid, match="is not below the folder of the personas"):
            personas.put("guard", document)
        with pytest.raises(PersonaInvalid):
            personas.put("new", {**DOCUMENT, "id": "new", "adapter": adapter})
    assert (place / "guard" / "persona.yaml").read_bytes() == COMMENTED


def test_adapters_below_the_personas_and_those_of_the_file_are_kept(personas, place):
    authored = "../../shared/lora"
    for adapter in ([authored, "lora"], ["./a/../b", "../cook/lora"], [authored], [], "../cook/lora", {"path": "x"}):
        if authored in adapter and authored not in str(personas.get("guard")["doc"].get("adapter")):
            (place / "guard" / "persona.yaml").write_bytes(COMMENTED)
        personas.put("guard", {**DOCUMENT, "adapter": adapter})
        Persona.load(place / "guard")
    (place / "guard" / "persona.yaml").write_bytes(COMMENTED)
    personas.put("guard", {**DOCUMENT, "adapter": {"path": authored, "scale": 0.5}})
    assert Persona.load(place / "guard").adapter[0].scale == 0.5


# -- delete --------------------------------------------------------------------------------------------------


def test_delete_moves_the_folder_into_the_trash(personas, place):
    before = contents(place / "guard")
    now = 1_785_500_000
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now))
    body = personas.delete("guard", now=now)
    assert body == {"persona": "guard", "trash": str(place / ".trash" / f"guard-{stamp}")}
    assert contents_of_trash(Path(body["trash"])) == before
    assert not list(Library.load(place))
    assert not Library.load(place).problems
    personas.put("guard", DOCUMENT)
    assert personas.delete("guard", now=now)["trash"].endswith(f"guard-{stamp}-2")
    shutil.move(body["trash"], place / "guard")
    assert contents(place / "guard") == before


def contents_of_trash(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_trash_is_bounded_and_in_its_place(personas, place, monkeypatch, tmp_path):
    trash = place / ".trash"
    trash.symlink_to(tmp_path)
    with pytest.raises(InvalidError, match=r"\.trash is a link"):
        personas.delete("guard")
    trash.unlink()
    trash.write_text("a file")
    with pytest.raises(InvalidError, match="cannot be moved"):
        personas.delete("guard")
    trash.unlink()
    monkeypatch.setattr(persona_folder, "MAX_TRASH", 1)
    personas.delete("guard")
    personas.put("guard", DOCUMENT)
    with pytest.raises(InvalidError, match=r"has 1 entries\. Empty it"):
        personas.delete("guard")
    assert (place / "guard" / "persona.yaml").exists()


# -- places that cannot be changed ---------------------------------------------------------------------------


def test_what_came_with_the_program_is_not_changed(place):
    personas = PersonaFolder(place, package=place.parent)
    before = contents(place)
    assert personas.get("guard")["doc"]["id"] == "guard"
    assert personas.validate(DOCUMENT)["ok"]
    for call in (lambda: personas.put("guard", DOCUMENT), lambda: personas.delete("guard")):
        with pytest.raises(InvalidError, match="came with the program") as caught:
            call()
        assert str(place) in caught.value.hint
        assert "--personas personas" in caught.value.hint
    assert contents(place) == before


def test_a_checkout_is_the_authors_own(place):
    """There the shipped personas lie beside the package, in the repository."""
    personas = PersonaFolder(place, package=place.parent / "npc_runtime")
    assert personas.put("guard", DOCUMENT)["etag"]


def test_a_write_protected_file_is_not_replaced(personas, place):
    """Version control that wants files checked out protects them; renaming another over them would work."""
    path = place / "guard" / "persona.yaml"
    path.chmod(0o444)
    with pytest.raises(InvalidError, match=r"is write-protected\. Check it out"):
        personas.put("guard", DOCUMENT)
    assert path.read_bytes() == COMMENTED
    assert personas.get("guard")["doc"]["id"] == "guard"
    path.chmod(0o640)
    personas.put("guard", DOCUMENT)
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_folder_that_cannot_be_written(place):
    """Root writes everywhere, so the folder is one that nobody can write: it is a file."""
    (place / "cook").write_text("not a folder")
    with pytest.raises(InvalidError, match=r"cook.*cannot be written: .*Make the folder writable"):
        PersonaFolder(place).put("cook", {**DOCUMENT, "id": "cook"})
    assert (place / "cook").read_text() == "not a folder"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder(personas, place):
    (place / "guard").chmod(0o555)
    with pytest.raises(InvalidError, match="cannot be written: Permission denied"):
        personas.put("guard", DOCUMENT)
    (place / "guard").chmod(0o755)
    place.chmod(0o555)
    with pytest.raises(InvalidError, match="cannot be moved: Permission denied"):
        personas.delete("guard")
    with pytest.raises(InvalidError, match="cannot be written: Permission denied"):
        personas.put("cook", {**DOCUMENT, "id": "cook"})
    place.chmod(0o755)


# -- with hot reload -----------------------------------------------------------------------------------------


class Listener:
    """What the daemon does with news, as far as this is about."""

    def __init__(self):
        self.adapters = []
        self.news = asyncio.Queue()

    async def replace_adapter(self, persona_id, parts):
        self.adapters.append((persona_id, parts))

    async def changed(self):
        return await asyncio.wait_for(self.news.get(), 10_000 * MS)


async def test_hot_reload_uses_what_was_put_and_forgets_what_was_deleted(personas, place):
    library, listener = Library.load(place), Listener()
    watch = PersonaWatch(
        library,
        place,
        loaded_at=time.time() + 1,
        replace_adapter=listener.replace_adapter,
        announce=listener.news.put_nowait,
    )
    watch.start()
    try:
        await asyncio.sleep(300 * MS)
        got = personas.get("guard")
        await asyncio.to_thread(personas.put, "guard", {**got["doc"], "bio": "Sleeps."}, etag=got["etag"])
        assert await listener.changed() == "guard"
        assert library.find("guard").bio == "Sleeps."
        assert listener.adapters[0][0] == "guard"
        await asyncio.to_thread(personas.put, "cook", {**DOCUMENT, "id": "cook"})
        while await listener.changed() != "cook":
            pass
        assert library.find("cook").bio == DOCUMENT["bio"]
        trash = Path((await asyncio.to_thread(personas.delete, "cook"))["trash"])
        while await listener.changed() != "cook" or "cook" in {persona.id for persona in library}:
            pass
        with pytest.raises(PersonaUnknown):
            library.find("cook")
        (trash / "persona.yaml").write_text("edited in the trash")
        shutil.move(trash, place / "cook")
        (place / "cook" / "persona.yaml").write_text(json.dumps({**DOCUMENT, "id": "cook", "bio": "Back."}))
        while await listener.changed() != "cook" or "cook" not in {persona.id for persona in library}:
            pass
        assert {persona.id for persona in library} == {"guard", "cook"}
        assert set(library.problems) | set(library.stale) <= {"cook"}
    finally:
        await watch.close()


# -- anything ------------------------------------------------------------------------------------------------

ODD_TEXTS = [
    "guard",
    "..",
    "../secret",
    "/etc",
    "con",
    "a\0b",
    "\ud800",
    "x" * 5_000,
    "🜁",
    "- a",
    "a: b",
    "#",
    "\u2028",
]
ODD_TEXTS += ["1e5", "yes", "", "\r\n", "a\n\n", "C:\\x", "//host/x", "lora"]
ODD = st.sampled_from([*ODD_TEXTS, 7, 2**70, float("inf"), float("nan"), b"bytes", None])
ANYTHING = st.recursive(
    ODD | st.text(max_size=20) | st.integers() | st.floats() | st.booleans(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
WHOLE_DOCUMENT = json.loads(json.dumps(YAML(typ="safe").load(WHOLE)))
IDS = st.sampled_from(["guard", "cook", "linked", *BAD_IDS, "con"]) | st.text(max_size=20)


@st.composite
def documents(draw):
    """Whole documents with odd values in some places."""
    document = json.loads(json.dumps(WHOLE_DOCUMENT))
    for name in draw(st.lists(st.sampled_from(sorted(document)), max_size=2)):
        value = document[name]
        if isinstance(value, dict) and value and draw(st.booleans()):
            value[draw(st.sampled_from(sorted(value)))] = draw(ANYTHING)
        elif isinstance(value, list) and value and draw(st.booleans()):
            value[draw(st.integers(0, len(value) - 1))] = draw(ANYTHING)
        else:
            document[name] = draw(ANYTHING)
    return document


def put(personas, persona_id, document, etag):
    try:
        personas.put(persona_id, document, etag=etag)
    except WireError as error:
        return error
    return None


@settings(max_examples=250, deadline=None)
@given(st.lists(st.tuples(IDS, documents() | ANYTHING, st.sampled_from([None, "", "0" * 16])), min_size=1, max_size=3))
def test_whatever_is_sent_only_personas_of_the_folder_change(tmp_path_factory, calls):
    root = tmp_path_factory.mktemp("fuzz")
    place = root / "personas"
    (place / "guard").mkdir(parents=True)
    (place / "guard" / "persona.yaml").write_bytes(WHOLE)
    (root / "secret").mkdir()
    (place / "linked").symlink_to(root / "secret")
    (root / "secret" / "persona.yaml").write_text(json.dumps(DOCUMENT))
    personas = PersonaFolder(place)
    try:
        for persona_id, document, etag in calls:
            is_ok = personas.validate(document, persona_id)["ok"]
            told = put(personas, persona_id, document, etag)
            if told:
                assert len(str(told).encode()) < 4_000
                assert told.hint
                assert not is_ok or "etag" in told.message or "Windows" in told.message
            else:
                assert is_ok
                [loaded] = [persona for persona in Library.load(place) if persona.id == persona_id]
                assert loaded.to_document() == Persona.model_validate(document).to_document()
                assert personas.get(persona_id)["doc"].keys() <= document.keys()
            assert {path.name for path in place.iterdir()} <= {"guard", "cook", "linked", "con", persona_id}
            assert (root / "secret" / "persona.yaml").read_text() == json.dumps(DOCUMENT)
            assert sorted(path.name for path in root.iterdir()) == ["personas", "secret"]
            assert not Library.load(place).problems.keys() - {"linked"}
    finally:
        shutil.rmtree(root)
