"""The display of `raftkv top`: polls of a cluster in memory, rates between them, and screens as text."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from raftkv.cli.keyboard import keys_of
from raftkv.cli.results import ClusterHealth, MoveHealth, ReplicaHealth, ShardHealth
from raftkv.cli.top_poll import Load, Sample, Watch, rates
from raftkv.cli.top_view import SORTS, View, screenful
from raftkv.machines.shard_map import ShardMap
from raftkv.protocol.errors import Unavailable
from tests.cli.fakes import FakeControllers
from tests.cli.golden import agrees


def replica(
    role: str, gid: int | None, number: int, state: str = "follower", index: int = 100, lag: int = 0
) -> ReplicaHealth:
    address = f"10.0.{gid or 0}.{number}:7000"
    if state == "down":
        return ReplicaHealth(role, gid, number, address, state)
    return ReplicaHealth(role, gid, number, address, state, 3, index, index - lag, lag)


def sample(at_s: float = 10.0, written: int = 0) -> Sample:
    """Three controllers, two groups, a coordinator; the group 1 has committed `written` more."""
    replicas = [
        replica("controller", None, 0, "leader"),
        replica("controller", None, 1),
        replica("controller", None, 2),
        replica("shardkv", 1, 0, index=4000 + written, lag=1200),
        replica("shardkv", 1, 1, "leader", index=4000 + written),
        replica("shardkv", 2, 0, "leader", index=50_000),
        replica("coordinator", None, 9, "leader", index=7),
    ]
    shards = [ShardHealth(shard, 1 + shard // 5, "serving") for shard in range(10)]
    latencies_s = {each.address: 0.001 * (1 + number) for number, each in enumerate(replicas)}
    return Sample(at_s, ClusterHealth(7, replicas, shards, [], []), latencies_s, Load(2, 1.25, 1, 3, 4))


def unwell() -> Sample:
    now = sample()
    replicas = [each if each.gid != 2 else replica("shardkv", 2, 0, "down") for each in now.health.replicas]
    shards = [
        *now.health.shards[:5],
        ShardHealth(5, 2, "arriving"),
        *(ShardHealth(n, 2, "unknown") for n in range(6, 10)),
    ]
    moves = [MoveHealth(5, 1, 2, 7, "copy", 1_234_567, 12.3, "group 2 has no leader that answers")]
    problems = ["group 2: the replica at 10.0.2.0:7000 is down", "group 2: no leader"]
    latencies_s = {address: latency_s for address, latency_s in now.latencies_s.items() if address != "10.0.2.0:7000"}
    return replace(now, health=ClusterHealth(7, replicas, shards, moves, problems), latencies_s=latencies_s)


def screen(before: Sample | None, now: Sample, view: View, columns: int = 80, lines: int = 24, **more: Any) -> str:
    """What a terminal shows, without colour."""
    view.columns = columns
    console = Console(
        file=io.StringIO(),
        width=columns,
        height=lines,
        force_terminal=True,
        no_color=True,
        color_system=None,
        legacy_windows=False,
    )
    shown = screenful(before, now, more.get("age_s", 0.4), more.get("error", ""), "12:34:56", view)
    with console.capture() as captured:
        console.print(shown, end="")
    text = captured.get().replace("\x1b[1m", "").replace("\x1b[2m", "").replace("\x1b[0m", "")
    assert "\x1b" not in text
    assert text.count("\n") == lines - 1
    assert all(len(line) <= columns for line in text.splitlines())
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


def test_a_healthy_cluster() -> None:
    agrees("top-healthy.txt", screen(sample(8.0), sample(10.0, written=5000), View()))


def test_an_unhealthy_one() -> None:
    agrees("top-unhealthy.txt", screen(None, unwell(), View(sort="lag", paused=True), lines=30))


def test_long_texts_give_way() -> None:
    now = unwell()
    move = replace(now.health.moves[0], waits_for="group 2 has no leader that answers, and it is the third time today")
    replicas = [
        replace(each, address=f"a-rather-long-name-{n}.raftkv.svc.cluster.local:7000")
        for n, each in enumerate(now.health.replicas)
    ]
    shards = [ShardHealth(shard, 1 + shard % 2, "serving") for shard in range(60)]
    now = replace(now, health=replace(now.health, moves=[move], replicas=replicas, shards=shards))
    agrees("top-long.txt", screen(None, now, View(), lines=34))


def test_a_low_narrow_screen_scrolls() -> None:
    view = View(first_line=3)
    agrees("top-small.txt", screen(sample(8.0), sample(), view, columns=50, lines=10))
    view.first_line = 1000  # it stops at the end
    shown = screen(None, sample(), view, columns=80, lines=10)
    assert shown.splitlines()[-2].startswith("locks:")
    assert shown.splitlines()[-1].startswith("q quit")
    view.first_line = -5
    assert screen(None, sample(), view, lines=10).splitlines()[1].startswith("GROUP")
    screen(None, sample(), view, lines=3, columns=10)


def test_the_head_says_how_old_it_is() -> None:
    assert "  5 s old" in screen(None, sample(), View(), age_s=5).splitlines()[0]
    assert "NO ANSWER for 5 s: nobody" in screen(None, sample(), View(), age_s=5, error="nobody\n").splitlines()[0]
    assert "Ctrl-C quits" in screen(None, sample(), View(keys=False)).splitlines()[-1]


@pytest.mark.parametrize("sort", SORTS)
def test_it_sorts(sort: str) -> None:
    before, now = sample(8.0), sample(10.0, written=5000)
    now = replace(now, health=replace(now.health, replicas=[*now.health.replicas, replica("shardkv", 2, 1, "down")]))

    def first(reverse: bool) -> list[str]:
        return screen(before, now, View(sort=sort, reverse=reverse)).splitlines()[2].split()

    shown, reversed_ = {
        "group": ("controller", "2"),
        "state": ("2", "1"),
        "lag": ("2", "coordinator"),
        "rate": ("1", "2"),
        "ms": ("2", "controller"),
    }[sort]
    assert first(False)[0] == shown
    assert first(True)[0] == reversed_


def test_rates_are_of_what_was_committed_in_between() -> None:
    assert rates(None, sample()) == {}
    speed = rates(sample(8.0), sample(10.0, written=5000))
    assert speed == {("controller", None): 0, ("shardkv", 1): 2500, ("shardkv", 2): 0, ("coordinator", None): 0}
    assert ("shardkv", 1) not in rates(sample(8.0, written=1), sample(10.0))  # it can't have committed less
    assert ("shardkv", 2) not in rates(unwell(), sample(12.0))
    assert rates(sample(), sample()) == {}


# ---- polls


def status(role: str, gid: int, number: int, state: str = "leader", **more: Any) -> Mapping[str, Any]:
    address = f"{role}{gid}-{number}:1"
    return {
        "role": role, "gid": gid, "replica": number, "address": address, "state": state, "term": 2, "commit_index": 50,
        "applied_index": 50, "members": {str(number): address}, "shards": [], "migrations": [], **more,
    }  # fmt: skip


def cluster() -> FakeControllers:
    groups = {1: ("shardkv1-0:1",), 2: ("shardkv2-0:1",)}
    statuses = [
        status("controller", 0, 0, coordinators=[[1, ["coordinator1-0:1"]]]),
        status(
            "shardkv", 1, 0, shards=[[0, "serving"], [1, "serving"]], prepared=2, explicit_locks=3, waiting_for_locks=1
        ),
        status(
            "shardkv", 2, 0, shards=[[2, "serving"], [3, "serving"]], prepared=1, explicit_locks=0, waiting_for_locks=0
        ),
        status("coordinator", 1, 0, open=2, transactions=[{"age_ms": 700}, {"age_ms": 1500}]),
    ]
    return FakeControllers(ShardMap(3, (1, 1, 2, 2), groups), {answer["address"]: answer for answer in statuses})


def poll(watch: Watch) -> Sample:
    return asyncio.run(watch.poll())


def test_a_poll_has_everything() -> None:
    found = poll(Watch(cluster(), ["controller0-0:1"], 10))
    assert found.health.problems == []
    assert [each.role for each in found.health.replicas] == ["controller", "shardkv", "shardkv", "coordinator"]
    assert found.load == Load(2, 1.5, 3, 3, 1)
    assert set(found.latencies_s) == {each.address for each in found.health.replicas}


def test_it_goes_on_without_controllers_and_without_anybody() -> None:
    client = cluster()
    watch = Watch(client, ["controller0-0:1"], 10)
    poll(watch)
    client.error = Unavailable("no leader")
    del client.statuses["controller0-0:1"]
    found = poll(watch)
    states = {each.address: each.state for each in found.health.replicas}
    assert states == {
        "controller0-0:1": "down", "shardkv1-0:1": "leader", "shardkv2-0:1": "leader", "coordinator1-0:1": "leader",
    }  # fmt: skip
    assert found.health.problems[0] == "the shard map can't be read; configuration 3 is the last that was"
    client.statuses.clear()
    assert {each.state for each in poll(watch).health.replicas} == {"down"}
    with pytest.raises(Unavailable):
        poll(Watch(client, ["controller0-0:1"], 10))  # nobody was ever there


def test_a_silent_daemon_delays_it_for_a_second_at_most() -> None:
    class Silent(FakeControllers):
        async def status_of(self, address: str) -> Mapping[str, Any]:
            if address == "shardkv2-0:1":
                await asyncio.Event().wait()
            return await super().status_of(address)

    made = cluster()
    watch = Watch(Silent(made.shard_map, made.statuses), ["controller0-0:1"], 0.05)
    found = poll(watch)
    assert {each.address: each.state for each in found.health.replicas}["shardkv2-0:1"] == "down"


def test_keys() -> None:
    assert keys_of("qs\x1b[A\x1b[B\x1bOA\x1b[5~p") == ["q", "s", "up", "down", "up", "pageup", "p"]
    assert keys_of("\x1b") == keys_of("\x1b[") == keys_of("\x1b[1;5C") == []
    assert keys_of("\x1b[1;5Cq") == ["q"]
