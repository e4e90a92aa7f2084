"""Writes PROTOCOL.md and tests/golden/ from the message models, tests/prompts/*.txt from the families' templates:
`make generate`.
"""

import json
import tempfile
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
import msgpack
from families import FAMILIES, make_base, speak
from golden_messages import CLIENT, SERVER
from pydantic import BaseModel

from npc_runtime import errors
from npc_runtime import protocol as wire
from npc_runtime.engine.tokenizer import ChatTokenizer
from npc_runtime.prompt import Context

ROOT = Path(__file__).parent.parent

PARTS = [
    wire.LineRequest,
    wire.Input,
    wire.ChatTurn,
    Context,
    wire.LineSampling,
    wire.ClientInfo,
    wire.Want,
    wire.AcceptedItem,
    wire.PersonaInfo,
    wire.WarmupItem,
    wire.BaseModelInfo,
    wire.DeltaItem,
    wire.Usage,
    wire.Timing,
    wire.ErrorInfo,
]

INTRO = """# Wire protocol, version 1

Generated from `npc_runtime/protocol.py` by `make generate`; a test fails when it is stale.

`ws://127.0.0.1:<port>/v1`, one message a frame, a map with `type`. Subprotocol `npc.v1.msgpack` sends binary
frames, `npc.v1.json` text frames. The first message is `hello`, within 5 s; the daemon answers `welcome`, or closes
with a code and a reason. Port and token are the daemon's first line on stdout and in its runtime file.

Rules:

- Every accepted line gets exactly one `line.end`, and nothing after it; every `generate` that is answered `accepted`
  gets exactly one `batch.end`. A line that is not taken says so in `accepted`.
- Deltas are whole characters, numbered per line; `line.end.text` replaces them. Errors are never inside a text.
- Lines of one npc are spoken in the order in which they were sent, each after the one before it; all others together.
- Fields that are not listed here are ignored; options (the keys of `sampling`, `format` and `config`) and enum values
  that are not listed are refused as `invalid`. Messages and fields that `welcome.caps` does not name are refused as
  `unsupported`. Clients look at `caps`, never at versions.
- A field that is null may be left out; the daemon leaves it out. `line`, `batch` and `id` are the client's: integers
  up to ±(2^53−1), or strings of 1 to 64 characters. `id` comes back as `re`.
- The daemon sends no frame over 32 KiB, or over what `hello.want.max_frame` allows; a larger `reply` comes in `parts`,
  one behind the other, `part` from 0. A frame over 1 MiB from a client closes 1009.
- Who does not read for five seconds loses its lines (`overload`), and after five more its connection. Nobody else
  waits for it.
- When a connection is lost (or left by `bye`, or taken over by a `resume`) its lines are cancelled, and nothing more is
  said of them. Its NPCs and their histories wait for `hello.resume`, for `want.linger_s`.
- A `hello` that comes while the base is loaded is answered by `event`s `model.loading`, at least one every two seconds,
  then `model.ready`, then `welcome`; or the connection closes 1011 with the reason. `progress` is that of what
  `message` names, and begins anew with the next.

Close codes: 4400 protocol, 4401 token, 4403 origin, 4408 no hello, 4429 too many connections, 1009 frame over
1 MiB, 1011 the daemon could not start, 1012 it stops or restarts; 1000 after `bye`, or where another connection has
resumed the session: do not connect again by yourself then.
"""


def main() -> None:
    (ROOT / "npc_runtime" / "PROTOCOL.md").write_text(protocol_page(), encoding="utf-8")
    folder = ROOT / "tests" / "golden"
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    for name, data in golden_files().items():
        (folder / name).write_bytes(data)
    for name, text in family_prompts().items():
        (ROOT / "tests" / "prompts" / f"{name}.txt").write_text(text, encoding="utf-8")


