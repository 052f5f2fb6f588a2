"""`RaftKV` against a scripted cluster: what it sends, how often, to whom, and what it says in the end."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

import pytest

from raftkv.client import retry
from raftkv.client.kv import RaftKV, Value
from raftkv.client.sessions import WINDOW
from raftkv.machines.slots import shard_of
from raftkv.protocol import errors
from raftkv.protocol.errors import OutcomeUnknown, RaftKVError, Timeout, Unavailable
from raftkv.protocol.limits import CONNECT_TIMEOUT_S, DIAL_PATIENCE_S, KEY_BYTES_MAX, VALUE_BYTES_MAX
from raftkv.protocol.messages import FOLLOWER_OK, ReadOp, Verb
from tests.client.fakes import (
    Asked,
    FakeCluster,
    FakeServer,
    Rule,
    apply_and_drop,
    apply_and_reset,
    drop,
    first,
    on_verb,
    refusing,
    reset,
    with_cluster,
)

SHARDS = 4


def key_of(gid: int, n: int = 0) -> bytes:
    """The nth key that group `gid` serves (shards go round the groups 1 and 2)."""
    keys = (b"key%d" % number for number in range(10_000))
    mine = [key for key in (next(keys) for _ in range(200)) if shard_of(key, SHARDS) % 2 == gid - 1]
    return mine[n]


def client(cluster: FakeCluster, timeout_s: float = 10.0, **options: Any) -> RaftKV:
    return RaftKV(cluster.addresses, timeout_s=timeout_s, rng=random.Random(1), **options)


def identities(asked: list[Asked]) -> set[tuple[Any, ...]]:
    """(shard, client id, seq, first unacked, stamp) of each WRITE."""
    return {tuple(request.command[1:6]) for request in asked}


# The happy path -------------------------------------------------------------------------------------


def test_every_operation() -> None:
    async def run(cluster: FakeCluster) -> None:
        async with client(cluster) as kv:
            assert await kv.get(b"a") is None
            version = await kv.put(b"a", b"1")
            assert await kv.get(b"a") == Value(b"1", version)
            assert await kv.append(b"a", b"2") > version
            assert await kv.cas(b"a", b"12", b"") > version
            assert (await kv.get(b"a") or Value(b"?", 0)).value == b""  # empty, not missing
            assert await kv.delete(b"a") is True
            assert await kv.delete(b"a") is False
            assert await kv.put(b"v", b"x", if_version=0) > 0
            with pytest.raises(errors.VersionMismatch):
                await kv.put(b"v", b"x", if_version=0)
            with pytest.raises(errors.CasMismatch) as caught:
                await kv.cas(b"v", b"y", b"z")
            assert caught.value.current == b"x"

    with_cluster(run)


def test_any_bytes() -> None:
    async def run(cluster: FakeCluster) -> None:
        async with client(cluster) as kv:
            pairs = {
                b"": b"",
                b"\x00\xff\n ": bytes(range(256)),
                b"{tag}x": b"{",
                b"k" * KEY_BYTES_MAX: b"v" * VALUE_BYTES_MAX,
            }
            for key, value in pairs.items():
                await kv.put(key, value)
            for key, value in pairs.items():
                found = await kv.get(key)
                assert found is not None
                assert found.value == value
            assert {key: value.value async for key, value in kv.scan()} == pairs

    with_cluster(run)


def test_requests_are_pipelined_over_one_connection_per_server() -> None:
    async def run(cluster: FakeCluster) -> None:
        most = 0

        def count(asked: Asked) -> bool:
            nonlocal most
            most = max(most, len(cluster.groups[1][0].requests))
            asyncio.get_running_loop().call_later(0.04, asked.server.answer, asked)
            return True

        cluster.groups[1][0].rules.append(count)
        async with client(cluster) as kv:
            keys = [key_of(1, n) for n in range(50)]
            started = time.monotonic()
            await asyncio.gather(*(kv.put(key, key) for key in keys))
            assert time.monotonic() - started < 1.5  # not 50 × 40 ms
            assert most == 50
            assert [s.connections for s in cluster.groups[1]] == [1, 0, 0]
            assert sum(s.connections for s in cluster.controllers) == 1
            await asyncio.gather(*(kv.get(key) for key in keys))
            assert cluster.groups[1][0].connections == 1
        assert len(identities(cluster.asked(Verb.WRITE))) == 50

    with_cluster(run)


def test_the_seqs_of_one_client_in_one_shard_stay_within_the_window() -> None:
    async def run(cluster: FakeCluster) -> None:
        held: list[Asked] = []

        def hold(asked: Asked) -> bool:
            held.append(asked)
            return True

        cluster.groups[1][0].rules.append(hold)
        async with client(cluster) as kv:
            writes = [asyncio.ensure_future(kv.put(key_of(1), b"%d" % n)) for n in range(WINDOW + 10)]
            async with asyncio.timeout(10):
                while len(held) < WINDOW:
                    await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            assert len(held) == WINDOW
            held.sort(key=lambda asked: int(asked.command[3]))
            cluster.groups[1][0].rules.clear()
            for asked in held[1:]:
                asked.server.answer(asked)
            await asyncio.sleep(0.05)
            assert len(cluster.groups[1][0].asked(Verb.WRITE)) == WINDOW  # the first is still out
            held[0].server.answer(held[0])
            await asyncio.gather(*writes)
        commands = [asked.command for asked in cluster.asked(Verb.WRITE)]
        assert sorted(command[3] for command in commands) == list(range(1, WINDOW + 11))
        assert all(command[3] - command[4] < WINDOW for command in commands)
        assert max(command[4] for command in commands) > WINDOW

    with_cluster(run)


def test_a_client_does_not_grow_with_the_number_of_keys() -> None:
    async def run(cluster: FakeCluster) -> None:
        async with client(cluster) as kv:
            for n in range(300):
                await kv.put(b"k%d" % n, b"")
            sessions = kv._cluster.sessions
            assert set(sessions._shards) <= set(range(SHARDS))
            assert all(session.in_flight == 0 for session in sessions._shards.values())
            assert kv.unsettled_writes() == []

    with_cluster(run)


# Exactly once -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        first(1, apply_and_reset),
        first(1, reset),
        first(3, apply_and_reset),
        first(1, refusing(errors.OutcomeUnknown("leadership was lost"))),
        first(2, refusing(errors.Busy("full"))),
        first(1, refusing(errors.Unavailable("no quorum"))),
        first(1, refusing(errors.ShuttingDown())),
        first(1, refusing(errors.Locked(b"t"))),
        first(2, refusing(errors.WrongGroup(1))),
        first(1, apply_and_drop),
        first(1, drop),
    ],
    ids=["applied, reset", "reset", "3 × applied, reset", "unknown", "busy", "unavailable", "stopping",
         "locked", "wrong group", "applied, reply lost", "lost"],
)  # fmt: skip
def test_a_retried_write_is_the_same_request_and_applies_once(fault: Rule) -> None:
    async def run(cluster: FakeCluster) -> None:
        async with client(cluster, timeout_s=4) as kv:
            await kv.get(key_of(1))
            before = kv.retries
            cluster.everywhere(1, on_verb(Verb.WRITE, fault))
            version = await kv.append(key_of(1), b"x")
            assert version == 1
            assert kv.retries - before == len(cluster.asked(Verb.WRITE)) - 1
        attempts = cluster.asked(Verb.WRITE)
        assert len(attempts) >= 2
        assert len(identities(attempts)) == 1
        assert len(cluster.applied) == 1
        assert cluster.data[key_of(1)] == (b"x", 1)

    with_cluster(run)


def test_a_lost_reply_costs_the_patience_for_one_attempt_only() -> None:
    async def run(cluster: FakeCluster) -> None:
        cluster.groups[1][0].rules.append(on_verb(Verb.WRITE, apply_and_drop))
        async with client(cluster, timeout_s=2) as kv:
            write = asyncio.ensure_future(kv.put(key_of(1), b"x"))
            await asyncio.sleep(0.1)
            cluster.leaders[1] = cluster.groups[1][1]  # the old leader is cut off from its group
            started = time.monotonic()
            assert await write == 1
            assert time.monotonic() - started < 1.5

    with_cluster(run)


def test_an_abandoned_seq_is_acknowledged_so_that_it_can_not_apply_later() -> None:
    async def run(cluster: FakeCluster) -> None:
        rule = on_verb(Verb.WRITE, drop)
        cluster.everywhere(1, rule)
        async with client(cluster, timeout_s=0.3) as kv:
            with pytest.raises(OutcomeUnknown):
                await kv.put(key_of(1), b"lost")
            for server in cluster.groups[1]:
                server.rules.clear()
                server.requests.clear()
            await asyncio.sleep(1.0)  # the silent ones are suspect for a while
            await kv.put(key_of(1), b"next")
        asked = [a.command[3:5] for a in cluster.asked(Verb.WRITE) if a.command[7] == b"next"]
        assert asked and all(header == [2, 2] for header in asked)  # seq 2, and nothing before it is awaited

    with_cluster(run)


def test_an_expired_first_attempt_begins_again_with_a_new_stamp() -> None:
    async def run(cluster: FakeCluster) -> None:
        async with client(cluster) as kv:
            await kv.get(key_of(1))
            cluster.map_time_ms = 9_000_000
            cluster.groups[1][0].rules.append(on_verb(Verb.WRITE, first(1, refusing(errors.Expired("old")))))
            await kv.put(key_of(1), b"x")
            stamps = [asked.command[5] for asked in cluster.asked(Verb.WRITE)]
            assert stamps == [1_000, 9_000_000]
            assert len({asked.command[3] for asked in cluster.asked(Verb.WRITE)}) == 1

    with_cluster(run)


def test_an_expired_retry_is_unknown_and_keeps_its_stamp() -> None:
    async def run(cluster: FakeCluster) -> None:
        faults = [first(1, apply_and_reset), first(9, refusing(errors.Expired("old")))]
        for fault in faults:
            cluster.everywhere(1, on_verb(Verb.WRITE, fault))
        async with client(cluster) as kv:
            with pytest.raises(OutcomeUnknown):
                await kv.put(key_of(1), b"x")
        assert len(identities(cluster.asked(Verb.WRITE))) == 1

    with_cluster(run)


# Definiteness -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("faults", "expected"),
    [
        ([refusing(errors.Busy("full"))], errors.Busy),
        ([refusing(errors.Locked(b"t"))], errors.Locked),
        ([refusing(errors.Unavailable("no quorum"))], Timeout),
        ([refusing(errors.NotLeader(None))], Timeout),
        ([refusing(errors.WrongGroup(1))], Timeout),
        ([first(1, drop), refusing(errors.Busy("full"))], OutcomeUnknown),
        ([first(1, reset), refusing(errors.Locked(b"t"))], OutcomeUnknown),
        ([first(1, apply_and_reset), refusing(errors.WrongGroup(1))], OutcomeUnknown),
        ([first(1, reset), refusing(errors.NotLeader(None))], OutcomeUnknown),
        ([first(1, refusing(errors.OutcomeUnknown("x"))), refusing(errors.Busy("full"))], OutcomeUnknown),
        ([first(1, reset), refusing(errors.BadRequest("bad"))], OutcomeUnknown),
        ([refusing(errors.BadRequest("bad"))], errors.BadRequest),
        ([refusing(errors.TooLarge("the value with the suffix", 9))], errors.TooLarge),
        ([first(1, reset), refusing(errors.CasMismatch(b"c", 1))], errors.CasMismatch),
        ([first(1, reset), refusing(errors.VersionMismatch(4))], errors.VersionMismatch),
        ([drop], OutcomeUnknown),
        ([reset], OutcomeUnknown),
    ],
)
def test_how_a_write_ends(faults: list[Rule], expected: type[RaftKVError], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "ATTEMPT_S_MIN", 0.3)  # an answer that is a bit late is in time all the same

    async def run(cluster: FakeCluster) -> None:
        async with client(cluster, timeout_s=0.7) as kv:
            await kv.get(key_of(1))
            for fault in faults:
                cluster.everywhere(1, on_verb(Verb.WRITE, fault))
            started = time.monotonic()
            with pytest.raises(expected) as caught:
                await kv.put(key_of(1), b"x")
            assert type(caught.value) is expected
            assert time.monotonic() - started < 2.5
            assert str(caught.value).isprintable()

    with_cluster(run)


@pytest.mark.parametrize("reply", [None, [], [0], ["0", 1], [0, "1"], [0, None], {}, [1], [12, 5], [999, "?"]])
def test_a_reply_that_is_none_leaves_a_write_unknown(reply: Any) -> None:
    async def run(cluster: FakeCluster) -> None:
        def nonsense(asked: Asked) -> bool:
            asked.reply(reply)
            return True

        cluster.everywhere(1, nonsense)
        async with client(cluster) as kv:
            with pytest.raises(OutcomeUnknown):
                await kv.put(key_of(1), b"x")
            with pytest.raises(OutcomeUnknown):
                await kv.delete(key_of(1))
            with pytest.raises(errors.ServerError):
                await kv.get(key_of(1))
            with pytest.raises(errors.ServerError):
                await anext(kv.scan())

    with_cluster(run)


# Leaders and replicas -------------------------------------------------------------------------------------


def test_the_leader_is_found_once_and_remembered() -> None:
    async def run(cluster: FakeCluster) -> None:
        cluster.leaders[1] = cluster.groups[1][2]
        async with client(cluster) as kv:
            for n in range(20):
                await kv.put(key_of(1), b"%d" % n)
        misses = [len(server.asked(Verb.WRITE)) for server in cluster.groups[1][:2]]
        assert sum(misses) <= 1  # its hint led to the leader
        assert len(cluster.asked(Verb.CONFIG)) <= 2

    with_cluster(run)


def test_a_new_leader_is_found_when_the_old_one_dies() -> None:
    async def run(cluster: FakeCluster) -> None:
        async with client(cluster) as kv:
            await kv.put(key_of(1), b"0")
            cluster.groups[1][0].stop()
            cluster.leaders[1] = None

            async def elect() -> None:
                await asyncio.sleep(0.5)
                cluster.leaders[1] = cluster.groups[1][1]

            election = asyncio.ensure_future(elect())
            started = time.monotonic()
            await asyncio.gather(*(kv.put(key_of(1, n), b"1") for n in range(20)))
            assert time.monotonic() - started < 2.0
            await election

    with_cluster(run)


def test_a_stale_hint_to_a_dead_leader_is_not_followed_for_ever() -> None:
    async def run(cluster: FakeCluster) -> None:
        dead = cluster.groups[1][0]
        async with client(cluster, timeout_s=3) as kv:
            await kv.put(key_of(1), b"0")
            dead.stop()  # and the others go on naming it, until one of them is elected
            write = asyncio.ensure_future(kv.put(key_of(1), b"1"))
            await asyncio.sleep(0.7)
            cluster.leaders[1] = cluster.groups[1][2]
            started = time.monotonic()
            await write
            assert time.monotonic() - started < 1.0

    with_cluster(run)


def test_a_server_restart_is_invisible() -> None:
    async def run(cluster: FakeCluster) -> None:
        async with client(cluster) as kv:
            await kv.put(key_of(1), b"0")
            leader = cluster.groups[1][0]
            for n in range(3):
                leader.stop()
                await leader.start()
                await kv.put(key_of(1), b"%d" % n)
                assert await kv.get(key_of(1)) is not None

    with_cluster(run)


@pytest.mark.parametrize(("silence", "found_s"), [("answers nothing", 2.5), ("says no hello", CONNECT_TIMEOUT_S)])
def test_a_silent_replica_does_not_eat_the_deadline_of_a_read(silence: str, found_s: float) -> None:
    async def run(cluster: FakeCluster) -> None:
        mute = cluster.groups[1][0]
        if silence == "says no hello":
            mute.says_hello = False
        else:
            mute.rules.append(drop)
        cluster.leaders[1] = cluster.groups[1][1]
        async with client(cluster, timeout_s=4) as kv:
            kv._cluster.router._groups.clear()
            await kv._cluster.router.shard_map(kv._cluster.call("warm up"))
            kv._cluster.router._groups[1].leader = mute.address
            started = time.monotonic()
            assert await kv.get(key_of(1)) is None
            assert time.monotonic() - started < found_s
            started = time.monotonic()
            assert await kv.get(key_of(1)) is None
            assert time.monotonic() - started < 0.8  # the next one knows

    with_cluster(run)


def test_dialling_goes_on_while_others_are_asked() -> None:
    async def run(cluster: FakeCluster) -> None:
        slow, *others = cluster.groups[1]
        slow.says_hello = False
        for other in others:
            other.stop()

        async def greet_late() -> None:
            while not slow.hellos:
                await asyncio.sleep(0.01)
            await asyncio.sleep(1.5 * DIAL_PATIENCE_S)
            slow.greet()

        async with client(cluster, timeout_s=4) as kv:
            late = asyncio.create_task(greet_late())
            assert await kv.get(key_of(1)) is None
            await late
        assert len(slow.hellos) == 1

    with_cluster(run)


def test_a_half_open_connection_is_replaced() -> None:
    async def run(cluster: FakeCluster) -> None:
        async with client(cluster, timeout_s=2) as kv:
            leader = cluster.groups[1][0]
            await kv.put(key_of(1), b"0")
            assert leader._server is not None
            old = list(leader._server.connections)
            for connection in old:
                connection.hold()  # nothing is read from it any more
            assert await kv.put(key_of(1), b"1") == 2
            assert leader.connections >= 1
            assert len(leader.hellos) == 2
            assert cluster.data[key_of(1)][0] == b"1"

    with_cluster(run)


def test_late_replies_keep_a_slow_connection_alive() -> None:
    async def run(cluster: FakeCluster) -> None:
        leader = cluster.groups[1][0]

        def slowly(asked: Asked) -> bool:
            asyncio.get_running_loop().call_later(0.2, asked.server.answer, asked)
            return True

        async with client(cluster, timeout_s=4) as kv:
            await kv.put(key_of(1), b"0")
            leader.rules.append(first(1, lambda asked: asked.verb == Verb.READ))
            leader.rules.append(slowly)
            reads = asyncio.gather(*(kv.get(key_of(1, n)) for n in range(5)))
            await reads
            assert len(leader.hellos) == 1

    with_cluster(run)


def test_reads_may_be_spread_over_followers() -> None:
    async def run(cluster: FakeCluster) -> None:
        def answer(asked: Asked) -> bool:
            asked.reply([b"v", 3])
            return True

        cluster.everywhere(1, on_verb(Verb.READ, answer))
        async with client(cluster, reads="follower") as kv:
            for _ in range(9):
                assert await kv.get(key_of(1)) == Value(b"v", 3)
        counts = [len(server.asked(Verb.READ)) for server in cluster.groups[1]]
        assert counts == [3, 3, 3]
        assert all(asked.body[1] == FOLLOWER_OK for asked in cluster.asked(Verb.READ))

        cluster.groups[1][0].stop()
        async with client(cluster, reads="follower") as kv:
            started = time.monotonic()
            for _ in range(9):
                await kv.get(key_of(1))
            assert time.monotonic() - started < 1.0

    with_cluster(run)


# Deadlines --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["silent", "no hello", "dead", "dead controllers", "silent controllers"])
def test_the_deadline_holds_when_nobody_answers(what: str) -> None:
    async def run(cluster: FakeCluster) -> None:
        targets: list[FakeServer] = cluster.controllers if "controllers" in what else cluster.groups[1]
        for server in targets:
            if "silent" in what:
                server.rules.append(drop)
            elif what == "no hello":
                server.says_hello = False
            else:
                server.stop()
        async with client(cluster, timeout_s=0.7) as kv:
            started = time.monotonic()
            results = await asyncio.gather(
                kv.get(key_of(1)), kv.put(key_of(1), b"x"), kv.append(key_of(1), b"y"), return_exceptions=True
            )
            assert time.monotonic() - started < 1.7
            assert type(results[0]) is Timeout
            sent = what == "silent"
            assert all(type(result) is (OutcomeUnknown if sent else Timeout) for result in results[1:])
            text = str(results[0])
            assert "within 0.7 s" in text
            assert targets[0].address in text
            assert ("the controllers" if "controllers" in what else "group 1") in text
            if "dead" in what:
                assert "connection refused" in text

            if "controllers" not in what:  # the other group is not disturbed
                await kv.put(key_of(2), b"x")

    with_cluster(run)


def test_cancelling_is_clean() -> None:
    async def run(cluster: FakeCluster) -> None:
        cluster.everywhere(1, drop)
        async with client(cluster) as kv:
            await kv.put(key_of(2), b"x")
            writes = [asyncio.ensure_future(kv.put(key_of(1, n), b"x")) for n in range(5)]
            await asyncio.sleep(0.05)
            assert len(kv.unsettled_writes()) == 5
            assert kv.unsettled_writes()[0].startswith("put 'key")
            for write in writes:
                write.cancel()
            results = await asyncio.gather(*writes, return_exceptions=True)
            assert all(isinstance(result, asyncio.CancelledError) for result in results)
            assert kv.unsettled_writes() == []
            assert all(s.in_flight == 0 for s in kv._cluster.sessions._shards.values())
            channel = kv._cluster.pool.ready(cluster.groups[1][0].address)
            assert channel is None or channel.in_flight == 0
            assert await kv.put(key_of(2), b"y") > 0

    with_cluster(run)


def test_one_failure_in_a_gather_leaks_nothing() -> None:
    async def run(cluster: FakeCluster) -> None:
        async with client(cluster) as kv:
            with pytest.raises(errors.TooLarge):
                await asyncio.gather(
                    kv.put(key_of(1), b"x"), kv.put(b"k" * 9000, b""), kv.get(key_of(2)), kv.append(b"a", b"b")
                )
            await asyncio.sleep(0.1)
            assert kv.unsettled_writes() == []
            await kv.put(key_of(1), b"y")

    with_cluster(run)


def test_closing_ends_requests_in_progress() -> None:
    async def run(cluster: FakeCluster) -> None:
        arrived = []

        def lose(asked: Asked) -> bool:
            arrived.append(asked)
            return drop(asked)

        cluster.everywhere(1, lose)
        kv = client(cluster, timeout_s=30)
        await kv.get(key_of(2))
        write = asyncio.ensure_future(kv.put(key_of(1), b"x"))
        read = asyncio.ensure_future(kv.get(key_of(1)))
        while len(arrived) < 2:
            await asyncio.sleep(0.01)
        await kv.close()
        closed_s = time.monotonic()
        with pytest.raises(OutcomeUnknown):
            await write
        with pytest.raises(Unavailable, match="the client was closed"):
            await read
        assert time.monotonic() - closed_s < 10, "they went on until their deadline"
        with pytest.raises(Unavailable, match="the client was closed"):
            await kv.get(key_of(1))

    with_cluster(run)


# Bad input --------------------------------------------------------------------------------------------------


def test_what_can_not_be_sent() -> None:
    async def run(cluster: FakeCluster) -> None:
        async with client(cluster) as kv:
            with pytest.raises(errors.TooLarge, match="the key is larger than the limit of 8192 bytes"):
                await kv.get(b"k" * (KEY_BYTES_MAX + 1))
            with pytest.raises(errors.TooLarge, match="the value"):
                await kv.put(b"k", b"v" * (VALUE_BYTES_MAX + 1))
            with pytest.raises(errors.TooLarge, match="the suffix"):
                await kv.append(b"k", b"v" * (VALUE_BYTES_MAX + 1))
            with pytest.raises(errors.TooLarge, match="the new value"):
                await kv.cas(b"k", b"", b"v" * (VALUE_BYTES_MAX + 1))
            with pytest.raises(TypeError, match="a key must be bytes, not str"):
                await kv.get("k")  # type: ignore[arg-type]
            with pytest.raises(TypeError, match="the value must be bytes, not bytearray"):
                await kv.put(b"k", bytearray())  # type: ignore[arg-type]
            for version in (-1, True, "1"):
                with pytest.raises(errors.BadRequest, match="if_version"):
                    await kv.put(b"k", b"", if_version=version)  # type: ignore[arg-type]
            with pytest.raises(errors.BadRequest, match="limit"):
                await anext(kv.scan(limit=-1))
        assert not cluster.asked(Verb.WRITE)

    with_cluster(run)
    for addresses in ([], ["nonsense"], ["h:0"], ["h:1", "[::1"]):
        with pytest.raises(errors.BadRequest):
            RaftKV(addresses)
    with pytest.raises(errors.BadRequest):
        RaftKV(["h:1"], timeout_s=0)
    with pytest.raises(errors.BadRequest):
        RaftKV(["h:1"], reads="any")  # type: ignore[arg-type]


# Scans ------------------------------------------------------------------------------------------------------


def test_a_scan_in_key_order_over_all_shards() -> None:
    async def run(cluster: FakeCluster) -> None:
        async with client(cluster) as kv:
            await asyncio.gather(*(kv.put(b"k%04d" % n, b"v%d" % n) for n in range(1500)))
            await kv.put(b"other", b"")
            found = [(key, value.value) async for key, value in kv.scan(b"k")]
            assert found == [(b"k%04d" % n, b"v%d" % n) for n in range(1500)]
            assert [key async for key, _ in kv.scan(b"k", limit=7)] == [b"k%04d" % n for n in range(7)]
            assert [key async for key, _ in kv.scan(b"zzz")] == []
            assert len([key async for key, _ in kv.scan()]) == 1501

    with_cluster(run)


def test_a_scan_of_a_whole_tag_asks_one_shard() -> None:
    async def run(cluster: FakeCluster) -> None:
        async with client(cluster) as kv:
            await asyncio.gather(*(kv.put(b"{user}%d" % n, b"") for n in range(5)))
            before = len(cluster.asked(Verb.READ))
            assert len([key async for key, _ in kv.scan(b"{user}")]) == 5
            assert len(cluster.asked(Verb.READ)) == before + 1
            assert len([key async for key, _ in kv.scan(b"{use")]) == 5
            assert len([key async for key, _ in kv.scan(b"{}")]) == 0
            assert len(cluster.asked(Verb.READ)) == before + 1 + 2 * SHARDS

    with_cluster(run)


def test_a_scan_goes_on_when_the_leader_changes() -> None:
    async def run(cluster: FakeCluster) -> None:
        async with client(cluster) as kv:
            await asyncio.gather(*(kv.put(b"k%04d" % n, b"") for n in range(3000)))
            got = []
            async for key, _ in kv.scan(b"k"):
                got.append(key)
                if len(got) == 100:
                    cluster.groups[1][0].stop()
                    cluster.leaders[1] = cluster.groups[1][1]
            assert got == [b"k%04d" % n for n in range(3000)]

    with_cluster(run)


@pytest.mark.parametrize(
    "page",
    [
        [[[b"k1", b"v", 1]]],
        [[[b"k2", b"v", 1], [b"k1", b"v", 1]], False],  # not ascending
        [[[b"x", b"v", 1]], False],  # not with the prefix
        [[], True],  # would never end
        [[[b"k1", b"v"]], False],
        [[["k1", b"v", 1]], False],
        [[b"k1"], False],
        [{}, False],
    ],
)
def test_a_bad_page_is_the_servers_failure(page: Any) -> None:
    async def run(cluster: FakeCluster) -> None:
        def answer(asked: Asked) -> bool:
            assert asked.body[2] == ReadOp.SCAN
            asked.reply(page)
            return True

        cluster.everywhere(1, on_verb(Verb.READ, answer))
        async with client(cluster) as kv:
            with pytest.raises(errors.ServerError):
                async for _ in kv.scan(b"k"):
                    pass

    with_cluster(run)
