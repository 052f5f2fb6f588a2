"""What happens to containers: killed, stopped, cut off, frozen, restarted. The load meanwhile is checked."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.docker import stack
from tests.docker.load import Load

pytestmark = [pytest.mark.docker, pytest.mark.timeout(600), pytest.mark.usefixtures("cluster")]

MORE_ANSWERS = 50
TURNS = 4
GROUP_1 = ("shardkv", 1)


def test_one_container_of_each_group_is_killed(tmp_path: Path) -> None:
    with Load(tmp_path, "killed") as load:
        victims = [stack.leader(role, gid)["container"] for role, gid in stack.GROUPS]
        with load.fault("kill", ", ".join(victims)):
            stack.out("docker", "kill", *victims)
            stack.write_to_every_shard()
        assert not stack.status()["healthy"]
        stack.out("docker", "start", *victims)
        stack.wait_healthy()
        load.wait_for(MORE_ANSWERS)
    print(load.report())


@pytest.mark.parametrize(("role", "gid"), stack.GROUPS, ids=lambda item: str(item or ""))
def test_a_leader_is_cut_off(tmp_path: Path, role: str, gid: int | None) -> None:
    with Load(tmp_path, f"cut-{role}{gid or ''}-") as load:
        victim = stack.leader(role, gid)["container"]
        with load.fault("network disconnect", victim):
            stack.out("docker", "network", "disconnect", stack.NETWORK, victim)
            stack.leader(role, gid, but=victim)
            stack.write_to_every_shard()
        load.wait_for(MORE_ANSWERS)
        with load.fault("network connect", victim):
            stack.out("docker", "network", "connect", stack.NETWORK, victim)
            stack.wait_healthy()
        load.wait_for(MORE_ANSWERS)
    print(load.report())


def test_leaders_are_frozen_and_thaw(tmp_path: Path) -> None:
    with Load(tmp_path, "frozen") as load:
        victims = {(role, gid): stack.leader(role, gid)["container"] for role, gid in stack.GROUPS}
        with load.fault("pause", ", ".join(victims.values())):
            stack.out("docker", "pause", *victims.values())
            stack.write_to_every_shard()
        load.wait_for(MORE_ANSWERS)
        with load.fault("unpause", ", ".join(victims.values())):
            stack.out("docker", "unpause", *victims.values())
            stack.wait_healthy()
        load.wait_for(MORE_ANSWERS)
    print(load.report())


def test_everything_is_restarted_in_turn(tmp_path: Path) -> None:
    """As for an upgrade: each container ends on SIGTERM, and the next one's turn comes when all is well again."""
    began_s = time.monotonic()
    with Load(tmp_path, "rolled") as load:
        for name in stack.in_turn():
            with load.fault("restart", name):
                stack.out("docker", "restart", "--time", "30", name)
                stack.wait_healthy()
                load.wait_for(MORE_ANSWERS)
        rolled_s = time.monotonic() - began_s
    longest_s = max(load.stall_s(event) for event in load.events)
    print(f"\nrolling restart of {len(load.events)} containers in {rolled_s:.0f} s, longest stall {longest_s:.2f} s")
    print(load.report())


def test_a_leader_that_is_stopped_hands_over() -> None:
    before = stack.leader(*GROUP_1)
    stack.out("docker", "stop", before["container"])
    shape = "{{.State.ExitCode}}"
    assert stack.out("docker", "inspect", "--format", shape, before["container"]) == "0\n"
    term = before["term"] + 1
    log = stack.run("docker", "logs", before["container"]).stderr
    assert f"follower in term {term}" in log.split("hands over and stops")[-1], "a successor, before it has gone"
    after = stack.leader(*GROUP_1)
    assert (after["term"], after["container"] != before["container"]) == (term, True)
    stack.out("docker", "start", before["container"])
    stack.wait_healthy()


def test_a_stopped_leader_holds_clients_up_for_less_than_a_killed_one(tmp_path: Path) -> None:
    """What counts is the shortest time in which the group answers nobody, with users who hardly pause: whoever dials a
    container in the moment in which the engine takes its address away waits a little, stopped or killed."""
    shards = [row["shard"] for row in stack.status()["shards"] if row["gid"] == 1]
    with Load(tmp_path, "stopped", transactors=0, think_s=0.004) as load:
        for how in ("stop", "kill") * TURNS:
            victim = stack.leader(*GROUP_1)["container"]
            with load.fault(how, victim):
                stack.out("docker", how, victim)
                stack.write_to_every_shard()
            stack.out("docker", "start", victim)
            stack.wait_healthy()
            load.wait_for(MORE_ANSWERS)
    silences_s: dict[str, list[float]] = {"stop": [], "kill": []}
    for event in load.events:
        silences_s[event.kind].append(round(load.silence_s(event, shards), 2))
    stop_s, kill_s = (min(silences_s[how]) for how in ("stop", "kill"))
    print(
        f"\ns without an answer of group 1: {silences_s}; shortest at docker stop {stop_s / kill_s:.2f} of docker kill"
    )
    print(load.report())
    assert stop_s < kill_s / 2
