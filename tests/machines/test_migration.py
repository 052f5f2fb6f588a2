"""The commands that move a shard, one rule at a time. Whole moves under all kinds of trouble: test_migration_world."""

from __future__ import annotations

from typing import Any

import pytest

from raftkv.machines import exports
from raftkv.machines import moves as op
from raftkv.machines.kv import APPEND, DELETE, PUT, KvMachine
from raftkv.machines.moves import shape_problem
from raftkv.machines.shard_map import ShardMap
from raftkv.machines.shard_states import ShardState
from raftkv.machines.slots import shard_of
from raftkv.protocol import errors
from tests.machines.support import ADDRESSES, Client, Replica, config_command, map_time_command

SHARD = 3
KEYS = [key for key in (b"key-%d" % number for number in range(400)) if shard_of(key, 10) == SHARD]
BUSY, UNAVAILABLE, SUPERSEDED, LIST_LOST, NOT_HOLDER = 6, 10, 27, 28, 29


def owned_by(num: int, *owners: int) -> ShardMap:
    """Configuration `num`: SHARD belongs to the last of `owners`, all others to group 1; groups 1 to 4 exist."""
    held = tuple(owners[-1] if shard == SHARD else 1 for shard in range(10))
    return ShardMap(num, held, {gid: tuple(ADDRESSES) for gid in (1, 2, 3, 4)})


class Group(Replica[KvMachine]):
    """A group that has taken a configuration for each of `owners` of SHARD, numbered from 1."""

    def __init__(self, gid: int, *owners: int) -> None:
        super().__init__(KvMachine(gid))
        for num, owner in enumerate(owners, 1):
            self.take(num, owner)

    def take(self, num: int, owner: int) -> None:
        assert self.run_one(config_command(owned_by(num, owner))) == [0, num]

    def is_in(self, state: ShardState) -> bool:
        return self.machine.state(SHARD) is state

    def open_list(self, to_gid: int, num: int, attempt: int = 1) -> list[Any]:
        return self.run_one([op.EXPORT_LIST, SHARD, to_gid, num, attempt])

    def ask(self, to_gid: int, num: int, list_id: int, attempt: int = 1, base: int = 10**6) -> list[Any]:
        return self.run_one([op.EXPORT_ASK, SHARD, to_gid, num, attempt, list_id, base])

    def release(self, to_gid: int, num: int) -> list[Any]:
        return self.run_one([op.EXPORT_RELEASE, SHARD, to_gid, num])

    def rows_of_shard(self) -> list[bytes]:
        return [key for key in self.engine.rows if key[:3] in (b"s\x00\x03", b"m\x00\x03")]

    def start(self, num: int, source: int = 1, list_id: int = 70, attempt: int = 1) -> list[Any]:
        return self.run_one([op.IMPORT_START, SHARD, num, attempt, source, list_id])

    def chunk(self, num: int, number: int, rows: list[Any], cursor: bytes | None, index: int = 80) -> list[Any]:
        return self.run_one([op.IMPORT_CHUNK, SHARD, num, 1, 70, number, rows, cursor, index])

    def bind(self, num: int) -> list[Any]:
        return self.run_one([op.IMPORT_ASK, SHARD, num, 1, 70])

    def install(self, num: int, number: int, rows: list[Any], *final: int) -> list[Any]:
        return self.run_one([op.IMPORT_INSTALL, SHARD, num, 1, 70, number, rows, *final])

    def drop(self, num: int, attempt: int = 1, list_id: int = 70) -> list[Any]:
        return self.run_one([op.IMPORT_DROP, SHARD, num, attempt, list_id])


# ---- the exporter: who may have it


def test_a_configuration_alone_freezes_nothing() -> None:
    group = Group(1, 1, 2)
    assert group.is_in(ShardState.SERVING)
    assert group.run_one(Client(1).command(PUT, KEYS[0], b"v", None)) == [0, 1]


