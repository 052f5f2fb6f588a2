"""Sessions, ownership and the controllers' fence (acceptance §4.6, rows 52 to 54, 56 and 58 to 60).

On simulated daemons, with requests made by hand where the SDK would not make them. Rows 55 and 57 (retries that cross
a migration, deletion behind it) and what 56 and 58 say of shards that leave a group need migration.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import Any

import msgpack
import pytest

from raftkv.machines.controller import INIT, JOIN, LEAVE, MOVE
from raftkv.machines.kv import APPEND, CONFIG, DELETE, PUT
from raftkv.machines.rows import KIND_SESSION, Incarnation, shard_prefix
from raftkv.machines.sessions import SESSION_LIFETIME_MS
from raftkv.machines.shard_map import ShardMap
from raftkv.machines.slots import shard_of
from raftkv.protocol.errors import (
    BadRequest,
    BadShard,
    DrainOver,
    Expired,
    GroupExists,
    LastGroup,
    NoSuchGroup,
    OutcomeUnknown,
    RaftKVError,
    Unavailable,
    VersionMismatch,
    WrongGroup,
)
from raftkv.protocol.messages import Verb
from raftkv.sim.cluster import Group, shards_of
from raftkv.sim.process import DaemonProcess
from tests.acceptance.kv_rig import Clerk, Rig, seeds
from tests.acceptance.rigs import Raw, Task
from tests.machines.support import addresses_of

KEY = b"k"
HOUR_S = SESSION_LIFETIME_MS / 1000


def raw_of(rig: Rig, clerk: Clerk, *, client_id: bytes = b"", group: Group | None = None) -> Raw:
    """At the present leader."""
    return Raw(clerk, rig.leader(group), client_id=client_id)


def refused(clerk: Clerk, raw: Raw, command: list[Any], kind: type[RaftKVError]) -> RaftKVError:
    """The error that the command is refused with."""
    with pytest.raises(kind) as error:
        clerk.do(raw.write(command))
    return error.value


def last_index(process: DaemonProcess) -> int:
    assert process.daemon is not None and process.daemon.replica is not None
    return process.daemon.replica.raft.last_index


def submit_unchecked(rig: Rig, process: DaemonProcess, command: Any) -> Any:
    """Past everything that looks at a command before the log; its result."""
    assert process.daemon is not None and process.loop is not None
    replica = process.daemon.replica
    assert replica is not None
    results: list[Any] = []
    process.loop.post(
        replica.submit, msgpack.packb(command), command, lambda token, result: results.append(result), None
    )
    rig.wait_until(lambda: bool(results), "result", 5)
    return results[0]


def session_rows(rig: Rig, process: DaemonProcess, client_id: bytes) -> list[bytes]:
    return [key for key in rig.rows(process) if key.endswith(client_id)]


# ---- 52 … 54: once, at most once, or not at all


@pytest.mark.parametrize("how", ["kill", "lose_power", "isolate", "all restart", "snapshot"])
@seeds(2, 10)
def test_52_a_retry_after_the_leader_changed_applies_once(seed: int, how: str) -> None:
    """The new leader knows the reply: from its log, from its disk, or from a snapshot that was sent to it."""
    with Rig(3, seed, max_raft_state=1000) as rig:
        clerk = rig.clerk()
        other = rig.clerk()
        leader = rig.leader()
        rest = [process for process in rig.servers if process is not leader]
        late = rest[0]
        if how == "snapshot":
            rig.isolate(late)
        raw = raw_of(rig, clerk)
        command = raw.command(APPEND, KEY, b"once ")
        first = clerk.do(raw.write(command))
        for number in range(60):
            other.do(other.put(b"filler", b"%0100d" % number))
        if how == "snapshot":
            rig.lose_segments_of(late)
            rig.heal()
            rig.wait_equal(10)
            assert late.daemon is not None and late.daemon.replica is not None
            assert late.daemon.replica.snapshots.installed == 1
            leader.kill()
            rest[1].kill()
            rest[1].start()  # the log of both is as long: either may win
        elif how == "isolate":
            rig.isolate(leader)
        elif how == "all restart":
            rig.restart(rig.servers)
        else:
            getattr(leader, how)()
        rig.wait_until(lambda: rig.group.leader() not in (None, leader) or how == "all restart", "new leader", 10)
        for _ in range(3):
            again = raw_of(rig, clerk, client_id=raw.client_id)
            assert clerk.do(again.write(command)) == first
        found = clerk.do(clerk.kv.get(KEY))
        assert found is not None and found.value == b"once " and [0, found.version] == first


@seeds(2, 10)
def test_52_a_refusal_is_remembered_as_well(seed: int) -> None:
    """A conditional put that did not match stays refused, even when it would match by now."""
    with Rig(3, seed) as rig:
        clerk = rig.clerk()
        version = clerk.do(clerk.put(KEY, b"first"))
        raw = raw_of(rig, clerk)
        command = raw.command(PUT, KEY, b"never", version + 1)
        refused(clerk, raw, command, VersionMismatch)
        assert clerk.do(clerk.put(KEY, b"second")) == version + 1
        rig.leader().kill()
        rig.wait_until(lambda: rig.group.leader() is not None, "new leader", 10)
        error = refused(clerk, raw_of(rig, clerk, client_id=raw.client_id), command, VersionMismatch)
        assert isinstance(error, VersionMismatch) and error.version == version
        assert clerk.do(clerk.kv.get(KEY)) == (b"second", version + 1)


@seeds(2, 10)
def test_53_a_retry_after_its_reply_was_acknowledged_is_refused(seed: int) -> None:
    with Rig(3, seed) as rig:
        clerk = rig.clerk()
        raw = raw_of(rig, clerk)
        first = raw.command(APPEND, KEY, b"1 ")
        clerk.do(raw.write(first))
        clerk.do(raw.write(raw.command(APPEND, KEY, b"2 ", seq=2, first_unacked=2)))
        refused(clerk, raw, first, Expired)
        rig.restart(rig.servers)
        refused(clerk, raw_of(rig, clerk, client_id=raw.client_id), first, Expired)
        found = clerk.do(clerk.kv.get(KEY))
        assert found is not None and found.value == b"1 2 "


def age(rig: Rig, seconds: float) -> None:
    """Let that time pass on all clocks, and the servers hear of it."""
    before_ms = map_time_ms(rig.servers[0])
    for process in rig.cluster.daemons:
        process.jump_clock(seconds)
    wanted_ms = before_ms + seconds * 1000
    rig.wait_until(lambda: all(map_time_ms(process) >= wanted_ms for process in rig.servers), "map time", 60)


def map_time_ms(process: DaemonProcess) -> int:
    if not process.running or process.daemon is None:
        return 0
    return process.daemon._role.machine.map_time_ms


@pytest.mark.parametrize("restarted", [False, True], ids=["running", "restarted"])
@seeds(2, 10)
def test_54_a_request_of_an_evicted_session_is_refused(seed: int, restarted: bool) -> None:
    """Nobody remembers whether it was applied: so it isn't, again or for the first time. New requests are."""
    with Rig(3, seed, max_raft_state=1000) as rig:
        clerk = rig.clerk()
        raw = raw_of(rig, clerk)
        stamp_ms = map_time_ms(rig.servers[0])
        done = raw.command(APPEND, KEY, b"done ", stamp_ms=stamp_ms)
        clerk.do(raw.write(done))
        rig.wait_equal()
        assert all(len(session_rows(rig, process, raw.client_id)) == 1 for process in rig.servers)

        age(rig, HOUR_S + 60)
        rig.wait_until(
            lambda: not any(session_rows(rig, process, raw.client_id) for process in rig.servers), "sweep", 60
        )
        if restarted:
            rig.restart(rig.servers)
        again = raw_of(rig, clerk, client_id=raw.client_id)
        refused(clerk, again, done, Expired)
        refused(clerk, again, raw.command(APPEND, KEY, b"late ", seq=2, stamp_ms=stamp_ms), Expired)
        unknown = raw_of(rig, clerk)
        refused(clerk, unknown, unknown.command(APPEND, KEY, b"never ", stamp_ms=stamp_ms), Expired)
        fresh_ms = map_time_ms(rig.leader())
        clerk.do(again.write(raw.command(APPEND, KEY, b"new ", seq=3, first_unacked=3, stamp_ms=fresh_ms)))
        found = clerk.do(clerk.kv.get(KEY))
        assert found is not None and found.value == b"done new "
        rig.wait_equal()


