"""The frame parser: whole, byte by byte, in random pieces; trailing, truncated, oversized and hostile bytes."""

from __future__ import annotations

import random
import resource
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raftkv.protocol.errors import Malformed, TooLarge
from raftkv.protocol.frames import FrameParser, decode_body, encode_frame
from raftkv.protocol.limits import ARRAY_LEN_MAX, FRAME_BYTES_MAX, MAP_LEN_MAX

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.binary(max_size=40)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)
arrays = st.lists(values, min_size=1, max_size=6)


def parse(data: bytes, pieces: list[int], **limits: int) -> tuple[list[list[Any]], Malformed | None]:
    """Feed `data` cut at the given positions; return the frames and how it ended."""
    parser = FrameParser(**limits)
    frames: list[list[Any]] = []
    start = 0
    for end in [*sorted(pieces), len(data)]:
        frames += parser.feed(data[start:end])
        start = end
        if parser.error is not None:
            break
    return frames, parser.error


def test_golden_bytes() -> None:
    assert encode_frame([11, 1, 0, [0, 9]]) == bytes.fromhex("00000007 94 0b 01 00 92 00 09")
    assert FrameParser().feed(bytes.fromhex("00000007 940b010092 0009")) == [[11, 1, 0, [0, 9]]]


@given(st.lists(arrays, max_size=5), st.data())
def test_any_cut_gives_the_same_frames(frames: list[list[Any]], data: st.DataObject) -> None:
    stream = b"".join(encode_frame(frame) for frame in frames)
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=10))
    assert parse(stream, cuts) == (frames, None)


@given(st.lists(arrays, min_size=1, max_size=3))
def test_byte_by_byte(frames: list[list[Any]]) -> None:
    stream = b"".join(encode_frame(frame) for frame in frames)
    assert parse(stream, list(range(len(stream)))) == (frames, None)


@given(arrays, arrays)
def test_trailing_bytes_wait_for_the_rest(first: list[Any], second: list[Any]) -> None:
    parser = FrameParser()
    rest = encode_frame(second)
    assert parser.feed(encode_frame(first) + rest[:-1]) == [first]
    assert parser.held_bytes == len(rest) - 1
    assert parser.feed(rest[-1:]) == [second]
    assert parser.held_bytes == 0


@given(st.binary(max_size=200), st.data())
def test_any_bytes_give_frames_or_malformed(stream: bytes, data: st.DataObject) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=5))
    frames, error = parse(stream, cuts)
    assert all(type(frame) is list and frame for frame in frames)
    assert (frames, str(error)) == (parse(stream, [])[0], str(parse(stream, [])[1]))


@given(st.lists(arrays, max_size=2), st.binary(max_size=100), st.data())
def test_any_body_gives_a_frame_or_malformed(good: list[list[Any]], body: bytes, data: st.DataObject) -> None:
    """The frames before the bad one are delivered however the stream is cut."""
    stream = b"".join(map(encode_frame, good)) + len(body).to_bytes(4, "big") + body
    whole, error = parse(stream, [])
    assert whole[: len(good)] == good
    assert (len(whole) == len(good)) == (error is not None)
    again, error_again = parse(stream, data.draw(st.lists(st.integers(0, len(stream)), max_size=5)))
    assert again == whole
    assert str(error_again) == str(error)


@given(arrays, st.data())
def test_a_cut_body_is_malformed(array: list[Any], data: st.DataObject) -> None:
    body = encode_frame(array)[4:]
    with pytest.raises(Malformed):
        decode_body(body[: data.draw(st.integers(0, len(body) - 1))])
    with pytest.raises(Malformed):
        decode_body(body + b"\x00")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x90",  # an empty array has no kind
        b"\x01",
        b"\x80",
        b"\xc0",
        b"\xa1\xff\x01",
        b"\x91\xa1\xff",  # str that is not UTF-8
        b"\x91\xc1",  # never used
        b"\x91\xd4\x01\x00",  # an extension type
        b"\x91\xd6\xff\x00\x00\x00\x00",  # a timestamp
        b"\x91\x81\x90\x01",  # an array as a map's key
        b"\x91\xdd\xff\xff\xff\xff",  # 2^32 - 1 items announced
        b"\x91\xdf\xff\xff\xff\xff",
        b"\x91\xc6\xff\xff\xff\xff",
        b"\xdd" + (ARRAY_LEN_MAX + 1).to_bytes(4, "big") + b"\x00" * (ARRAY_LEN_MAX + 1),
        b"\x91\xde" + (MAP_LEN_MAX + 1).to_bytes(2, "big") + b"".join(
            msgpack.packb(n.to_bytes(2, "big")) + b"\x00" for n in range(MAP_LEN_MAX + 1)
        ),
    ],
)  # fmt: skip
def test_bad_bodies(body: bytes) -> None:
    with pytest.raises(Malformed):
        decode_body(body)
    frames, error = parse(encode_frame([1]) + len(body).to_bytes(4, "big") + body + encode_frame([2]), [])
    assert frames == [[1]]
    assert error is not None


@pytest.mark.parametrize("opener", [b"\x91", b"\x81\xa1a", b"\xdc\xff\xff", b"\xdd\x00\x00\xff\xff"])
def test_hostile_nesting_is_malformed_and_bounded(opener: bytes) -> None:
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for depth in (2_000, 5_000, 200_000):
        with pytest.raises(Malformed):
            decode_body(opener * depth + b"\x00")
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib
    assert grown_kib < 256 * 1024


def test_an_oversized_frame_is_refused_by_its_length_alone() -> None:
    frames, error = parse(encode_frame([1]) + (FRAME_BYTES_MAX + 1).to_bytes(4, "big"), [])
    assert frames == [[1]]
    assert error is not None
    assert str(FRAME_BYTES_MAX) in str(error)
    with pytest.raises(TooLarge):
        encode_frame([b"x" * FRAME_BYTES_MAX])


def test_the_largest_frame_passes() -> None:
    frame = encode_frame([1, b"x" * (FRAME_BYTES_MAX - 7)])
    assert len(frame) == FRAME_BYTES_MAX + 4
    parser = FrameParser()
    got: list[list[Any]] = []
    for start in range(0, len(frame), 65_536):
        got += parser.feed(frame[start : start + 65_536])
    assert len(got) == 1
    assert len(got[0][1]) == FRAME_BYTES_MAX - 7


def test_the_first_frame_has_its_own_limit() -> None:
    small, large = encode_frame([1, b"x" * 50]), encode_frame([2, b"x" * 500])
    limits = {"frame_bytes_max": 1000, "first_bytes_max": 100}
    frames, error = parse(small + large, [], **limits)
    assert [frame[0] for frame in frames] == [1, 2]
    assert error is None
    frames, error = parse(large, [], **limits)
    assert frames == []
    assert error is not None


def test_a_broken_stream_can_not_be_fed_again() -> None:
    parser = FrameParser()
    assert parser.feed(b"\x00\x00\x00\x01\x01") == []
    assert parser.error is not None
    with pytest.raises(Malformed):
        parser.feed(encode_frame([1]))


def test_many_small_frames_in_odd_pieces() -> None:
    rng = random.Random(7)
    frames = [[10, n, 1, rng.randbytes(rng.randrange(60))] for n in range(2_000)]
    stream = b"".join(map(encode_frame, frames))
    cuts = [rng.randrange(len(stream)) for _ in range(300)]
    assert parse(stream, cuts) == (frames, None)
