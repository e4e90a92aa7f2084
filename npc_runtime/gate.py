"""Who may come in: by what name the daemon was called, whose web page asks, how many may wait before they say who they
are, and what a wrong token costs.

It decides and does no I/O; `server` asks it. What a client says once it is in, is for `session`.
"""

import ipaddress
import re
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Protocol

from npc_runtime.errors import StartupError

__all__ = ["HELLO_TIMEOUT_S", "Abortable", "Gate"]

HELLO_TIMEOUT_S = 5.0
"""For the handshake, and again for the first message."""

MAX_STRANGERS = 64
"""Sockets that nobody vouches for yet: a handshake under way, a page being fetched, no valid `hello` so far."""

FREE_TRIES, TRIES_WITHIN_S, DELAY_S = 5, 60.0, 1.0
"""So many wrong tokens are answered at once; while there are more within that time, each answer is held back."""

HTTP_PORT = 80  # a browser leaves it out
LOOPBACK_NAMES = ("127.0.0.1", "localhost", "[::1]")

HOST = re.compile(r"(?P<name>\[[0-9a-f:.]{2,45}\]|[a-z0-9._-]{1,253})(?::(?P<port>[0-9]{1,5}))?")
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://" + HOST.pattern)


class Abortable(Protocol):
    """A transport: what can be dropped without a word."""

    def abort(self) -> None:
        """Drop it."""


class Gate:
    """The rules of one daemon, and who stands at its gate. Raises `StartupError` for a host or origin that is none."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        allowed_hosts: Iterable[str] = (),
        allowed_origins: Iterable[str] = (),
    ) -> None:
        self._port = port
        self._own_names = {*LOOPBACK_NAMES, _canonical(host)}
        self._is_everywhere = host in ("", "0.0.0.0", "::")
        self._allowed_names = {_checked_host(name) for name in allowed_hosts}
        self._allowed_origins = {_checked_origin(origin) for origin in allowed_origins}
        self._strangers: dict[Abortable, None] = {}  # in the order they came
        self._wrong_at: deque[float] = deque(maxlen=FREE_TRIES)

    def knows_host(self, hosts: Sequence[str]) -> bool:
        """Whether these `Host` headers name this daemon.

        A name of somebody else's that leads here is DNS rebinding: to the browser, the page that came by that name is
        of the same origin. Addresses cannot be rebound, so a daemon that listens on all of the machine's takes any.
        """
        found = HOST.fullmatch(hosts[0].lower()) if len(hosts) == 1 else None
        if found is None:
            return False
        name = _canonical(found["name"])
        if name in self._allowed_names:  # by any port: what stands in front of the daemon has its own
            return True
        if int(found["port"] or HTTP_PORT) != self._port:
            return False
        return name in self._own_names or (self._is_everywhere and _is_address(name))

    def knows_origin(self, origins: Sequence[str], host: str) -> bool:
        """Whether these `Origin` headers may open a socket to `host`, a `Host` that is known.

        Native clients send none. A page of the daemon's own comes from where it connects to; on this machine all
        loopback names are one. `null` is anybody: a sandboxed frame, a file, a data URL.
        """
        if not origins:
            return True
        origin, host = origins[0].lower(), host.lower()
        name = _name_of(host)
        ours = {f"http://{host}"}
        if name in LOOPBACK_NAMES:
            ours |= {f"http://{loopback}{host.removeprefix(name)}" for loopback in LOOPBACK_NAMES}
        if name in self._allowed_names:
            ours.add(f"https://{host}")  # the proxy in front of the daemon speaks TLS
        return len(origins) == 1 and origin in ours | self._allowed_origins

    def enter(self, stranger: Abortable) -> None:
        """Somebody connected. Where too many wait, who has waited longest is dropped.

        Nobody but a flood is hurt: a client says hello within milliseconds of connecting.
        """
        self._strangers[stranger] = None
        if len(self._strangers) > MAX_STRANGERS:
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            oldest.abort()

    def leave(self, stranger: Abortable) -> None:
        """This one said who it is, or is gone."""
        self._strangers.pop(stranger, None)

    def delay_wrong_token(self, now: float) -> float:
        """Count a wrong token and say for how many seconds its answer is held back.

        The token's 192 bits are what stops guessing; this slows a client that tries the same one for ever. The right
        token never waits, or anybody could keep the game out with wrong ones.
        """
        is_often = len(self._wrong_at) == FREE_TRIES and now - self._wrong_at[0] < TRIES_WITHIN_S
        self._wrong_at.append(now)
        return DELAY_S if is_often else 0.0


def _name_of(host: str) -> str:
    found = HOST.fullmatch(host)
    return found["name"] if found else ""


def _canonical(name: str) -> str:
    """One spelling of a name; IPv6 addresses in brackets, as they stand in `Host`."""
    name = name.lower()
    try:
        address = ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return name
    return f"[{address.compressed}]" if address.version == 6 else address.compressed


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def _checked_host(name: str) -> str:
    found = HOST.fullmatch(name.lower())
    if found is None or found["port"]:
        raise StartupError(
            f"--allow-host {name!r} is no host name.", "Give the name alone: game-pc.local, or 10.0.0.7."
        )
    return _canonical(found["name"])


def _checked_origin(origin: str) -> str:
    if not ORIGIN.fullmatch(origin.lower()):
        raise StartupError(
            f"--allow-origin {origin!r} is no web page's origin.",
            "Give scheme, host and port as the browser sends them: http://localhost:8080, without a path.",
        )
    return origin.lower()
