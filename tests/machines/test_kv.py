"""The key-value machine: what each command does, who may be asked, and in which order maps are taken."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest

from raftkv.machines.kv import (
    APPEND,
    CAS,
    CAS_CURRENT_BYTES_MAX,
    CONFIG,
    DELETE,
    MAP_TIME,
    PUT,
    KvMachine,
)
from raftkv.machines.machine import Machine, decode_command, join_commands
from raftkv.machines.rows import meta_key, pack_meta, unpack_meta
from raftkv.machines.shard_map import ShardMap
from raftkv.machines.shard_states import ShardState
from raftkv.machines.slots import shard_of
from raftkv.protocol import errors
from raftkv.protocol.limits import KEY_BYTES_MAX, VALUE_BYTES_MAX
from raftkv.raft.entry import Entry, EntryKind
from raftkv.storage.engine import Overlay
from tests.machines.support import ADDRESSES, Client, Replica, config_command, kv_replica, one_group

SHARDS = 10


def get(replica: Replica[KvMachine], key: bytes) -> tuple[bytes | None, int]:
    return replica.machine.get(replica.engine, shard_of(key, SHARDS), key)


def same_shard_keys(count: int, shard: int = 3) -> list[bytes]:
    """`count` keys of one shard, in ascending order."""
    found = [key for key in (b"key-%05d" % number for number in range(20 * count)) if shard_of(key, 10) == shard]
    return found[:count]


# ---- commands


def test_put_get_and_versions_are_revisions_of_the_shard() -> None:
    replica, client = kv_replica(), Client(1)
    one, two = same_shard_keys(2)
    assert get(replica, one) == (None, 0)
    assert replica.run_one(client.command(PUT, one, b"a", None)) == [0, 1]
    assert replica.run_one(client.command(PUT, two, b"b", None)) == [0, 2]
    assert replica.run_one(client.command(PUT, one, b"", None)) == [0, 3]
    assert get(replica, one) == (b"", 3), "an empty value is not a missing key"
    assert get(replica, two) == (b"b", 2)


def test_append() -> None:
    replica, client = kv_replica(), Client(1)
    assert replica.run_one(client.command(APPEND, b"k", b"one")) == [0, 1]
    assert replica.run_one(client.command(APPEND, b"k", b"\x00two")) == [0, 2]
    assert get(replica, b"k") == (b"one\x00two", 2)


def test_delete_takes_a_revision_only_if_there_is_a_key() -> None:
    replica, client = kv_replica(), Client(1)
    one, two = same_shard_keys(2)
    assert replica.run_one(client.command(DELETE, one)) == [0, False, 0]
    replica.run(client.command(PUT, one, b"a", None))
    assert replica.run_one(client.command(DELETE, one)) == [0, True, 2]
    assert get(replica, one) == (None, 2)
    assert get(replica, two) == (None, 2), "an absent key's version is the shard's last delete"
    assert replica.run_one(client.command(DELETE, two)) == [0, False, 2]
    assert replica.run_one(client.command(PUT, one, b"b", None)) == [0, 3]


def test_cas() -> None:
    replica, client = kv_replica(), Client(1)
    assert replica.run_one(client.command(CAS, b"k", b"", b"x")) == [12, None, 0]
    replica.run(client.command(PUT, b"k", b"old", None))
    assert replica.run_one(client.command(CAS, b"k", b"other", b"x")) == [12, b"old", 1]
    assert replica.run_one(client.command(CAS, b"k", b"old", b"new")) == [0, 2]
    assert get(replica, b"k") == (b"new", 2)


def test_a_mismatch_shows_short_values_only() -> None:
    replica, client = kv_replica(), Client(1)
    for size in (CAS_CURRENT_BYTES_MAX, CAS_CURRENT_BYTES_MAX + 1):
        (_, version) = replica.run_one(client.command(PUT, b"k", b"v" * size, None))
        shown = b"v" * size if size == CAS_CURRENT_BYTES_MAX else None
        assert replica.run_one(client.command(CAS, b"k", b"", b"")) == [12, shown, version]


def test_versioned_put_rules() -> None:
    """The course's conditional Put: version 0 creates, a wrong or missing one changes nothing."""
    replica, client = kv_replica(), Client(1)
    assert replica.run_one(client.command(PUT, b"k", b"a", 1)) == [13, 0], "a version on a missing key"
    assert replica.run_one(client.command(PUT, b"k", b"a", 0)) == [0, 1]
    assert replica.run_one(client.command(PUT, b"k", b"b", 0)) == [13, 1]
    assert replica.run_one(client.command(PUT, b"k", b"b", 2)) == [13, 1]
    assert replica.run_one(client.command(PUT, b"k", b"b", 1)) == [0, 2]
    assert get(replica, b"k") == (b"b", 2)
    replica.run(client.command(DELETE, b"k"))
    assert replica.run_one(client.command(PUT, b"k", b"c", 2)) == [13, 0]
    assert replica.run_one(client.command(PUT, b"k", b"c", 0)) == [0, 4], "versions are never used again"


