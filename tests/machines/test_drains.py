"""Leave of the last group: only when it is empty, and without a write that is acknowledged and lost."""

from __future__ import annotations

import random
from typing import Any

import pytest

from raftkv.machines import kv
from raftkv.machines.drains import DRAIN_MAX_MS
from raftkv.machines.kv import DELETE, PUT, KvMachine
from raftkv.machines.shard_states import ShardState
from tests.machines.support import Client, Controllers, Replica, check_config, config_command, kv_replica, one_group

KEY = b"key"
UNAVAILABLE, LAST_GROUP, DRAIN_OVER, WRONG_GROUP = 10, 26, 30, 2


def drain(group: Replica[KvMachine], num: int, config_num: int = 1) -> list[Any]:
    return group.run_one([kv.DRAIN, num, config_num])


def lift(group: Replica[KvMachine], num: int) -> list[Any]:
    return group.run_one([kv.LIFT, num])


# ---- the controllers


def test_the_last_groups_leave_by_a_drain() -> None:
    controllers = Controllers()
    controllers.join(1, 2)
    controllers.tick(7_000)
    assert controllers.drain(2, 1) == [0, 1]
    assert controllers.machine.drains_over == 0
    assert controllers.leave_drained(1, 2, 1) == [0, 2]
    check_config(controllers.latest, [])
    assert controllers.latest.given_up_ms == 7_000
    assert controllers.machine.drains_over == 1
    assert controllers.leave_drained(1, 2, 1) == [DRAIN_OVER]


def test_one_drain_at_a_time_shared_by_whoever_wants_the_same() -> None:
    controllers = Controllers()
    controllers.join(1)
    assert controllers.drain(1) == controllers.drain(1) == [0, 1]
    assert controllers.lift(1) == [0, 1]
    assert controllers.leave_drained(1, 1) == [DRAIN_OVER]
    assert controllers.drain(1) == [0, 2]
    assert controllers.machine.drains_over == 1
    controllers.lift(1)
    assert controllers.machine.drains_over == 1, "somebody late, about another drain"
    assert controllers.leave_drained(2, 1) == [0, 2]


def test_every_change_of_the_map_ends_a_drain() -> None:
    controllers = Controllers()
    controllers.join(1)
    assert controllers.drain(1) == [0, 1]
    controllers.join(2)
    assert controllers.machine.drains_over == 1
    assert controllers.leave_drained(1, 1) == [DRAIN_OVER]


def test_only_all_groups_of_the_latest_map_are_drained() -> None:
    controllers = Controllers()
    controllers.join(1, 2)
    assert controllers.drain(1) == [DRAIN_OVER], "it isn't the last one"
    assert controllers.drain(1, 2, config_num=0) == [DRAIN_OVER]
    assert controllers.drain(1, 9) == [18, 9]
    for arguments in ([[1, 2], "1"], [[], 1], [[1, 2]], [7, 7]):
        assert controllers.run_one(controllers.client.command(69, *arguments, shard=-1))[0] == 8
    assert controllers.run_one(controllers.client.command(70, None, shard=-1))[0] == 8
    assert controllers.machine.drains_over == 0


def test_a_forgotten_drain_ends() -> None:
    controllers = Controllers()
    controllers.join(1)
    controllers.tick(5_000)
    controllers.drain(1)
    controllers.tick(DRAIN_MAX_MS - 1)
    assert controllers.machine.drains_over == 0
    controllers.machine.load(controllers.engine)
    assert controllers.machine.drains_over == 0
    controllers.tick(1)
    assert controllers.machine.drains_over == 1
    controllers.machine.load(controllers.engine)
    assert controllers.machine.drains_over == 1


# ---- the group


