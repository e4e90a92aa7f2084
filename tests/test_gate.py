"""Names, origins, strangers and wrong tokens, without a socket."""

import pytest

from npc_runtime.errors import StartupError
from npc_runtime.gate import DELAY_S, FREE_TRIES, MAX_STRANGERS, TRIES_WITHIN_S, Gate


@pytest.mark.parametrize(
    ("bound", "allowed", "host", "is_known"),
    [
        ("127.0.0.1", [], "127.0.0.1:4780", True),
        ("127.0.0.1", [], "localhost:4780", True),
        ("127.0.0.1", [], "LocalHost:4780", True),
        ("127.0.0.1", [], "[::1]:4780", True),
        ("127.0.0.1", [], "[0:0:0:0:0:0:0:1]:4780", True),
        ("127.0.0.1", [], "127.0.0.1:4781", False),
        ("127.0.0.1", [], "127.0.0.1", False),
        ("127.0.0.1", [], "127.0.0.2:4780", False),
        ("127.0.0.1", [], "192.168.0.7:4780", False),
        ("127.0.0.1", [], "evil.test:4780", False),
        ("127.0.0.1", [], "localhost.evil.test:4780", False),
        ("127.0.0.1", [], "localhost:4780.evil.test", False),
        ("127.0.0.1", [], "evil@localhost:4780", False),
        ("127.0.0.1", [], "localhost:4780/", False),
        ("127.0.0.1", [], "localhost:4780 ", False),
        ("127.0.0.1", [], "localhost:04780000", False),
        ("127.0.0.1", [], "", False),
        ("192.168.0.7", [], "192.168.0.7:4780", True),
        ("192.168.0.7", [], "192.168.0.8:4780", False),
        ("fd00::7", [], "[fd00:0::7]:4780", True),
        ("game-pc.lan", [], "game-pc.lan:4780", True),
        ("game-pc.lan", [], "evil.test:4780", False),
        ("0.0.0.0", [], "192.168.0.7:4780", True),
        ("0.0.0.0", [], "[fd00::7]:4780", True),
        ("::", [], "10.1.2.3:4780", True),
        ("0.0.0.0", [], "10.1.2.3:80", False),
        ("0.0.0.0", [], "evil.test:4780", False),
        ("0.0.0.0", [], "10.1.2.3.evil.test:4780", False),
        ("0.0.0.0", [], "[evil]:4780", False),
        ("0.0.0.0", ["game-pc.lan"], "game-pc.lan:4780", True),
        ("127.0.0.1", ["Game-PC.lan"], "game-pc.lan", True),
        ("127.0.0.1", ["game-pc.lan"], "evil.game-pc.lan", False),
    ],
)
def test_hosts(bound, allowed, host, is_known):
    assert Gate(bound, 4780, allowed_hosts=allowed).knows_host([host]) is is_known


def test_the_port_of_http_is_left_out():
    assert Gate("127.0.0.1", 80).knows_host(["localhost"])
    assert Gate("127.0.0.1", 80).knows_origin(["http://127.0.0.1"], "localhost")


def test_one_host_header_and_no_other_number():
    gate = Gate("127.0.0.1", 4780)
    assert not gate.knows_host([])
    assert not gate.knows_host(["localhost:4780", "localhost:4780"])


@pytest.mark.parametrize(
    ("origins", "host", "is_known"),
    [
        ([], "127.0.0.1:4780", True),
        (["http://127.0.0.1:4780"], "127.0.0.1:4780", True),
        (["http://localhost:4780"], "127.0.0.1:4780", True),
        (["http://[::1]:4780"], "localhost:4780", True),
        (["HTTP://LOCALHOST:4780"], "LOCALHOST:4780", True),
        (["http://127.0.0.1:4781"], "127.0.0.1:4780", False),
        (["https://127.0.0.1:4780"], "127.0.0.1:4780", False),
        (["http://evil.test:4780"], "127.0.0.1:4780", False),
        (["http://127.0.0.1:4780.evil.test"], "127.0.0.1:4780", False),
        (["http://localhost"], "127.0.0.1:4780", False),
        (["null"], "127.0.0.1:4780", False),
        ([""], "127.0.0.1:4780", False),
        (["http://127.0.0.1:4780", "http://127.0.0.1:4780"], "127.0.0.1:4780", False),
        (["http://192.168.0.7:4780"], "192.168.0.7:4780", True),
        (["http://192.168.0.8:4780"], "192.168.0.7:4780", False),
        (["http://localhost:4780"], "192.168.0.7:4780", False),
        (["http://192.168.0.7:4780"], "127.0.0.1:4780", False),
        (["https://npc.studio.test"], "npc.studio.test", True),
        (["https://npc.studio.test:8443"], "npc.studio.test:8443", True),
        (["https://npc.studio.test"], "127.0.0.1:4780", False),
        (["http://localhost:5173"], "127.0.0.1:4780", True),
        (["https://play.studio.test"], "192.168.0.7:4780", True),
        (["https://evil.play.studio.test"], "192.168.0.7:4780", False),
    ],
)
def test_origins(origins, host, is_known):
    """Of a daemon that listens everywhere; what page may speak depends on where it says it connects to."""
    gate = Gate(
        "0.0.0.0",
        4780,
        allowed_hosts=["npc.studio.test"],
        allowed_origins=["http://localhost:5173", "https://Play.studio.test"],
    )
    assert gate.knows_host([host])
    assert gate.knows_origin(origins, host) is is_known


@pytest.mark.parametrize("name", ["*", "http://x", "a b", "x/y", "", "x:4780"])
def test_an_allowed_host_is_a_name(name):
    with pytest.raises(StartupError, match="--allow-host"):
        Gate("127.0.0.1", 1, allowed_hosts=[name])


@pytest.mark.parametrize("origin", ["*", "null", "localhost:8080", "http://x/", "http://x/y", "http://*.x", ""])
def test_an_allowed_origin_is_one(origin):
    with pytest.raises(StartupError, match="--allow-origin"):
        Gate("127.0.0.1", 1, allowed_origins=[origin])


class Socket:
    def __init__(self):
        self.is_gone = False

    def abort(self):
        self.is_gone = True


def test_of_too_many_strangers_the_oldest_goes():
    gate, sockets = Gate("127.0.0.1", 1), [Socket() for _ in range(MAX_STRANGERS + 3)]
    for number, socket_ in enumerate(sockets):
        gate.enter(socket_)
        if number == 1:
            gate.leave(socket_)  # it said who it is
    assert [number for number, socket_ in enumerate(sockets) if socket_.is_gone] == [0, 2]
    gate.leave(sockets[0])  # as every socket that is closed
    assert len(gate._strangers) == MAX_STRANGERS


def test_wrong_tokens_wait_only_while_there_are_many():
    gate = Gate("127.0.0.1", 1)
    assert [gate.delay_wrong_token(float(now)) for now in range(FREE_TRIES)] == [0.0] * FREE_TRIES
    assert gate.delay_wrong_token(FREE_TRIES) == DELAY_S
    assert gate.delay_wrong_token(TRIES_WITHIN_S + FREE_TRIES + 1) == 0.0
