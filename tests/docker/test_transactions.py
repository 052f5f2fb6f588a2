"""The four stories of transactions over several groups, with whole containers as machines.

tests/system/test_transaction_stories.py has them on processes; here the command line is the client.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docker import stack
from tests.docker.load import Load

pytestmark = [pytest.mark.docker, pytest.mark.timeout(600), pytest.mark.usefixtures("cluster")]

KV = ("kv", "raftkv-kv")
TURNS = 3
MORE_ANSWERS = 50
LOCKED_S_MAX = 30
"""Far beyond what is printed."""


def test_three_puts_over_two_groups_commit_together() -> None:
    keys = [*stack.keys_at(1, 2, "three-"), *stack.keys_at(2, 1, "three-")]
    shell = stack.Shell(*KV)
    begun, txid = shell.ask("begin").split()
    assert begun == "OK"
    assert [shell.ask(f"put {key} {number}") for number, key in enumerate(keys)] == ["OK"] * 3
    assert stack.kv("scan", "three-") == "", "nobody else sees them"
    assert shell.ask("commit") == "OK"
    assert sorted(stack.kv("scan", "three-").splitlines()) == sorted(f"{k}\t{n}" for n, k in enumerate(keys))
    assert shell.ask(f"txn status {txid}") == "committed"
    assert shell.end() == (0, "", "")


def test_of_two_that_conflict_exactly_one_commits() -> None:
    one, two = stack.keys_at(1, 1, "both-")[0], stack.keys_at(2, 1, "both-")[0]
    for turn in range(TURNS):
        stack.kv("put", one, "before")
        stack.kv("put", two, "before")
        shells = [stack.Shell(*KV) for _ in range(2)]
        for number, shell in enumerate(shells):
            assert shell.ask("begin").startswith("OK ")
            for key in (one, two):
                assert shell.ask(f"get {key}") == "before"
                assert shell.ask(f"put {key} {number}-{turn}") == "OK"
        for shell in shells:
            shell.say("commit")
        ends = [shell.end() for shell in shells]
        assert sorted(status for status, _, _ in ends) == [0, 7], ends
        statuses = [status for status, _, _ in ends]
        winner, loser = statuses.index(0), statuses.index(7)
        assert ends[winner] == (0, "OK\n", "")
        assert "Commit: conflict: " in ends[loser][2]
        assert [stack.kv("get", key) for key in (one, two)] == [f"{winner}-{turn}\n"] * 2


@pytest.fixture
def coordinators_that_stall(cluster: None, tmp_path: Path) -> Iterator[None]:
    """They have all votes, and don't decide."""
    names = [name for name in stack.DAEMONS if name.startswith("coordinator")]
    stall = {"environment": {"RAFTKV_FAILPOINTS": "coordinator got all votes=stall:120"}}
    override = tmp_path / "stalls.json"
    override.write_text(json.dumps({"services": dict.fromkeys(names, stall)}), encoding="utf-8")
    up = ("up", "-d", "--no-deps")
    stack.compose("-f", "compose/compose.yaml", "-f", str(override), *up, *names)
    stack.wait_healthy()
    yield
    stack.compose(*up, *names)
    stack.wait_healthy()


def test_the_next_leader_clears_the_locks_of_a_coordinator_that_died(coordinators_that_stall: None) -> None:
    keys = [*stack.keys_at(1, 1, "locked-"), *stack.keys_at(2, 1, "locked-")]
    shell = stack.Shell(*KV)
    assert shell.ask("begin").startswith("OK ")
    assert [shell.ask(f"put {key} 1") for key in keys] == ["OK"] * 2
    shell.say("commit")
    wait_locked(gids={1, 2})
    victim = stack.leader("coordinator", None)["container"]
    stack.out("docker", "kill", victim)
    killed_s = time.monotonic()
    stack.leader("coordinator", None, but=victim)
    elected_s = time.monotonic()
    wait_locked(gids=set())
    cleared_s = time.monotonic()
    print(f"\nelected after {elected_s - killed_s:.2f} s, locks cleared {cleared_s - elected_s:.2f} s later")
    status, said, errors = shell.end()
    assert (status in (6, 7), said) == (True, ""), (status, said, errors)
    assert stack.kv("scan", "locked-") == "", "nothing was written"
    assert stack.kv("put", keys[0], "free") == "OK\n"
    stack.out("docker", "start", victim)


def wait_locked(*, gids: set[int]) -> None:
    """Until exactly these groups hold locks, and no transaction is open if there are none."""
    deadline_s = time.monotonic() + LOCKED_S_MAX
    while True:
        found = stack.CTL.ask("txns")
        if found is not None and not found["unlisted"] and not found["unanswered"]:
            holders = {lock["gid"] for lock in found["locks"]}
            if (holders, bool(found["transactions"])) == (gids, bool(gids)):
                return
        assert time.monotonic() < deadline_s, found
        time.sleep(stack.POLL_S)


def test_any_container_crashes_and_comes_back_from_its_volume(tmp_path: Path) -> None:
    """Money is handed on, a ring changes its order and lists grow all the while, in transactions."""
    with Load(tmp_path, "crashed", transactors=3) as load:
        for name in stack.in_turn():
            with load.fault("kill", name):
                stack.out("docker", "kill", name)
                stack.out("docker", "start", name)
                stack.wait_healthy()
                load.wait_for(MORE_ANSWERS)
    outcomes = load.history.header["transactions"]
    wait_locked(gids=set())
    print(load.report())
    print(f"transactions: {outcomes}")
    assert outcomes["transfer ok"] > 10
