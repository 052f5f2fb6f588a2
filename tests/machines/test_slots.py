"""The slot function against Redis Cluster's published examples, and the shards' ranges of slots."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raftkv.machines.slots import SLOTS, hash_tag, shard_of, slot_of


def test_known_slots() -> None:
    assert slot_of(b"123456789") == 0x31C3, "the check value of CRC16/XMODEM, as in the specification"
    assert slot_of(b"") == 0
    assert slot_of(b"foo") == 12182, "CLUSTER KEYSLOT foo"
    assert slot_of(b"somekey") == 11058, "CLUSTER KEYSLOT somekey"
    assert slot_of(b"foo{hash_tag}") == slot_of(b"hash_tag") == 2515


@pytest.mark.parametrize(
    ("key", "tag"),
    [
        (b"{user1000}.following", b"user1000"),
        (b"foo{}{bar}", b"foo{}{bar}"),
        (b"foo{{bar}}zap", b"{bar"),
        (b"foo{bar}{zap}", b"bar"),
        (b"foo{bar", b"foo{bar"),
        (b"foo}bar{", b"foo}bar{"),
        (b"}{x}", b"x"),
        (b"\x00{\xff}", b"\xff"),
    ],
)
def test_hash_tags(key: bytes, tag: bytes) -> None:
    assert hash_tag(key) == tag
    assert slot_of(key) == slot_of(b"{" + tag + b"}" if b"}" not in tag and tag != b"" else key)


@given(st.binary(max_size=40), st.integers(1, SLOTS))
def test_a_shard_is_a_range_of_slots(key: bytes, shards: int) -> None:
    assert shard_of(key, shards) == slot_of(key) * shards // SLOTS < shards


def test_shards_are_contiguous_and_nearly_equal() -> None:
    for shards in (1, 10, 12, 100, SLOTS):
        counts = [0] * shards
        previous = 0
        for slot in range(SLOTS):
            shard = slot * shards // SLOTS
            assert previous <= shard <= previous + 1
            previous = shard
            counts[shard] += 1
        assert max(counts) - min(counts) <= 1
