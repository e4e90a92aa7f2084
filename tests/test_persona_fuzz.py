"""10,000 broken persona files: each is read or refused with a file, a reason and a remedy, and nothing grows."""

import copy
import json
import random
import resource
import time
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from test_persona import WHOLE

from npc_runtime.errors import PersonaInvalid
from npc_runtime.persona import Persona

NUM_FILES = 10_000
FOLDER = Path("guard")
SNIPPETS = [
    b"[",
    b"]",
    b"{",
    b"}",
    b": ",
    b"- ",
    b"\n",
    b"\n  ",
    b"'",
    b'"',
    b"#",
    b"&a ",
    b"*a",
    b"!!int ",
    b"|\n",
    b"? ",
]
SNIPPETS += [
    b"\t",
    b"\0",
    b"\xff",
    b"\xed\xa0\x80",
    b"\\ud800",
    b"9" * 400,
    b"nan",
    b"null",
    b"~",
    b"<<: ",
    b"%",
    b"---\n",
]
ODD = [
    None,
    True,
    7,
    -1e308,
    1e400,
    "",
    " ",
    "x" * 5_000,
    [],
    {},
    [[[[]]]],
    {"a": {"b": [1]}},
    "\ud800",
    ["\0"],
    [None],
]
ODD += ["(" * 400, "a and " * 70, "quest == ", 2**70, "\u202e", [{"id": "a", "text": "b"}] * 3]


def broken_bytes(chance):
    """The whole file with pieces cut, put in, moved and said twice."""
    data = bytearray(WHOLE)
    for _ in range(chance.randrange(1, 6)):
        start = chance.randrange(len(data) + 1)
        end = min(len(data), start + chance.choice([0, 0, 1, 3, 40]))
        match chance.randrange(4):
            case 0:
                data[start:end] = chance.choice(SNIPPETS)
            case 1:
                data[start:end] = bytes([chance.randrange(256)])
            case 2:
                data[start:start] = data[start : start + chance.randrange(200)]
            case 3:
                del data[start:end]
    return bytes(data)


def broken_values(chance, whole):
    """The whole file with odd values anywhere, as JSON, which is YAML."""
    document = json.loads(json.dumps(whole))
    for _ in range(chance.randrange(1, 4)):
        node = document
        while True:
            keys = list(node) if isinstance(node, dict) else range(len(node))
            if not keys:
                break
            key = chance.choice(list(keys))
            if not isinstance(node[key], (dict, list)) or not node[key] or chance.random() < 0.3:
                if isinstance(node, dict) and chance.random() < 0.3:
                    node[key + chance.choice("abc_")] = node.pop(key)
                else:
                    node[key] = copy.deepcopy(chance.choice(ODD))
                break
            node = node[key]
    return json.dumps(document).encode()


def refusal(data):
    try:
        Persona.parse(data, FOLDER)
    except PersonaInvalid as error:
        return error
    return None


@pytest.mark.parametrize("kind", ["bytes", "values"])
def test_a_broken_file_is_refused_with_a_remedy(kind):
    chance, whole = random.Random(kind), YAML(typ="safe").load(WHOLE)
    Persona.parse(WHOLE, FOLDER)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    num_refused, slowest = 0, 0.0
    for _ in range(NUM_FILES // 2):
        data = broken_bytes(chance) if kind == "bytes" else broken_values(chance, whole)
        started = time.process_time()
        error = refusal(data)
        if error:
            num_refused += 1
            assert "guard" in error.message
            assert len(str(error).encode()) < 2_000
            assert error.hint
        slowest = max(slowest, time.process_time() - started)
    assert num_refused > NUM_FILES // 5
    assert slowest < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB
