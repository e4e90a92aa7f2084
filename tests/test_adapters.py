"""The adapter store: what is loaded when, by whom and from where, and what a load that fails leaves behind."""

import shutil
import threading
import time

import pytest
import torch
from conftest import MS
from driving import ask, hold
from fake_cuda import LOWEST, FakeCuda
from tiny import make_adapter, make_model

from npc_runtime.engine.adapters import AdapterStore
from npc_runtime.engine.core import Admission
from npc_runtime.engine.model import ModelShape, PageLayout
from npc_runtime.engine.peft_folder import load_peft_folder
from npc_runtime.errors import AdapterIncompatible, AdapterMissing

RANKS = {"a": 8, "b": 16, "c": 8, "wide": 64}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def shape(model):
    return ModelShape.from_config(model.config)


@pytest.fixture
def folders(model, tmp_path):
    return {name: make_adapter(model, tmp_path / name, rank=rank, seed=rank) for name, rank in RANKS.items()}


@pytest.fixture
def make(shape, folders):
    """Make stores of the named adapters; their loaders are gone after the test."""
    made = []

    def make_store(names="abc", max_pages=2, **budgets):
        options = dict(dtype=torch.float32, device=torch.device("cpu"), max_pages=max_pages, **budgets)
        store = AdapterStore(shape, PageLayout.of(shape), **options)
        for name in names:
            store.add(name, [(folders[name], 1.0)])
        made.append(store)
        return store

    yield make_store
    for store in made:
        store.close(30_000 * MS)
        assert store._loader is None or not store._loader.is_alive()


def read(folder, shape):
    return load_peft_folder(folder, shape, PageLayout.of(shape), dtype=torch.float32)


def settle(store):
    """Wait for one load; returns what failed."""
    for _ in range(2_000):
        if not store._outcomes.empty():
            return store.collect()
        time.sleep(1 * MS)
    raise AssertionError("nothing was loaded")


def count_reads(store, monkeypatch):
    reads, right = [], store.host._read

    def reading(parts, base):
        reads.append((parts[0][0].name, threading.current_thread().name))
        return right(parts, base)

    monkeypatch.setattr(store.host, "_read", reading)
    return reads


def test_what_fits_is_there_from_the_start(make, folders, shape):
    store = make(["a", "wide", "b"], max_pages=5)
    store.open()
    assert store.resident == ("a", "wide")
    assert store.pool.shape[0] == 5
    for name in store.resident:
        assert torch.equal(store.pool[store.pages_of(name)], read(folders[name], shape).pages)


def test_the_pool_is_no_larger_than_needed(make):
    store = make("ab", max_pages=64)
    store.open()
    assert store.pool.shape[0] == 2


def test_another_one_is_loaded_by_the_loader(make, folders, shape, monkeypatch):
    store = make(max_host_bytes=0)
    reads = count_reads(store, monkeypatch)
    store.open()
    line, outcome = ask(store, "b")
    assert outcome is Admission.LOADING
    assert settle(store) == []
    assert store.admit(line) is Admission.ADMITTED
    assert torch.equal(store.pool[store.pages_of("b")], read(folders["b"], shape).pages)
    assert reads == [("b", "adapter loader")]


def test_the_engine_is_woken_by_every_load(make):
    store = make(max_host_bytes=0)
    store.open()
    woken = threading.Event()
    store.on_loaded = woken.set
    ask(store, "a")
    assert woken.wait(30_000 * MS)


def test_adapters_take_turns_in_the_pages(make, folders, shape):
    store = make()
    for name in "cabcabacb":
        line = hold(store, name)
        assert torch.equal(store.pool[store.pages_of(name)], read(folders[name], shape).pages)
        assert len(store.resident) <= 2
        store.check_integrity([line], [])
        store.leave(line)


def test_copies_stay_within_their_budget_and_the_rest_is_read_again(make, monkeypatch):
    whole = make(max_host_bytes=None)
    page_bytes = whole.host._copies["a"].pages.nbytes
    store = make(max_host_bytes=2 * page_bytes)
    reads = count_reads(store, monkeypatch)
    assert store.host.names == ["b", "c"]
    store.open()
    assert store.resident == ("b", "c")
    for name in "abab":
        store.leave(hold(store, name))
        assert store.host.num_bytes == sum(copy.pages.nbytes for copy in store.host._copies.values()) <= 2 * page_bytes
    assert [name for name, _ in reads] == ["a", "b"]
    assert store.host.names == ["a", "b"]


