"""What a daemon passes to the process that takes its place: the port, the token, its project's lock, and how often.

Only another process can use a GPU again whose context is broken. So the process replaces itself (`exec`): program,
arguments, environment and process id stay, and clients find the daemon where it was, by the token they know. The
port is never given up, so nobody else can take it, and who connects meanwhile waits until the new process serves.
"""

import json
import os
import socket
import sys
import time
from dataclasses import dataclass, replace
from typing import NoReturn, Self

from npc_runtime.errors import EngineDied

__all__ = ["Handover"]

VARIABLE = "NPC_RUNTIME_HANDOVER"
"""Environment variable, for as long as nobody has read it; as secret as the runtime file, which holds the token too."""

CAN_REPLACE = os.name == "posix"
"""Windows has no `exec`: a new process would have another id, and the socket would have to be duplicated into it."""

MAX_REPLACEMENTS, REPLACEMENTS_WITHIN_S = 3, 3600.0


@dataclass(frozen=True, slots=True)
class Handover:
    """A daemon's port, token and lock; `replaced_at` says when a process took them from the one before it."""

    sock: socket.socket
    token: str | None
    replaced_at: tuple[float, ...] = ()
    lock_fd: int | None = None

    @classmethod
    def take(cls) -> Self | None:
        """What the process before this one has passed on, once; None if there was none."""
        try:
            passed = json.loads(os.environ.pop(VARIABLE, "null"))
            if passed is None or passed["pid"] != os.getpid():  # another daemon's child has its environment
                return None
            token, replaced_at, lock_fd = passed["token"], tuple(passed["replaced_at"]), passed["lock_fd"]
            if lock_fd is not None:
                os.set_inheritable(lock_fd, False)
            sock = socket.socket(fileno=passed["fd"])
            sock.set_inheritable(False)
            return cls(sock, token, replaced_at, lock_fd)
        except (OSError, ValueError, TypeError, KeyError):  # nobody else has a reason to set it
            return None

    def successor(self) -> Self:
        """What the next process takes over, the port open once more. Raises `EngineDied` if there is to be none."""
        from npc_runtime.engine.faults import Attempts  # and torch with it

        attempts = Attempts(MAX_REPLACEMENTS, REPLACEMENTS_WITHIN_S, self.replaced_at)
        if not CAN_REPLACE:
            raise EngineDied("The engine thread died.", "The log above has the reason; start the daemon again.")
        if not attempts.take(time.monotonic()):  # which counts on from one process to the next
            raise EngineDied(
                f"The engine thread died, and so it did in the {MAX_REPLACEMENTS} processes before this one.",
                "The log above has the reason; if it is the GPU, look at its driver, its power and its heat.",
            )
        return replace(self, sock=self.sock.dup(), replaced_at=attempts.times)

    def replace_process(self) -> NoReturn:
        """Become the next process. Raises `EngineDied` if the system refuses."""
        passed = {
            "pid": os.getpid(),
            "fd": self.sock.fileno(),
            "token": self.token,
            "replaced_at": self.replaced_at,
            "lock_fd": self.lock_fd,
        }
        self.sock.set_inheritable(True)
        if self.lock_fd is not None:
            os.set_inheritable(self.lock_fd, True)
        try:
            os.execve(
                sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, VARIABLE: json.dumps(passed)}
            )
        except OSError as error:
            raise EngineDied(f"The engine thread died, and the process could not be replaced ({error}).") from error
