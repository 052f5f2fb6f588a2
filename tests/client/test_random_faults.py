"""Random faults under concurrent appends: each ends as the client was told, and none applies twice.

Replies are lost before and after the command was applied, commands are applied long after their client gave up,
connections are reset, leaders change, groups refuse. Each append carries a unique token. In the end: acknowledged
tokens are there exactly once, refused ones are not there, unknown ones at most once.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from typing import Any

import msgpack
import pytest

from raftkv.client import retry
from raftkv.client.calls import Caller
from raftkv.client.kv import RaftKV
from raftkv.protocol import errors
from raftkv.protocol.errors import OutcomeUnknown, RaftKVError
from raftkv.protocol.messages import Verb
from tests.client.fakes import Asked, FakeCluster, with_cluster

KEYS = [b"key%d" % n for n in range(6)]


class Chaos:
    """A rule for every server, and a task that moves leaders."""

    def __init__(self, cluster: FakeCluster, rng: random.Random) -> None:
        self.cluster = cluster
        self.rng = rng
        self.on = True
        self.late: list[asyncio.TimerHandle] = []

    def __call__(self, asked: Asked) -> bool:
        if not self.on or self.rng.random() < 0.6:
            return False
        fault = self.rng.choice(
            [self.lose, self.lose_the_reply, self.apply_late, self.reset, self.apply_and_reset, self.refuse]
            if asked.verb == Verb.WRITE
            else [self.reset, self.refuse]
        )
        fault(asked)
        return True

    def apply(self, asked: Asked) -> bool:
        """Carry it out without a word; False if this server may not."""
        try:
            asked.server._body(asked)
        except RaftKVError:
            return False
        return True

    def lose(self, asked: Asked) -> None:
        """Nothing happens, ever."""

    def lose_the_reply(self, asked: Asked) -> None:
        self.apply(asked)

    def apply_late(self, asked: Asked) -> None:
        loop = asyncio.get_running_loop()
        self.late.append(loop.call_later(self.rng.uniform(0.05, 0.6), self.apply, asked))

    def reset(self, asked: Asked) -> None:
        asked.connection.abort()

    def apply_and_reset(self, asked: Asked) -> None:
        self.apply(asked)
        asked.connection.abort()

    def refuse(self, asked: Asked) -> None:
        refusals: list[RaftKVError] = [
            errors.Busy("full"),
            errors.NotLeader(None),
            errors.NotLeader(self.rng.choice(self.cluster.servers).address),
            errors.WrongGroup(1, -1),
            errors.WrongGroup(self.rng.randrange(3), self.rng.choice([1, 2])),
            errors.Unavailable("no quorum"),
        ]
        asked.refuse(self.rng.choice(refusals))

    async def move_leaders(self) -> None:
        while True:
            await asyncio.sleep(self.rng.uniform(0.02, 0.1))
            for gid in self.cluster.gids:
                servers = self.cluster.groups[gid]
                self.cluster.leaders[gid] = self.rng.choice([*servers, None])


def run_seed(seed: int) -> None:
    rng = random.Random(seed)
    told: dict[bytes, str] = {}

    async def work(kv: RaftKV, worker: int) -> None:
        for n in range(12):
            token = b"<%d.%d>" % (worker, n)
            try:
                await kv.append(rng.choice(KEYS), token)
                told[token] = "done"
            except OutcomeUnknown:
                told[token] = "unknown"
            except RaftKVError:
                told[token] = "not done"

    async def run(cluster: FakeCluster) -> None:
        chaos = Chaos(cluster, rng)
        for gid in (0, *cluster.gids):
            cluster.everywhere(gid, chaos)
        moving = asyncio.ensure_future(chaos.move_leaders())
        async with RaftKV(cluster.addresses, timeout_s=0.4, rng=rng) as kv:
            await asyncio.gather(*(work(kv, worker) for worker in range(8)))
            assert kv.unsettled_writes() == []
            chaos.on = False
            moving.cancel()
            await asyncio.gather(moving, return_exceptions=True)
            for gid in cluster.gids:
                cluster.leaders[gid] = cluster.groups[gid][0]
            await asyncio.sleep(0.7)  # what was late has arrived
            kv._cluster.timeout_s = 5
            values = [found.value for found in await asyncio.gather(*map(kv.get, KEYS)) if found is not None]
        everything = b"".join(values)
        for token, fate in told.items():
            count = everything.count(token)
            expected = {"done": (1,), "not done": (0,), "unknown": (0, 1)}[fate]
            assert count in expected, f"seed {seed}: {token!r} was {fate}, and is there {count} times"

    with_cluster(run)
    assert len(told) == 8 * 12


@pytest.mark.parametrize("seed", range(2))
def test_each_write_ends_as_the_client_was_told(seed: int) -> None:
    run_seed(seed)


def test_without_the_definiteness_rule_it_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each attempt judged for itself: a refusal after a lost reply then passes for "not done"."""
    rule = retry.judge

    def forgetful(error: RaftKVError, *, is_write: bool, unknown: bool, what: str) -> retry.Verdict:
        return rule(error, is_write=is_write, unknown=False, what=what)

    monkeypatch.setattr(retry, "judge", forgetful)
    with pytest.raises(AssertionError, match="was not done, and is there 1 times"):
        for seed in range(5):
            run_seed(seed)


def test_without_the_same_seq_for_every_attempt_it_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = Caller.ask
    seqs = itertools.count(1)

    async def with_a_new_seq(
        self: Caller, call: Any, route_of: Any, verb: int, body: Any, decode: Any, *, any_replica: bool = False
    ) -> Any:
        def anew(route: Any) -> list[Any]:
            config_num, encoded = body(route)
            command = msgpack.unpackb(encoded)
            command[3] = command[4] = next(seqs)
            return [config_num, msgpack.packb(command)]

        return await ask(
            self, call, route_of, verb, anew if verb == Verb.WRITE else body, decode, any_replica=any_replica
        )

    monkeypatch.setattr(Caller, "ask", with_a_new_seq)
    with pytest.raises(AssertionError, match=r"and is there [2-9] times"):
        for seed in range(5):
            run_seed(seed)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(98, 120))
def test_each_write_ends_as_the_client_was_told_long(seed: int) -> None:
    run_seed(seed)
