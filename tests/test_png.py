"""PNG chunks are cut, checked and put back; a damaged file is named with the byte."""

import struct
import zlib

import pytest

from npc_runtime.png import Chunk, PngError, draw_portrait, find_text, read_chunks, text_chunk, write_chunks

PICTURE = draw_portrait("Odo")


def test_a_drawn_portrait_is_a_picture():
    chunks = read_chunks(PICTURE)
    assert [chunk.kind for chunk in chunks] == [b"IHDR", b"IDAT", b"IEND"]
    width, height = struct.unpack(">II", bytes(chunks[0].data[:8]))
    assert len(zlib.decompress(bytes(chunks[1].data))) == height * (1 + 3 * width)
    assert len(PICTURE) < 10_000
    assert draw_portrait("Berta") != PICTURE


def test_chunks_come_back_as_they_were():
    assert write_chunks(read_chunks(PICTURE)) == PICTURE


def test_what_stands_behind_the_end_is_passed_over():
    assert len(read_chunks(PICTURE + b"PK\3\4")) == 3


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "not a PNG"),
        (b"GIF89a", "not a PNG"),
        (PICTURE[:8], "ends at byte 8"),
        (PICTURE[:-5], "ends at byte"),
        (PICTURE[:60], "chunk IDAT at byte 33 says it has"),
        (PICTURE[:45] + b"?" + PICTURE[46:], "chunk IDAT at byte 33 does not have the checksum"),
        (PICTURE[:33] + b"\xff" * 4 + PICTURE[37:], "says it has 4,294,967,295 bytes"),
        (PICTURE[:8] + PICTURE[33:], "no header at byte 8"),
        (PICTURE[:37] + b"\0\1\2\3" + PICTURE[41:], "no chunk at byte 33"),
        (PICTURE[:33] + write_chunks([Chunk(b"teST", b"")])[8:] * 100_000, "more than 100,000 chunks"),
    ],
)
def test_a_damaged_file_is_named(data, told):
    with pytest.raises(PngError, match=told):
        read_chunks(data)


@pytest.mark.parametrize(
    "chunk",
    [
        Chunk(b"tEXt", b"Chara\0words"),
        Chunk(b"zTXt", b"chara\0\0" + zlib.compress(b"words")),
        Chunk(b"iTXt", b"chara\0\0\0en\0Figur\0words"),
        Chunk(b"iTXt", b"chara\0\1\0\0\0" + zlib.compress(b"words")),
    ],
)
def test_texts_of_every_kind(chunk):
    chunks = [Chunk(b"IDAT", b"chara\0no"), text_chunk("other", b"no"), chunk, text_chunk("chara", b"later")]
    assert find_text(chunks, "chara", max_bytes=5) == b"words"
    assert find_text(chunks, "ccv3", max_bytes=5) is None
    with pytest.raises(PngError, match="more than 4 bytes"):
        find_text(chunks, "chara", max_bytes=4)


def test_compressed_rubbish_is_named():
    with pytest.raises(PngError, match="'chara' cannot be decompressed"):
        find_text([Chunk(b"zTXt", b"chara\0\0rubbish")], "chara", max_bytes=99)
