"""The shard map: fetched once, refreshed when a server knows better; map time; who has lost its way."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

import pytest

from raftkv.client import routing
from raftkv.client.kv import RaftKV
from raftkv.machines.shard_map import ShardMap
from raftkv.machines.slots import shard_of
from raftkv.protocol import errors
from raftkv.protocol.errors import OutcomeUnknown, Timeout, WrongGroup, WrongPeer
from raftkv.protocol.messages import Hello, Verb
from tests.client.fakes import (
    CLUSTER_ID,
    Asked,
    FakeCluster,
    apply_and_drop,
    drop,
    first,
    on_verb,
    refusing,
    with_cluster,
)


def client(cluster: FakeCluster, timeout_s: float = 10.0, **options: Any) -> RaftKV:
    return RaftKV(cluster.addresses, timeout_s=timeout_s, rng=random.Random(1), **options)


def keys_of_shard(shard: int, shards: int = 4) -> list[bytes]:
    return [key for key in (b"key%d" % n for n in range(100)) if shard_of(key, shards) == shard]


def test_the_map_is_fetched_once_for_all() -> None:
    async def run(cluster: FakeCluster) -> None:
        async with client(cluster) as kv:
            await asyncio.gather(*(kv.put(b"k%d" % n, b"") for n in range(100)))
            answered = [a for a in cluster.asked(Verb.CONFIG) if a.server is cluster.leaders[0]]
            assert len(answered) == 1

    with_cluster(run)


def test_a_newer_map_is_fetched_when_a_group_knows_of_one() -> None:
    async def run(cluster: FakeCluster) -> None:
        async with client(cluster) as kv:
            keys = [b"k%d" % n for n in range(50)]
            await asyncio.gather(*(kv.put(key, b"1") for key in keys))
            cluster.shard_map = cluster.make_map(2, (2, 1, 2, 1))
            before = len(cluster.asked(Verb.CONFIG))
            started = time.monotonic()
            await asyncio.gather(*(kv.put(key, b"2") for key in keys))
            assert time.monotonic() - started < 1.5
            assert len(cluster.asked(Verb.CONFIG)) == before + 1
            assert {asked.body[0] for asked in cluster.asked(Verb.WRITE)} == {1, 2}
        assert all(cluster.data[key][0] == b"2" for key in keys)

    with_cluster(run)


def test_a_group_behind_the_map_is_waited_for() -> None:
    async def run(cluster: FakeCluster) -> None:
        cluster.everywhere(1, on_verb(Verb.WRITE, first(3, refusing(WrongGroup(0)))))
        async with client(cluster) as kv:
            await kv.put(keys_of_shard(0)[0], b"x")
            assert len(cluster.asked(Verb.CONFIG)) < 5

    with_cluster(run)


def test_the_holder_is_asked_while_a_shard_is_on_its_way() -> None:
    """The new owner says who holds the shard; later requests go there at once, until the holder refuses."""

    async def run(cluster: FakeCluster) -> None:
        key = keys_of_shard(0)[0]
        frozen = False

        def at_owner(asked: Asked) -> bool:
            if not frozen and shard_of(asked.command[6], 4) == 0:
                asked.refuse(WrongGroup(2, 1))
                return True
            return False

        def at_holder(asked: Asked) -> bool:
            if frozen:
                asked.refuse(WrongGroup(2, -1))
            else:
                asked.reply([0, 77])
            return True

        async with client(cluster) as kv:
            await kv.get(b"warm up")
            cluster.shard_map = cluster.make_map(2, (2, 2, 2, 2))
            cluster.everywhere(2, on_verb(Verb.WRITE, at_owner))
            cluster.everywhere(1, on_verb(Verb.WRITE, at_holder))
            await kv._cluster.router.renew_map_time(kv._cluster.call("see map 2"))
            assert await kv.put(key, b"1") == 77
            at_2 = len(cluster.groups[2][0].asked(Verb.WRITE))
            assert await kv.put(key, b"2") == 77
            assert len(cluster.groups[2][0].asked(Verb.WRITE)) == at_2
            frozen = True  # the last of it has moved
            assert await kv.put(key, b"3") == 1
            assert cluster.applied[-1][7] == b"3"

    with_cluster(run)


def test_an_owner_behind_the_map_names_the_holder() -> None:
    """The owner has the configuration before, in which the shard was its own already, and had not arrived."""

    async def run(cluster: FakeCluster) -> None:
        key = keys_of_shard(0)[0]

        def at_owner(asked: Asked) -> bool:
            asked.refuse(WrongGroup(2, 1))
            return True

        def at_holder(asked: Asked) -> bool:
            asked.reply([0, 77])
            return True

        cluster.shard_map = cluster.make_map(3, (2, 2, 2, 2))
        cluster.everywhere(2, on_verb(Verb.WRITE, at_owner))
        cluster.everywhere(1, on_verb(Verb.WRITE, at_holder))
        async with client(cluster) as kv:
            assert await kv.put(key, b"1") == 77
            asked = len(cluster.groups[2][0].asked(Verb.WRITE))
            assert await asyncio.gather(*(kv.put(key, b"2") for _ in range(20))) == [77] * 20
            assert len(cluster.groups[2][0].asked(Verb.WRITE)) == asked

    with_cluster(run)


def test_many_refused_by_the_owner_at_once_all_go_to_the_holder() -> None:
    """The second refusal of the owner is not taken for one of the holder."""

    async def run(cluster: FakeCluster) -> None:
        keys = keys_of_shard(0)[:8]
        refusals: list[Asked] = []

        def at_owner(asked: Asked) -> bool:
            refusals.append(asked)
            if len(refusals) == len(keys):
                for request in refusals:
                    request.refuse(WrongGroup(2, 1))
            return True

        def at_holder(asked: Asked) -> bool:
            asked.reply([0, 77])
            return True

        cluster.shard_map = cluster.make_map(2, (2, 2, 2, 2))
        cluster.everywhere(2, on_verb(Verb.WRITE, at_owner))
        cluster.everywhere(1, on_verb(Verb.WRITE, at_holder))
        async with client(cluster) as kv:
            assert await asyncio.gather(*(kv.put(key, b"1") for key in keys)) == [77] * len(keys)
            assert len(refusals) == len(keys)

    with_cluster(run)


def test_a_group_that_has_left_is_asked_while_it_holds_a_shard() -> None:
    """A client that never saw a map with it looks for it in earlier ones, once."""

    async def run(cluster: FakeCluster) -> None:
        key = keys_of_shard(0)[0]
        old = cluster.make_map(1, (1, 1, 1, 1))
        latest = ShardMap(3, (2, 2, 2, 2), {2: old.groups[2]})
        maps = {-1: latest, 3: latest, 2: ShardMap(2, latest.owners, latest.groups), 1: old}

        def config(asked: Asked) -> bool:
            if asked.server is not cluster.leaders[0]:
                return False
            asked.reply([maps[asked.body[0]].encode(), 1_000])
            return True

        def at_holder(asked: Asked) -> bool:
            asked.reply([0, 77])
            return True

        cluster.shard_map = latest
        cluster.everywhere(0, on_verb(Verb.CONFIG, config))
        cluster.everywhere(2, on_verb(Verb.WRITE, refusing(WrongGroup(3, 1))))
        cluster.everywhere(1, on_verb(Verb.WRITE, at_holder))
        async with client(cluster) as kv:
            assert await kv.put(key, b"1") == 77
            assert await kv.put(key, b"2") == 77
            assert await kv.put(keys_of_shard(1)[0], b"3") == 77
            asked = [asked.body[0] for asked in cluster.leaders[0].asked(Verb.CONFIG)]  # type: ignore[union-attr]
            assert [num for num in asked if num >= 0] == [2, 1]

    with_cluster(run)


def test_a_holder_that_no_map_has_is_looked_for_once() -> None:
    async def run(cluster: FakeCluster) -> None:
        cluster.everywhere(2, on_verb(Verb.WRITE, first(3, refusing(WrongGroup(2, 9)))))
        cluster.shard_map = cluster.make_map(2, (2, 2, 2, 2))
        async with client(cluster) as kv:
            assert await kv.put(keys_of_shard(0)[0], b"1") == 1
            asked = [asked.body[0] for asked in cluster.leaders[0].asked(Verb.CONFIG)]  # type: ignore[union-attr]
            assert [num for num in asked if num >= 0] == [1]

    with_cluster(run)


def test_without_groups_it_waits_for_a_join() -> None:
    async def run(cluster: FakeCluster) -> None:
        full = cluster.shard_map
        cluster.shard_map = ShardMap.initial(4)
        async with client(cluster, timeout_s=5) as kv:
            write = asyncio.ensure_future(kv.put(b"k", b"v"))
            await asyncio.sleep(0.2)
            cluster.shard_map = full
            await write
        cluster.shard_map = ShardMap.initial(4)
        async with client(cluster, timeout_s=0.4) as kv:
            with pytest.raises(Timeout, match=r"no group serves the shards \(configuration 0\); add one with"):
                await kv.put(b"k", b"v")

    with_cluster(run)


def test_controllers_that_are_not_formed_yet_are_waited_for() -> None:
    async def run(cluster: FakeCluster) -> None:
        cluster.everywhere(0, first(2, refusing(errors.Unavailable("the cluster is not formed yet"))))
        async with client(cluster) as kv:
            assert await kv.get(b"k") is None
        cluster.everywhere(0, refusing(errors.Unavailable("the cluster is not formed yet")))
        async with client(cluster, timeout_s=0.3) as kv:
            with pytest.raises(Timeout, match="the cluster is not formed yet"):
                await kv.get(b"k")

    with_cluster(run)


@pytest.mark.parametrize("body", [None, [], [b"junk", 5], ["m", 5], [ShardMap.initial(4).encode(), "5"]])
def test_a_map_that_is_none(body: Any) -> None:
    async def run(cluster: FakeCluster) -> None:
        def answer(asked: Asked) -> bool:
            asked.reply(body)
            return True

        cluster.everywhere(0, answer)
        async with client(cluster) as kv:
            with pytest.raises(errors.ServerError):
                await kv.put(b"k", b"v")  # nothing was sent: definite

    with_cluster(run)


def test_a_write_of_unknown_fate_stays_unknown_when_the_controllers_fail_then() -> None:
    async def run(cluster: FakeCluster) -> None:
        key = keys_of_shard(0)[0]
        async with client(cluster, timeout_s=1.2) as kv:
            await kv.get(key)
            for server in cluster.controllers:
                server.stop()
            lose = first(1, apply_and_drop)
            for server in cluster.groups[1]:
                server.rules.append(on_verb(Verb.WRITE, lose))
                server.rules.append(on_verb(Verb.WRITE, refusing(WrongGroup(9))))
            with pytest.raises(OutcomeUnknown):
                await kv.put(key, b"x")
            with pytest.raises(Timeout):
                await kv.put(key, b"x")

    with_cluster(run)


# Map time ---------------------------------------------------------------------------------------------------


def stamps(cluster: FakeCluster) -> list[int]:
    return [command[5] for command in cluster.applied]


def test_an_old_map_time_is_refreshed_beside_the_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "MAP_TIME_OLD_S", 0.05)

    async def run(cluster: FakeCluster) -> None:
        async with client(cluster) as kv:
            await kv.put(b"k", b"1")
            cluster.map_time_ms = 2_000
            await asyncio.sleep(0.06)
            await kv.put(b"k", b"2")
            await asyncio.sleep(0.02)
            await kv.put(b"k", b"3")
            assert stamps(cluster)[0] == 1_000
            assert stamps(cluster)[-1] == 2_000

    with_cluster(run)


def test_a_stale_map_time_is_refreshed_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "MAP_TIME_OLD_S", 0.02)
    monkeypatch.setattr(routing, "MAP_TIME_STALE_S", 0.05)

    async def run(cluster: FakeCluster) -> None:
        async with client(cluster) as kv:
            await kv.put(b"k", b"1")
            cluster.map_time_ms = 2_000
            await asyncio.sleep(0.06)
            await asyncio.gather(*(kv.put(b"k", b"%d" % n) for n in range(10)))
            assert set(stamps(cluster)[1:]) == {2_000}
            assert len(cluster.asked(Verb.CONFIG)) <= 4
            cluster.map_time_ms = 500  # of a controller that is behind: time never goes back
            await asyncio.sleep(0.06)
            await kv.put(b"k", b"3")
            assert stamps(cluster)[-1] == 2_000

    with_cluster(run)


def test_writes_go_on_without_controllers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "MAP_TIME_OLD_S", 0.02)
    monkeypatch.setattr(routing, "MAP_TIME_STALE_S", 0.05)
    monkeypatch.setattr(routing, "MAP_TIME_WAIT_S", 0.1)

    async def run(cluster: FakeCluster) -> None:
        async with client(cluster, timeout_s=2) as kv:
            await kv.put(b"k", b"1")
            for server in cluster.controllers:
                server.rules.append(drop)
            await asyncio.sleep(0.06)
            started = time.monotonic()
            for n in range(5):
                await kv.put(b"k", b"%d" % n)
            assert time.monotonic() - started < 1.0

    with_cluster(run)


# Who lives at an address --------------------------------------------------------------------------------------


def test_the_cluster_id_is_learned_and_demanded() -> None:
    async def run(cluster: FakeCluster) -> None:
        async with client(cluster) as kv:
            await kv.put(b"k", b"v")
        hellos = [h for servers in cluster.groups.values() for server in servers for h in server.hellos]
        assert {hello.cluster_id for hello in hellos} == {CLUSTER_ID}

    with_cluster(run)


def test_a_group_where_controllers_should_be_is_said_at_once() -> None:
    async def run(cluster: FakeCluster) -> None:
        addresses = [server.address for server in cluster.groups[2]]
        async with RaftKV(addresses, timeout_s=10) as kv:
            started = time.monotonic()
            with pytest.raises(WrongPeer, match=r"is shardkv \d of group 2, not a controller; check the addresses"):
                await kv.put(b"k", b"v")
            assert time.monotonic() - started < 1.0

    with_cluster(run)


def test_one_wrong_address_among_right_ones_does_no_harm() -> None:
    async def run(cluster: FakeCluster) -> None:
        for n in range(8):  # whichever it begins with
            addresses = [cluster.groups[2][0].address, cluster.controllers[1].address]
            async with RaftKV(addresses, timeout_s=5, rng=random.Random(n)) as kv:
                await kv.put(b"k", b"v")

    with_cluster(run)


def test_another_group_at_a_replicas_address() -> None:
    async def run(cluster: FakeCluster) -> None:
        cluster.groups[1][0].hello = Hello(role="shardkv", gid=9, replica=0)
        cluster.leaders[1] = cluster.groups[1][1]
        async with client(cluster) as kv:
            for key in keys_of_shard(0)[:5]:
                await kv.put(key, b"v")
        assert not cluster.groups[1][0].asked(Verb.WRITE)

    with_cluster(run)


def test_an_earlier_owner_is_asked_when_the_owner_is_not_there() -> None:
    """A new owner that never came up has never asked for the shard: who had it before serves it still."""

    async def run(cluster: FakeCluster) -> None:
        key = keys_of_shard(0)[0]
        old = cluster.make_map(1, (1, 1, 1, 1))
        latest = cluster.make_map(2, (2, 2, 2, 2))
        maps = {-1: latest, 2: latest, 1: old}

        def config(asked: Asked) -> bool:
            if asked.server is not cluster.leaders[0]:
                return False
            asked.reply([maps[asked.body[0]].encode(), 1_000])
            return True

        def at_holder(asked: Asked) -> bool:
            asked.reply([0, 77])
            return True

        cluster.shard_map = latest
        cluster.everywhere(0, on_verb(Verb.CONFIG, config))
        cluster.everywhere(1, on_verb(Verb.WRITE, at_holder))
        for server in cluster.groups[2]:
            server.stop()
        async with client(cluster) as kv:
            started = time.monotonic()
            assert await kv.put(key, b"1") == 77
            assert await kv.put(key, b"2") == 77
            assert time.monotonic() - started < 3

    with_cluster(run)


def test_a_map_that_comes_while_an_earlier_one_is_looked_at() -> None:
    """The request that looked goes by the newer one then, in which the owner that is gone isn't any more."""

    async def run(cluster: FakeCluster) -> None:
        key = keys_of_shard(0)[0]
        old, second = cluster.make_map(1, (1, 1, 1, 1)), cluster.make_map(2, (2, 2, 2, 2))
        latest = ShardMap(3, (1, 1, 1, 1), {1: old.groups[1]})
        held: list[Asked] = []

        def config(asked: Asked) -> bool:
            if asked.server is not cluster.leaders[0]:
                return False
            if asked.body[0] == 1:
                held.append(asked)
            else:
                asked.reply([cluster.shard_map.encode(), 1_000])
            return True

        cluster.shard_map = second
        cluster.everywhere(0, on_verb(Verb.CONFIG, config))
        for server in cluster.groups[2]:
            server.stop()
        async with client(cluster) as kv:
            write = asyncio.ensure_future(kv.put(key, b"1"))
            while not held:
                await asyncio.sleep(0.005)
            cluster.shard_map = latest
            await kv._cluster.router.renew_map_time(kv._cluster.call("see map 3"))
            held[0].reply([old.encode(), 1_000])
            assert await write == 1

    with_cluster(run)