def test_a_copy_spares_the_disk(make, folders):
    store = make()
    store.open()
    for folder in folders.values():
        shutil.rmtree(folder)
    for name in "cab":
        store.leave(hold(store, name))


def test_a_byte_budget_bounds_the_pool(make, shape):
    page_bytes = PageLayout.of(shape).num_elements * 4
    store = make(max_pages=64, max_pool_bytes=3 * page_bytes - 1)
    store.open()
    assert store.pool.shape[0] == 2


def test_an_adapter_larger_than_the_pool_is_refused(make):
    with pytest.raises(AdapterIncompatible, match="needs 4 pages, the pool has 2") as caught:
        make(["wide"])
    assert "--adapter-memory" in caught.value.hint


def test_a_list_of_adapters_adds_up(make, folders, shape):
    store = make([])
    both = store.add("both", [(folders["a"], 1.0), (folders["b"], 0.5)])
    half = load_peft_folder(folders["b"], shape, PageLayout.of(shape), dtype=torch.float32, scale=0.5)
    assert torch.equal(both.pages, torch.cat((read(folders["a"], shape).pages, half.pages)))
    assert both.rank == 24
    line = hold(store, "both")
    assert torch.equal(store.pool[store.pages_of("both")], both.pages)
    store.leave(line)


def swap(folder):
    shutil.copy(folder.parent / "c" / "adapter_model.safetensors", folder)


def rescale(folder):
    path = folder / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 16', '"lora_alpha": 32'))


def truncate(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("spoil", "kind", "message", "hint"),
    [
        (shutil.rmtree, AdapterMissing, "does not exist", "correct the persona"),
        (truncate, AdapterIncompatible, "damaged", "Copy or export"),
    ],
)
def test_a_failed_load_names_file_and_remedy_and_can_be_tried_again(
    make, folders, tmp_path, spoil, kind, message, hint
):
    folder = folders["a"]
    store = make("ab", max_host_bytes=0)
    shutil.copytree(folder, tmp_path / "kept")
    spoil(folder)
    store.open()
    line, _ = ask(store, "a", 7)
    [failure] = settle(store)
    assert (failure.name, failure.wanted_by, type(failure.error)) == ("a", {7}, kind)
    assert str(folder) in failure.error.message
    assert message in failure.error.message
    assert hint in failure.error.hint
    store.leave(line)
    store.check_integrity([], [])
    assert store.resident == ()
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(tmp_path / "kept", folder)
    store.leave(hold(store, "a"))
    assert store.resident == ("a",)


def test_a_reader_that_fails_in_an_unknown_way_spoils_nothing_else(make, monkeypatch):
    store = make(max_host_bytes=0)
    store.open()
    right = store.host.get

    def get(name):
        if name == "a":
            raise RuntimeError("a defect")
        return right(name)

    monkeypatch.setattr(store.host, "get", get)
    line, _ = ask(store, "a")
    [failure] = settle(store)
    assert "a defect" in failure.error.message
    store.leave(line)
    store.leave(hold(store, "b"))


def test_closing_finishes_the_load_it_is_in_and_begins_no_other(make, monkeypatch):
    store = make(max_host_bytes=0)
    reads, right = [], store.host.get
    is_loading, may_go_on = threading.Event(), threading.Event()

    def get(name):
        reads.append(name)
        is_loading.set()
        assert may_go_on.wait(30_000 * MS)
        return right(name)

    monkeypatch.setattr(store.host, "get", get)
    store.open()
    ask(store, "a")
    ask(store, "b")
    assert is_loading.wait(30_000 * MS)
    started = time.monotonic()
    store.close(50 * MS)
    assert time.monotonic() - started < 1_000 * MS
    assert store._loader.is_alive(), "the bound is the caller's, the load goes on"
    may_go_on.set()
    store.close(30_000 * MS)
    assert not store._loader.is_alive()
    assert reads == ["a"]


