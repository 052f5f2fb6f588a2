"""Golden bytes of every row and key: what is on disk must stay readable for ever."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raftkv.machines.rows import (
    CONTROLLER_SHARD,
    ExportList,
    ImportProgress,
    Incarnation,
    OwnerHistory,
    ShardMeta,
    UnknownRowFormat,
    config_key,
    export_key,
    import_key,
    meta_key,
    pack_export,
    pack_gid,
    pack_history,
    pack_import,
    pack_meta,
    pack_value,
    prefix_end,
    release_key,
    shard_of_meta_key,
    shard_prefix,
    split_release_key,
    unpack_export,
    unpack_gid,
    unpack_history,
    unpack_import,
    unpack_meta,
    unpack_value,
)
from raftkv.machines.sessions import Session
from raftkv.machines.shard_states import ShardState
from raftkv.machines.slots import SLOTS

META = ShardMeta(ShardState.SERVING, Incarnation(3, 1), 9, 7, 5)
META_BYTES = bytes.fromhex("0002000000000000000300000001000000000000000900000000000000070000000000000005")


def test_golden_keys() -> None:
    assert config_key(258) == b"gc" + bytes.fromhex("0000000000000102")
    assert meta_key(10) == b"m\x00\x0a"
    assert shard_prefix(10, Incarnation(3, 1)) == b"s" + bytes.fromhex("000a000000000000000300000001")
    assert CONTROLLER_SHARD >= SLOTS, "the controllers' sessions are under no real shard"


def test_golden_meta_row() -> None:
    assert pack_meta(META) == META_BYTES
    assert unpack_meta(META_BYTES) == META


def test_golden_value_row() -> None:
    row = bytes.fromhex("000000000000000109") + b"value"
    assert pack_value(265, b"value") == row
    assert unpack_value(row) == (b"value", 265)
    assert unpack_value(pack_value(1, b"")) == (b"", 1)


def test_golden_history_row() -> None:
    history = [OwnerHistory(2, 1, 3), OwnerHistory(0, 0, 0)]
    row = bytes.fromhex("00000002 00000001 0000000000000003 00000000 00000000 0000000000000000")
    assert pack_history(history) == row
    assert unpack_history(row) == history


def test_golden_migration_rows() -> None:
    progress = ImportProgress(2, 70, True, 1, 5, 71, 0, 300, b"kcursor")
    row = bytes.fromhex(
        "00 00000002 0000000000000046 01 00000001 0000000000000005 0000000000000047 0000000000000000 000000000000012c"
    )
    assert import_key(10) == b"m\x00\x0ai"
    assert pack_import(progress) == row + b"kcursor"
    assert unpack_import(row + b"kcursor") == progress
    assert type(unpack_import(row).asked) is bool
    export = ExportList(3, 4, 1, 70, 9, 120, 60_000)
    row = bytes.fromhex(
        "00 00000003 0000000000000004 00000001 0000000000000046 0000000000000009 0000000000000078 000000000000ea60"
    )
    assert export_key(10) == b"m\x00\x0ax"
    assert pack_export(export) == row
    assert unpack_export(row) == export
    assert release_key(10, 258) == b"m\x00\x0ar" + bytes.fromhex("0000000000000102")
    assert split_release_key(release_key(10, 258)) == (10, 258)
    assert pack_gid(3) == b"\x00\x00\x00\x03"
    assert unpack_gid(b"\x00\x00\x00\x03") == 3


def test_golden_session_row() -> None:
    session = Session()
    session.record(7, 6, 300, [0, 41])
    session.record(6, 6, 200, [12, b"x", 5])
    row = bytes.fromhex(
        "00 0000000000000006 000000000000012c"
        "0000000000000007 000b 9200cf0000000000000029"
        "0000000000000006 0006 930cc4017805"
    )
    assert session.encode() == row
    decoded = Session.decode(row)
    assert decoded.encode() == row
    assert decoded.reply_bytes == session.reply_bytes == len(row) - 17
    assert decoded.recall(7, 7, 300, 0) == [0, 41]
    assert decoded.recall(6, 6, 200, 0) == [12, b"x", 5]


def test_owner_history() -> None:
    history = OwnerHistory(0, 0, 0)
    seen = []
    for config_num, owner in enumerate((0, 3, 3, 0, 4, 0, 3)):
        history = history.then(owner, config_num)
        seen.append(tuple(history))
    assert seen == [(0, 0, 0), (3, 0, 1), (3, 0, 1), (3, 0, 1), (4, 3, 4), (4, 3, 4), (3, 4, 6)]


def test_rows_of_a_newer_version_are_not_guessed_at() -> None:
    for row in (b"\x01" + META_BYTES[1:], META_BYTES + b"\x00", META_BYTES[:-1]):
        with pytest.raises(UnknownRowFormat):
            unpack_meta(row)
    with pytest.raises(UnknownRowFormat):
        unpack_value(b"\x01" + bytes(16) + b"value")
    with pytest.raises(UnknownRowFormat):
        Session.decode(b"\x01" + bytes(16))
    with pytest.raises(UnknownRowFormat):
        unpack_import(b"\x01" + bytes(60))
    with pytest.raises(UnknownRowFormat):
        unpack_export(b"\x01" + bytes(60))


@given(st.integers(0, SLOTS - 1), st.integers(0, SLOTS - 1))
def test_meta_keys_sort_by_shard(one: int, other: int) -> None:
    assert (meta_key(one) < meta_key(other)) == (one < other)
    assert shard_of_meta_key(meta_key(one)) == one


incarnations = st.builds(Incarnation, st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1))


@given(st.integers(0, 0xFFFF), incarnations, st.integers(0, 0xFFFF), incarnations)
def test_no_prefix_covers_another_incarnation(
    shard: int, one: Incarnation, other_shard: int, other: Incarnation
) -> None:
    prefix, other_prefix = shard_prefix(shard, one), shard_prefix(other_shard, other)
    if (shard, one) == (other_shard, other):
        assert prefix == other_prefix
    else:
        assert not prefix <= other_prefix + b"k" < prefix_end(prefix)
        assert (prefix < other_prefix) == ((shard, one) < (other_shard, other))


@given(st.binary(min_size=1, max_size=4).filter(lambda prefix: prefix.strip(b"\xff")), st.binary(max_size=6))
def test_prefix_end(prefix: bytes, key: bytes) -> None:
    assert (prefix <= key < prefix_end(prefix)) == key.startswith(prefix)