def test_concurrent_versioned_puts_count() -> None:
    """Ten clients race on one key: the final version equals the number of puts that succeeded."""
    replica, clients = kv_replica(), [Client(number) for number in range(10)]
    known, succeeded = 0, 0
    for _ in range(30):
        results = replica.run(*(client.command(PUT, b"k", client.client_id, known) for client in clients))
        assert [result[0] for result in results].count(0) == 1
        assert results[1:] == [[13, known + 1]] * 9
        succeeded += 1
        known = get(replica, b"k")[1]
    assert known == succeeded


def test_commands_of_one_entry_see_each_other() -> None:
    replica, client, other = kv_replica(), Client(1), Client(2)
    results = replica.run(
        client.command(PUT, b"k", b"a", 0),
        other.command(PUT, b"k", b"b", 0),
        other.command(APPEND, b"k", b"c"),
        client.command(CAS, b"k", b"ac", b"d"),
        client.command(DELETE, b"k"),
        other.command(PUT, b"k", b"e", 0),
    )
    assert results == [[0, 1], [13, 1], [0, 2], [0, 3], [0, True, 4], [0, 5]]
    assert get(replica, b"k") == (b"e", 5)


def test_one_meta_row_per_touched_shard_per_entry() -> None:
    replica, clients = kv_replica(), [Client(number) for number in range(50)]
    view = Overlay(replica.engine)
    keys = same_shard_keys(50)
    entry = replica.entry([c.command(PUT, key, b"v", None) for c, key in zip(clients, keys, strict=True)])
    replica.machine.apply(view, entry)
    assert len([key for key in view.changes if key.startswith(b"m")]) == 1
    assert len(view.changes) == 1 + 50 + 50


def test_sizes() -> None:
    replica, client = kv_replica(), Client(1)
    long_key = b"k" * KEY_BYTES_MAX
    assert replica.run_one(client.command(PUT, long_key, b"v" * VALUE_BYTES_MAX, None))[0] == 0
    assert replica.run_one(client.command(PUT, long_key + b"k", b"", None)) == [7, "the key", KEY_BYTES_MAX]
    too_long = b"v" * (VALUE_BYTES_MAX + 1)
    assert replica.run_one(client.command(PUT, b"k", too_long, None)) == [7, "the value", VALUE_BYTES_MAX]
    assert replica.run_one(client.command(CAS, b"k", b"", too_long)) == [7, "the new value", VALUE_BYTES_MAX]
    for command in (client.command(PUT, b"k", too_long, None), client.command(DELETE, long_key + b"k")):
        with pytest.raises(errors.TooLarge):
            replica.machine.validate(command)
    before = dict(replica.engine.rows)
    refusal = [7, "the value with the suffix", VALUE_BYTES_MAX]
    assert replica.run_one(client.command(APPEND, long_key, b"x")) == refusal
    assert replica.engine.rows == before, "a refused append leaves no trace, not in the session either"


def test_binary_keys_and_values() -> None:
    replica, client = kv_replica(), Client(1)
    keys = [b"", b"\x00", b"\xff" * 9, b"a b", b"a\nb", b"{tag}x", bytes(range(256))]
    for key in keys:
        assert replica.run_one(client.command(PUT, key, key[::-1], None))[0] == 0
    for key in keys:
        assert get(replica, key)[0] == key[::-1]


# ---- scans


def scan(replica: Replica[KvMachine], *args: Any, shard: int = 3) -> tuple[list[list[Any]], bool]:
    return replica.machine.scan(replica.engine, shard, *args)


def test_scan_pages() -> None:
    replica, client = kv_replica(), Client(1)
    keys = same_shard_keys(10)
    for number, key in enumerate(keys):
        replica.run(client.command(PUT, key, b"v%d" % number, None))
    everything = [[key, b"v%d" % number, number + 1] for number, key in enumerate(keys)]
    assert scan(replica, b"", None, 100, 10**6) == (everything, False)
    assert scan(replica, b"", None, 10, 10**6) == (everything, False)
    assert scan(replica, b"", None, 9, 10**6) == (everything[:9], True)
    assert scan(replica, b"", keys[8], 9, 10**6) == (everything[9:], False)
    assert scan(replica, b"", keys[9], 9, 10**6) == ([], False)
    assert scan(replica, b"", None, 0, 0) == (everything[:1], True), "a page always makes progress"
    pair_bytes = len(keys[0]) + 2
    assert scan(replica, b"", None, 100, 3 * pair_bytes) == (everything[:3], True)
    assert scan(replica, b"", None, 100, 3 * pair_bytes - 1) == (everything[:2], True)
    assert scan(replica, keys[4], None, 100, 10**6) == ([everything[4]], False)
    assert scan(replica, b"key-", b"aaa", 100, 10**6) == (everything, False)
    assert scan(replica, b"key-", b"zzz", 100, 10**6) == ([], False)
    assert scan(replica, b"zzz", b"aaa", 100, 10**6) == ([], False)


