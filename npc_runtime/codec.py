"""Frames to messages and back, in both subprotocols.

One message a frame: a map with `type`. `npc.v1.msgpack` sends binary frames, `npc.v1.json` text frames. Whatever
bytes come in, only errors of ours come out.
"""

import json
from typing import Annotated, Any, get_args

import msgpack
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from npc_runtime import protocol as wire
from npc_runtime.errors import FormatUnsupported, InvalidError, ProtocolError, UnsupportedError, WireError

__all__ = ["decode", "encode", "frame_size", "parse_client", "parse_line", "parse_server"]

JSON = "npc.v1.json"

_CLIENT: TypeAdapter[wire.ClientMessage] = TypeAdapter(Annotated[wire.ClientMessage, Field(discriminator="type")])
_SERVER: TypeAdapter[wire.ServerMessage] = TypeAdapter(Annotated[wire.ServerMessage, Field(discriminator="type")])
_CLIENT_TYPES = frozenset(model.model_fields["type"].default for model in wire.CLIENT_MESSAGES)
_SERVER_TYPES = frozenset(model.model_fields["type"].default for model in wire.SERVER_MESSAGES)
_EVENTS = frozenset(get_args(wire.Event.model_fields["kind"].annotation))


def encode(message: BaseModel, subprotocol: str) -> bytes | str:
    """Encode a message for its subprotocol; fields that are None are left out."""
    document = message.model_dump(mode="json", exclude_none=True)
    if subprotocol == JSON:
        return json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    packed: bytes = msgpack.packb(document)
    return packed


def frame_size(message: BaseModel, subprotocol: str) -> int:
    """Bytes that the encoded message takes."""
    encoded = encode(message, subprotocol)
    return len(encoded.encode() if isinstance(encoded, str) else encoded)


def decode(frame: bytes | str, subprotocol: str) -> dict[str, Any]:
    """Decode a frame to a map. Raises `ProtocolError` for whatever is not one; never anything else."""
    is_text = subprotocol == JSON
    if isinstance(frame, str) != is_text:
        kind = "text" if is_text else "binary"
        raise ProtocolError(f"{subprotocol} carries {kind} frames.", "Use the other frame type, or subprotocol.")
    try:
        document = json.loads(frame) if is_text else msgpack.unpackb(frame)
        if is_text and "\\ud" in str(frame).lower():  # an escaped half of a surrogate pair is not a character
            json.dumps(document, ensure_ascii=False).encode()
    except (ValueError, RecursionError, msgpack.UnpackException, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        raise ProtocolError(f"The frame is not {subprotocol[7:]} ({reason}).", "Send one map a frame.") from error
    if not isinstance(document, dict) or not isinstance(document.get("type"), str):
        raise ProtocolError("The frame is not a map with a text 'type'.", "Send one map a frame.")
    return document


def parse_client(document: dict[str, Any]) -> wire.ClientMessage:
    """Check a client's message. Raises `UnsupportedError` for a type that is not served, else `InvalidError`."""
    kind = document["type"]
    if kind not in _CLIENT_TYPES:
        raise UnsupportedError(f"This daemon does not serve '{kind[:64]}'.", "See welcome.caps for what it does.")
    try:
        return _CLIENT.validate_python(document)
    except (ValidationError, RecursionError) as error:
        raise _first_problem(error, skip=1) from error


def parse_line(document: Any) -> wire.LineRequest:
    """Check one entry of `generate.lines`. Raises `InvalidError`, `UnsupportedError` or `FormatUnsupported`."""
    try:
        line = wire.LineRequest.model_validate(document)
    except (ValidationError, RecursionError) as error:
        raise _first_problem(error, whole="the line") from error
    if line.format.kind != "text":
        raise FormatUnsupported(f"format.kind '{line.format.kind}' is not served yet.", "Use 'text'.")
    refused = {"emotions": line.emotions, "actions": line.actions}
    for name, value in refused.items():
        if value:
            raise UnsupportedError(f"'{name}' is not served yet.", "Leave this field out.")
    return line


def parse_server(document: dict[str, Any]) -> wire.ServerMessage | None:
    """Check a daemon's message, for clients; None for a type, or a kind of event, that a later daemon may send.

    Raises `ProtocolError`.
    """
    kind = document["type"]
    if kind not in _SERVER_TYPES or (kind == "event" and document.get("kind") not in _EVENTS):
        return None
    try:
        return _SERVER.validate_python(document)
    except ValidationError as error:
        raise ProtocolError(f"The daemon sent a message that is not of this protocol: {error}") from error


def _first_problem(error: ValidationError | RecursionError, *, skip: int = 0, whole: str = "the message") -> WireError:
    """Name the first wrong field; `skip` leaves out the union's tag in front of the path."""
    if isinstance(error, RecursionError):
        return ProtocolError("The message is nested too deeply.", "Send flat maps.")
    problem = error.errors(include_url=False)[0]
    field = ".".join(str(part)[:64] for part in problem["loc"][skip:]) or whole
    if problem["type"] == "extra_forbidden":
        return InvalidError(f"'{field}' is not an option.", "PROTOCOL.md lists the options.")
    if problem["type"] == "model_type":
        return InvalidError(f"'{field}' is not a map.", "PROTOCOL.md has its fields.")
    reason = problem["msg"].removeprefix("Value error, ")[:200]
    return InvalidError(f"'{field}' is invalid: {reason}.", "PROTOCOL.md has the bounds.")