@seeds(1, 5)
def test_54_a_client_that_slept_through_its_session_goes_on(seed: int) -> None:
    """The SDK is told that its time is too old, fetches a new one, and the write is done once."""
    with Rig(3, seed) as rig:
        clerk = rig.clerk()
        assert clerk.do(clerk.append(KEY, b"1 ")) == 1
        age(rig, HOUR_S + 60)
        assert clerk.do(clerk.append(KEY, b"2 ")) == 2
        found = clerk.do(clerk.kv.get(KEY))
        assert found is not None and found.value == b"1 2 "


# ---- 56, 58: who owns what


@seeds(2, 10)
def test_56_ownership_is_decided_when_a_command_is_applied(seed: int) -> None:
    """Before the log as well; but what got into it is refused too, leaves no session behind, and is no use later."""
    with Rig(3, seed, groups=2) as rig:
        clerk = rig.clerk()
        latest = clerk.do(clerk.controllers.query())
        one, two = rig.cluster.groups[1:]
        key = next(b"%d" % n for n in range(100) if latest.owner(shard_of(b"%d" % n, latest.shards)) == two.gid)
        raw = raw_of(rig, clerk, group=one)
        command = raw.command(PUT, key, b"foreign", None)
        error = refused(clerk, raw, command, WrongGroup)
        assert isinstance(error, WrongGroup) and error.config_num == latest.num and error.holder_gid == two.gid
        logged = last_index(rig.leader(one))
        result = submit_unchecked(rig, rig.leader(one), command)
        assert result == [WrongGroup.code, latest.num, two.gid]
        assert last_index(rig.leader(one)) == logged + 1
        rig.wait_equal()
        assert not any(session_rows(rig, process, raw.client_id) for process in one.processes)
        right = raw_of(rig, clerk, client_id=raw.client_id, group=two)
        assert clerk.do(right.write(command))[0] == 0
        found = clerk.do(clerk.kv.get(key))
        assert found is not None and found.value == b"foreign"