def family_prompts() -> dict[str, str]:
    """What every family's template makes of the same line."""
    with tempfile.TemporaryDirectory() as folder:
        return {name: speak(ChatTokenizer(make_base(name, Path(folder) / name))).text for name in FAMILIES}


def golden_files() -> dict[str, bytes]:
    """File name to bytes: every message once as indented JSON, once as the frame itself."""
    files = {}
    for side, messages in (("client", CLIENT), ("server", SERVER)):
        for message in messages:
            document = message.model_dump(mode="json", exclude_none=True)
            name = f"{side}.{document['type']}"
            files[f"{name}.json"] = (json.dumps(document, ensure_ascii=False, indent=2) + "\n").encode()
            files[f"{name}.msgpack"] = msgpack.packb(document)
    return files


def protocol_page() -> str:
    parts = [INTRO, f"Features (`welcome.caps`): {', '.join(f'`{cap}`' for cap in wire.CAPS)}.\n"]
    limits = ", ".join(f"`{name}` {value:,}" for name, value in wire.LIMITS.items())
    parts.append(f"Limits (`welcome.limits`, and `context`, the tokens of prompt and reply): {limits}.\n")
    for title, models in (
        ("Client to daemon", wire.CLIENT_MESSAGES),
        ("Daemon to client", wire.SERVER_MESSAGES),
        ("Parts", PARTS),
    ):
        parts.append(f"## {title}\n")
        parts += [describe(model) for model in models]
    parts.append("## Error codes\n")
    parts += [
        f"- `{error.code}`{' (retryable)' if error.retryable else ''}: {error.__doc__}"
        for error in sorted(errors.WireError.__subclasses__(), key=lambda error: error.code)
    ]
    return "\n".join(parts) + "\n"


def describe(model: type[BaseModel]) -> str:
    kind = model.model_fields["type"].default if "type" in model.model_fields else model.__name__
    lines = [f"### {kind}\n", f"{' '.join((model.__doc__ or '').split())}\n"]
    lines += ["| field | type | default |", "| --- | --- | --- |"]
    for name, field in model.model_fields.items():
        if name == "type":
            continue
        default = "required" if field.is_required() else show_default(field.get_default(call_default_factory=True))
        bounds = [text for item in field.metadata if (text := show_bound(item))]
        text = " ".join([show_type(field.annotation), *bounds])
        text += f" ({field.description})" if field.description else ""
        lines.append(f"| `{name}` | {text} | {default} |")
    return "\n".join(lines) + "\n"


def show_type(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is dict:
        return "map"
    if annotation == int | str or {int, str} <= set(args):
        return "id"
    if origin is Annotated:
        bounds = [text for item in args[1:] if (text := show_bound(item))]
        return " ".join([show_type(args[0]), *bounds])
    if origin is Literal:
        return " or ".join(f"`{arg}`" for arg in args)
    if origin in (Union, types.UnionType):
        return " or ".join(show_type(arg) for arg in args if arg is not type(None))
    if origin in (list, tuple):
        return f"list of {show_type(args[0])}"
    if origin is dict:
        return "map"
    plain = {str: "text", int: "integer", float: "number", bool: "boolean", Any: "any"}
    return plain.get(annotation) or f"`{annotation.__name__}`"


def show_bound(item: Any) -> str:
    match item:
        case annotated_types.Ge(ge):
            return f"≥ {ge}"
        case annotated_types.Gt(gt):
            return f"> {gt}"
        case annotated_types.Le(le):
            return f"≤ {le}"
        case annotated_types.MinLen(size):
            return f"at least {size}"
        case annotated_types.MaxLen(size):
            return f"at most {size}"
    metadata = getattr(item, "metadata", [])
    return " ".join(text for inner in metadata if (text := show_bound(inner)))


def show_default(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, BaseModel):
        return "its defaults"
    if isinstance(value, tuple):
        value = list(value)
    return f"`{json.dumps(value, ensure_ascii=False)}`"


if __name__ == "__main__":
    main()
