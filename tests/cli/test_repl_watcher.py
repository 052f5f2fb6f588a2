"""The watcher: what it says of configurations, leaders and silence, and that it ends when it is told to."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from raftkv.cli import repl_watcher
from raftkv.cli.repl_known import Known
from raftkv.cli.repl_watcher import Notice, Watcher, describe_change, leader_among
from raftkv.machines.shard_map import ShardMap
from tests.cli.fakes import FakeControllers

GROUPS = {1: ("g1:1", "g1:2"), 2: ("g2:1",)}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RETRY_S", "PAUSE_S", "LOOK_S"):
        monkeypatch.setattr(repl_watcher, name, 0.005)


def says(state: str, term: int = 1) -> dict[str, Any]:
    return {"state": state, "term": term}


class World:
    """A cluster in memory with a watcher in front of it."""

    def __init__(self) -> None:
        self.client = FakeControllers(ShardMap(4, (1, 1, 2, 2), GROUPS))
        self.client.statuses = {"c:1": says("leader"), "g1:1": says("leader"), "g1:2": says("follower")}
        self.client.statuses["g2:1"] = says("leader")
        self.said: list[str] = []
        self.changes = 0
        self.known = Known()
        self.watcher = Watcher(self.client, ("c:1",), self.known, self._tell, self._changed)

    async def _tell(self, notice: Notice) -> None:
        self.said.append(notice.text)

    def _changed(self) -> None:
        self.changes += 1

    async def until(self, holds: Callable[[], object]) -> None:
        async with asyncio.timeout(20):
            while not holds():
                await asyncio.sleep(0.002)

    async def looks(self, number: int = 4) -> None:
        """Wait until it has looked so often."""
        before = self.changes
        await self.until(lambda: self.changes >= before + number)


def watch(story: Callable[[World], Awaitable[None]]) -> None:
    async def run() -> None:
        world = World()
        watching = asyncio.get_running_loop().create_task(world.watcher.run())
        await world.until(lambda: world.known.shard_map)
        await world.looks()
        assert world.said == []  # how it is, is no news
        await story(world)
        watching.cancel()
        await asyncio.wait([watching], timeout=5)
        assert watching.done()
        assert world.client.calls[-1] == ("close", None)

    asyncio.run(run())


def test_another_configuration() -> None:
    async def story(world: World) -> None:
        world.client.shard_map = ShardMap(6, (1, 1, 1, 1), {1: GROUPS[1]})
        await world.until(lambda: world.said)
        await world.looks()
        assert world.said == ["configuration 6: group 2 left; 2 shards got another owner"]
        assert world.known.shard_map == world.client.shard_map

    watch(story)


def test_another_leader() -> None:
    async def story(world: World) -> None:
        world.client.statuses |= {"g1:1": says("follower", 2), "g1:2": says("leader", 2)}
        await world.until(lambda: world.said)
        world.client.statuses["g1:1"] = says("leader", 1)  # one that was left behind
        await world.looks()
        assert world.said == ["group 1: g1:2 leads now"]

    watch(story)


def test_no_leader_for_a_while() -> None:
    async def story(world: World) -> None:
        del world.client.statuses["g2:1"]
        world.client.statuses["c:1"] = says("candidate", 2)
        await world.until(lambda: len(world.said) == 2)
        await world.looks()
        assert sorted(world.said) == ["group 2: no leader answers", "the controllers: no leader answers"]
        world.client.statuses["g2:1"] = says("leader", 3)
        await world.until(lambda: len(world.said) == 3)
        assert world.said[2] == "group 2: g2:1 leads now"

    watch(story)


def test_an_election_is_no_news_until_it_is_over() -> None:
    async def story(world: World) -> None:
        world.watcher._silent_looks[1] = -100  # as if a look took long
        world.client.statuses |= {"g1:1": says("candidate", 2), "g1:2": says("candidate", 2)}
        await world.looks()
        world.client.statuses["g1:2"] = says("leader", 3)
        await world.until(lambda: world.said)
        assert world.said == ["group 1: g1:2 leads now"]

    watch(story)


def test_nobody_answers() -> None:
    async def story(world: World) -> None:
        assert world.watcher.connected
        world.client.silent = True
        await world.until(lambda: world.watcher.connected is False)
        world.client.statuses.clear()
        await asyncio.sleep(0.05)
        assert world.said == []  # of the leaders nothing is known then
        world.client.silent = False
        await world.until(lambda: world.watcher.connected)

    watch(story)


def test_a_bug_in_it_is_said_and_ends_it() -> None:
    async def run() -> None:
        world = World()

        async def broken(num: int) -> ShardMap:
            raise ZeroDivisionError("oops")

        world.client.wait_beyond = broken  # type: ignore[method-assign]
        await world.watcher.run()
        assert world.said == ["the cluster is not watched any more: ZeroDivisionError: oops"]
        assert world.client.calls == [("close", None)]

    asyncio.run(run())


def test_changes_in_words() -> None:
    empty = ShardMap.initial(4)
    one = ShardMap(1, (1, 1, 1, 1), {1: GROUPS[1]})
    three = ShardMap(3, (1, 1, 2, 3), {**GROUPS, 3: ("g3:1",)})
    assert describe_change(empty, one) == "configuration 1: group 1 joined; 4 shards got another owner"
    assert describe_change(one, three) == "configuration 3: groups 2, 3 joined; 2 shards got another owner"
    assert describe_change(three, one) == "configuration 1: groups 2, 3 left; 2 shards got another owner"
    moved = ShardMap(4, (1, 1, 1, 3), three.groups)
    assert describe_change(three, moved) == "configuration 4: 1 shard got another owner"
    assert describe_change(one, ShardMap(2, one.owners, one.groups)) == "configuration 2: nothing differs"


def test_the_leader_of_the_highest_term() -> None:
    assert leader_among({"a": says("leader", 2), "b": says("leader", 3), "c": says("follower", 4)}) == ("b", 3)
    assert leader_among({"a": says("follower"), "b": None}) == (None, 0)
