"""The PNG container as far as character cards need it: its chunks, the texts in them, a small drawn picture.

Chunks are read and written as the PNG specification lays them out (W3C, third edition: 5.2 signature, 5.3 chunks,
11.3.3 textual information); what the pixels mean is left alone. This module knows nothing of cards.
"""

import struct
import zlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

__all__ = ["SIGNATURE", "Chunk", "PngError", "draw_portrait", "find_text", "read_chunks", "text_chunk", "write_chunks"]

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_CHUNKS = 100_000
FRAME = 12  # length, kind and checksum of a chunk
TEXT_KINDS = (b"tEXt", b"zTXt", b"iTXt")
WIDTH, HEIGHT = 256, 384


class PngError(ValueError):
    """A file that is no whole PNG: `what` names the byte, `remedy` says what to do."""

    def __init__(self, what: str, remedy: str = "Get the file again; it is damaged or was cut short.") -> None:
        super().__init__(f"{what}. {remedy}")
        self.what = what
        self.remedy = remedy


class Chunk(NamedTuple):
    """One chunk; `data` is a view into the file, so that reading copies nothing."""

    kind: bytes
    data: bytes | memoryview

    @property
    def keyword(self) -> str | None:
        """Of a chunk with a text, what the text is; None for all others."""
        if self.kind not in TEXT_KINDS:
            return None
        return bytes(self.data[:80]).partition(b"\0")[0].decode("latin-1")


def read_chunks(data: bytes) -> list[Chunk]:
    """Cut a file into its chunks, with every length and checksum compared. Raises `PngError`."""
    if not data.startswith(SIGNATURE):
        raise PngError("this is not a PNG file", "Name a PNG file.")
    view = memoryview(data)
    chunks: list[Chunk] = []
    at = len(SIGNATURE)
    while not chunks or chunks[-1].kind != b"IEND":
        if len(chunks) >= MAX_CHUNKS:
            raise PngError(f"the file has more than {MAX_CHUNKS:,} chunks", "Save it again in a picture editor.")
        if at + FRAME > len(data):
            raise PngError(f"the file ends at byte {len(data)}, before its last chunk")
        length = int.from_bytes(view[at : at + 4], "big")
        kind = bytes(view[at + 4 : at + 8])
        if not (kind.isalpha() and kind.isascii()) or (not chunks and kind != b"IHDR"):
            raise PngError(f"there is no {'chunk' if chunks else 'header'} at byte {at}")
        if length > len(data) - at - FRAME:
            name = kind.decode()
            raise PngError(f"the chunk {name} at byte {at} says it has {length:,} bytes, and the file ends before that")
        end = at + 8 + length
        if zlib.crc32(view[at + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            raise PngError(f"the chunk {kind.decode()} at byte {at} does not have the checksum that it says")
        chunks.append(Chunk(kind, view[at + 8 : end]))
        at = end + 4
    return chunks


def write_chunks(chunks: Iterable[Chunk]) -> bytes:
    """Put chunks together to a file."""
    parts = [SIGNATURE]
    for kind, data in chunks:
        checksum = zlib.crc32(data, zlib.crc32(kind))
        parts += [struct.pack(">I", len(data)), kind, bytes(data), struct.pack(">I", checksum)]
    return b"".join(parts)


def find_text(chunks: Sequence[Chunk], keyword: str, *, max_bytes: int) -> bytes | None:
    """The first text with this keyword, large or small letters alike; None if there is none.

    Raises `PngError` if it is longer than `max_bytes`, also where it is compressed.
    """
    for chunk in chunks:
        if (chunk.keyword or "").lower() == keyword:
            text = _text_of(chunk, max_bytes)
            if len(text) > max_bytes:
                raise PngError(f"the text '{keyword}' has more than {max_bytes:,} bytes", "Take pictures out of it.")
            return text
    return None


def text_chunk(keyword: str, text: bytes) -> Chunk:
    """A tEXt chunk; `text` is ASCII."""
    return Chunk(b"tEXt", keyword.encode("latin-1") + b"\0" + text)


def draw_portrait(name: str) -> bytes:
    """A small picture of a head and shoulders, in colours of the name's own."""
    shade = zlib.crc32(name.encode("utf-8", "replace"))
    back, front = (bytes(60 + (shade >> (8 * i) & 63) + light for i in range(3)) for light in (0, 80))
    rows = bytearray()
    for y in range(HEIGHT):
        half = max(_half_width(y, 150, 70, 60), _half_width(y, HEIGHT, 150, 110))
        edge = WIDTH // 2 - half
        rows += b"\0" + back * edge + front * (2 * half) + back * edge
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 8, 2, 0, 0, 0)  # 8 bits each of red, green and blue
    return write_chunks([Chunk(b"IHDR", header), Chunk(b"IDAT", zlib.compress(bytes(rows), 9)), Chunk(b"IEND", b"")])


def _half_width(y: int, centre: int, height: int, width: int) -> int:
    """Half the width of an ellipse in the row y."""
    share = 1 - ((y - centre) / height) ** 2
    return int(width * share**0.5) if share > 0 else 0


def _text_of(chunk: Chunk, max_bytes: int) -> bytes:
    """What stands behind the keyword."""
    body = bytes(chunk.data).partition(b"\0")[2]
    if chunk.kind == b"tEXt":
        return body
    is_compressed = True
    if chunk.kind == b"zTXt":
        body = body[1:]  # the method: there is one
    else:
        is_compressed = body[:1] == b"\1"
        body = body[2:].partition(b"\0")[2].partition(b"\0")[2]  # flag and method, language, translated keyword
    if not is_compressed:
        return body
    try:
        return zlib.decompressobj().decompress(body, max_bytes + 1)
    except zlib.error as error:
        raise PngError(f"the text '{chunk.keyword}' cannot be decompressed") from error
