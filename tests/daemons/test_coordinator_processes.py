"""Transactions on real daemons: a commit, a leader that dies at a failpoint, and no lock left."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from raftkv.client.controllers import Controllers
from raftkv.client.kv import RaftKV
from raftkv.daemons.group_calls import GroupCalls
from raftkv.machines.slots import shard_of
from raftkv.machines.txn_commands import make_txid
from raftkv.protocol.errors import Busy, RaftKVError, Unavailable
from raftkv.protocol.messages import Hello, Verb
from raftkv.protocol.transactions import CoordinateOp, State, decode_state_reply
from tests.cli.clusters import LocalCluster, run

SHAPE = ("--groups", "2", "--replicas", "1")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LocalCluster]:
    cluster = LocalCluster(tmp_path, SHAPE)
    try:
        yield cluster
    finally:
        cluster.down("--wipe")


def ask(cluster: LocalCluster, *body: Any, within_s: float = 20.0) -> State:
    addresses = cluster.status()["coordinators"]

    async def main() -> State:
        calls = GroupCalls(Hello.of_client, "coordinator")
        deadline = time.monotonic() + within_s
        while True:
            try:
                return decode_state_reply(await calls.ask(1, addresses, Verb.COORDINATE, list(body)))
            except (Busy, Unavailable):
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.05)

    return asyncio.run(main())


def with_client(cluster: LocalCluster, work: Any) -> Any:
    async def main() -> Any:
        async with RaftKV(cluster.controllers.split(",")) as kv:
            result: Coroutine[Any, Any, Any] = work(kv)
            return await result

    return asyncio.run(main())


def keys_of_two_groups(cluster: LocalCluster) -> tuple[bytes, bytes, bytes]:
    """Two keys, and a txid of now."""

    async def main() -> tuple[bytes, bytes, bytes]:
        async with Controllers(cluster.controllers.split(",")) as controllers:
            latest = await controllers.query()
            status = await controllers.status_of(cluster.controllers.split(",")[0])
        one, two = (
            next(b"k%d" % n for n in range(99) if latest.owner(shard_of(b"k%d" % n, 10)) == gid) for gid in (1, 2)
        )
        return one, two, make_txid(status["map_time_ms"], b"entropy8")

    return asyncio.run(main())


def parts_of(value: bytes, *keys: bytes) -> list[list[Any]]:
    return [[shard_of(key, 10), [], [[key, value]]] for key in keys]


def test_a_commit_over_two_groups(cluster: LocalCluster) -> None:
    cluster.up()
    one, two, txid = keys_of_two_groups(cluster)
    assert ask(cluster, CoordinateOp.COMMIT, txid, parts_of(b"v", one, two)) is State.COMMITTED
    assert ask(cluster, CoordinateOp.STATUS, txid) is State.COMMITTED
    assert cluster.kv("get", one).out == cluster.kv("get", two).out == b"v\n"
    for row in cluster.processes():
        cluster.kill(row)
    cluster.up()
    assert ask(cluster, CoordinateOp.STATUS, txid) is State.COMMITTED
    assert cluster.kv("get", two).out == b"v\n"


@pytest.mark.long
@pytest.mark.parametrize(
    ("step", "state"),
    [("coordinator got all votes", State.ABORTED), ("coordinator logged decision", State.COMMITTED)],
)
def test_coordinators_that_die_at_a_step(cluster: LocalCluster, step: str, state: State) -> None:
    arguments = ("raftkv", "local", "up", "--data-dir", str(cluster.data_dir), *SHAPE)
    cluster.controllers = run(*arguments, RAFTKV_FAILPOINTS=f"{step}=crash").out.decode().split()[-1]
    one, two, txid = keys_of_two_groups(cluster)
    body = (CoordinateOp.COMMIT, txid, parts_of(b"v", one, two))
    if state is State.ABORTED:  # one after the other dies of it
        with pytest.raises(RaftKVError):
            ask(cluster, *body, within_s=2.0)
    else:  # the next one finds that it is decided
        assert ask(cluster, *body) is State.COMMITTED
    down = [row["role"] for row in cluster.processes(state="down")]
    assert down and set(down) == {"coordinator"}
    cluster.up()
    assert ask(cluster, CoordinateOp.STATUS, txid) is state
    began = time.monotonic()
    values = with_client(cluster, lambda kv: kv.get(one)), with_client(cluster, lambda kv: kv.get(two))
    assert time.monotonic() - began < 5.0
    assert [value is not None for value in values] == [state is State.COMMITTED] * 2
    if state is State.ABORTED:
        with pytest.raises(RaftKVError):
            ask(cluster, *body)
    else:
        assert ask(cluster, *body) is State.COMMITTED


def test_a_bad_variable_is_one_line(cluster: LocalCluster) -> None:
    arguments = ("raftkv", "controller", "--id", "0", "--listen", "127.0.0.1:1", "--peers", "0=127.0.0.1:1")
    refused = run(*arguments, "--data-dir", str(cluster.data_dir / "x"), RAFTKV_FAILPOINTS="nowhere=crash")
    assert refused.code == 1
    assert refused.err == "raftkv: RAFTKV_FAILPOINTS: 'nowhere=crash' is not NAME=crash or NAME=stall:SECONDS\n"