def test_a_drained_group_serves_nothing_until_the_drain_is_lifted() -> None:
    group, client = kv_replica(), Client(1)
    assert group.run_one(client.command(PUT, KEY, b"1", None))[0] == 0
    assert drain(group, 1) == [LAST_GROUP, 1]
    assert group.machine.serves(3)
    assert group.run_one(client.command(DELETE, KEY))[:2] == [0, True]
    assert drain(group, 1) == drain(group, 1) == [0, 1]
    for _ in range(2):
        assert group.machine.drain_num == 1
        assert {state for _, state in group.machine.shard_states()} == {ShardState.DRAINED}
        assert group.machine.awaited_shards() == []
        assert group.run_one(client.command(PUT, KEY, b"2", None)) == [WRONG_GROUP, 1, -1]
        group.machine.load(group.engine)
    assert lift(group, 2) == [0, 1], "of another drain"
    assert lift(group, 1) == lift(group, 1) == [0, 0]
    assert group.run_one(client.command(PUT, KEY, b"3", None))[0] == 0


def test_a_later_drain_takes_over_and_an_earlier_one_is_refused() -> None:
    group = kv_replica()
    assert drain(group, 2) == [0, 2]
    assert drain(group, 1) == [DRAIN_OVER]
    assert drain(group, 3) == [0, 3]
    assert lift(group, 2) == [0, 3]


def test_the_group_and_the_drain_are_of_one_configuration() -> None:
    group = kv_replica()
    assert drain(group, 1, config_num=2)[0] == UNAVAILABLE
    assert drain(group, 1) == [0, 1]
    assert group.run_one(config_command(one_group(num=2))) == [0, 2]
    assert group.machine.drain_num == 0
    assert group.machine.serves(3)
    assert drain(group, 1) == [DRAIN_OVER]


def test_shards_on_their_way_keep_the_group() -> None:
    group = kv_replica(config=one_group(2))
    assert group.run_one(config_command(one_group(1, num=2)))[0] == 0
    assert drain(group, 1, 2) == [UNAVAILABLE, "shards are on their way to or from group 1"]
    group = kv_replica()
    assert group.run_one(config_command(one_group(2, num=2)))[0] == 0
    assert drain(group, 1, 2)[0] == UNAVAILABLE, "it still serves what is another group's by now"


@pytest.mark.parametrize("numbers", [[], [1], [0, 1], [1, None], [1, 1, 1], [2**64 - 1, 1]])
def test_malformed_drains(numbers: list[Any]) -> None:
    assert kv_replica().run_one([kv.DRAIN, *numbers])[0] == 8
    with pytest.raises(Exception, match="clients may not"):
        kv_replica().machine.validate([kv.DRAIN, 1, 1])


# ---- both, with everything late, twice, or never


