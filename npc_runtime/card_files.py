"""The files that a character card comes in: JSON, PNG with a text chunk, CHARX. Bytes to a JSON object and back.

A PNG carries base64 of the JSON in tEXt chunks: `chara` (Character Card V2) and `ccv3` (V3, which goes first where both
are there); a CHARX is a zip with `card.json` in it (github.com/kwaroran/character-card-spec-v3, SPEC_V3.md, "Embedding
Methods"). Nothing is read that is larger, deeper or of more values than the bounds below, whatever the file says of
itself. This module does not know what the fields of a card mean.
"""

import base64
import binascii
import io
import json
import math
import re
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from npc_runtime.errors import CardInvalid
from npc_runtime.png import SIGNATURE, Chunk, PngError, find_text, read_chunks, text_chunk, write_chunks

__all__ = ["CardFile", "parse_card_file", "parse_json", "read_card_file", "write_json", "write_png"]

MAX_FILE = 64 << 20
MAX_JSON = 8 << 20
MAX_DEPTH = 64
MAX_VALUES = 200_000
MAX_PICTURE = 16 << 20
MAX_DIRECTORY = 1 << 20  # of a zip: its list of contents, which is held in memory
KEYWORDS = ("ccv3", "chara")

Json = dict[str, Any]

_STRING = re.compile(rb'"(?>[^"\\]+|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_OTHER_PICTURES = ((b"\xff\xd8\xff", "a JPEG"), (b"RIFF", "a WebP"), (b"GIF8", "a GIF"))


@dataclass(frozen=True, slots=True)
class CardFile:
    """What was in a file: the card as JSON, its picture as a PNG without the card, and what else came along."""

    document: Json
    picture: bytes | None = None
    others: tuple[str, ...] = ()  # further files of a CHARX


def read_card_file(path: Path) -> CardFile:
    """Read a card. Raises `CardInvalid`, and nothing else whatever the file is."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE + 1)
    except OSError as error:
        reason = error.strerror or str(error)
        raise CardInvalid(f"{path} cannot be read: {reason}.", "Name a card: .json, .png or .charx.") from error
    return parse_card_file(data, str(path))


def parse_card_file(data: bytes, name: str) -> CardFile:
    """Read what a file called `name` would say; what it is is found in its bytes. Raises as `read_card_file`."""
    if len(data) > MAX_FILE:
        raise CardInvalid(f"{name} is larger than {MAX_FILE >> 20} MiB.", "Make its picture smaller.")
    if data.startswith(SIGNATURE):
        return _parse_png(data, name)
    if data.startswith(b"PK\3\4"):
        return _parse_charx(data, name)
    for start, kind in _OTHER_PICTURES:
        if data.startswith(start):
            raise CardInvalid(
                f"{name} is {kind} picture, and no card is in it.",
                "Cards are PNG, JSON or CHARX; where a site shows a smaller copy of the picture, get the original.",
            )
    return CardFile(parse_json(data, name))


def parse_json(data: bytes, name: str) -> Json:
    """Read a JSON object; size, depth and number of values are bounded before any is built. Raises `CardInvalid`."""
    if len(data) > MAX_JSON:
        raise CardInvalid(f"{name}: the card has more than {MAX_JSON >> 20} MiB of JSON.", "Take pictures out of it.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        what = f"{name}: byte {error.start} is not UTF-8 text."
        raise CardInvalid(what, "Name a card: .json, .png or .charx.") from error
    _check_shape(data, name)
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except json.JSONDecodeError as error:
        where = f"{name}, line {error.lineno}, column {error.colno}"
        what = f"{where}: this is not JSON: {error.msg[:1].lower()}{error.msg[1:]}."
        raise CardInvalid(what, "Save it as JSON again, or get the file again.") from error
    except (ValueError, RecursionError) as error:
        raise CardInvalid(f"{name}: this is not JSON: {str(error)[:100]}.", "Write a plain number.") from error
    if not isinstance(value, dict):
        raise CardInvalid(f"{name}: this is JSON, but no character card.", "A card is an object with a name in it.")
    return value


def write_json(document: Mapping[str, Any]) -> bytes:
    """A card as a JSON file."""
    try:
        return (json.dumps(document, ensure_ascii=False, indent=2) + "\n").encode()
    except UnicodeEncodeError:  # half of a character, which JSON can say and UTF-8 cannot
        return (json.dumps(document, indent=2) + "\n").encode()


def write_png(picture: bytes, cards: Mapping[str, Mapping[str, Any]]) -> bytes:
    """A picture with cards in it; `cards` are by the keyword of their chunk. Raises `CardInvalid`."""
    chunks = [chunk for chunk in _chunks(picture, "the picture") if not _is_card(chunk)]
    texts = [text_chunk(keyword, base64.b64encode(json.dumps(card).encode())) for keyword, card in cards.items()]
    return write_chunks([*chunks[:-1], *texts, chunks[-1]])


def _parse_png(data: bytes, name: str) -> CardFile:
    chunks = _chunks(data, name)
    for keyword in KEYWORDS:
        where = f"{name}, text '{keyword}'"
        try:
            text = find_text(chunks, keyword, max_bytes=MAX_JSON * 4 // 3 + 4)
        except PngError as error:
            raise CardInvalid(f"{name}: {error.what}.", error.remedy) from error
        if text is not None:
            document = parse_json(_decode(text, where), where)
            return CardFile(document, write_chunks(chunk for chunk in chunks if not _is_card(chunk)))
    raise CardInvalid(
        f"{name} is a picture, and no card is in it (no text 'chara' or 'ccv3').",
        "Picture editors and many sites drop it; get the original file.",
    )


def _chunks(data: bytes, name: str) -> list[Chunk]:
    try:
        return read_chunks(data)
    except PngError as error:
        raise CardInvalid(f"{name}: {error.what}.", error.remedy) from error


def _is_card(chunk: Chunk) -> bool:
    return (chunk.keyword or "").lower() in KEYWORDS


def _decode(text: bytes, where: str) -> bytes:
    text = b"".join(text.split())
    try:
        return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except binascii.Error as error:
        remedy = "Get the file again, or export it again where it was made."
        raise CardInvalid(f"{where} is not base64.", remedy) from error


def _parse_charx(data: bytes, name: str) -> CardFile:
    remedy = "Export it again where it was made."
    try:
        with zipfile.ZipFile(io.BytesIO(_plain_zip(data, name))) as archive:
            names = [info.filename for info in archive.infolist() if not info.is_dir()]
            if "card.json" not in names:
                raise CardInvalid(f"{name} is a zip file without card.json in it.", "Name a CHARX file, or unpack it.")
            document = parse_json(_unpack(archive, "card.json", MAX_JSON), f"{name}, card.json")
            icon = _find_icon(document)
            picture = _unpack(archive, icon, MAX_PICTURE) if icon in names else b""
    except CardInvalid:
        raise
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError) as error:
        raise CardInvalid(f"{name}: this is not a whole zip file: {str(error)[:100]}.", remedy) from error
    except (NotImplementedError, RuntimeError, ValueError, LookupError) as error:  # encrypted, or packed otherwise
        raise CardInvalid(f"{name}: this zip file cannot be unpacked: {str(error)[:100]}.", remedy) from error
    others = tuple(other for other in names if other != "card.json")
    return CardFile(document, picture if picture.startswith(SIGNATURE) and _is_whole(picture) else None, others)


def _unpack(archive: zipfile.ZipFile, name: str, max_bytes: int) -> bytes:
    """A file of a zip, and at most one byte more than it may have."""
    with archive.open(name) as file:
        return file.read(max_bytes + 1)


def _find_icon(document: Json) -> str:
    """Where a CHARX has the card's own picture, by its list of assets; "" where that does not say."""
    data = document.get("data")
    assets = data.get("assets") if isinstance(data, dict) else None
    for asset in assets if isinstance(assets, list) else ():
        is_icon = isinstance(asset, dict) and (asset.get("type"), asset.get("name")) == ("icon", "main")
        if is_icon and isinstance(uri := asset.get("uri"), str) and uri.startswith("embeded://"):
            return uri.removeprefix("embeded://")
    return ""


def _is_whole(picture: bytes) -> bool:
    try:
        return bool(read_chunks(picture))
    except PngError:
        return False


def _plain_zip(data: bytes, name: str) -> bytes:
    """The zip file up to its end record, if that announces a list of contents of bearable size."""
    end = data.rfind(b"PK\5\6")
    if end < 0 or end + 22 > len(data):
        raise CardInvalid(f"{name}: this zip file is cut short.", "Get the file again.")
    size = int.from_bytes(data[end + 12 : end + 16], "little")
    if size > MAX_DIRECTORY or data[max(0, end - 20) : end].startswith(b"PK\6\7"):
        raise CardInvalid(f"{name}: this zip file has too many files in it.", "A card has a few pictures at most.")
    return data[: end + 20] + b"\0\0"  # without the comment, so that the end is where zipfile looks first


def _check_shape(data: bytes, name: str) -> None:
    """Count values and depth in what is left of JSON without its strings."""
    skeleton = _STRING.sub(b"", data)
    if sum(map(skeleton.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise CardInvalid(f"{name}: the card has more than {MAX_VALUES:,} values.", "Shorten its lorebook.")
    depth = 0
    for sign in re.findall(rb"[][{}]", skeleton):
        depth += 1 if sign in b"[{" else -1
        if depth > MAX_DEPTH:
            raise CardInvalid(f"{name}: lists and objects are nested too deeply.", f"The limit is {MAX_DEPTH}.")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"{digits[:40]} is too large a number")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")