@seeds(2, 10)
def test_58_the_last_group_does_not_leave_with_the_data(seed: int) -> None:
    with Rig(3, seed) as rig:
        clerk = rig.clerk()
        version = clerk.do(clerk.put(KEY, b"here"))
        for _ in range(2):
            with pytest.raises(LastGroup):
                clerk.do(clerk.controllers.leave([1]))
        assert clerk.do(clerk.controllers.query()).owners == (1,) * 10
        rig.restart([*rig.servers, *rig.cluster.groups[0].processes])
        assert clerk.do(clerk.kv.get(KEY)) == (b"here", version)
        clerk.do(clerk.put(KEY, b"there"))


async def leave_and_come_back(clerk: Clerk, left: list[int], for_s: float) -> None:
    """The only group leaves whenever it can, and joins again at once."""
    loop = asyncio.get_running_loop()
    until_s = loop.time() + for_s
    addresses = list((await clerk.controllers.query()).groups[1])
    while loop.time() < until_s:
        try:
            left.append(await clerk.controllers.leave([1]))
        except (LastGroup, DrainOver, Unavailable, OutcomeUnknown, NoSuchGroup):
            await asyncio.sleep(0.05)
        while not (await clerk.controllers.query()).groups:
            with contextlib.suppress(GroupExists, Unavailable, OutcomeUnknown):
                await clerk.controllers.join({1: addresses})
        await asyncio.sleep(clerk.rng.uniform(0, 0.3))


async def come_and_go(clerk: Clerk, key: bytes, rng: random.Random, for_s: float) -> None:
    """A key of one client alone: what was acknowledged is there, until the client deletes it."""
    loop = asyncio.get_running_loop()
    until_s = loop.time() + for_s
    number = 0
    while loop.time() < until_s:
        number += 1
        value = b"%d" % number
        await clerk.kv.put(key, value)
        await asyncio.sleep(rng.uniform(0, 0.1))
        found = await clerk.kv.get(key)
        assert found is not None and found.value == value, "acknowledged, and lost"
        assert await clerk.kv.delete(key)
        assert await clerk.kv.get(key) is None
        await asyncio.sleep(rng.uniform(0, 0.5))


