"""What is on disk, byte for byte: a change here needs a new version, or old directories can't be read."""

from __future__ import annotations

import random
import zlib

import pytest

from raftkv.raft.actions import HardState
from raftkv.raft.membership import Membership
from raftkv.storage.boot import Applied
from raftkv.storage.checkpoint import Manifest, Part
from raftkv.storage.engine import Changes
from raftkv.storage.errors import Corruption, FormatTooNew
from raftkv.storage.identity import Identity
from raftkv.storage.wal_format import (
    BATCH_HEADER_BYTES,
    BLOCK_BYTES,
    Bad,
    LogStart,
    SegmentHeader,
    decode_batch,
    decode_segment_header,
    encode_batch_header,
    encode_entry,
    encode_hard_state,
    encode_start,
)
from tests.storage.helpers import entry
from tests.storage.store_helpers import Machine

HEADER = SegmentHeader(1, 7, 4096, 2048, 0x0102030405060708)
MEMBERSHIP = Membership((1, 2), (3,), ((1, b"s" * 4),))


def test_a_segment_header() -> None:
    encoded = HEADER.encode()
    assert encoded.hex() == (
        "526166744b56776c0001000000000000000700000000000010000000000000000800010203040506070843e9cc67"
    )
    assert decode_segment_header(encoded) == HEADER and HEADER.end == 6144


def test_records() -> None:
    assert encode_hard_state(HardState(5, 2)).hex() == "00000011ead01e9d0100000000000000050000000000000002"
    assert encode_hard_state(HardState(5)).hex() == "0000001140b87fc4010000000000000005ffffffffffffffff"
    assert encode_start(LogStart(9, 4), reset=False).hex() == ("00000012fab64a00020000000000000009000000000000000400")
    assert encode_start(LogStart(9, 4, MEMBERSHIP), reset=True).hex() == (
        "0000002115aba940020000000000000009000000000000000401" + MEMBERSHIP.encode().hex()
    )
    parts: list[bytes] = []
    assert encode_entry(parts, entry(3, 2, b"data")) == len(b"".join(parts)) == 9 + 25 + 4
    assert b"".join(parts).hex() == "0000001edd83a15903" + entry(3, 2, b"data").encoded.hex()


def test_a_batch() -> None:
    parts: list[bytes] = [encode_hard_state(HardState(5, 2)), encode_start(LogStart(9, 4, MEMBERSHIP), reset=True)]
    encode_entry(parts, entry(10, 5, b"data"))
    records = b"".join(parts)
    header = encode_batch_header(HEADER.seed, 4096 + BLOCK_BYTES, 4000, len(records))
    assert header.hex() == "f55742a1553199a900000000000012000000000000000fa0" + f"{len(records):08x}"
    data = (bytes(BLOCK_BYTES) + header + records).ljust(2048, b"\0")
    batch = decode_batch(data, BLOCK_BYTES, HEADER)
    assert batch.records == (HardState(5, 2), (LogStart(9, 4, MEMBERSHIP), True), entry(10, 5, b"data"))
    assert (batch.position, batch.end, batch.durable) == (BLOCK_BYTES, 2 * BLOCK_BYTES, 4000)


def test_bytes_that_are_no_batch_are_never_more_than_bad() -> None:
    """Fuzz behind a valid header: whatever the records are, the answer is a batch or Bad."""
    rng = random.Random(1)
    for _ in range(3000):
        records = rng.randbytes(rng.randrange(60))
        if rng.random() < 0.5:
            parts: list[bytes] = []
            encode_entry(parts, entry(1, 1, rng.randbytes(10)))
            damaged = bytearray(b"".join(parts))
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            records = bytes(damaged)
        header = encode_batch_header(HEADER.seed, 4096 + BLOCK_BYTES, 0, len(records) + rng.choice((0, 0, 5, 10_000)))
        data = (bytes(BLOCK_BYTES) + header + records).ljust(2048, b"\0")
        try:
            batch = decode_batch(data, BLOCK_BYTES, HEADER)
        except Bad as bad:
            assert BLOCK_BYTES <= bad.position < BLOCK_BYTES + BATCH_HEADER_BYTES + 100 and bad.reason
        else:
            assert all(record == entry(1, 1, record.data) for record in batch.records)  # type: ignore[union-attr]


def test_an_identity() -> None:
    identity = Identity("shardkv", 100, 1, (1, 2, 3), b"c" * 4, b"s" * 4)
    encoded = identity.encode()
    assert encoded.hex() == "4aca554a9701a773686172646b76640193010203c40463636363c40473737373"
    assert Identity.decode("identity", encoded) == identity


@pytest.mark.parametrize("data", [b"", b"\0\0\0\0", b"\0" * 40, bytes(range(40))])
def test_what_is_not_an_identity_is_corrupt(data: bytes) -> None:
    with pytest.raises(Corruption):
        Identity.decode("identity", data)


def test_an_identity_of_a_later_version_is_refused() -> None:
    body = b"\x92\x02\xa3new"
    with pytest.raises(FormatTooNew):
        Identity.decode("identity", zlib.crc32(body).to_bytes(4, "big") + body)


def test_a_manifest() -> None:
    manifest = Manifest(Applied(9, 4, 77), MEMBERSHIP, (Part("STATE", 300, 0xABCD),))
    encoded = manifest.encode()
    assert encoded.hex() == (
        "524b56534e4150010000002332e4c59d9509044dc40f" + MEMBERSHIP.encode().hex() + "9193a55354415445cd012ccdabcd"
    )
    assert Manifest.decode(encoded[16:]) == manifest


def test_the_stores_own_rows() -> None:
    store = Machine.make().open()
    changes: Changes = {}
    store.meta_changes(changes, 9, 4, 77, MEMBERSHIP)
    assert changes == {
        b"\x00applied": bytes.fromhex("0100000000000000090000000000000004000000000000004d"),
        b"\x00membership": MEMBERSHIP.encode(),
    }
    store.engine.write(changes)
    assert store.applied == Applied(9, 4, 77) and store.engine_membership == MEMBERSHIP