def train_again(folder, seed=77):
    """New weights in the place of the old ones, as `npc-runtime train` installs them."""
    other = make_adapter(make_model("llama", folder.parent / "again"), folder.parent / f"new{seed}", seed=seed)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (other / name).replace(folder / name)


def reload(store, name, folder, waiting=()):
    """Have the store read the files again; returns what is wrong with them."""
    answers = []
    store.replace(name, [(folder, 1.0)], answers.append)
    for _ in range(2_000):
        assert store.collect(waiting) == []
        if answers:
            return answers[0]
        time.sleep(1 * MS)
    raise AssertionError("nothing was read")


def test_new_files_are_for_new_lines_and_the_old_pages_are_free_when_the_last_old_line_left(make, folders, shape):
    store = make("ab", max_pages=3, spare_pages=1)
    line = hold(store, "a")
    before = store.pool[store.pages_of("a")].clone()
    old_digest = store.digest_of("a")
    train_again(folders["a"])
    assert reload(store, "a", folders["a"]) is None
    newer = store.version_of("a")
    assert newer != "a"
    assert store.digest_of(newer) != old_digest
    settle(store)  # it was brought to the spare page at once
    new_line = hold(store, newer)
    assert torch.equal(store.pool[store.pages_of("a")], before)
    assert torch.equal(store.pool[store.pages_of(newer)], read(folders["a"], shape).pages)
    store.check_integrity([line, new_line], [])
    assert store._made.pages.num_free == 0
    store.leave(line)
    store.check_integrity([new_line], [])
    assert store._made.pages.num_free == 1
    assert store.resident == ("a", "b")
    store.leave(new_line)
    assert store.host.names == ["b", newer], "the old copy is gone too"


def test_lines_that_wait_get_the_new_files_and_those_that_spoke_the_old_ones(make, folders):
    store = make("ab", max_pages=2)
    store.open()
    unborn, preempted = hold(store, "a"), hold(store, "a")
    preempted.output_ids.append(5)
    for line in (unborn, preempted):
        assert store.suspend(line) is False
        line.block_keys.append(b"a key of the old content")
    train_again(folders["a"])
    assert reload(store, "a", folders["a"], [unborn, preempted]) is None
    newer = store.version_of("a")
    assert (unborn.request.adapter, unborn.request.cache_key) == (newer, store.digest_of(newer))
    assert (unborn.block_keys, unborn.is_promised) == ([], False)
    assert (preempted.request.adapter, preempted.is_promised) == ("a", True)
    store.check_integrity([], [unborn, preempted])
    assert store.admit(preempted) is Admission.ADMITTED
    preempted.is_promised = store.suspend(preempted)
    assert preempted.is_promised, "nobody could load it again"
    assert store.admit(preempted) is Admission.ADMITTED
    preempted.is_promised = False
    store.leave(preempted)
    store.check_integrity([], [unborn])
    store.leave(hold(store, newer))


def test_files_that_cannot_be_used_change_nothing(make, folders):
    store = make("ab", max_pages=3)
    line = hold(store, "a")
    for spoil in (truncate, shutil.rmtree):
        spoil(folders["a"])
        problem = reload(store, "a", folders["a"])
        assert isinstance(problem, AdapterIncompatible | AdapterMissing)
        assert str(folders["a"]) in problem.message
        assert store.version_of("a") == "a"
    problem = reload(store, "a", folders["wide"])
    assert "needs 4 pages, the pool has 2" in problem.message
    store.leave(line)
    store.leave(hold(store, "a"))


def test_the_same_files_again_are_nothing_new(make, folders):
    store = make("ab")
    store.open()
    (folders["a"] / "adapter_config.json").touch()
    assert reload(store, "a", folders["a"]) is None
    assert store.version_of("a") == "a"
    assert store.host.names == ["a", "b"]


def test_an_adapter_can_be_added_while_lines_speak(make, folders, shape):
    store = make("a", spare_pages=1)
    line = hold(store, "a")
    assert reload(store, "b", folders["b"]) is None
    settle(store)
    other = hold(store, "b")
    assert torch.equal(store.pool[store.pages_of("b")], read(folders["b"], shape).pages)
    store.check_integrity([line, other], [])