@pytest.mark.parametrize("crashes", [False, True])
@seeds(2, 20)
def test_58_an_empty_last_group_leaves_and_no_write_is_lost(seed: int, crashes: bool) -> None:
    """Writers race with the drain; with `crashes`, leaders of the group and of the controllers die meanwhile."""
    with Rig(3, seed) as rig:
        rng = random.Random(seed)
        left: list[int] = []
        admin, *writers = rig.clerks_of(4)
        end_s = rig.now + 25
        tasks: list[Task[None]] = [admin.spawn(leave_and_come_back(admin, left, 30))]
        for number, clerk in enumerate(writers):
            tasks.append(clerk.spawn(come_and_go(clerk, b"key%d" % number, random.Random(rng.random()), 30)))
        while rig.now < end_s:
            rig.sleep(rng.uniform(0.5, 3))
            victims = [rig.leader_now(), next((p for p in rig.cluster.groups[0].processes if is_leader(p)), None)]
            if crashes:
                rig.restart([process for process in victims if process is not None and rng.random() < 0.7], 0.3)
        rig.finish_all(tasks, 60)
        assert len(left) > 3
        rig.wait_until(lambda: drained_replicas(rig) == 0, "service")


def is_leader(process: DaemonProcess) -> bool:
    daemon = process.daemon
    return daemon is not None and daemon.replica is not None and daemon.replica.is_leader


def drained_replicas(rig: Rig) -> int:
    return sum(
        state == "drained"
        for process in rig.servers
        if process.daemon is not None
        for _, state in process.daemon.status()["shards"]
    )


# ---- 59: the controllers' fence


@seeds(3, 20)
def test_59_a_controller_cut_off_shows_no_old_configuration(seed: int) -> None:
    """It led, and it answers nobody until it is back among the others; then with what they decided."""
    with Rig(3, seed, groups=1, controllers=3, join=False) as rig:
        group, controllers = rig.group, rig.cluster.groups[0]
        near, far = rig.clerks_of(2)
        assert near.do(near.controllers.query()).num == 0
        leader = rig.leader(controllers)
        rest = [process.host for process in controllers.processes if process is not leader]
        # On the leader's side: a client, and the group itself, which therefore isn't told either.
        rig.cut([leader.host, near.host, *group.hosts], [*rest, far.host])
        query = near.spawn(near.controllers.query())
        joined = far.do(far.controllers.join({group.gid: list(group.addresses.values())}), 10)
        assert joined == 1
        rig.sleep(3.0)
        assert not query.done, f"seed {seed}: {query.result}"
        leaders = [process for process in group.processes if rig.is_up(process)]
        assert all(process.daemon is None or shards_of(process).config_num == 0 for process in leaders)
        rig.heal()
        assert rig.finish(query, 5.0).num == 1
        near.do(near.put(KEY, b"served"), 10)
        rig.wait_equal()


@seeds(2, 10)
def test_59_a_group_takes_configurations_in_order_only(seed: int) -> None:
    """A late or a forged one, whoever sends it, changes nothing: not who owns what, and no data."""
    with Rig(3, seed) as rig:
        clerk = rig.clerk()
        version = clerk.do(clerk.put(KEY, b"kept"))
        latest = clerk.do(clerk.controllers.query())
        elsewhere = ShardMap(latest.num, (2,) * latest.shards, {2: tuple(addresses_of(2))})
        ahead = ShardMap(latest.num + 2, elsewhere.owners, elsewhere.groups)
        other_shards = ShardMap(latest.num + 1, (2,) * (latest.shards + 1), elsewhere.groups)
        leader = rig.leader()
        for config in (ShardMap.initial(latest.shards), elsewhere):
            assert submit_unchecked(rig, leader, [CONFIG, config.encode()]) == [0, latest.num]
        for encoded in (ahead.encode(), other_shards.encode(), b"", b"\xc1"):
            assert submit_unchecked(rig, leader, [CONFIG, encoded])[0] == BadRequest.code
        rig.wait_equal()
        assert clerk.do(clerk.kv.get(KEY)) == (b"kept", version)
        with pytest.raises(BadRequest):  # and clients may not send one at all
            clerk.do(raw_of(rig, clerk).write([CONFIG, elsewhere.encode()]))
        rig.restart(rig.servers)
        assert clerk.do(clerk.kv.get(KEY)) == (b"kept", version)
        assert clerk.do(clerk.put(KEY, b"new")) == version + 1


# ---- 60: what makes no sense

MALFORMED: list[list[Any]] = [
    [JOIN, [[0, ["h:1"]]]],
    [JOIN, [[-1, ["h:1"]]]],
    [JOIN, [[5, []]]],
    [JOIN, [[5, ["nowhere"]]]],
    [JOIN, [[5, ["h:1", "h:1"]]]],
    [JOIN, [[5, ["h:1"]], [5, ["h:2"]]]],
    [JOIN, []],
    [JOIN, None],
    [LEAVE, []],
    [LEAVE, [1, 1]],
    [LEAVE, ["1"]],
    [MOVE, "0", 1],
    [MOVE, 0],
    [99, 0],
]
"""Wrong in themselves: refused before the log."""

