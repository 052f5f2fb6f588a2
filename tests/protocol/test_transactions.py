"""The bodies of TXN and COORDINATE, and their answers: golden bytes, and nothing but Malformed for nonsense."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raftkv.protocol import transactions as txn
from raftkv.protocol.errors import Malformed
from raftkv.protocol.frames import decode_body
from raftkv.protocol.messages import Verb, encode_request
from raftkv.protocol.transactions import CoordinateBody, CoordinateOp, State
from tests.protocol.test_frames import arrays

TXID = bytes(range(16))

GOLDEN = {
    "commit": (
        encode_request(1, Verb.COORDINATE, [CoordinateOp.COMMIT, TXID, [[3, [[b"k", 7]], [[b"k", None]]]]]),
        "00000026 96 0a 01 0a 01 c410000102030405060708090a0b0c0d0e0f 91 93 03 91 92c4016b07 91 92c4016bc0",
    ),
    "resolve": (
        encode_request(1, Verb.COORDINATE, [CoordinateOp.RESOLVE, TXID, [3, 4]]),
        "0000001a 96 0a 01 0a 02 c410000102030405060708090a0b0c0d0e0f 92 03 04",
    ),
    "status": (
        encode_request(1, Verb.COORDINATE, [CoordinateOp.STATUS, TXID]),
        "00000017 95 0a 01 0a 03 c410000102030405060708090a0b0c0d0e0f",
    ),
    "doubt": (
        encode_request(1, Verb.COORDINATE, [CoordinateOp.DOUBT, [TXID]]),
        "00000018 95 0a 01 0a 04 91 c410000102030405060708090a0b0c0d0e0f",
    ),
    "txn": (encode_request(1, Verb.TXN, [3, b"cmd"]), "0000000a 95 0a 01 09 03 c403636d64"),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_bytes(name: str) -> None:
    frame, golden = GOLDEN[name]
    assert frame.hex() == golden.replace(" ", "")
    body = decode_body(frame[4:])[3:]
    if name == "txn":
        assert txn.decode_txn_body(body) == b"cmd"
    else:
        assert txn.decode_coordinate_body(body).op == CoordinateOp[name.upper()]


def test_bodies() -> None:
    assert txn.decode_coordinate_body([1, TXID, []]) == CoordinateBody(1, TXID, parts=[])
    assert txn.decode_coordinate_body([2, TXID, [3, 4]]) == CoordinateBody(2, TXID, shards=(3, 4))
    assert txn.decode_coordinate_body([3, TXID]) == CoordinateBody(3, TXID)
    assert txn.decode_coordinate_body([4, [TXID, TXID]]) == CoordinateBody(4, txids=(TXID, TXID))


def test_answers() -> None:
    assert txn.decode_state_reply([1]) is State.COMMITTED
    assert txn.decode_state_reply([-2, "later"]) is State.EXPIRED
    assert txn.decode_states_reply([[TXID, 2]]) == {TXID: State.ABORTED}
    assert txn.decode_decide_reply([0, [[3, 1, 9], [4, -1, 0]]]) == {3: 1, 4: -1}
    assert txn.decode_resolve_reply([0, [[TXID, [3, 4]]]]) == {TXID: [3, 4]}


@pytest.mark.parametrize(
    ("decode", "body"),
    [
        (txn.decode_coordinate_body, []),
        (txn.decode_coordinate_body, [5, TXID]),
        (txn.decode_coordinate_body, [True, TXID, []]),
        (txn.decode_coordinate_body, [1, TXID]),
        (txn.decode_coordinate_body, [1, TXID[:15], []]),
        (txn.decode_coordinate_body, [1, TXID, {}]),
        (txn.decode_coordinate_body, [2, TXID, []]),
        (txn.decode_coordinate_body, [2, TXID, [1, 1]]),
        (txn.decode_coordinate_body, [2, TXID, [16_384]]),
        (txn.decode_coordinate_body, [3, "t" * 16]),
        (txn.decode_coordinate_body, [4, []]),
        (txn.decode_coordinate_body, [4, [b"x"]]),
        (txn.decode_txn_body, [1]),
        (txn.decode_txn_body, [-2, b"c"]),
        (txn.decode_txn_body, [1, "c"]),
        (txn.decode_state_reply, []),
        (txn.decode_state_reply, [3]),
        (txn.decode_states_reply, [[TXID]]),
        (txn.decode_states_reply, [[b"x", 1]]),
        (txn.decode_decide_reply, [0]),
        (txn.decode_decide_reply, [1, []]),
        (txn.decode_decide_reply, [0, [[3, 1]]]),
        (txn.decode_decide_reply, [0, [[3, 1, None]]]),
        (txn.decode_resolve_reply, [0, [[TXID]]]),
        (txn.decode_resolve_reply, [0, [[TXID, [None]]]]),
        (txn.decode_resolve_reply, [0, [[b"x", [1]]]]),
    ],
)
def test_nonsense(decode: Callable[[Any], Any], body: list[Any]) -> None:
    with pytest.raises(Malformed):
        decode(body)


DECODERS: list[Callable[[Any], Any]] = [
    txn.decode_coordinate_body,
    txn.decode_txn_body,
    txn.decode_state_reply,
    txn.decode_states_reply,
    txn.decode_decide_reply,
    txn.decode_resolve_reply,
]


@given(arrays, st.sampled_from(DECODERS))
def test_any_array_gives_a_body_or_a_typed_error(array: list[Any], decode: Callable[[Any], Any]) -> None:
    for candidate in (array, [0, array], [1, TXID, array], [4, array]):
        try:
            decode(candidate)
        except Malformed:
            continue
