"""The lines of Import and Export: both forms give any bytes back, and what is no pair says why."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raftkv.cli.pair_lines import DECODERS, ENCODERS, FORMS, BadLine, decode_jsonl, decode_tsv, form_of

ANY = st.one_of(st.binary(max_size=60), st.text(max_size=30).map(lambda text: text.encode("utf-8", "replace")))


@pytest.mark.parametrize("form", FORMS)
@given(key=ANY, value=ANY)
def test_any_bytes_come_back_from_one_line(form: str, key: bytes, value: bytes) -> None:
    line = ENCODERS[form](key, value)
    assert b"\n" not in line and b"\r" not in line
    assert form_of(line) == form
    assert DECODERS[form](line) == DECODERS[form](line + b"\r") == (key, value)


@given(key=ANY, value=ANY)
def test_a_tsv_is_printable_ascii(key: bytes, value: bytes) -> None:
    fields = ENCODERS["tsv"](key, value).split(b"\t")
    assert len(fields) == 2
    assert all(0x20 <= byte < 0x7F for field in fields for byte in field)


def test_the_escapes_of_a_tsv() -> None:
    assert ENCODERS["tsv"](b"a\\b", b"\n\r\t\x00\x1b\xff \"'") == b"a\\\\b\t\\n\\r\\t\\0\\x1b\\xff \"'"


@pytest.mark.parametrize(
    ("line", "pair"),
    [
        ("käse\twörter".encode(), ("käse".encode(), "wörter".encode())),  # what other programs write
        (b"\xff\t\x01", (b"\xff", b"\x01")),
        (b'a\\"\t\\x41\\x0a', (b'a"', b"A\n")),
        (b"\\0001\tx", (b"\x00001", b"x")),  # not an octal number
        (b"a\t", (b"a", b"")),
        (b"\t", (b"", b"")),
        (b"a \t b", (b"a ", b" b")),
        (b"a\tb\r", (b"a", b"b")),
        (b"a\tb\r\r", (b"a", b"b\r")),
        (b'{"key": "a"}\tx', (b'{"key": "a"}', b"x")),
    ],
)
def test_lines_of_a_tsv(line: bytes, pair: tuple[bytes, bytes]) -> None:
    assert form_of(line) == "tsv"
    assert decode_tsv(line) == pair


@pytest.mark.parametrize(
    ("line", "pair"),
    [
        (b'{"key": "a", "value": "b", "version": 7}', (b"a", b"b")),
        (b'  {"value":"","key":""}', (b"", b"")),
        (b'{"key": "\\u00e4\\n", "value": {"b64": "/w=="}}', ("ä\n".encode(), b"\xff")),
        (b'{"key": "a", "value": {"b64": ""}}', (b"a", b"")),
    ],
)
def test_lines_of_a_jsonl(line: bytes, pair: tuple[bytes, bytes]) -> None:
    assert form_of(line) == "jsonl"
    assert decode_jsonl(line) == pair


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"a", "there is no tab between key and value"),
        (b"", "there is no tab between key and value"),
        (b"a\tb\tc", "there is more than one tab"),
        (b"a\tb\\", "unknown escape at byte 2 of"),
        (b"a\\q\tb", "unknown escape at byte 2 of"),
        (b"a\tb\\x4", "unknown escape at byte 2 of"),
        (b"a\t\\xgg", "a backslash is"),
    ],
)
def test_what_is_no_line_of_a_tsv(line: bytes, why: str) -> None:
    with pytest.raises(BadLine, match=why):
        decode_tsv(line)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b'{"key": "a", "value": "b"', "it is not JSON"),
        (b'{"key": "a", "value": "\xff"}', "it is not JSON"),
        (b'{"key": "a", "value": "b"} x', "it is not JSON"),
        (b"[" * 100_000, "it is not JSON"),
        (b'["a", "b"]', "it is not a JSON object"),
        (b'{"key": "a"}', '"value" is neither'),
        (b'{"value": "a"}', '"key" is neither'),
        (b'{"key": 1, "value": "b"}', '"key" is neither'),
        (b'{"key": "a", "value": null}', '"value" is neither'),
        (b'{"key": "a", "value": {"b64": "no"}}', '"value" is neither'),
        (b'{"key": "a", "value": {"b64": 5}}', '"value" is neither'),
        (b'{"key": "\\ud800", "value": "b"}', '"key" is neither'),  # half of a character
    ],
)
def test_what_is_no_line_of_a_jsonl(line: bytes, why: str) -> None:
    with pytest.raises(BadLine, match=why):
        decode_jsonl(line)


@given(line=st.binary(max_size=80))
def test_any_line_is_a_pair_or_says_why_not(line: bytes) -> None:
    for decode in DECODERS.values():
        try:
            decode(line)
        except BadLine as error:
            assert str(error)
