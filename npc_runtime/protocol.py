"""The wire protocol, version 1: every message as a model.

Its three parts, `wire_parts`, `wire_client` and `wire_server`, are the definition; PROTOCOL.md and tests/golden/ are
generated from it. `codec` turns the models into frames and back.
"""

from typing import get_args

from npc_runtime.wire_client import (
    Bye,
    Cancel,
    ClientInfo,
    Config,
    Format,
    Generate,
    Hello,
    Input,
    LineRequest,
    LineSampling,
    NpcClose,
    NpcHistory,
    NpcOpen,
    NpcRestore,
    NpcSnapshot,
    PersonaDelete,
    PersonaGet,
    PersonaList,
    PersonaPut,
    PersonaValidate,
    Request,
    Shutdown,
    Status,
    Vars,
    Want,
    Warmup,
    Watch,
)
from npc_runtime.wire_parts import (
    CAPS,
    LIMITS,
    MAX_CLIENT_FRAME,
    MAX_SERVER_FRAME,
    PROTOCOL_VERSION,
    SUBPROTOCOLS,
    BaseModelInfo,
    ChatTurn,
    CloseCode,
    ErrorInfo,
    Id,
    Message,
    NpcId,
    Options,
    PersonaInfo,
    ShortText,
    is_id,
)
from npc_runtime.wire_server import (
    Accepted,
    AcceptedItem,
    BatchEnd,
    Delta,
    DeltaItem,
    Error,
    Event,
    LineEnd,
    LineStart,
    Reply,
    Stats,
    Timing,
    Usage,
    WarmupItem,
    Watched,
    Welcome,
)

__all__ = [
    "CAPS",
    "CLIENT_MESSAGES",
    "LIMITS",
    "MAX_CLIENT_FRAME",
    "MAX_SERVER_FRAME",
    "PROTOCOL_VERSION",
    "SERVER_MESSAGES",
    "SUBPROTOCOLS",
    "Accepted",
    "AcceptedItem",
    "BaseModelInfo",
    "BatchEnd",
    "Bye",
    "Cancel",
    "ChatTurn",
    "ClientInfo",
    "ClientMessage",
    "CloseCode",
    "Config",
    "Delta",
    "DeltaItem",
    "Error",
    "ErrorInfo",
    "Event",
    "Format",
    "Generate",
    "Hello",
    "Id",
    "Input",
    "LineEnd",
    "LineRequest",
    "LineSampling",
    "LineStart",
    "Message",
    "NpcClose",
    "NpcHistory",
    "NpcId",
    "NpcOpen",
    "NpcRestore",
    "NpcSnapshot",
    "Options",
    "PersonaDelete",
    "PersonaGet",
    "PersonaInfo",
    "PersonaList",
    "PersonaPut",
    "PersonaValidate",
    "Reply",
    "Request",
    "ServerMessage",
    "ShortText",
    "Shutdown",
    "Stats",
    "Status",
    "Timing",
    "Usage",
    "Vars",
    "Want",
    "Warmup",
    "WarmupItem",
    "Watch",
    "Watched",
    "Welcome",
    "is_id",
]

ClientMessage = (
    Hello
    | Generate
    | Cancel
    | NpcOpen
    | NpcClose
    | NpcHistory
    | NpcSnapshot
    | NpcRestore
    | PersonaList
    | PersonaGet
    | PersonaPut
    | PersonaValidate
    | PersonaDelete
    | Warmup
    | Watch
    | Config
    | Status
    | Shutdown
    | Bye
)
ServerMessage = Welcome | Accepted | LineStart | Delta | LineEnd | BatchEnd | Reply | Event | Stats | Watched | Error

CLIENT_MESSAGES: tuple[type[Request], ...] = get_args(ClientMessage)
SERVER_MESSAGES: tuple[type[Message], ...] = get_args(ServerMessage)