def test_who_gets_a_list_and_who_does_not() -> None:
    group = Group(1, 1, 2)
    assert group.open_list(2, 3) == [UNAVAILABLE, "group 1 has not taken configuration 3 yet"]
    assert group.open_list(3, 2)[0] == 8, "another group than that configuration's"
    assert group.open_list(1, 1) == [SUPERSEDED, 2]
    assert group.open_list(2, 1) == [SUPERSEDED, 2]
    assert group.open_list(2, 2) == [0, group.index]
    group.take(3, 4)
    assert group.open_list(2, 2) == [SUPERSEDED, 3]
    assert Group(2, 1, 2, 4).open_list(4, 3) == [NOT_HOLDER, -1], "it never asked for it itself"
    importing = Group(2, 1, 2)
    importing.start(2)
    importing.chunk(2, 0, [], None)
    importing.bind(2)
    importing.take(3, 4)
    assert importing.open_list(4, 3) == [BUSY, "shard 3 is still on its way to group 2"]
    with pytest.raises(errors.BadRequest):
        group.machine.validate([op.EXPORT_LIST, SHARD, 2, 2, 1])


def test_the_same_attempt_gets_the_same_list_and_an_older_one_none() -> None:
    group = Group(1, 1, 2)
    (_, first) = group.open_list(2, 2)
    assert group.open_list(2, 2) == [0, first]
    assert group.open_list(2, 2, attempt=3) == [0, group.index]
    assert group.open_list(2, 2, attempt=2) == [LIST_LOST, 3]
    assert group.ask(2, 2, first) == [LIST_LOST, 3], "replaced"
    assert group.is_in(ShardState.SERVING)


def test_the_ask_freezes_and_may_be_repeated() -> None:
    group, client = Group(1, 1, 2), Client(1)
    (_, list_id) = group.open_list(2, 2)
    assert group.ask(2, 2, list_id + 1) == [LIST_LOST, 1]
    assert group.ask(2, 2, list_id, attempt=2) == [LIST_LOST, 1]
    assert group.ask(2, 2, list_id, base=list_id - 1) == [LIST_LOST, 1]
    assert group.is_in(ShardState.SERVING), "nothing was frozen"
    put = client.command(PUT, KEYS[0], b"v", None)
    late = client.command(PUT, KEYS[1], b"v", None)
    ask = [op.EXPORT_ASK, SHARD, 2, 2, 1, list_id, list_id]
    assert group.run(put, ask, late) == [[0, 1], [0], [2, 2, 2]], "decided where it stands in the log"
    group.take(3, 4)
    assert group.ask(2, 2, list_id) == [0], "it was granted before it was superseded"
    assert group.ask(4, 3, list_id) == [NOT_HOLDER, 2]
    assert group.open_list(4, 3) == [NOT_HOLDER, 2]
    with pytest.raises(errors.WrongGroup) as refused:
        group.machine.get(group.engine, SHARD, KEYS[0])
    assert refused.value.holder_gid == 2
    group.machine.load(group.engine)
    assert group.ask(2, 2, list_id) == [0]


def test_a_superseded_ask_is_never_granted() -> None:
    group = Group(1, 1, 2)
    (_, list_id) = group.open_list(2, 2)
    group.take(3, 4)
    assert group.ask(2, 2, list_id) == [SUPERSEDED, 3]
    group.take(4, 2)
    assert group.ask(2, 2, list_id) == [SUPERSEDED, 4]
    assert group.is_in(ShardState.SERVING)


def test_only_its_importer_releases_it_and_nothing_is_left() -> None:
    group = Group(1, 1, 2)
    group.run_one(Client(1).command(PUT, KEYS[0], b"v", None))
    (_, list_id) = group.open_list(2, 2)
    assert group.release(2, 2) == [0, False], "it was never frozen"
    group.ask(2, 2, list_id)
    assert group.release(3, 2) == [0, False]
    assert group.release(2, 1) == [0, False]
    assert group.rows_of_shard()
    assert group.release(2, 2) == [0, True]
    assert group.rows_of_shard() == []
    assert group.is_in(ShardState.ABSENT)
    assert group.release(2, 2) == [0, False], "acknowledged all the same"
    assert group.ask(2, 2, list_id) == [NOT_HOLDER, -1]


