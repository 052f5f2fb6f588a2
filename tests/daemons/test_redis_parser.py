"""Requests out of bytes: whatever way they arrive, by either parser, the same; and nothing without a bound."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raftkv.daemons.redis import parser as module
from raftkv.daemons.redis.parser import BULK_BYTES_MAX, Parser, Request, parse_int, split_words
from tests.system.resp import packed

WORDS = st.lists(st.binary(max_size=40) | st.sampled_from([b"", b"\r\n*2000000000\r\n", b"-1", b"*", b"$"]), min_size=1)


def in_pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({cut % (len(data) + 1) for cut in cuts} | {0, len(data)})
    return [data[a:b] for a, b in pairwise(places)]


@given(st.lists(WORDS, min_size=1, max_size=6), st.lists(st.integers(min_value=0), max_size=6))
def test_requests_come_out_as_they_went_in(requests: list[Request], cuts: list[int]) -> None:
    parser = Parser()
    found = [
        request
        for piece in in_pieces(b"".join(packed(*words) for words in requests), cuts)
        for request in parser.feed(piece)
    ]
    assert found == requests
    assert parser.error is None and parser.held_bytes == 0


@given(
    st.lists(
        st.sampled_from(
            [packed("GET", "a"), packed("SET", "a", b"\n*9999\r\n"), b"*0\r\n", b"*-1\r\n", b"PING\r\n",
             b"*1\r\n:5\r\n", b"*1\r\n*1\r\n", b"+boundary\r\n", b"*2\r\n$3\r\nGET\r\n", b"%1\r\n",
             b"*1\r\n$-1\r\n", b"\r\n", b"*", b"$4\r\n"]
        ),
        max_size=6,
    )
)  # fmt: skip
def test_both_parsers_agree_on_odd_input(pieces: list[bytes]) -> None:
    """hiredis is asked first; byte by byte it never is."""
    data = b"".join(pieces)
    whole, strict = Parser(), Parser()
    found = whole.feed(data)
    expected = [request for at in range(len(data)) for request in strict.feed(data[at : at + 1])]
    assert found == expected
    assert str(whole.error) == str(strict.error)


def test_long_chunks_that_are_cut_off() -> None:
    """As a bulk load has them: all but the last request by hiredis, and then on from there."""
    request = packed("SET", "key", b"v" * 500)
    data = request * 200
    parser = Parser()
    found = 0
    for at in range(0, len(data), 40_000):
        requests = parser.feed(data[at : at + 40_000])
        assert all(words == [b"SET", b"key", b"v" * 500] for words in requests)
        found += len(requests)
    assert found == 200


def test_the_quick_way_is_taken_for_plain_requests() -> None:
    """Else it would be of no use."""
    taken: list[bytes] = []

    class Watched(Parser):
        def _quick(self, data: bytes) -> list[Request] | None:
            taken.append(data)
            return super()._quick(data)

        def _strict(self, data: bytes, requests: list[Request]) -> int:
            raise AssertionError(data)

    data = packed("SET", "key:1", "x" * 100) + packed("GET", "key:1")
    assert Watched().feed(data) == [[b"SET", b"key:1", b"x" * 100], [b"GET", b"key:1"]]
    assert taken == [data]


def test_a_large_argument_is_not_looked_at_until_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0
    bulk = Parser._bulk

    def counted(self: Parser, data: bytes, at: int) -> int:
        nonlocal looks
        looks += 1
        return bulk(self, data, at)

    monkeypatch.setattr(Parser, "_bulk", counted)
    parser = Parser()
    data = packed("SET", "k", b"x" * 1_000_000)
    for at in range(0, len(data), 1000):
        requests = parser.feed(data[at : at + 1000])
    assert requests == [[b"SET", b"k", b"x" * 1_000_000]]
    assert looks <= 6


def test_many_arguments_are_not_looked_at_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0
    bulk = Parser._bulk

    def counted(self: Parser, data: bytes, at: int) -> int:
        nonlocal looks
        looks += 1
        return bulk(self, data, at)

    monkeypatch.setattr(Parser, "_bulk", counted)
    parser = Parser()
    data = packed("MSET", *(b"%06d" % number for number in range(2000)))
    for at in range(0, len(data), 7):
        requests = parser.feed(data[at : at + 7])
    assert len(requests[0]) == 2001
    assert looks < 3 * 2001


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"*1048577\r\n", "invalid multibulk length"),
        (b"*2000000000\r\n", "invalid multibulk length"),
        (b"*1\r\n$%d\r\n" % (BULK_BYTES_MAX + 1), "invalid bulk length"),
        (b"*1\r\n$-1\r\n", "invalid bulk length"),
        (b"*" + b"1" * 70_000, "too big mbulk count string"),
        (b"*1\r\n$" + b"1" * 70_000, "too big bulk count string"),
        (b"x" * 70_000, "too big inline request"),
        (b"*1\r\nx", "expected '$', got 'x'"),
    ],
)
def test_what_has_no_bound_is_refused(data: bytes, text: str) -> None:
    parser = Parser()
    assert parser.feed(packed("PING") + data) == [[b"PING"]]
    assert str(parser.error) == text
    assert parser.feed(packed("PING")) == []


def test_the_size_of_a_request_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REQUEST_BYTES_MAX", 10_000)
    parser = Parser()
    parser.feed(packed("MSET", *([b"x"] * 1000)))
    assert "more than 10000 bytes" in str(parser.error)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"", []),
        (b" a  b\t c ", [b"a", b"b", b"c"]),
        (b'"a b" c', [b"a b", b"c"]),
        (b"'a b' c", [b"a b", b"c"]),
        (rb'"\x41\n\"\\\q"', [b'A\n"\\q']),
        (rb"'\x41\'y'", [b"\\x41'y"]),
        (rb"'\'", None),
        (b'a"b"', [b"ab"]),
        (b'"a', None),
        (b"'a", None),
        (b'"a"b', None),
        (b'""', [b""]),
    ],
)
def test_words_of_an_inline_command(line: bytes, words: Request | None) -> None:
    assert split_words(line) == words


@pytest.mark.parametrize(
    "text", [b"", b"+1", b"01", b"-0", b" 1", b"1 ", b"1.0", b"0x1", b"9223372036854775808", b"1\n"]
)
def test_what_is_no_number(text: bytes) -> None:
    assert parse_int(text) is None


@given(st.integers(min_value=-(1 << 63), max_value=(1 << 63) - 1))
def test_numbers(number: int) -> None:
    assert parse_int(b"%d" % number) == number