@pytest.mark.parametrize("timeout_s", [0.2, 0.35, 0.5, 0.7])
def test_a_dead_holder_is_named_whatever_is_asked_last(timeout_s: float) -> None:
    """Its shards are another group's by the map: that one answers, and so do the controllers."""

    async def run(cluster: FakeCluster) -> None:
        first_map, latest = cluster.make_map(1, (2, 2, 2, 2)), cluster.make_map(2, (1, 1, 1, 1))

        def config(asked: Asked) -> bool:
            if asked.server is not cluster.leaders[0]:
                return False
            asked.reply([(first_map if asked.body[0] == 1 else latest).encode(), 1_000])
            return True

        cluster.everywhere(0, on_verb(Verb.CONFIG, config))
        cluster.everywhere(1, on_verb(Verb.READ, refusing(WrongGroup(2, 2))))
        for server in cluster.groups[2]:
            server.stop()
        async with client(cluster, timeout_s) as kv:
            with pytest.raises(Timeout, match=rf"^scan: no replica of group 2 answered within {timeout_s:g} s: start "):
                async for _ in kv.scan():
                    raise AssertionError("there is nothing")

    with_cluster(run)


def test_controllers_that_are_asked_at_the_last_moment_are_not_to_blame(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "REFRESH_S_MIN", 0.0)

    async def run(cluster: FakeCluster) -> None:
        started = asyncio.get_running_loop().time()
        late = on_verb(Verb.CONFIG, lambda asked: asyncio.get_running_loop().time() - started > 0.45)
        cluster.everywhere(1, on_verb(Verb.READ, refusing(WrongGroup(1, -1))))
        cluster.everywhere(0, late)
        async with client(cluster, 0.5) as kv:
            with pytest.raises(Timeout, match=r"group 1 did not serve the shard within 0\.5 s; tried"):
                await kv.get(keys_of_shard(0)[0])

    with_cluster(run)


def test_the_owner_is_named_not_a_group_that_had_the_shard_in_between() -> None:
    """That one may never have been there: a mistyped Join, taken back by Leave."""

    async def run(cluster: FakeCluster) -> None:
        first_map, latest = cluster.make_map(1, (1, 1, 1, 1)), cluster.make_map(3, (2, 2, 2, 2))
        mistyped = ShardMap(2, (9, 9, 9, 9), {**first_map.groups, 9: ("127.0.0.1:1",)})
        maps = {1: first_map, 2: mistyped}

        def config(asked: Asked) -> bool:
            if asked.server is not cluster.leaders[0]:
                return False
            asked.reply([maps.get(asked.body[0], latest).encode(), 1_000])
            return True

        cluster.everywhere(0, on_verb(Verb.CONFIG, config))
        cluster.everywhere(1, on_verb(Verb.READ, refusing(WrongGroup(3, -1))))
        for server in cluster.groups[2]:
            server.stop()
        async with client(cluster, 1.0) as kv:
            for _ in range(2):
                with pytest.raises(Timeout, match=r"no replica of group 2 answered within 1 s"):
                    await kv.get(keys_of_shard(0)[0])

    with_cluster(run)