def test_a_shard_that_came_back_is_not_hit_by_an_old_release() -> None:
    group = Group(1, 1, 2)
    (_, list_id) = group.open_list(2, 2)
    group.ask(2, 2, list_id)
    group.release(2, 2)
    group.take(3, 1)
    assert group.machine.awaited_shards() == [SHARD]
    group.start(3, source=2)
    group.chunk(3, 0, [[b"kx", bytes(9)]], None)
    group.bind(3)
    assert group.install(3, 2, [], 5, 4, 0, 0) == [0, True]
    rows = group.rows_of_shard()
    assert group.release(2, 2) == [0, False]
    assert group.rows_of_shard() == rows


# ---- the exporter: what is copied


def changes_of(group: Group, list_id: int, since: int) -> list[Any]:
    (rows, cursor), _ = group.machine.changed_rows(group.engine, SHARD, (2, 2, 1, list_id), since, b"")
    assert cursor is None
    return rows


def test_the_list_has_every_kind_of_row_and_deletes_too() -> None:
    group, client = Group(1, 1, 2), Client(1)
    group.run_one(client.command(PUT, KEYS[0], b"old", None))
    (_, list_id) = group.open_list(2, 2)
    assert changes_of(group, list_id, list_id) == []
    group.run(client.command(PUT, KEYS[1], b"new", None), client.command(DELETE, KEYS[0]))
    changed = dict(changes_of(group, list_id, list_id))
    assert list(changed) == [b"c" + client.client_id, b"k" + KEYS[0], b"k" + KEYS[1]]
    assert changed[b"k" + KEYS[0]] is None
    assert changed[b"k" + KEYS[1]] == b"\x00" + (2).to_bytes(8) + b"new"
    before = group.index
    group.run_one(client.command(APPEND, KEYS[1], b"er"))
    assert [suffix for suffix, _ in changes_of(group, list_id, before)] == [b"c" + client.client_id, b"k" + KEYS[1]]
    assert changes_of(group, list_id, group.index) == []


def test_a_swept_session_is_noted_as_deleted() -> None:
    group, client = Group(1, 1, 2), Client(1)
    group.run_one(client.command(PUT, KEYS[0], b"v", None))
    group.run_one(map_time_command(3_500_000))
    (_, list_id) = group.open_list(2, 2)
    group.run_one(map_time_command(3_600_001))
    assert changes_of(group, list_id, list_id) == [[b"c" + client.client_id, None]]


def test_pages_of_a_pull(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exports, "PAGE_ROWS_MAX", 2)
    group, client = Group(1, 1, 2), Client(1)
    for key in KEYS[:5]:
        group.run_one(client.command(PUT, key, b"v", None))
    (_, list_id) = group.open_list(2, 2)
    group.run_one(client.command(PUT, KEYS[0], b"w", None))
    pages, cursor = [], b""
    while True:
        rows, after = group.machine.pull(group.engine, SHARD, (2, 2, 1, list_id), cursor)
        pages.append([suffix for suffix, _ in rows])
        if after is None:
            break
        assert after == rows[-1][0]
        cursor = after
    expected = [b"c" + client.client_id, *sorted(b"k" + key for key in KEYS[:5])]
    assert pages == [expected[0:2], expected[2:4], expected[4:6]], "and the list of touched keys isn't in it"