class World:
    """Controllers, group 1, administrators who let it leave, and a client that writes to it and deletes.

    Group 2 is somewhere else: it may join and leave, and never gets anything. Messages stay in flight for ever.
    """

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.controllers = Controllers()
        self.controllers.join(1)
        self.group = Replica(KvMachine(1))
        self.client = Client(7, stamp_ms=0)
        self.asks: list[tuple[int, int]] = []
        self.drained: set[int] = set()
        self.polls: list[tuple[int, int]] = []
        self.lifts: list[int] = []
        self.live: set[bytes] = set()
        self.leaves = self.lifted = self.refused = 0

    def step(self) -> None:
        action = self.rng.choice([
            self.write, self.delete, self.delete, self.delete, self.begin, self.ask, self.ask, self.leave,
            self.leave, self.give_up, self.poll, self.poll, self.take, self.take, self.take, self.lift, self.change_map,
            self.rejoin, self.tick,
        ])  # fmt: skip
        action()

    def run(self, command: list[Any]) -> bool:
        """Whether the group has executed it. Nothing may be acknowledged that the map has given up already."""
        result = self.group.run_one(command)
        if result[0] != 0:
            assert result[0] in (WRONG_GROUP, 9)
            return False
        known = self.group.machine.config_num
        later = [
            self.controllers.machine.config(num) for num in range(known + 1, self.controllers.machine.config_num + 1)
        ]
        assert not any(config.given_up_ms for config in later), "acknowledged, and lost"
        return True

    def write(self) -> None:
        self.client.stamp_ms = self.controllers.machine.map_time_ms
        key = b"key-%d" % self.rng.randrange(2)
        if self.run(self.client.command(PUT, key, b"v", None)):
            self.live.add(key)

    def delete(self) -> None:
        self.client.stamp_ms = self.controllers.machine.map_time_ms
        key = b"key-%d" % self.rng.randrange(2)
        if self.run(self.client.command(DELETE, key)):
            self.live.discard(key)

    def begin(self) -> None:
        latest = self.controllers.latest
        result = self.controllers.drain(*latest.groups) if latest.groups else [DRAIN_OVER]
        if result[0] == 0:
            self.asks.append((result[1], latest.num))

    def ask(self) -> None:
        if self.asks:
            num, config_num = self.rng.choice(self.asks[-4:])
            result = drain(self.group, num, config_num)
            self.refused += result[0] == LAST_GROUP
            if result[0] == 0:
                self.drained.add(num)

    def leave(self) -> None:
        gids = tuple(self.controllers.latest.groups)
        if self.drained and gids == (1,):  # group 2 would have to agree
            result = self.controllers.leave_drained(self.rng.choice(sorted(self.drained)[-3:]), *gids)
            if result[0] == 0:
                assert not self.live, "left with data"
                self.leaves += 1

    def give_up(self) -> None:
        if self.asks:
            self.controllers.lift(self.rng.choice(self.asks[-3:])[0])

    def poll(self) -> None:
        self.polls.append((self.controllers.machine.config_num, self.controllers.machine.drains_over))

    def take(self) -> None:
        if not self.polls:
            return
        latest, over = self.rng.choice(self.polls[-4:])
        while self.group.machine.config_num < latest:
            config = self.controllers.machine.config(self.group.machine.config_num + 1)
            self.group.run_one(config_command(config))
            if config.given_up_ms:
                self.live.clear()
        if 0 < self.group.machine.drain_num <= over:
            self.lifts.append(self.group.machine.drain_num)

    def lift(self) -> None:
        if self.lifts:
            before = self.group.machine.drain_num
            lift(self.group, self.rng.choice(self.lifts[-3:]))
            self.lifted += self.group.machine.drain_num != before

    def change_map(self) -> None:
        if self.rng.random() < 0.3:
            if 2 in self.controllers.latest.groups:
                self.controllers.leave(2)
            elif self.rng.random() < 0.3 and 1 in self.controllers.latest.groups:
                self.controllers.join(2)

    def rejoin(self) -> None:
        if not self.controllers.latest.groups:
            self.controllers.join(1)

    def tick(self) -> None:
        self.controllers.tick(self.rng.choice([100, 1_000, 20_000]))
        if self.rng.random() < 0.2:
            self.group.machine.load(self.group.engine)
            self.controllers.machine.load(self.controllers.engine)


def test_no_write_is_lost_however_late_anything_comes() -> None:
    leaves = lifted = refused = 0
    for seed in range(60):
        world = World(seed)
        for _ in range(600):
            world.step()
        leaves, lifted, refused = leaves + world.leaves, lifted + world.lifted, refused + world.refused
    assert min(leaves, lifted, refused) > 60, (leaves, lifted, refused)


def test_the_world_notices_a_lift_that_is_taken_from_an_older_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The group takes "no drain went on when I asked" for "my drain is over"."""
    take = World.take

    def take_and_lift(self: World) -> None:
        take(self)
        if self.group.machine.drain_num:
            self.lifts.append(self.group.machine.drain_num)

    monkeypatch.setattr(World, "take", take_and_lift)
    with pytest.raises(AssertionError, match=r"acknowledged, and lost|left with data"):
        test_no_write_is_lost_however_late_anything_comes()