@pytest.mark.parametrize("change", [train_again, rescale])
def test_a_load_that_finds_new_files_takes_them(make, folders, shape, change):
    """Nobody said that they changed yet, or nobody watches."""
    store = make("ab", max_host_bytes=0)
    store.open()
    change(folders["a"])
    line, outcome = ask(store, "a", 7)
    line.is_promised = True
    assert outcome is Admission.LOADING
    for _ in range(2_000):
        assert store.collect([line]) == []
        if line.request.adapter != "a" and store.admit(line) is Admission.ADMITTED:
            break
        time.sleep(1 * MS)
    assert torch.equal(store.pool[store.pages_of(line.request.adapter)], read(folders["a"], shape).pages)
    store.check_integrity([line], [])


def test_files_are_read_when_nobody_writes_them_any_more(make, folders, shape):
    """Written in place and slowly: weights of the old file's size, a part at a time."""
    store = make("ab", spare_pages=1)
    store.open()
    path = folders["a"] / "adapter_model.safetensors"
    whole = (folders["c"] / "adapter_model.safetensors").read_bytes()
    whole = whole[:-2] + b"\x00\x00"
    assert len(whole) == path.stat().st_size

    def write():
        with path.open("r+b") as file:
            for start in range(0, len(whole), len(whole) // 5):
                file.write(whole[start : start + len(whole) // 5])
                file.flush()
                time.sleep(20 * MS)

    writer = threading.Thread(target=write)
    writer.start()
    assert reload(store, "a", folders["a"]) is None
    writer.join()
    newer = hold(store, store.version_of("a"))
    assert torch.equal(store.pool[store.pages_of(newer.request.adapter)], read(folders["a"], shape).pages)


def test_files_that_never_come_to_rest_are_left_alone(make, folders):
    store = make("ab")
    store.open()
    path = folders["a"] / "adapter_model.safetensors"
    is_over = threading.Event()

    def touch():
        while not is_over.wait(10 * MS):
            path.touch()

    writer = threading.Thread(target=touch)
    writer.start()
    problem = reload(store, "a", folders["a"])
    is_over.set()
    writer.join()
    assert "is still being written" in problem.message
    assert store.version_of("a") == "a"


def test_what_was_read_survives_an_error_of_the_device(make, folders):
    """Asked for before the pool is made anew, put in place after it."""
    store = make("ab", max_pages=3, spare_pages=1)
    store.open()
    train_again(folders["a"])
    answers = []
    store.replace("a", [(folders["a"], 1.0)], answers.append)
    store.reset(30_000 * MS)
    for _ in range(2_000):
        if answers:
            break
        store.collect()
        time.sleep(1 * MS)
    assert answers == [None]
    store.leave(hold(store, store.version_of("a")))
    assert store.pool.shape[0] == 3


# -- on a GPU, whose calls are only noted down here ---------------------------------------------------------------


@pytest.fixture
def gpu_store(make, monkeypatch):
    """A store that takes its device for a GPU once its pool is made, and what it asks of the device."""
    store, cuda = make(), FakeCuda(monkeypatch)
    store.open()
    store._device = torch.device("cuda:0")
    write = store._write

    def note(*given):
        cuda.calls.append(f"written on {cuda.made.index(cuda.current)}")
        write(*given)

    monkeypatch.setattr(store, "_write", note)
    return store, cuda


def test_pages_are_written_after_the_steps_that_may_still_read_them(gpu_store):
    """Nobody waits for a step that samples nothing, such as the last one of a warmup."""
    store, cuda = gpu_store
    ask(store, "c")
    assert settle(store) == []
    assert cuda.calls == ["recorded", "waits for the steps so far", "written on 0", "synchronized"]
    assert [stream.priority for stream in cuda.made] == [LOWEST]


def test_a_loader_without_a_stream_fails_the_load(gpu_store, monkeypatch):
    """A broken context must not leave a line waiting for ever."""
    store, _ = gpu_store

    def broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda.Stream, "priority_range", broken)
    ask(store, "c")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        settle(store)


def test_pinned_copies_count_as_what_torch_takes_for_them(make):
    store = make(["wide"], max_pages=4, max_host_bytes=None)
    (copy,) = store.host._copies.values()
    store.host._pinned = True
    assert copy.pages.nbytes < store.host._bytes_of(copy) < 2 * copy.pages.nbytes
    assert store.host._bytes_of(copy).bit_count() == 1
