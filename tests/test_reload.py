"""Hot reload: real daemons whose personas and adapters are saved while they speak."""

import json
import shutil
import time

import pytest
from conftest import MS, discard, start_daemon
from game import deltas, line, play

from npc_runtime.persona import shipped_personas

GREEDY = {"temperature": 0, "seed": 1, "max_tokens": 12, "trim": "none"}
LONG = {"temperature": 0, "seed": 1, "max_tokens": 150, "min_tokens": 150, "trim": "none"}
TEXT = "What is wrong with the cellar?"
WITHIN_S = 1_000 * MS
"""From a save to the next line that uses it."""


@pytest.fixture(scope="module")
def personas(tmp_path_factory):
    """Two of the shipped personas, to be changed at will, and a guard without an adapter."""
    folder = tmp_path_factory.mktemp("reload") / "personas"
    for name in ("odo", "brom", "marta"):
        shutil.copytree(shipped_personas() / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def running(personas):
    """One daemon for all; every test puts the files back."""
    daemon = start_daemon("--personas", str(personas), "--dtype", "float32", "--deterministic", "--project", "reload")
    assert daemon.endpoint, daemon.read_log()
    yield daemon
    discard(daemon)


def install(source, target):
    """As `npc-runtime train` does it: written beside, then put in place, the weights last."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(source / name, target / f"{name}.new")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (target / f"{name}.new").replace(target / name)


def edit(folder, change):
    """Save a persona file with a change to its text."""
    path = folder / "persona.yaml"
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")


async def say(game, number, persona="odo", sampling=GREEDY):
    await game.send(type="generate", batch=number, lines=[line(number, persona, TEXT, sampling=sampling)])
    messages = await game.until("batch.end")
    [end] = [m for m in messages if m["type"] == "line.end"]
    assert end["reason"] in ("stop", "length"), end
    return end


async def changed(game):
    """Wait for the news that every client gets."""
    event = {}
    while event.get("kind") != "persona.changed":
        [*_, event] = await game.until("event")
    return event["persona"]


async def listed(game):
    await game.send(type="persona.list", id="list")
    [*_, reply] = await game.until("reply")
    return {persona["id"]: persona for persona in reply["body"]["personas"]}


async def test_new_weights_speak_the_next_line_and_a_running_line_ends_with_the_old_ones(running, personas, tmp_path):
    shutil.copytree(personas / "odo" / "adapter", tmp_path / "kept")
    async with play(running) as game, play(running) as other:
        undisturbed = (await say(game, "alone", sampling=LONG))["text"]
        before = (await say(game, "before"))["text"]
        await other.send(type="generate", batch=1, lines=[line(1, "odo", TEXT, sampling=LONG)])
        await other.until("line.start")
        started = time.monotonic()
        install(personas / "brom" / "adapter", personas / "odo" / "adapter")
        news = await changed(game)
        seconds = time.monotonic() - started
        assert (news["id"], news.get("stale")) == ("odo", None)
        after = (await say(game, "after"))["text"]
        assert not before.startswith(after[:20]), "the next line has the new weights"
        messages = await other.until("batch.end")
        [end] = [m for m in messages if m["type"] == "line.end"]
        assert end["timing"]["total_ms"] > 1_000 * seconds, "it did not run meanwhile"
        assert end["text"] == undisturbed, "a line that runs is not touched"
        assert deltas(messages, 1).endswith(undisturbed[-40:])
        install(tmp_path / "kept", personas / "odo" / "adapter")
        await changed(game)
        assert (await say(game, "back"))["text"] == before
        await game.send(type="status", id=1)
        [*_, status] = await game.until("reply")
        assert (status["body"]["active"], status["body"]["adapters"]) == (0, ["brom", "odo"])
    print(f"save to news: {1_000 * seconds:.0f} ms")
    assert seconds < WITHIN_S


async def test_a_bad_adapter_leaves_the_old_one_in_use_and_is_explained(running, personas):
    path = personas / "odo" / "adapter" / "adapter_model.safetensors"
    whole = path.read_bytes()
    async with play(running) as game:
        before = (await say(game, "before"))["text"]
        path.write_bytes(whole[:-1000])
        news = await changed(game)
        assert news["stale"]["code"] == "adapter_incompatible"
        assert str(path) in news["stale"]["message"]
        assert (await say(game, "after"))["text"] == before
        assert (await listed(game))["odo"]["stale"] == news["stale"]
        path.write_bytes(whole)
        assert "stale" not in await changed(game)
        assert "stale" not in (await listed(game))["odo"]
    assert "persona odo stays as it was" in running.read_log()


async def test_an_edited_persona_file_speaks_and_a_broken_one_does_not(running, personas):
    async with play(running) as game:
        before = (await say(game, "before"))["prompt_hash"]
        started = time.monotonic()
        edit(personas / "odo", lambda text: text.replace("innkeeper", "cook"))
        await changed(game)
        after = (await say(game, "after"))["prompt_hash"]
        assert time.monotonic() - started < WITHIN_S + 2_000 * MS  # the line itself takes some of it
        assert after != before
        edit(personas / "odo", lambda text: text + "temper: 3\n")
        news = await changed(game)
        assert news["stale"]["code"] == "persona_invalid"
        assert "temper" in news["stale"]["message"]
        assert (await say(game, "kept"))["prompt_hash"] == after
        edit(personas / "odo", lambda text: text.replace("temper: 3\n", "").replace("cook", "innkeeper"))
        assert "stale" not in await changed(game)
        assert (await say(game, "back"))["prompt_hash"] == before


async def test_personas_come_and_go_and_get_their_first_adapter(running, personas):
    async with play(running) as game:
        assert (await say(game, "before", "marta"))["usage"]["completion"] > 0
        shutil.copytree(personas / "brom" / "adapter", personas / "marta" / "adapter")
        edit(personas / "marta", lambda text: text + "adapter: adapter\n")
        while (await changed(game)).get("adapter") != "marta":
            pass
        await game.send(type="generate", batch="b", lines=[line("l", "marta", TEXT, sampling=GREEDY)])
        started = next(m for m in await game.until("batch.end") if m["type"] == "line.start")
        assert started["adapter"] == "marta"
        document = {"schema": 1, "id": "nan", "display_name": "Nan", "bio": "A cook."}
        (personas / "nan").mkdir()
        (personas / "nan" / "persona.yaml").write_text(json.dumps(document))
        while (await changed(game))["id"] != "nan":
            pass
        assert (await say(game, "nan", "nan"))["text"]
        shutil.rmtree(personas / "nan")
        while (await changed(game)).get("error", {}).get("code") != "persona_unknown":
            pass
        assert "nan" not in await listed(game)


async def test_what_was_saved_while_the_daemon_started_is_used(make_daemon, personas, tmp_path):
    """And adapters outside the folder of the personas are watched too."""
    folder = tmp_path / "personas"
    shutil.copytree(personas / "odo", folder / "odo")
    shutil.move(folder / "odo" / "adapter", tmp_path / "lora")
    edit(folder / "odo", lambda text: text.replace("adapter: adapter", "adapter: ../../lora"))
    daemon = make_daemon("--personas", str(folder), "--dtype", "float32", "--deterministic")
    async with play(daemon) as game:
        before = (await say(game, "before"))["text"]
        install(personas / "brom" / "adapter", tmp_path / "lora")
        assert "stale" not in await changed(game)
        assert (await say(game, "after"))["text"] != before
