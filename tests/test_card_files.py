"""JSON, PNG and CHARX to a JSON object within bounds; everything else is refused by name, place and remedy."""

import base64
import io
import json
import tracemalloc
import zipfile
import zlib

import pytest

from npc_runtime.card_files import CardFile, parse_card_file, parse_json, read_card_file, write_json, write_png
from npc_runtime.errors import CardInvalid
from npc_runtime.png import Chunk, draw_portrait, read_chunks, text_chunk, write_chunks

CARD = {"spec": "chara_card_v3", "data": {"name": "Odo", "description": "Ängstlich 😱"}}
PICTURE = draw_portrait("Odo")


def png_with(*texts):
    *chunks, end = read_chunks(PICTURE)
    return write_chunks([*chunks, *texts, end])


def zip_with(**files):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name.replace("__", "/").replace("_", "."), data)
    return stream.getvalue()


def encoded(document):
    return base64.b64encode(json.dumps(document).encode())


def test_json_with_and_without_a_byte_order_mark():
    for data in (write_json(CARD), b"\xef\xbb\xbf" + write_json(CARD), json.dumps(CARD).encode()):
        assert parse_card_file(data, "odo.json") == CardFile(CARD)


def test_half_a_character_survives():
    card = {"name": "cut \ud83d"}
    assert parse_json(write_json(card), "x") == card


def test_a_png_holds_both_cards_and_gives_the_newer_one():
    data = write_png(png_with(text_chunk("chara", b"old"), text_chunk("Title", b"kept")), {"chara": {}, "ccv3": CARD})
    assert parse_card_file(data, "odo.png") == CardFile(CARD, png_with(text_chunk("Title", b"kept")))
    assert [chunk.keyword for chunk in read_chunks(data)[2:-1]] == ["Title", "chara", "ccv3"]
    assert data.count(b"old") == 0


def test_base64_with_line_ends_or_without_its_end():
    text = encoded(CARD).rstrip(b"=")
    wrapped = b"\n".join(text[at : at + 20] for at in range(0, len(text), 20))
    assert parse_card_file(png_with(text_chunk("chara", wrapped)), "x").document == CARD


def test_a_charx_gives_its_card_icon_and_what_else_is_in_it():
    icon = {"type": "icon", "name": "main", "uri": "embeded://assets/main.png", "ext": "png"}
    card = {**CARD, "data": {**CARD["data"], "assets": [icon]}}
    data = zip_with(card_json=json.dumps(card), assets__main_png=PICTURE, module_risum=b"?")
    assert parse_card_file(data, "x") == CardFile(card, PICTURE, ("assets/main.png", "module.risum"))
    for bad in (b"\xff\xd8\xff", PICTURE[:-9]):
        data = zip_with(card_json=json.dumps(card), assets__main_png=bad)
        assert parse_card_file(data, "x").picture is None


BOMB = zlib.compress(b" " * 40_000_000, 9)
MANY = zip_with(**{f"f{i}" * 8: b"" for i in range(20_000)})


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "x, line 1, column 1: this is not JSON"),
        (b'{"name": "Odo"', "x, line 1, column 15: this is not JSON"),
        (b'{"name":\n "Odo}', "x, line 2, column 2: this is not JSON: unterminated"),
        (b'["name"]', "is JSON, but no character card"),
        (b'{"name": NaN}', "NaN is not a number"),
        (b'{"name": 1e999}', "1e999 is too large a number"),
        (b'{"name": ' + b"9" * 5_000 + b"}", "this is not JSON: Exceeds the limit"),
        (b'{"name": "\xff"}', "byte 10 is not UTF-8"),
        ('{"name": "Odo"}'.encode("utf-16"), "byte 0 is not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "nested too deeply"),
        (b"[" + b"[]," * 300_000 + b"[]]", "more than 200,000 values"),
        (b'"' + b"\\" * 1_000_001, "this is not JSON"),
        (b'"' + b'\\"' * 1_000_000, "this is not JSON"),
        (b" " * (8 << 20) + b"{}", "more than 8 MiB of JSON"),
        (b"\0" * ((64 << 20) + 1), "larger than 64 MiB"),
        (b"\xff\xd8\xff\xe0", "is a JPEG picture"),
        (b"RIFF....WEBP", "is a WebP picture"),
        (PICTURE, "is a picture, and no card is in it"),
        (PICTURE[:-20], "x: the chunk IDAT at byte 33 says"),
        (png_with(text_chunk("chara", b"?")), "text 'chara' is not base64"),
        (png_with(text_chunk("ccv3", b"rcc||rot||")), "text 'ccv3' is not base64"),
        (png_with(text_chunk("chara", b"AAAAA")), "text 'chara' is not base64"),
        (png_with(text_chunk("chara", base64.b64encode(b"{"))), "text 'chara', line 1, column 2: this is not JSON"),
        (png_with(Chunk(b"zTXt", b"chara\0\0" + BOMB)), "text 'chara' has more than 11,184,814 bytes"),
        (png_with(Chunk(b"iTXt", b"ccv3\0\1\0\0\0" + BOMB)), "text 'ccv3' has more than 11,184,814 bytes"),
        (zip_with(other_json="{}"), "a zip file without card.json"),
        (zip_with(card_json=" " * 40_000_000), "card.json: the card has more than 8 MiB"),
        (zip_with(card_json="{}")[:-30], "this zip file is cut short"),
        (MANY, "too many files"),
        (b"PK\3\4" + b"PK\6\7" + b"\0" * 16 + b"PK\5\6" + b"\0" * 18, "too many files"),
        (b"PK\3\4PK\5\6" + b"\0" * 18, "a zip file without card.json"),
    ],
)
def test_what_is_no_card_is_named_and_costs_little(data, told):
    tracemalloc.start()
    with pytest.raises(CardInvalid) as caught:
        parse_card_file(data, "x")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert told in str(caught.value)
    assert caught.value.hint
    assert peak < 48 << 20


def test_files_that_are_not_there(tmp_path):
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(CardInvalid, match="cannot be read"):
            read_card_file(path)
