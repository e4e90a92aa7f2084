"""10,000 damaged adapters: each is loaded or refused with one of our errors, soon and in little memory."""

import io
import json
import random
import resource
import struct
import sys
import tracemalloc
import zipfile

import pytest
import torch
from nemo import model_config, random_lora, state_dict, write_nemo
from tiny import make_adapter, make_model

from npc_runtime.engine.model import ModelShape, PageLayout
from npc_runtime.engine.nemo_file import read_nemo
from npc_runtime.engine.peft_folder import load_peft_folder
from npc_runtime.errors import AdapterIncompatible, AdapterMissing

NUM_HEADERS, NUM_BYTES, NUM_CONFIGS, NUM_NEMO = 4_500, 2_500, 2_500, 500
NUM_TRACED = 100
"""Of each kind, Python's memory is traced, which is slow; the process is watched all the time."""
MAX_GROWTH = 64 << 20
"""Bytes that reading any damaged file may take at once; the adapter has 20 kB."""

ODD = [
    None,
    True,
    -1,
    0,
    2**63,
    2**31,
    1e308,
    "",
    "x",
    "F64",
    "I64",
    "F8_E4M3",
    [],
    [0],
    {},
    {"a": 1},
    [[1]],
    "\u0000" * 9,
]
ODD_SHAPES = [[], [0], [2**40, 48], [8, 2**40], [-1, 48], [8, 48, 1], [512, 48], [8.5, 48], ["8", 48], [2**64, 2**64]]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def model(place):
    return make_model("llama", place / "model")


@pytest.fixture(scope="module")
def shape(model):
    return ModelShape.from_config(model.config)