IMPOSSIBLE: list[tuple[list[Any], type[RaftKVError]]] = [
    ([JOIN, [[1, ["h:1"]]]], GroupExists),
    ([LEAVE, [7]], NoSuchGroup),
    ([LEAVE, [1, 7]], NoSuchGroup),
    ([MOVE, 99, 1], BadShard),
    ([MOVE, -1, 1], BadShard),
    ([MOVE, 0, 7], NoSuchGroup),
]
"""Wrong for the configuration: refused by the log, and no configuration is made."""


@seeds(2, 10)
def test_60_invalid_changes_are_refused_and_change_nothing(seed: int) -> None:
    """Before the log; and if they get there (an older release's leader, a bug), alike by all, after a restart too."""
    with Rig(3, seed, controllers=3) as rig:
        clerk = rig.clerk()
        controllers = rig.cluster.groups[0]
        latest = clerk.do(clerk.controllers.query())
        raw = raw_of(rig, clerk, group=controllers)

        def command(change: list[Any], seq: int = 1) -> list[Any]:
            return [change[0], -1, raw.client_id, seq, 1, 0, *change[1:]]

        def ask(change: list[Any], seq: int) -> Any:
            return raw.request(Verb.CONTROL, [msgpack.packb(command(change, seq))])

        logged = last_index(rig.leader(controllers))
        for change in MALFORMED:
            with pytest.raises(BadRequest):
                clerk.do(ask(change, 1))
        with pytest.raises(BadRequest):
            clerk.do(raw.request(Verb.CONTROL, [msgpack.packb([INIT, bytes(16), 10])]))
        assert last_index(rig.leader(controllers)) == logged, "it was logged"

        for change, kind in IMPOSSIBLE:
            with pytest.raises(kind):
                clerk.do(ask(change, 1))
        for number, change in enumerate([*MALFORMED, [LEAVE, [7]], [MOVE, 99, 1]]):
            result = submit_unchecked(rig, rig.leader(controllers), command(change, number + 1))
            assert result[0] != 0, change
        nonsense: list[Any] = [None, 7, [], {}, [None], [JOIN], [JOIN, -1, b"", 0, 0, 0, []]]
        for junk in nonsense:
            assert submit_unchecked(rig, rig.leader(controllers), junk)[0] == BadRequest.code
        rig.wait_equal()
        assert clerk.do(clerk.controllers.query()) == latest
        rig.restart(controllers.processes)
        assert clerk.do(clerk.controllers.query()) == latest
        rig.wait_equal()


@seeds(2, 10)
def test_60_invalid_writes_are_refused_and_change_nothing(seed: int) -> None:
    with Rig(3, seed) as rig:
        clerk = rig.clerk()
        version = clerk.do(clerk.put(KEY, b"kept"))
        raw = raw_of(rig, clerk)
        other_shard = (shard_of(KEY, 10) + 1) % 10
        bad: list[list[Any]] = [
            raw.command(PUT, KEY, b"v"),
            raw.command(PUT, KEY, "text", None),
            raw.command(PUT, KEY, b"v", -1),
            raw.command(APPEND, KEY, None),
            raw.command(DELETE, KEY, seq=0),
            raw.command(DELETE, KEY, seq=1, first_unacked=2),
            [PUT, other_shard, raw.client_id, 1, 1, 0, KEY, b"v", None],
            [PUT, shard_of(KEY, 10), b"short", 1, 1, 0, KEY, b"v", None],
        ]
        logged = last_index(rig.leader())
        for command in bad:
            refused(clerk, raw, command, BadRequest)
        assert last_index(rig.leader()) == logged, "it was logged"
        for command in bad:
            assert submit_unchecked(rig, rig.leader(), command)[0] == BadRequest.code
        rig.wait_equal()
        rig.restart(rig.servers)
        assert clerk.do(clerk.kv.get(KEY)) == (b"kept", version)
        assert not any(session_rows(rig, process, raw.client_id) for process in rig.servers)
        prefix = shard_prefix(shard_of(KEY, 10), Incarnation(1, 0)) + KIND_SESSION
        assert any(row.startswith(prefix) for row in rig.rows(rig.leader())), "the clerk's own is there"