def test_scan_sees_one_shard_and_values_only() -> None:
    replica, client = kv_replica(), Client(1)
    for number in range(50):
        replica.run(client.command(PUT, b"\xff%d" % number, b"v", None))
    seen: list[bytes] = []
    for shard in range(SHARDS):
        pairs, more = scan(replica, b"\xff", None, 100, 10**6, shard=shard)
        assert not more
        assert all(shard_of(key, SHARDS) == shard for key, _, _ in pairs)
        seen += [key for key, _, _ in pairs]
    assert sorted(seen) == sorted(b"\xff%d" % number for number in range(50))


# ---- ownership and configurations


def two_groups(num: int, owners: str) -> ShardMap:
    return ShardMap(num, tuple(map(int, owners)), {gid: tuple(ADDRESSES) for gid in (1, 2)})


def test_before_any_configuration_nothing_is_served() -> None:
    replica = Replica(KvMachine(1))
    assert replica.run_one(Client(1).command(PUT, b"k", b"v", None)) == [2, 0, -1]
    with pytest.raises(errors.WrongGroup) as caught:
        replica.machine.get(replica.engine, 0, b"k")
    assert (caught.value.config_num, caught.value.holder_gid) == (0, -1)
    assert replica.machine.config is None
    assert replica.machine.shard_count == 0


def test_shards_of_other_groups_are_refused_with_the_holder() -> None:
    replica = kv_replica(1, config=two_groups(1, "1111122222"))
    client = Client(1)
    assert [replica.machine.serves(shard) for shard in range(10)] == [True] * 5 + [False] * 5
    assert replica.machine.shard_states() == [(shard, ShardState.SERVING) for shard in range(5)]
    for number in range(40):
        key = b"%d" % number
        shard = shard_of(key, SHARDS)
        result = replica.run_one(client.command(PUT, key, b"v", None))
        if shard < 5:
            assert result[0] == 0
        else:
            assert result == [2, 1, 2]
            with pytest.raises(errors.WrongGroup) as got:
                get(replica, key)
            with pytest.raises(errors.WrongGroup) as scanned:
                scan(replica, b"", None, 1, 1, shard=shard)
            assert got.value.fields == scanned.value.fields == [1, 2]
    assert replica.run_one(client.command(PUT, b"k", b"v", None, shard=-1))[0] == 8
    with pytest.raises(errors.WrongGroup):
        replica.machine.get(replica.engine, 99, b"k")


def test_a_key_of_another_shard_is_refused_before_the_log_and_in_it() -> None:
    replica, client = kv_replica(), Client(1)
    command = client.command(PUT, b"k", b"v", None, shard=(shard_of(b"k", SHARDS) + 1) % SHARDS)
    with pytest.raises(errors.BadRequest, match="not of this shard"):
        replica.machine.validate(command)
    assert replica.run_one(command) == [8, "the key is not of this shard"]


def test_ownership_is_decided_at_apply() -> None:
    """In the log before a configuration, applied before it: refused; after it: carried out; one entry."""
    replica, client = Replica(KvMachine(1)), Client(1)
    command = client.command(PUT, b"k", b"v", None)
    assert replica.run(command, config_command(one_group()), command) == [[2, 0, -1], [0, 1], [0, 1]]
    assert get(replica, b"k") == (b"v", 1), "the refusal left the seq open"


def test_a_request_applied_after_its_shard_froze_is_refused() -> None:
    """Row 56, with the state that live migration will bring, written into the meta row by hand."""
    replica, client = kv_replica(), Client(1)
    assert replica.run_one(client.command(PUT, b"k", b"v", None)) == [0, 1]
    key = meta_key(shard_of(b"k", SHARDS))
    replica.engine.rows[key] = pack_meta(unpack_meta(replica.engine.rows[key])._replace(state=ShardState.EXPORTING))
    replica.machine.load(replica.engine)
    assert replica.run_one(client.command(PUT, b"k", b"w", None))[0] == 2
    with pytest.raises(errors.WrongGroup):
        get(replica, b"k")


