"""The commands of raftkv-ctl on a controller in memory, and what Status calls unhealthy."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from raftkv.cli.command_table import parse
from raftkv.cli.exit_codes import ExitCode, UsageError
from raftkv.cli.health import cluster_health
from raftkv.cli.oneshot import execute
from raftkv.cli.results import ClusterHealth
from raftkv.cli.words import split_words
from raftkv.machines.shard_map import ShardMap
from raftkv.protocol.errors import Unavailable
from tests.cli.fakes import FakeControllers, Shell

INTEGER_MAX = (1 << 63) - 1


def run(shell: Shell, line: str) -> tuple[ExitCode, str]:
    call = parse(shell.table, split_words(line.encode()), environment={}).call()
    code = asyncio.run(execute(shell.session, shell.printer, call))
    return code, shell.out.getvalue().decode()


@pytest.mark.parametrize(
    ("line", "call"),
    [
        ("join 1:h:1,h:2 2:[::1]:3", ("join", {1: ["h:1", "h:2"], 2: ["[::1]:3"]})),
        ("join 1:h:1 --no-wait", ("join", {1: ["h:1"]})),
        ("leave 1,2 3", ("leave", [1, 2, 3])),
        ("move 9 -1", ("move", (9, -1))),
    ],
)
def test_changes(line: str, call: tuple[str, Any]) -> None:
    shell = Shell("raftkv-ctl")
    assert run(shell, line) == (ExitCode.DONE, "OK\n")
    assert shell.fakes.controllers_client.calls[0] == call


def test_the_last_leave_by_force_says_what_is_lost(capsys: pytest.CaptureFixture[str]) -> None:
    shell = Shell("raftkv-ctl")
    client = shell.fakes.controllers_client = FakeControllers(ShardMap(3, (1, 1, 2, 2), {1: ("h:1",), 2: ("h:2",)}))
    assert run(shell, "leave 1 --force --no-wait") == (ExitCode.DONE, "OK\n")
    assert capsys.readouterr().err == ""
    assert run(shell, "leave 1,2 --force --no-wait")[0] is ExitCode.DONE
    assert capsys.readouterr().err == "raftkv-ctl: shards 0-3 are given up with all that was in them\n"
    assert [call for call in client.calls if call[0] != "query"] == [
        ("leave by force", [1]),
        ("leave by force", [1, 2]),
    ]


def test_query() -> None:
    shell = Shell("raftkv-ctl")
    expected = "Config #0: {Num:0 Shards:[0 0 0 0 0 0 0 0 0 0] Groups:map[]}\n"
    assert run(shell, "query") == (ExitCode.DONE, expected)
    assert run(shell, "QUERY 5")[0] is ExitCode.DONE
    assert shell.fakes.controllers_client.calls == [("query", None), ("query", 5)]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("join 1", "Join: 1 is not GID:HOST:PORT,HOST:PORT,…"),
        ("join 1:", "Join: group 1: address '' is not HOST:PORT"),
        ("join 1:h", "Join: group 1: address 'h' is not HOST:PORT"),
        ("join 1:h:1,", "Join: group 1: address '' is not HOST:PORT"),
        ("join x:h:1", "GID: 'x' is not a whole number"),
        ("join 1:h:1,h:1", "Join: group 1 has an address twice"),
        ("join 1:h:1 1:h:2", "Join: group 1 stands there twice"),
        ("leave 1,", "GID: '' is not a whole number"),
        ("leave 1,1", "Leave: a group stands there twice"),
        (
            "move 1 99999999999999999999",
            f"GID: 99999999999999999999 is out of range: it must be between {-INTEGER_MAX} and {INTEGER_MAX}",
        ),
        ("move 1.5 1", "SHARD: '1.5' is not a whole number"),
        ("query -1", f"NUM: -1 is out of range: it must be between 0 and {INTEGER_MAX}"),
        ("join", "Join needs more words: usage: Join GID:ADDR,ADDR,… … [--no-wait]"),
    ],
)
def test_bad_words_are_refused_before_anything_is_sent(line: str, complaint: str) -> None:
    shell = Shell("raftkv-ctl")
    with pytest.raises(UsageError) as caught:
        run(shell, line)
    assert str(caught.value) == complaint
    assert shell.fakes.controllers_client.calls == []


def answer(
    gid: int, replica: int, state: str, *, term: int = 1, commit: int = 10, applied: int = 10, serving: bool = True
) -> Mapping[str, Any]:
    shards = [[shard, "serving" if serving else "importing"] for shard in range(10)]
    return {
        "gid": gid,
        "replica": replica,
        "state": state,
        "term": term,
        "commit_index": commit,
        "applied_index": applied,
        "shards": shards if gid else [],
        "address": f"g{gid}:{replica + 1}",
        "members": members(gid),
    }


def members(gid: int) -> dict[str, str]:
    return {str(replica): f"g{gid}:{replica + 1}" for replica in range(3)}


def healthy() -> FakeControllers:
    """Three controllers and group 1 of three."""
    fake = FakeControllers(ShardMap(1, (1,) * 10, {1: ("g1:1", "g1:2", "g1:3")}))
    for gid in (0, 1):
        for replica in range(3):
            state = "leader" if replica == 0 else "follower"
            fake.statuses[f"g{gid}:{replica + 1}"] = answer(gid, replica, state)
    return fake


CONTROLLERS = ("g0:1", "g0:2", "g0:3")


def health(fake: FakeControllers) -> ClusterHealth:
    return asyncio.run(cluster_health(fake, CONTROLLERS, 5))


def test_a_healthy_cluster() -> None:
    shown = health(healthy())
    assert shown.problems == []
    assert [(replica.role, replica.gid, replica.replica) for replica in shown.replicas] == [
        *(("controller", None, replica) for replica in range(3)),
        *(("shardkv", 1, replica) for replica in range(3)),
    ]
    assert {(shard.gid, shard.state) for shard in shown.shards} == {(1, "serving")}


def test_a_replica_that_is_down() -> None:
    fake = healthy()
    del fake.statuses["g1:2"]
    shown = health(fake)
    assert shown.problems == ["group 1: the replica at g1:2 is down"]
    down = next(replica for replica in shown.replicas if replica.state == "down")
    assert (down.replica, down.address) == (1, "g1:2")  # its peers know its id


def test_one_controller_names_the_others() -> None:
    shown = asyncio.run(cluster_health(healthy(), ("g0:2",), 5))
    assert shown.problems == []
    assert [replica.address for replica in shown.replicas if replica.gid is None] == ["g0:2", "g0:1", "g0:3"]


def test_coordinators_count() -> None:
    """Those that the most advanced of the controllers knows of."""
    fake = healthy()
    registered = [[1, ["t:1", "t:2"]]]
    fake.statuses["g0:2"] = {**answer(0, 1, "follower", applied=9), "coordinators": [[1, ["t:9"]]]}
    fake.statuses["g0:1"] = {**answer(0, 0, "leader"), "coordinators": registered}
    members = {"members": {"0": "t:1", "1": "t:2"}}
    fake.statuses["t:1"] = {**answer(0, 0, "leader"), "gid": 1, **members}
    fake.statuses["t:2"] = {**answer(0, 1, "follower", applied=8), "gid": 1, **members}
    shown = health(fake)
    assert shown.problems == []
    found = [(replica.replica, replica.lag) for replica in shown.replicas if replica.role == "coordinator"]
    assert found == [(0, 0), (1, 2)]
    del fake.statuses["t:1"]
    assert health(fake).problems == [
        "the coordinators: the replica at t:1 is down",
        "the coordinators: no leader",
    ]


def test_a_group_without_a_leader() -> None:
    fake = healthy()
    fake.statuses["g1:1"] = answer(1, 0, "candidate", term=7)
    shown = health(fake)
    assert shown.problems == ["group 1: no leader"]
    assert {replica.lag for replica in shown.replicas if replica.gid == 1} == {None}
    assert {shard.state for shard in shown.shards} == {"unknown"}


def test_a_replica_that_is_no_member() -> None:
    fake = healthy()
    unformed = {"state": "unformed", "term": 0, "waits_for": [0, 2], "shards": []}
    fake.statuses["g1:2"] = {"gid": 1, "replica": 1, "address": "g1:2", "members": members(1), **unformed}
    shown = health(fake)
    assert shown.problems == ["group 1: the replica at g1:2 is no member; it waits for 0, 2"]
    assert next(replica.lag for replica in shown.replicas if replica.address == "g1:2") is None


def test_an_old_leader_does_not_hide_the_new_one() -> None:
    fake = healthy()
    fake.statuses["g1:2"] = answer(1, 1, "leader", term=5, commit=30, applied=28)
    shown = health(fake)
    assert [replica.lag for replica in shown.replicas if replica.gid == 1] == [20, 2, 20]


def test_shards_that_nobody_serves() -> None:
    fake = healthy()
    fake.statuses["g1:1"] = answer(1, 0, "leader", serving=False)
    assert health(fake).problems[0] == "shard 0 is importing at its owner, group 1"
    fake = healthy()
    fake.shard_map = ShardMap(2, (0,) * 10, fake.shard_map.groups)
    assert health(fake).problems == [f"shard {shard} has no owner" for shard in range(10)]


def moving(**changes: Any) -> dict[str, Any]:
    move = {"shard": 0, "from": 2, "to": 1, "config_num": 4, "state": "importing", "phase": "copy", "bytes": 9}
    return {**move, "age_s": 1.5, "waits_for": None, **changes}


def test_a_shard_that_is_being_copied_is_no_problem_until_it_waits() -> None:
    fake = healthy()
    leader = {**answer(1, 0, "leader"), "shards": [[0, "importing"], *([shard, "serving"] for shard in range(1, 10))]}
    fake.statuses["g1:1"] = {**leader, "migrations": [moving()]}
    shown = health(fake)
    assert shown.problems == []
    assert [(shard.shard, shard.state) for shard in shown.shards if shard.state != "serving"] == [(0, "arriving")]
    assert [(move.shard, move.source, move.target, move.size_bytes) for move in shown.moves] == [(0, 2, 1, 9)]
    fake.statuses["g1:1"] = {**leader, "migrations": [moving(waits_for="group 2 has no leader")]}
    assert health(fake).problems == ["shard 0, on its way from group 2 to group 1, waits: group 2 has no leader"]


def test_a_shard_that_is_held_back_on_purpose_is_shown_and_is_no_problem() -> None:
    fake = healthy()
    leader = {**answer(1, 0, "leader"), "shards": [[0, "importing"], *([shard, "serving"] for shard in range(1, 10))]}
    fake.statuses["g1:1"] = {**leader, "migrations": [moving(slowed_by="throttled to 20 MB/s")]}
    shown = health(fake)
    assert shown.problems == []
    assert [(move.waits_for, move.slowed_by) for move in shown.moves] == [(None, "throttled to 20 MB/s")]


def test_a_release_that_is_not_acknowledged() -> None:
    fake = healthy()
    release = moving(phase="release", waits_for="group 2 does not answer at g2:1")
    fake.statuses["g1:1"] = {**answer(1, 0, "leader"), "migrations": [release]}
    shown = health(fake)
    assert {shard.state for shard in shown.shards} == {"serving"}
    assert shown.problems == [
        "the release of shard 0, on its way from group 2 to group 1, waits: group 2 does not answer at g2:1"
    ]


def test_no_groups_at_all_is_healthy() -> None:
    fake = healthy()
    fake.shard_map = ShardMap.initial(10)
    shown = health(fake)
    assert shown.problems == []
    assert {shard.state for shard in shown.shards} == {"no owner"}


def test_an_address_of_another_group() -> None:
    fake = healthy()
    fake.statuses["g1:3"] = answer(2, 0, "follower")
    assert health(fake).problems == ["group 1: g1:3 is a replica of group 2"]


def test_controllers_without_a_leader_are_unhealthy_and_silent_ones_unavailable() -> None:
    fake = healthy()
    fake.error = Unavailable("no leader")
    fake.statuses["g0:1"] = answer(0, 0, "follower")
    assert health(fake).problems == ["the shard map can't be read: no leader", "the controllers: no leader"]
    fake.statuses.clear()
    with pytest.raises(Unavailable):
        health(fake)


def test_status_is_exit_5_when_something_is_wrong() -> None:
    shell = Shell("raftkv-ctl")
    shell.fakes.controllers_client = healthy()
    shell.session.settings = shell.session.settings.__class__("raftkv-ctl", CONTROLLERS)
    assert run(shell, "status")[0] is ExitCode.DONE
    del shell.fakes.controllers_client.statuses["g0:3"]
    assert run(shell, "status")[0] is ExitCode.UNHEALTHY
