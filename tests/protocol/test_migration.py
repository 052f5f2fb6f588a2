"""Bodies of the verb SHARD: golden bytes of every operation, and nothing but Malformed for nonsense."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raftkv.protocol.errors import Malformed
from raftkv.protocol.frames import decode_body, encode_body
from raftkv.protocol.messages import Verb, decode_request, encode_request
from raftkv.protocol.migration import (
    ATTEMPT_MAX,
    CURSOR_BYTES_MAX,
    ShardBody,
    ShardOp,
    ShardPage,
    decode_list_reply,
    decode_page_reply,
    decode_shard_body,
    encode_shard_body,
)
from tests.protocol.test_frames import values

GOLDEN = {
    "list": (ShardBody(ShardOp.LIST, 3, 2, 7, 1), "98 0a 05 07 01 03 02 07 01"),
    "pull": (ShardBody(ShardOp.PULL, 3, 2, 7, 1, 70, 0, b"kx"), "9a 0a 05 07 02 03 02 07 01 46 c4026b78"),
    "changes": (
        ShardBody(ShardOp.CHANGES, 3, 2, 7, 1, 70, 300, b""),
        "9b 0a 05 07 03 03 02 07 01 46 cd012c c400",
    ),
    "ask": (ShardBody(ShardOp.ASK, 3, 2, 7, 1, 70, 71), "9a 0a 05 07 04 03 02 07 01 46 47"),
    "release": (ShardBody(ShardOp.RELEASE, 3, 2, 7), "97 0a 05 07 05 03 02 07"),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_bytes(name: str) -> None:
    body, golden = GOLDEN[name]
    frame = encode_request(5, Verb.SHARD, encode_shard_body(body))
    assert frame[4:].hex() == golden.replace(" ", "")
    assert int.from_bytes(frame[:4]) == len(frame) - 4
    assert decode_shard_body(decode_request(decode_body(frame[4:]))[2]) == body


GOOD: list[Any] = [3, 3, 2, 7, 1, 70, 71, b"kx"]


@pytest.mark.parametrize(
    ("position", "value"),
    [(0, 0), (0, 6), (0, None), (0, True), (1, -1), (1, 16_384), (1, b"3"), (2, 0), (2, 2**31), (3, 0), (3, 2**63),
     (4, 0), (4, ATTEMPT_MAX + 1), (4, None), (5, 0), (6, -1), (6, True), (7, None), (7, "kx"),
     (7, b"x" * (CURSOR_BYTES_MAX + 1))],
)  # fmt: skip
def test_bad_bodies(position: int, value: Any) -> None:
    assert decode_shard_body(GOOD).cursor == b"kx"
    bad = list(GOOD)
    bad[position] = value
    with pytest.raises(Malformed):
        decode_shard_body(bad)


def test_short_and_long_bodies() -> None:
    for length in range(len(GOOD)):
        with pytest.raises(Malformed):
            decode_shard_body(GOOD[:length])
    with pytest.raises(Malformed):
        decode_shard_body([*GOOD, 1])


def test_replies() -> None:
    assert decode_list_reply([0, 70]) == 70
    rows: list[Any] = [[b"kx", b"row"], [b"ky", None]]
    assert decode_page_reply([80, rows, b"ky"]) == ShardPage(80, rows, b"ky", None)
    assert decode_page_reply([80, [], None, [4, 3, 2, 1], "more"]) == ShardPage(80, [], None, [4, 3, 2, 1])


@pytest.mark.parametrize(
    "reply",
    [None, [], [80], [80, []], [0, [], None], [80, None, None], [80, [[b"kx"]], None], [80, [["kx", b""]], None],
     [80, [[b"", b""]], None], [80, [[b"kx", "v"]], None], [80, [], b""], [80, [], 5], [80, [], None, [1, 2, 3]],
     [80, [], None, [1, 2, 3, -1]], [80, [], None, 5]],
)  # fmt: skip
def test_bad_pages(reply: Any) -> None:
    with pytest.raises(Malformed):
        decode_page_reply(reply)


@pytest.mark.parametrize("reply", [None, [], [0], [0, 0], [0, None], {}])
def test_bad_list_replies(reply: Any) -> None:
    with pytest.raises(Malformed):
        decode_list_reply(reply)


@given(st.lists(values, max_size=9))
def test_any_array_is_a_body_or_malformed(array: list[Any]) -> None:
    for decode in (decode_shard_body, decode_page_reply, decode_list_reply):
        try:
            decode(array)
        except Malformed:
            continue


@given(st.integers(0, len(GOOD) - 1), values)
def test_what_passes_comes_back_the_same(position: int, value: Any) -> None:
    array = list(GOOD)
    array[position] = value
    try:
        body = decode_shard_body(array)
    except Malformed:
        return
    assert decode_body(encode_body(encode_shard_body(body))) == array