def test_configurations_in_strict_order() -> None:
    replica = Replica(KvMachine(1))
    first, second, third = two_groups(1, "1" * 10), two_groups(2, "1" * 10), two_groups(3, "1" * 10)
    assert replica.run_one(config_command(second)) == [8, "a configuration before this one is missing"]
    assert not replica.engine.rows
    assert replica.run_one(config_command(first)) == [0, 1]
    rows = dict(replica.engine.rows)
    assert replica.run_one(config_command(first)) == [0, 1]
    assert replica.run_one(config_command(third))[0] == 8
    assert replica.run_one(config_command(ShardMap.initial(10))) == [0, 1]
    assert replica.engine.rows == rows, "what is known, missing or older changes nothing"
    assert replica.run(config_command(second), config_command(third)) == [[0, 2], [0, 3]]
    assert replica.machine.config == third
    other_count = ShardMap(4, (1,) * 5, {1: ("h:1",)})
    assert replica.run_one(config_command(other_count))[0] == 8


def test_a_forged_map_with_the_present_number_changes_nothing() -> None:
    replica = kv_replica(1, config=two_groups(1, "1111122222"))
    assert replica.run_one(config_command(two_groups(1, "1" * 10))) == [0, 1]
    assert not replica.machine.serves(7)


def test_the_first_assignment_happens_at_the_first_owner() -> None:
    """Group 1 takes configurations late: the shards were assigned to it first and moved on since. It has
    them, empty, because nobody else can ever have had them; group 2 waits for them."""
    configs = [two_groups(1, "1111111111"), two_groups(2, "1111122222"), two_groups(3, "2222222222")]
    first, second = Replica(KvMachine(1)), Replica(KvMachine(2))
    for config in configs:
        for replica in (first, second):
            assert replica.run_one(config_command(config)) == [0, config.num]
    assert [shard for shard, _ in first.machine.shard_states()] == list(range(10))
    assert second.machine.shard_states() == []
    assert second.machine.awaited_shards() == list(range(10))
    assert first.machine.awaited_shards() == []
    key = b"k"
    assert first.run_one(Client(1).command(PUT, key, b"v", None)) == [0, 1]
    assert second.run_one(Client(1).command(PUT, key, b"v", None)) == [2, 3, 1]


def test_a_shard_without_owner_still_has_a_history() -> None:
    """After the last group has left, the next owner isn't the first one."""
    gone = ShardMap(2, (0,) * 10, {})
    back = ShardMap(3, (2,) * 10, {2: ("h:1",)})
    replica = Replica(KvMachine(2))
    for config in (one_group(1), gone, back):
        assert replica.run_one(config_command(config))[0] == 0
    assert replica.machine.shard_states() == []
    assert replica.machine.holder(0) == 1


# ---- the system's commands, decoding


def test_map_time_never_goes_back() -> None:
    replica = kv_replica()
    assert replica.run_one([MAP_TIME, 500]) == [0, 500]
    assert replica.run_one([MAP_TIME, 400]) == [0, 500]
    assert replica.machine.map_time_ms == 500
    replica.machine.load(replica.engine)
    assert replica.machine.map_time_ms == 500


def test_clients_may_not_send_the_systems_commands() -> None:
    replica = kv_replica()
    for command in ([MAP_TIME, 500], config_command(one_group(1, num=2))):
        with pytest.raises(errors.BadRequest):
            replica.machine.validate(command)


def test_entries_without_commands_have_no_results() -> None:
    replica = kv_replica()
    rows = dict(replica.engine.rows)
    for kind in (EntryKind.NOOP, EntryKind.MEMBERSHIP, EntryKind.TICK):
        assert replica.apply(Entry.make(1, 9, kind, 5, b"\x93\x01\x02\x03")) == []
    assert replica.engine.rows == rows


def test_commands_travel_as_the_clients_bytes() -> None:
    client = Client(1)
    commands = [client.command(PUT, b"%d" % number, b"v", None, first_unacked=1) for number in range(20)]
    encoded = [msgpack.packb(command) for command in commands]
    assert [decode_command(command) for command in encoded] == commands
    replica = kv_replica()
    data = join_commands(encoded)
    assert replica.machine.decode(data) == commands
    results = replica.apply(Entry.make(1, 9, EntryKind.COMMANDS, 5, data))
    assert results == replica.run(*commands), "and applying them again answers from the sessions"
    assert replica.machine.decode(join_commands([])) == []


def test_the_machine_is_what_the_runtime_expects() -> None:
    machine: Machine = KvMachine(1)
    assert machine.decode(b"\x90") == []
    assert CONFIG == 32
    assert MAP_TIME == 33
