"""`Controllers`: changes of the map apply once; queries; status of whoever is asked."""

from __future__ import annotations

import random
import time

import pytest

from raftkv.client import kv
from raftkv.client.cluster import CONTROLLERS_SHARD
from raftkv.client.controllers import GIVE_UP, JOIN, LEAVE, MOVE, Controllers
from raftkv.client.sessions import WINDOW
from raftkv.machines import controller
from raftkv.machines import kv as kv_machine
from raftkv.machines.sessions import SESSION_REPLIES_MAX
from raftkv.protocol import errors
from raftkv.protocol.errors import BadRequest, ConnectFailed, OutcomeUnknown, Timeout
from raftkv.protocol.messages import Verb
from tests.client.fakes import (
    Asked,
    FakeCluster,
    Rule,
    apply_and_drop,
    apply_and_reset,
    drop,
    first,
    on_verb,
    refusing,
    with_cluster,
)


def test_the_commands_are_those_of_the_machines() -> None:
    """The client doesn't import the machines' modules: they take a while, and it needs these numbers only."""
    numbers = (controller.JOIN, controller.LEAVE, controller.MOVE, controller.GIVE_UP)
    assert numbers == (JOIN, LEAVE, MOVE, GIVE_UP)
    assert controller.COMMAND_SHARD == CONTROLLERS_SHARD
    assert (kv.PUT, kv.APPEND, kv.DELETE, kv.CAS) == (
        kv_machine.PUT,
        kv_machine.APPEND,
        kv_machine.DELETE,
        kv_machine.CAS,
    )
    assert WINDOW < SESSION_REPLIES_MAX


def client(cluster: FakeCluster, timeout_s: float = 10.0) -> Controllers:
    return Controllers(cluster.addresses, timeout_s=timeout_s, rng=random.Random(1))


def test_changes_are_commands_with_a_session() -> None:
    async def run(cluster: FakeCluster) -> None:
        async with client(cluster) as controllers:
            assert await controllers.join({2: ["b:1", "b:2"], 1: ["a:1"]}) == 7
            assert await controllers.leave([1, 2]) == 7
            assert await controllers.move(3, 2) == 7
        commands = [asked.command for asked in cluster.asked(Verb.CONTROL) if asked.server is cluster.leaders[0]]
        client_id = commands[0][2]
        assert commands == [
            [JOIN, -1, client_id, 1, 1, 1_000, [[1, ["a:1"]], [2, ["b:1", "b:2"]]]],
            [LEAVE, -1, client_id, 2, 2, 1_000, [1, 2]],
            [MOVE, -1, client_id, 3, 3, 1_000, 3, 2],
        ]

    with_cluster(run)


def test_the_last_group_is_given_up_only_when_none_of_it_answers() -> None:
    async def run(cluster: FakeCluster) -> None:
        gids = sorted(cluster.shard_map.groups)
        async with client(cluster) as controllers:
            assert await controllers.leave(gids[:1], force=True) == 7  # another group is there for the shards
            for server in [server for gid in gids for server in cluster.groups[gid]][1:]:
                server.stop()
            with pytest.raises(errors.BadRequest, match=r"group 1 answers at .*: force is for groups that are lost"):
                await controllers.leave(gids, force=True)
            cluster.groups[gids[0]][0].stop()
            assert await controllers.leave(gids, force=True) == 7
        commands = [command[0] for command in cluster.applied]
        assert commands == [GIVE_UP, GIVE_UP]

    with_cluster(run)


@pytest.mark.parametrize("fault", [apply_and_reset, apply_and_drop, refusing(errors.Unavailable("no quorum"))])
def test_a_repeated_change_is_the_same_request(fault: Rule) -> None:
    async def run(cluster: FakeCluster) -> None:
        cluster.controllers[0].rules.append(on_verb(Verb.CONTROL, first(1, fault)))
        async with client(cluster, timeout_s=4) as controllers:
            assert await controllers.leave([1]) == 7
        assert len(cluster.applied) == 1
        assert len({bytes(asked.body[0]) for asked in cluster.asked(Verb.CONTROL)}) == 1

    with_cluster(run)


