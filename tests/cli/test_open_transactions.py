"""`raftkv-ctl Txns`: what the leaders say, in all three forms, and who didn't say."""

from __future__ import annotations

import json
from typing import Any

import pytest

from raftkv.cli.exit_codes import ExitCode
from raftkv.machines.shard_map import ShardMap
from tests.cli.fakes import FakeControllers, Shell
from tests.cli.test_ctl_commands import run

OLD, NEW = bytes(15) + b"\x01", bytes(15) + b"\x02"


def status(state: str, term: int = 1, **fields: Any) -> dict[str, Any]:
    return {"state": state, "term": term, **fields}


def shell(output: str = "plain", **statuses: dict[str, Any]) -> Shell:
    made = Shell("raftkv-ctl", output)
    client = FakeControllers(ShardMap(3, (1, 2), {1: ("g1:1", "g1:2"), 2: ("g2:1",)}))
    client.coordinator_groups = {9: ["c:1", "c:2"]}
    client.statuses = {
        "c:1": status("follower"),
        "c:2": status(
            "leader",
            transactions=[
                {"txid": NEW, "state": "begun", "shards": [0, 1], "age_ms": 1500},
                {"txid": OLD.hex(), "state": "COMMITTED", "shards": [1], "age_ms": 61_000},
            ],
        ),
        "g1:1": status("leader", 3, locks=[{"txid": OLD, "shard": 0, "keys": [], "kind": "stale", "age_ms": 0}]),
        "g1:2": status(
            "leader",
            4,
            locks=[{"txid": NEW, "shard": 0, "keys": [b"a", b"\xff\n"], "kind": "prepared", "age_ms": 900}],
        ),
        "g2:1": status("leader"),
        **{name.replace("_", ":"): answer for name, answer in statuses.items()},
    }
    made.fakes.controllers_client = client
    return made


@pytest.mark.parametrize("output", ["plain", "table"])
def test_for_people(output: str) -> None:
    code, out = run(shell(output), "txns")
    assert code is ExitCode.DONE
    assert out.splitlines() == [
        "TXID                              STATE      COORDINATOR  SHARDS  SECONDS",
        f"{OLD.hex()}  committed  9            1       61",
        f"{NEW.hex()}  begun      9            0-1     2",
        "",
        "TXID                              GROUP  SHARD  LOCKS     SECONDS  KEYS",
        f"{NEW.hex()}  1      0      prepared  1        a \\xff\\n",
        "",
        "2 open transactions over several groups; 1 transaction with locks",
    ]


def test_json() -> None:
    code, out = run(shell("json"), "txns")
    assert code is ExitCode.DONE
    assert json.loads(out) == {
        "transactions": [
            {"txid": OLD.hex(), "state": "committed", "coordinator": 9, "shards": [1], "age_s": 61.0},
            {"txid": NEW.hex(), "state": "begun", "coordinator": 9, "shards": [0, 1], "age_s": 1.5},
        ],
        "locks": [
            {
                "txid": NEW.hex(), "gid": 1, "shard": 0, "kind": "prepared", "keys": ["a", {"b64": "/wo="}],
                "age_s": 0.9,
            },
        ],
        "unlisted": [],
        "unanswered": [],
    }  # fmt: skip


def test_who_does_not_say() -> None:
    code, out = run(shell(c_2=status("candidate"), g2_1=status("follower")), "txns")
    assert code is ExitCode.UNHEALTHY
    assert out.splitlines()[-2:] == [
        "UNKNOWN: no leader of the coordinators (group 9) answers",
        "UNKNOWN: no leader of group 2 answers",
    ]


def test_nothing_is_open() -> None:
    made = shell(c_2=status("leader"), g1_2=status("leader", 5))
    assert run(made, "txns") == (
        ExitCode.DONE,
        "0 open transactions over several groups; 0 transactions with locks\n",
    )


def test_who_only_counts() -> None:
    counted = {"open": 2, "in_progress": 1}
    made = shell(
        c_2=status("leader", transactions=counted),
        g1_2=status("leader", 5, prepared=1, explicit_locks=2),
        g2_1=status("leader", prepared=0, explicit_locks=0),
    )
    assert run(made, "txns") == (
        ExitCode.DONE,
        "not listed: the coordinators (group 9) have 2 open transactions\n"
        "not listed: group 1 has 1 prepared, and 2 keys locked explicitly\n",
    )
