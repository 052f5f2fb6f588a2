"""Splitting lines into words, and writing words that are read back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raftkv.cli.words import (
    Word,
    WordError,
    escape_bytes,
    is_comment_or_blank,
    quote_word,
    show_word,
    split_words,
)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"", []),
        (b"  \t \r\n", []),
        (b"put k v\n", [b"put", b"k", b"v"]),
        (b"  put\tk  v\r\n", [b"put", b"k", b"v"]),
        (b"put \"a b\" 'c d'", [b"put", b"a b", b"c d"]),
        (b'put k ""', [b"put", b"k", b""]),
        (b"put k ''", [b"put", b"k", b""]),
        (rb'put k "\\ \" \n \r \t \0 \x7f\xFF"', [b"put", b"k", b'\\ " \n \r \t \0 \x7f\xff']),
        (rb"put k '\n \x00 \\'", [b"put", b"k", rb"\n \x00 \\"]),
        (rb"put k a\nb", [b"put", b"k", rb"a\nb"]),
        (b'put k {"a":1}', [b"put", b"k", b'{"a":1}']),
        (b"put k it's", [b"put", b"k", b"it's"]),
        (b"put k \xff\x00x", [b"put", b"k", b"\xff\x00x"]),
        (b'put "#k" #v', [b"put", b"#k", b"#v"]),
        (b'put \xc3\xbc "\xc3\xbc"', [b"put", b"\xc3\xbc", b"\xc3\xbc"]),
    ],
)
def test_lines_are_split(line: bytes, words: list[bytes]) -> None:
    assert [word.data for word in split_words(line)] == words


def test_a_word_knows_whether_it_was_quoted() -> None:
    assert split_words(b"a \"b\" 'c'") == [Word(b"a"), Word(b"b", True), Word(b"c", True)]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b'put "a', "column 5: this quote is never closed"),
        (b"put 'a", "column 5: this quote is never closed"),
        (b'put "a\\"', "column 5: this quote is never closed"),
        (b'put "a"b', "column 8: a space must follow the closing quote"),
        (rb'put "\q"', r"column 6: unknown escape \q"),
        (b'put "\\', "column 6: unknown escape"),
        (rb'put "\x4"', r"column 6: \x needs two hexadecimal digits"),
        (rb'put "\xg0"', r"column 6: \x needs two hexadecimal digits"),
        (rb'put "\x', r"column 6: \x needs two hexadecimal digits"),
    ],
)
def test_what_cannot_be_split_is_refused_with_the_column(line: bytes, complaint: str) -> None:
    with pytest.raises(WordError) as caught:
        split_words(line)
    assert str(caught.value).startswith(complaint)
    assert "\n" not in str(caught.value)


@given(st.lists(st.binary(max_size=40), max_size=6))
def test_quoted_words_are_read_back(words: list[bytes]) -> None:
    line = b" ".join(quote_word(word) for word in words)
    assert [word.data for word in split_words(line)] == words
    assert all(0x20 <= byte < 0x7F for byte in line)


@given(st.lists(st.binary(max_size=40), min_size=1, max_size=6))
def test_a_quoted_line_is_one_line_and_no_comment(words: list[bytes]) -> None:
    line = b" ".join(quote_word(word) for word in words)
    assert len(line.splitlines()) == 1
    assert not is_comment_or_blank(line)


@given(st.binary(max_size=60))
def test_any_line_is_split_or_refused(line: bytes) -> None:
    try:
        words = split_words(line)
    except WordError:
        return
    assert sum(len(word.data) for word in words) <= len(line)


def test_comments_and_blank_lines() -> None:
    assert is_comment_or_blank(b"# put a b\n")
    assert is_comment_or_blank(b"   # indented")
    assert is_comment_or_blank(b" \t\r\n")
    assert not is_comment_or_blank(b"put a #b")
    assert not is_comment_or_blank(b'"#a"')


def test_scan_escapes_only_what_is_not_printable_ascii() -> None:
    assert escape_bytes(b"plain ~") == b"plain ~"
    assert escape_bytes(b"a\tb\nc\x00\x7f\xff") == rb"a\x09b\x0ac\x00\x7f\xff"
    assert escape_bytes(rb"back\slash") == rb"back\slash"
    assert escape_bytes("ü".encode()) == rb"\xc3\xbc"


@given(st.binary(max_size=60))
def test_escaped_bytes_are_one_printable_field(data: bytes) -> None:
    assert all(0x20 <= byte < 0x7F for byte in escape_bytes(data))


def test_long_words_are_cut_in_messages() -> None:
    assert show_word(b"key") == "key"
    assert show_word(b"a b") == '"a b"'
    assert show_word(b"x" * 100).endswith("… (100 bytes)")