@pytest.mark.parametrize(
    "error",
    [
        errors.GroupExists(1),
        errors.NoSuchGroup(1),
        errors.BadShard(99, 10),
        errors.LastGroup(1),
        errors.BadRequest("bad"),
    ],
)
def test_refusals_are_typed_and_unknown_after_a_lost_reply(error: errors.RaftKVError) -> None:
    async def run(cluster: FakeCluster) -> None:
        cluster.controllers[0].rules.append(on_verb(Verb.CONTROL, refusing(error)))
        async with client(cluster) as controllers:
            with pytest.raises(type(error)) as caught:
                await controllers.move(1, 1)
            assert caught.value.fields == error.fields
        cluster.controllers[0].rules.insert(0, on_verb(Verb.CONTROL, first(1, apply_and_reset)))
        async with client(cluster) as controllers:
            with pytest.raises(OutcomeUnknown):
                await controllers.move(1, 1)

    with_cluster(run)


def test_queries() -> None:
    async def run(cluster: FakeCluster) -> None:
        async with client(cluster) as controllers:
            assert await controllers.query() == cluster.shard_map
            assert await controllers.query(1) == cluster.shard_map
            nums = [asked.body for asked in cluster.asked(Verb.CONFIG) if asked.server is cluster.leaders[0]]
            assert nums == [[-1, -1, 0], [1, -1, 0]]
            cluster.everywhere(0, refusing(errors.NoSuchConfig(9)))
            with pytest.raises(errors.NoSuchConfig, match="there is no configuration 9"):
                await controllers.query(9)
            with pytest.raises(BadRequest):
                await controllers.query(-1)

    with_cluster(run)


def test_status_of_each_and_of_any_daemon() -> None:
    async def run(cluster: FakeCluster) -> None:
        cluster.controllers[2].stop()
        async with client(cluster) as controllers:
            answers = await controllers.status()
            assert [type(answer) for answer in answers.values()] == [dict, dict, ConnectFailed]
            assert list(answers) == cluster.addresses
            follower = await controllers.status_of(cluster.groups[2][1].address)
            assert follower == {"role": "shardkv", "replica": 1}
            with pytest.raises(BadRequest):
                await controllers.status_of("nonsense")

    with_cluster(run)


def test_status_of_a_daemon_that_does_not_answer() -> None:
    async def run(cluster: FakeCluster) -> None:
        cluster.controllers[0].rules.append(drop)
        cluster.controllers[1].says_hello = False

        def nonsense(asked: Asked) -> bool:
            asked.reply([1])
            return True

        cluster.controllers[2].rules.append(nonsense)
        async with client(cluster, timeout_s=0.3) as controllers:
            started = time.monotonic()
            for server in cluster.controllers[:2]:
                with pytest.raises(errors.Unavailable, match=r"127.0.0.1:\d+: no (answer|connection) "):
                    await controllers.status_of(server.address)
            assert time.monotonic() - started < 1.5
            with pytest.raises(errors.ServerError):
                await controllers.status_of(cluster.controllers[2].address)

    with_cluster(run)


def test_transfer() -> None:
    async def run(cluster: FakeCluster) -> None:
        def accept(asked: Asked) -> bool:
            asked.reply([])
            return True

        cluster.controllers[0].rules.append(on_verb(Verb.TRANSFER, accept))
        cluster.controllers[1].rules.append(on_verb(Verb.TRANSFER, refusing(errors.NotLeader("h:1"))))
        async with client(cluster) as controllers:
            await controllers.transfer(cluster.controllers[0].address, 2)
            await controllers.transfer(cluster.controllers[0].address)
            with pytest.raises(errors.NotLeader):
                await controllers.transfer(cluster.controllers[1].address)
        assert [asked.body for asked in cluster.controllers[0].asked(Verb.TRANSFER)] == [[2], [-1]]

    with_cluster(run)


def test_the_deadline_without_controllers() -> None:
    async def run(cluster: FakeCluster) -> None:
        for server in cluster.controllers:
            server.stop()
        async with client(cluster, timeout_s=0.4) as controllers:
            started = time.monotonic()
            with pytest.raises(Timeout, match=r"no leader of the controllers answered within 0\.4 s; tried 127"):
                await controllers.query()
            with pytest.raises(Timeout):
                await controllers.leave([1])
            assert time.monotonic() - started < 1.5

    with_cluster(run)


def test_bad_arguments_are_not_sent() -> None:
    async def run(cluster: FakeCluster) -> None:
        async with client(cluster) as controllers:
            refused: list[dict[int, list[str]]] = [{}, {1: []}, {1: ["nonsense"]}]
            for groups in refused:
                with pytest.raises(BadRequest):
                    await controllers.join(groups)
            with pytest.raises(BadRequest):
                await controllers.leave([])
        assert not cluster.asked(Verb.CONTROL)

    with_cluster(run)
