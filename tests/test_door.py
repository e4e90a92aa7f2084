"""Who is let in: how many at once, and who comes back."""

from npc_runtime import protocol as wire
from npc_runtime.door import MAX_CONNECTIONS, Door


def hello(**fields):
    return wire.Hello(protocol=1, token="right", **fields)


def test_there_is_room_for_so_many_and_for_who_comes_back():
    door = Door(token="right")
    guests = [object() for _ in range(MAX_CONNECTIONS)]
    names = []
    for guest in guests:
        assert door.refusal(hello()) is None
        names.append(door.casts.arrive(guest, None, 0.0).name)
    assert door.refusal(hello())[0] == wire.CloseCode.TOO_MANY
    assert door.refusal(hello(resume="unknown"))[0] == wire.CloseCode.TOO_MANY
    assert door.refusal(hello(resume=names[3])) is None, "it takes the place of its own old connection"
    door.casts.leave(names[0], guests[0], 0.0, 0.0)
    assert door.refusal(hello()) is None


def test_a_wrong_token_is_not_told_how_full_it_is():
    door = Door(token="right")
    for _ in range(MAX_CONNECTIONS):
        door.casts.arrive(object(), None, 0.0)
    assert door.refusal(wire.Hello(protocol=1, token="wrong"))[0] == wire.CloseCode.AUTH