class Reader:
    """Reads damaged adapters and counts what became of them."""

    def __init__(self, read):
        self._read = read
        self.refused = self.largest = self.num_read = 0

    def read(self):
        is_traced = self.num_read < NUM_TRACED
        self.num_read += 1
        if is_traced:
            tracemalloc.start()
        try:
            self._read()
        except (AdapterIncompatible, AdapterMissing) as error:
            self.refused += 1
            problem = error
        else:
            problem = None
        assert problem is None or (problem.hint and len(str(problem)) < 2_000), problem
        if is_traced:
            self.largest = max(self.largest, tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()


@pytest.fixture
def peak():
    """The process may not grow by more than a little either: torch's memory is not Python's."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for tensors of some hundred numbers
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    torch.set_num_threads(num_threads)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * (1 if sys.platform == "darwin" else 1024) < MAX_GROWTH


@pytest.fixture
def adapter(model, tmp_path):
    return make_adapter(model, tmp_path / "adapter", rank=4, use_dora=True, target_modules=["q_proj", "up_proj"])


def reader_of(folder, shape):
    layout = PageLayout.of(shape)
    return Reader(lambda: load_peft_folder(folder, shape, layout, dtype=torch.float32))


def overwrite(path, data):
    """Without emptying the file first, after which ext4 waits for the disk."""
    path.touch()
    with path.open("r+b") as file:
        file.write(data)
        file.truncate()


def as_file(header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def damage_header(chance, header):
    """Change one or two things of a safetensors header."""
    for _ in range(chance.randint(1, 2)):
        name = chance.choice([name for name in header if name != "__metadata__"])
        entry = header[name]
        what = chance.randrange(7)
        if what == 0:
            entry["shape"] = chance.choice(ODD_SHAPES)
        elif what == 1:
            entry["dtype"] = chance.choice(ODD)
        elif what == 2:
            entry["data_offsets"] = [chance.choice([0, 1, 7, 2**40, -1]), chance.choice([0, 4, 2**40, 2**63])]
        elif what == 3:
            entry[chance.choice(["shape", "dtype", "data_offsets", "more"])] = chance.choice(ODD)
        elif what == 4:
            del entry[chance.choice([key for key in entry])]
        elif what == 5:
            place = chance.randrange(len(name))
            header[name[:place] + chance.choice([".", "9", "A", "\n", "é", "lora_"]) + name[place + 1 :]] = entry
            del header[name]
        else:
            header[name] = chance.choice(ODD)
        if len(header) < 3 or not all(isinstance(value, dict) and value for value in header.values()):
            return header
    return header


def test_headers(adapter, shape, peak):
    path = adapter / "adapter_model.safetensors"
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    sound, data = raw[8 : 8 + length].decode(), raw[8 + length :]
    reader, chance = reader_of(adapter, shape), random.Random(1)
    for _ in range(NUM_HEADERS):
        overwrite(path, as_file(damage_header(chance, json.loads(sound)), data))
        reader.read()
    assert reader.refused > 0.95 * NUM_HEADERS
    assert reader.largest < 4 << 20


def test_bytes(adapter, shape, peak):
    """Bits flip, the end is missing, bytes are inserted; most of it in the header, some in its length."""
    path = adapter / "adapter_model.safetensors"
    sound = path.read_bytes()
    reader, chance = reader_of(adapter, shape), random.Random(2)
    for _ in range(NUM_BYTES):
        data = bytearray(sound)
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(chance.choice([8, 200, 2_000, len(data)]))] ^= chance.randint(1, 255)
        what = chance.randrange(4)
        if what == 0:
            del data[chance.randrange(len(data)) :]
        elif what == 1:
            place = chance.randrange(2_000)
            data[place:place] = chance.randbytes(chance.randint(1, 9))
        overwrite(path, data)
        reader.read()
    assert reader.refused > 0.5 * NUM_BYTES
    assert reader.largest < 4 << 20


def test_configurations(adapter, shape, peak):
    """Every key with every odd value, two at a time, and expressions of all kinds."""
    path = adapter / "adapter_config.json"
    sound = json.loads(path.read_text())
    reader, chance = reader_of(adapter, shape), random.Random(3)
    letters = [
        "a",
        "q_proj",
        ".*",
        "+",
        "(",
        ")",
        "[",
        "]",
        "{2}",
        "{9999999999}",
        "|",
        "\\",
        "^",
        "$",
        "?",
        "layers",
        "\\d",
    ]
    keys = [*sound, "unknown_key", "lora_bias", "use_new", "new_config"]
    for _ in range(NUM_CONFIGS):
        config = dict(sound)
        for key in chance.sample(keys, chance.randint(1, 2)):
            config[key] = chance.choice(ODD)
        if chance.randrange(2):
            expression = "".join(chance.choices(letters, k=chance.randint(1, 9)))
            key = chance.choice(
                ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern"]
            )
            config[key] = {expression: chance.choice([1, 4, None, "x"])} if "_pattern" in key else expression
        text = json.dumps(config)
        overwrite(path, (text[: chance.randrange(len(text))] if chance.randrange(8) == 0 else text).encode())
        reader.read()
    assert reader.refused > 0.5 * NUM_CONFIGS
    assert reader.largest < 4 << 20


def test_nemo_files(model, shape, tmp_path, peak):
    """The tar, the zip in it, the pickle in that: bits flip in all of them, and sizes lie."""
    config = model.config
    lora = {0: random_lora(config, rank=2)[0]}
    path = write_nemo(tmp_path / "sound.nemo", model_config(config, rank=2, alpha=4), state_dict(lora, config))
    sound = path.read_bytes()
    buffer = io.BytesIO()
    torch.save(state_dict(lora, config), buffer)
    with zipfile.ZipFile(buffer) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    reader, chance = Reader(lambda: read_nemo(tmp_path / "bad.nemo", shape)), random.Random(4)
    for number in range(NUM_NEMO):
        data = bytearray(sound)
        if number % 2:
            data = repacked(chance, members, config, tmp_path)
        else:
            for _ in range(chance.randint(1, 5)):
                data[chance.randrange(chance.choice([512, 2_000, len(data)]))] ^= chance.randint(1, 255)
            if chance.randrange(4) == 0:
                del data[chance.randrange(len(data)) :]
        overwrite(tmp_path / "bad.nemo", data)
        reader.read()
    assert reader.refused > 0.4 * NUM_NEMO
    assert reader.largest < 16 << 20


def repacked(chance, members, config, tmp_path):
    """The same file with a changed pickle, as a zip that is whole."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            changed = bytearray(data)
            if name.endswith(".pkl"):
                for _ in range(chance.randint(1, 6)):
                    changed[chance.randrange(len(changed))] = chance.randrange(256)
            archive.writestr(name, bytes(changed))
    path = tmp_path / "repacked.nemo"
    return write_nemo(path, model_config(config, rank=2, alpha=4), buffer.getvalue()).read_bytes()
