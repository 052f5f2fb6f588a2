"""Hellos, requests, replies and their bodies: golden bytes, and nothing but Malformed for nonsense."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raftkv.protocol import limits, messages
from raftkv.protocol.errors import BadVersion, Malformed, NotLeader, RaftKVError, WrongPeer
from raftkv.protocol.frames import decode_body
from raftkv.protocol.messages import CheckBody, GetBody, Hello, OutcomeBody, ScanBody, Verb
from tests.protocol.test_frames import arrays, values

HELLO = Hello(
    cluster_id=bytes(range(16)),
    role="shardkv",
    gid=7,
    replica=2,
    store_id=b"S" * 16,
    purpose="peer",
    formed=True,
    stores=[(0, b"a" * 16), (2, b"S" * 16)],
    peers=[0, 1, 2],
)

GOLDEN = {
    "hello": (
        messages.encode_hello(HELLO),
        "00000064 9b 01 01 c410000102030405060708090a0b0c0d0e0f a773686172646b76 07 02"
        "c41053535353535353535353535353535353 a470656572 c3"
        "92 9200c41061616161616161616161616161616161 9202c41053535353535353535353535353535353 93000102",
    ),
    "hello reply": (
        messages.encode_hello_reply(Hello()),
        "0000001a 9b 02 01 c400 a6636c69656e74 00 ff c400 a6636c69656e74 c2 90 90",
    ),
    "refused": (messages.encode_refused(WrongPeer("no")), "00000007 93 03 0f 91 a26e6f"),
    "request": (messages.encode_request(1, Verb.WRITE, [3, b"cmd"]), "0000000a 95 0a 01 01 03 c403636d64"),
    "reply": (messages.encode_reply(1, [0, 9]), "00000007 94 0b 01 00 92 00 09"),
    "error reply": (
        messages.encode_error_reply(300, *NotLeader("h:1").to_wire()),
        "0000000b 94 0b cd012c 01 91 a3683a31",
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_bytes(name: str) -> None:
    frame, golden = GOLDEN[name]
    assert frame.hex() == golden.replace(" ", "")


def body_of(frame: bytes) -> list[Any]:
    return decode_body(frame[4:])


def test_hello_and_back() -> None:
    assert messages.decode_hello(body_of(messages.encode_hello(HELLO))) == HELLO
    mine = messages.decode_hello(body_of(messages.encode_hello_reply(Hello.of_client(b"c" * 16))))
    assert (mine.role, mine.replica, mine.cluster_id) == ("client", -1, b"c" * 16)
    assert str(HELLO) == "shardkv 2 of group 7"


def test_another_version_is_told_apart_before_anything_else_is_read() -> None:
    with pytest.raises(BadVersion) as caught:
        messages.decode_hello([1, 2])
    assert (caught.value.mine, caught.value.yours) == (limits.PROTOCOL_VERSION, 2)


@pytest.mark.parametrize(
    ("position", "value"),
    [
        (0, 10),
        (1, "1"),
        (1, True),
        (1, -1),
        (2, "c"),
        (2, b"short"),
        (3, "king"),
        (3, ["client"]),
        (4, -1),
        (4, 2**31),
        (5, -2),
        (5, 65_536),
        (6, b"x" * 17),
        (7, "fun"),
        (8, 1),
        (9, None),
        (9, [[0]]),
        (9, [[0, b"x"]]),
        (9, [["0", b"a" * 16]]),
        (9, [[0, b"a" * 16]] * 257),
        (10, {}),
        (10, [-1]),
        (10, [True]),
        (10, [0] * 257),
    ],
)
def test_bad_hellos(position: int, value: Any) -> None:
    array = body_of(messages.encode_hello(HELLO))
    array[position] = value
    with pytest.raises(Malformed):
        messages.decode_hello(array)


def test_short_and_long_hellos() -> None:
    array = body_of(messages.encode_hello(HELLO))
    for length in range(1, len(array)):
        with pytest.raises(Malformed):
            messages.decode_hello(array[:length])
    assert messages.decode_hello([*array, "a later field"]) == HELLO


def test_requests_and_replies_and_back() -> None:
    frame = messages.encode_request(7, Verb.READ, [3, 0, 1, 2, b"k"])
    assert messages.decode_request(body_of(frame)) == (7, Verb.READ, [3, 0, 1, 2, b"k"])
    assert messages.decode_reply(body_of(messages.encode_reply(7, [b"v", 1]))) == (7, None, [b"v", 1])
    request_id, error, body = messages.decode_reply(
        body_of(messages.encode_error_reply(7, *NotLeader("h:1").to_wire()))
    )
    assert (request_id, body) == (7, None)
    assert isinstance(error, NotLeader)
    refused = messages.decode_refused(body_of(messages.encode_refused(WrongPeer("no"))))
    assert isinstance(refused, WrongPeer)


@pytest.mark.parametrize(
    ("decode", "array"),
    [
        (messages.decode_request, [10, 1]),
        (messages.decode_request, [11, 1, 1]),
        (messages.decode_request, [10, -1, 1]),
        (messages.decode_request, [10, True, 1]),
        (messages.decode_request, [10, 2**63, 1]),
        (messages.decode_request, [10, 1, "WRITE"]),
        (messages.decode_reply, [11, 1, 0]),
        (messages.decode_reply, [11, 1, 0, 1, 2]),
        (messages.decode_reply, [10, 1, 0, 1]),
        (messages.decode_reply, [11, None, 0, 1]),
        (messages.decode_reply, [11, 1, False, 1]),
        (messages.decode_reply, [11, 1, 1, 1]),
        (messages.decode_reply, [11, 1, 1, []]),
        (messages.decode_refused, [3, 1]),
        (messages.decode_refused, [3, [], []]),
    ],
)
def test_bad_requests_and_replies(decode: Callable[[list[Any]], Any], array: list[Any]) -> None:
    with pytest.raises(Malformed):
        decode(array)


def test_bodies() -> None:
    assert messages.decode_write_body([3, b"c"]) == (3, b"c")
    assert messages.decode_read_body([3, 1, 1, 9, b"k"]) == GetBody(3, 1, 9, b"k")
    assert messages.decode_read_body([-1, 0, 2, 9, b"", None, 10, 20]) == ScanBody(-1, 0, 9, b"", None, 10, 20)
    whole = messages.decode_read_body([0, 0, 2, 0, b"p", b"pa", 2**40, 2**40])
    assert isinstance(whole, ScanBody)
    assert (whole.max_pairs, whole.max_bytes) == (limits.SCAN_PAIRS_MAX, limits.SCAN_BYTES_MAX)
    txid = b"t" * 16
    assert messages.decode_read_body([3, 0, 3, 9, txid]) == OutcomeBody(3, 0, 9, txid)
    assert messages.decode_read_body([3, 0, 4, 9, [b"a", b""]]) == CheckBody(3, 0, 9, [b"a", b""])
    assert messages.decode_config_body([-1, -1, 2**40]) == (-1, -1, limits.CONFIG_WAIT_MS_MAX)
    assert messages.decode_control_body([b"c"]) == b"c"
    assert messages.decode_transfer_body([-1]) == -1


@pytest.mark.parametrize(
    ("decode", "body"),
    [
        (messages.decode_write_body, []),
        (messages.decode_write_body, [1, "c"]),
        (messages.decode_write_body, [-2, b"c"]),
        (messages.decode_write_body, [1, b"c", 1]),
        (messages.decode_read_body, [1, 0, 1]),
        (messages.decode_read_body, [1, 0, 5, 0]),
        (messages.decode_read_body, [1, 0, 3, 0]),
        (messages.decode_read_body, [1, 0, 3, 0, b"short"]),
        (messages.decode_read_body, [1, 0, 3, 0, "t" * 16]),
        (messages.decode_read_body, [1, 0, 4, 0]),
        (messages.decode_read_body, [1, 0, 4, 0, []]),
        (messages.decode_read_body, [1, 0, 4, 0, ["k"]]),
        (messages.decode_read_body, [1, 0, 4, 0, [b"k" * 8_193]]),
        (messages.decode_read_body, [1, 0, 4, 0, [b"k"] * 10_001]),
        (messages.decode_read_body, [1, 0, 1, 0]),
        (messages.decode_read_body, [1, 0, 1, -1, b"k"]),
        (messages.decode_read_body, [1, 0, 1, 16_384, b"k"]),
        (messages.decode_read_body, [1, 0, 1, 0, "k"]),
        (messages.decode_read_body, [1, 0, 1, 0, b"k" * 8_193]),
        (messages.decode_read_body, [1, -1, 1, 0, b"k"]),
        (messages.decode_read_body, [1, 0, 1, 0, b"k", 1]),
        (messages.decode_read_body, [1, 0, 2, 0, b"", None, 0, 1]),
        (messages.decode_read_body, [1, 0, 2, 0, b"", None, 1, 0]),
        (messages.decode_read_body, [1, 0, 2, 0, b"", 5, 1, 1]),
        (messages.decode_read_body, [1, 0, 2, 0, None, None, 1, 1]),
        (messages.decode_config_body, [1, 1]),
        (messages.decode_config_body, [1, 1, -1]),
        (messages.decode_config_body, [-2, 1, 1]),
        (messages.decode_control_body, [[1]]),
        (messages.decode_transfer_body, [None]),
        (messages.decode_transfer_body, [-2]),
    ],
)
def test_bad_bodies(decode: Callable[[list[Any]], Any], body: list[Any]) -> None:
    with pytest.raises(Malformed):
        decode(body)


def test_the_answer_to_a_config_of_any_release() -> None:
    whole = [b"map", 5, 2, [[1, ["t:1", "t:2"]], [7, []]], "a later field"]
    assert messages.decode_config_reply(whole) == (b"map", 5, 2, {1: ("t:1", "t:2"), 7: ()})
    assert messages.decode_config_reply(whole[:3]) == (b"map", 5, 2, {})
    assert messages.decode_config_reply(whole[:2]) == (b"map", 5, 0, {})


@pytest.mark.parametrize(
    "body",
    [
        None,
        [],
        [b"map"],
        ["map", 5],
        [b"map", -1],
        [b"map", 5, None],
        [b"map", 5, 0, None],
        [b"map", 5, 0, [[0, []]]],
        [b"map", 5, 0, [[1]]],
        [b"map", 5, 0, [[1, "t:1"]]],
        [b"map", 5, 0, [[1, [b"t:1"]]]],
    ],
)
def test_what_is_no_answer_to_a_config(body: Any) -> None:
    with pytest.raises(Malformed):
        messages.decode_config_reply(body)


DECODERS: list[Callable[[list[Any]], Any]] = [
    messages.decode_hello,
    messages.decode_refused,
    messages.decode_request,
    messages.decode_reply,
    messages.decode_write_body,
    messages.decode_read_body,
    messages.decode_config_body,
    messages.decode_config_reply,
    messages.decode_control_body,
    messages.decode_transfer_body,
]


@given(arrays, st.sampled_from([1, 2, 3, 10, 11]), st.sampled_from(DECODERS))
def test_any_array_gives_a_message_or_a_typed_error(
    array: list[Any], kind: int, decode: Callable[[list[Any]], Any]
) -> None:
    for candidate in (array, [kind, *array]):
        try:
            decode(candidate)
        except RaftKVError as error:
            assert isinstance(error, (Malformed, BadVersion))


@given(st.data(), values)
def test_a_hello_with_any_field_replaced(data: st.DataObject, value: Any) -> None:
    array = body_of(messages.encode_hello(HELLO))
    array[data.draw(st.integers(0, len(array) - 1))] = value
    try:
        hello = messages.decode_hello(array)
    except (Malformed, BadVersion):
        return
    assert messages.decode_hello(body_of(messages.encode_hello(hello))) == hello