def test_pages_of_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page ends at so many keys looked at, too: it may be empty, and there is more."""
    monkeypatch.setattr(exports, "PAGE_EXAMINED_MAX", 2)
    group, client = Group(1, 1, 2), Client(1)
    (_, list_id) = group.open_list(2, 2)
    for key in sorted(KEYS[:4]):
        group.run_one(client.command(PUT, key, b"v", None))
    since, cursor, pages = group.index - 1, b"", []
    while True:
        (rows, after), _ = group.machine.changed_rows(group.engine, SHARD, (2, 2, 1, list_id), since, cursor)
        pages.append([suffix for suffix, _ in rows])
        if after is None:
            break
        cursor = after
    assert pages == [[b"c" + client.client_id], [], [b"k" + sorted(KEYS[:4])[3]]]


def test_the_counters_come_with_a_frozen_shard_only() -> None:
    group, client = Group(1, 1, 2), Client(1)
    group.run_one(map_time_command(500))
    group.run(client.command(PUT, KEYS[0], b"v", None), client.command(DELETE, KEYS[0]))
    (_, list_id) = group.open_list(2, 2)
    claim = (2, 2, 1, list_id)
    assert group.machine.changed_rows(group.engine, SHARD, claim, list_id, b"") == (([], None), None)
    group.ask(2, 2, list_id)
    assert group.machine.changed_rows(group.engine, SHARD, claim, list_id, b"") == (([], None), [2, 2, 0, 500])


def test_without_the_list_nothing_is_read() -> None:
    group = Group(1, 1, 2)
    with pytest.raises(errors.ListLost):
        group.machine.pull(group.engine, SHARD, (2, 2, 1, 1), b"")
    (_, list_id) = group.open_list(2, 2)
    for claim in ((2, 2, 2, list_id), (2, 2, 1, list_id + 1), (3, 2, 1, list_id), (2, 1, 1, list_id)):
        with pytest.raises(errors.ListLost):
            group.machine.pull(group.engine, SHARD, claim, b"")
        with pytest.raises(errors.ListLost):
            group.machine.changed_rows(group.engine, SHARD, claim, 0, b"")


# ---- the exporter: lists that go


def test_a_list_that_is_too_long_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exports, "LIST_ROWS_MAX", 4)
    group, client = Group(1, 1, 2), Client(1)
    (_, list_id) = group.open_list(2, 2)
    for _ in range(20):
        group.run_one(client.command(APPEND, KEYS[0], b"v"))
    assert group.machine._exports.lists, "a key counts once"
    for key in KEYS[1:4]:
        group.run_one(client.command(PUT, key, b"v", None))
    assert not group.machine._exports.lists
    assert not [key for key in group.rows_of_shard() if key[15:16] == b"d"]
    assert group.ask(2, 2, list_id) == [LIST_LOST, 1]
    assert group.open_list(2, 2, attempt=2) == [0, group.index]


def test_a_list_goes_with_its_importer() -> None:
    group = Group(1, 1, 2)
    group.open_list(2, 2)
    rows = group.rows_of_shard()
    group.take(3, 2)
    assert group.rows_of_shard() == rows, "the same owner still"
    group.take(4, 1)
    assert group.rows_of_shard() == [b"m\x00\x03"]


def test_a_list_that_nobody_asks_for_goes() -> None:
    group = Group(1, 1, 2)
    group.open_list(2, 2)
    group.run_one(map_time_command(400_000))
    group.open_list(2, 2)
    group.run_one(map_time_command(900_000))
    assert group.machine._exports.lists
    group.run_one(map_time_command(1_000_001))
    assert not group.machine._exports.lists


# ---- the importer


def test_only_the_owner_imports_and_by_the_configuration_that_made_it_one() -> None:
    group = Group(2, 1, 2)
    assert group.start(1) == [0, False]
    assert group.start(3) == [0, False]
    assert group.start(2) == [0, True]
    assert group.start(2, attempt=2) == [0, False], "there is one under way"
    assert group.is_in(ShardState.IMPORTING)
    assert group.machine.holder(SHARD) == 1
    assert Group(3, 1, 2).start(2) == [0, False]
    assert Group(1, 1, 2).start(2) == [0, False]


def test_chunks_are_taken_in_order_and_once() -> None:
    group = Group(2, 1, 2)
    group.start(2)
    assert group.chunk(2, 1, [], None) == [0, False]
    assert group.chunk(2, 0, [[b"ka", b"1" * 9]], b"ka", index=80) == [0, True]
    assert group.chunk(2, 0, [[b"ka", b"2" * 9]], b"ka") == [0, False]
    imported = group.machine.import_of(SHARD)
    assert imported is not None
    assert imported[1] == (1, 70, False, 0, 1, 70, 80, 11, b"ka")
    assert group.chunk(2, 1, [[b"kb", b"3" * 9]], None, index=90) == [0, True]
    group.machine.load(group.engine)
    imported = group.machine.import_of(SHARD)
    assert imported is not None
    assert imported[1] == (1, 70, False, 1, 2, 80, 0, 22, b""), "changes count from the pass's first page"
    assert group.run_one([op.IMPORT_CHUNK, SHARD, 2, 1, 71, 2, [], None, 9]) == [0, False], "another list"
    assert group.run_one([op.IMPORT_CHUNK, SHARD, 2, 2, 70, 2, [], None, 9]) == [0, False], "another attempt"


def test_an_import_that_has_not_asked_follows_the_map() -> None:
    group = Group(2, 1, 2)
    group.start(2)
    group.chunk(2, 0, [[b"ka", b"1" * 9]], None)
    group.take(3, 4)
    assert group.is_in(ShardState.ABSENT)
    assert group.rows_of_shard() == []
    assert group.bind(2) == [0, False]
    group.take(4, 2)
    assert group.start(2) == [0, False]
    assert group.start(4) == [0, True]


def test_an_import_that_has_asked_is_bound() -> None:
    group = Group(2, 1, 2)
    group.start(2)
    assert group.bind(2) == [0, False], "nothing is copied yet"
    group.chunk(2, 0, [[b"ka", b"1" * 9]], None)
    assert group.install(2, 1, [], 1, 0, 0, 0) == [0, False], "it hasn't asked"
    assert group.bind(2) == [0, True]
    assert group.bind(2) == [0, False]
    assert group.chunk(2, 1, [], None) == [0, False], "read before the ask"
    group.take(3, 4)
    group.machine.load(group.engine)
    assert group.is_in(ShardState.IMPORTING)
    assert group.chunk(2, 2, [[b"kb", b"2" * 9]], b"kb") == [0, True]
    assert group.install(2, 2, [], 1, 0, 0, 0) == [0, False], "the chunk before"
    assert group.install(2, 3, [[b"ka", None], [b"kc", b"3" * 9]], 9, 8, 7, 600) == [0, True]
    assert group.is_in(ShardState.SERVING)
    assert group.machine.map_time_ms == 600
    prefix = group.machine._shards.here[SHARD].prefix
    assert sorted(key[15:] for key in group.engine.rows if key.startswith(prefix)) == [b"kb", b"kc"]
    assert group.machine._shards.here[SHARD].meta()[2:] == (9, 8, 7)
    assert group.install(2, 3, [], 1, 0, 0, 0) == [0, False]


def test_the_release_is_owed_until_it_is_acknowledged() -> None:
    group = Group(2, 1, 2)
    group.start(2)
    group.chunk(2, 0, [], None)
    group.bind(2)
    group.install(2, 2, [], 1, 0, 0, 0)
    group.machine.load(group.engine)
    assert group.machine.releases() == [(SHARD, 2, 1)]
    assert group.run_one([op.IMPORT_RELEASED, SHARD, 3]) == [0, False]
    assert group.run_one([op.IMPORT_RELEASED, SHARD, 2]) == [0, True]
    assert group.machine.releases() == []
    assert group.run_one([op.IMPORT_RELEASED, SHARD, 2]) == [0, False]
    assert sorted(key for key in group.rows_of_shard()) == [b"m\x00\x03"]


def test_a_drop_hits_its_own_attempt_only() -> None:
    group = Group(2, 1, 2)
    group.start(2)
    group.chunk(2, 0, [[b"ka", b"1" * 9]], None)
    group.bind(2)
    assert group.drop(2, attempt=2) == [0, False]
    assert group.drop(2, list_id=71) == [0, False]
    assert group.drop(2) == [0, True]
    assert group.rows_of_shard() == []
    assert group.start(2, list_id=75) == [0, True]


# ---- whom to ask


def test_past_owners_and_addresses() -> None:
    group = Group(2, 1, 3, 1, 2, 4, 2)
    assert list(group.machine.past_owners(group.engine, SHARD)) == [4, 1, 3]
    assert group.machine.owned_since(SHARD) == 6
    assert group.machine.awaited_shards() == [SHARD]
    assert group.machine.addresses_of(group.engine, 4) == tuple(ADDRESSES)
    gone = ShardMap(7, (2,) * 10, {2: ("new:1",)})
    assert group.run_one(config_command(gone)) == [0, 7]
    assert group.machine.addresses_of(group.engine, 4) == tuple(ADDRESSES), "where it was"
    assert group.machine.addresses_of(group.engine, 2) == ("new:1",)
    assert group.machine.addresses_of(group.engine, 9) == ()


def test_every_command_has_a_shape() -> None:
    for command in sorted(op.MOVE_OPS):
        assert shape_problem([command]) == "wrong number of items in the command"
    assert shape_problem([op.IMPORT_RELEASED, -1, 1]) == "the shard: not what it must be"
    assert shape_problem([op.IMPORT_CHUNK, 3, 1, 1, 7, 0, [[b"d1", b""]], None, 1]) == "the rows: not what it must be"
    assert shape_problem([op.IMPORT_CHUNK, 3, 1, 1, 7, 0, [[b"", b""]], None, 1]) is not None
    assert shape_problem([op.IMPORT_CHUNK, 3, 1, 1, 7, 0, [[b"k", b""]], None, 1]) is None


def given_up(num: int, map_time_ms: int) -> list[Any]:
    return config_command(ShardMap(num, (0,) * 10, {}, map_time_ms))


def test_giving_up_all_shards_leaves_nothing_and_the_next_owner_begins_empty() -> None:
    group, client, key = Group(1, 1), Client(1), KEYS[0]
    assert group.run_one(client.command(PUT, key, b"v", None)) == [0, 1]
    assert group.run_one(given_up(2, 5_000)) == [0, 2]
    assert group.machine.shard_states() == [] and group.rows_of_shard() == []
    assert group.run_one(client.command(PUT, key, b"w", None))[0] == errors.WrongGroup.code
    group.take(3, 1)
    again = KvMachine(1)
    again.load(group.engine)
    for machine in (group.machine, again):
        assert machine.get(group.engine, SHARD, key) == (None, 0)
    assert group.run_one(client.command(PUT, key, b"late", None, stamp_ms=4_999))[0] == errors.Expired.code
    assert group.run_one(client.command(PUT, key, b"new", None, stamp_ms=5_000)) == [0, 1]


def test_giving_up_ends_imports_exports_and_releases() -> None:
    source, target, arrived = Group(1, 1, 2), Group(2, 1, 2), Group(2, 1, 2)
    _, list_id = source.open_list(2, 2)
    assert source.ask(2, 2, list_id) == [0]
    assert target.start(2) == arrived.start(2) == [0, True]
    arrived.chunk(2, 0, [], None)
    arrived.bind(2)
    assert arrived.install(2, 2, [], 0, 0, 0, 0) == [0, True]
    assert arrived.machine.releases() != []
    for group in (source, target, arrived):
        assert group.run_one(given_up(3, 7)) == [0, 3]
        assert group.machine.shard_states() == [] and group.rows_of_shard() == []
        assert group.machine.importing() == [] and group.machine.releases() == []
    assert source.release(2, 2) == [0, False]
    assert target.chunk(2, 0, [], None) == [0, False]
