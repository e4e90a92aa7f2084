"""What a hello has to show, and where the casts of those who left wait. Who may say one is the gate's business."""

import hmac

from npc_runtime import protocol as wire
from npc_runtime.cast import GreenRoom

__all__ = ["MAX_CONNECTIONS", "Door"]

MAX_CONNECTIONS = 16
"""Of clients that were let in; who has said nothing yet takes no place (`gate`)."""


class Door:
    """What a client has to show; the same for every connection."""

    def __init__(self, *, token: str | None, project: str = "", owner_pid: int | None = None) -> None:
        self.token = token  # None: --no-auth
        self.project = project
        self.owner_pid = owner_pid
        self.casts = GreenRoom()

    def refusal(self, hello: wire.Hello) -> tuple[int, str] | None:
        """Why this client may not come in: a close code and a reason."""
        if hello.protocol != wire.PROTOCOL_VERSION:
            reason = f"This daemon speaks protocol {wire.PROTOCOL_VERSION}, not {hello.protocol}."
            return wire.CloseCode.PROTOCOL, reason
        given = (hello.token or "").encode(errors="replace")
        if self.token is not None and not hmac.compare_digest(given, self.token.encode()):
            what = "The token is wrong." if hello.token else "hello has no token."
            return wire.CloseCode.AUTH, f"{what} It is in the daemon's first line and runtime file."
        if hello.project is not None and hello.project != self.project:
            return wire.CloseCode.PROTOCOL, f"This daemon serves the project {self.project}, not {hello.project}."
        if self.casts.num_present(besides=hello.resume) >= MAX_CONNECTIONS:
            return wire.CloseCode.TOO_MANY, f"{MAX_CONNECTIONS} connections are open already"
        return None
