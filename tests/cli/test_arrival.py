"""Join, Leave and Move wait for what they move; Plan only says what that would be; Status shows it under way."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from prompt_toolkit.output import DummyOutput

from raftkv.cli import arrival, repl
from raftkv.cli.arrival import wait_for_change
from raftkv.cli.command_table import parse
from raftkv.cli.exit_codes import ExitCode, LocalFailure, UsageError
from raftkv.cli.health import cluster_health
from raftkv.cli.oneshot import interrupted, run_one
from raftkv.cli.script import Script
from raftkv.cli.words import split_words
from raftkv.machines.shard_map import ShardMap
from raftkv.protocol.errors import GroupExists, NoSuchGroup, Timeout
from tests.cli.fakes import FakeControllers, Shell
from tests.cli.test_ctl_commands import run

GROUPS = {1: ("g1:1",), 2: ("g2:1",)}
BEFORE = ShardMap(1, (1, 1, 1, 1), {1: GROUPS[1]})
AFTER = ShardMap(2, (1, 1, 2, 2), GROUPS)


def leader(gid: int, serving: list[int], migrations: list[Mapping[str, Any]] | None = None) -> dict[str, Any]:
    return {
        "role": "shardkv" if gid else "controller",
        "cluster_id": "",
        "gid": gid,
        "replica": 0,
        "state": "leader",
        "term": 3,
        "commit_index": 9,
        "applied_index": 9,
        "address": f"g{gid}:1",
        "members": {"0": f"g{gid}:1"},
        "shards": [[shard, "serving"] for shard in serving],
        "migrations": migrations or [],
    }


def moving(shard: int, size_bytes: int = 0, waits_for: str | None = None, phase: str = "copy") -> dict[str, Any]:
    return {"shard": shard, "from": 1, "to": 2, "config_num": 2, "phase": phase, "bytes": size_bytes,
            "age_s": 1.5, "waits_for": waits_for}  # fmt: skip


class Moving(FakeControllers):
    """Group 2 shows one picture after the other; the last one stays."""

    def __init__(self, *pictures: dict[str, Any] | None) -> None:
        super().__init__(AFTER)
        self.pictures = list(pictures)
        self.looks = 0
        self.statuses = {"g1:1": leader(1, [0, 1])}

    async def query(self, num: int | None = None) -> ShardMap:
        return BEFORE if num == 1 else AFTER

    async def status_of(self, address: str) -> Mapping[str, Any]:
        if address == "g2:1":
            picture = self.pictures[min(self.looks, len(self.pictures) - 1)]
            self.looks += 1
            if picture is None:
                raise ConnectionRefusedError(address)
            return picture
        return await super().status_of(address)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrival, "POLL_S", 0.01)
    monkeypatch.setattr(arrival, "POLL_S_MAX", 0.02)


def wait(client: FakeControllers, timeout_s: float = 5.0) -> None:
    asyncio.run(wait_for_change(client, "Join 2", 2, timeout_s))


def test_it_returns_when_all_that_moves_is_served() -> None:
    client = Moving(None, leader(2, [], [moving(2)]), leader(2, [2], [moving(3)]), leader(2, [2, 3]))
    wait(client)
    assert client.looks == 4


def test_what_stays_is_not_waited_for() -> None:
    client = Moving(leader(2, [2, 3]))
    del client.statuses["g1:1"]
    wait(client)


def test_the_timeout_counts_from_the_last_progress() -> None:
    client = Moving(*[leader(2, [], [moving(2, size_bytes)]) for size_bytes in range(20)], leader(2, [2, 3]))
    wait(client, timeout_s=0.1)
    assert client.looks == 21


@pytest.mark.parametrize(
    ("picture", "reason"),
    [
        (None, "group 2 has no leader that answers"),
        (leader(2, []), "group 2 has not begun to fetch shard 2"),
        (leader(2, [], [moving(2)]), "shard 2 from group 1 to 2: copy"),
        (leader(2, [], [moving(2, waits_for="group 1 is away")]), "shard 2 from group 1 to 2: group 1 is away"),
    ],
)
def test_no_progress_ends_it_with_the_reason(picture: dict[str, Any] | None, reason: str) -> None:
    with pytest.raises(LocalFailure) as caught:
        wait(Moving(picture), timeout_s=0.05)
    assert caught.value.exit_code is ExitCode.UNAVAILABLE
    assert "configuration 2 is made, but 2 shards of 2 have not arrived" in str(caught.value)
    assert reason in str(caught.value)


def test_a_join_waits_unless_told_not_to() -> None:
    shell = Shell("raftkv-ctl")
    client = shell.fakes.controllers_client = Moving(leader(2, []))
    client.shard_map = BEFORE  # Join makes number 2
    with pytest.raises(LocalFailure, match="have not arrived"):
        run(shell, "join 2:g2:1 --timeout 50ms")
    assert run(shell, "move 2 2 --no-wait") == (ExitCode.DONE, "OK\n")
    client.pictures = [leader(2, [2, 3])]
    assert run(shell, "move 2 2")[0] is ExitCode.DONE


GO_ON = "the shards go on moving: `raftkv-ctl Status` shows how, `raftkv-ctl Wait` waits for them\n"
INTERRUPTED = f"interrupted; configuration 2 is made, and {GO_ON}"


def waiting_shell() -> Shell:
    shell = Shell("raftkv-ctl")
    shell.fakes.controllers_client = Moving(leader(2, [], [moving(2)]))
    shell.fakes.controllers_client.shard_map = BEFORE  # Move makes number 2
    return shell


async def until_it_waits(shell: Shell) -> None:
    async with asyncio.timeout(10):
        while shell.session.config_made is None:
            await asyncio.sleep(0)


def test_ctrl_c_while_it_waits_says_that_the_configuration_is_made(capsys: pytest.CaptureFixture[str]) -> None:
    shell = waiting_shell()

    async def interrupt(line: bytes) -> None:
        call = parse(shell.table, split_words(line), environment={}).call()
        task = asyncio.create_task(run_one(shell.session, shell.printer, call))
        await until_it_waits(shell)
        shell.session.interrupt(task)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert interrupted(shell.session, call).endswith("nothing was changed")  # the next one begins anew

    asyncio.run(interrupt(b"move 2 2"))
    assert capsys.readouterr().err == f"raftkv-ctl: Move 2: {INTERRUPTED}"


def test_ctrl_c_while_it_waits_in_a_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shell = waiting_shell()
    path = tmp_path / "script"
    path.write_bytes(b"leave 1\nquery\n")

    async def interrupt() -> None:
        with path.open("rb") as file:
            script = Script(shell.session, shell.printer, shell.table, environment={})
            task = asyncio.create_task(script.run(file.fileno()))
            await until_it_waits(shell)
            shell.session.interrupt(task)
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(interrupt())
    assert capsys.readouterr().err == f"raftkv-ctl: line 1: Leave 1: {INTERRUPTED}"


def test_ctrl_c_while_it_waits_in_the_shell(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shell = waiting_shell()

    async def interrupt() -> None:
        typed_in = repl.Shell(
            shell.session, shell.printer, shell.table, {"XDG_STATE_HOME": str(tmp_path)}, screen=DummyOutput()
        )
        task = asyncio.create_task(typed_in.run_line("move 2 2"))
        await until_it_waits(shell)
        os.kill(os.getpid(), signal.SIGINT)
        await task

    before = signal.getsignal(signal.SIGINT)
    try:
        asyncio.run(interrupt())
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == f"Move 2: {INTERRUPTED}"


def test_a_wait_that_ends_leaves_nothing_behind() -> None:
    shell = waiting_shell()
    with pytest.raises(LocalFailure):
        run(shell, "move 2 2 --timeout 50ms")
    assert shell.session.config_made is None
    shell = Shell("raftkv-ctl")
    shell.fakes.controllers_client = Moving(leader(2, [2, 3]))
    shell.fakes.controllers_client.shard_map = BEFORE
    assert run(shell, "move 2 2")[0] is ExitCode.DONE
    assert shell.session.config_made is None


def test_controllers_that_are_lost_while_it_waits_do_not_hide_that_the_configuration_is_made() -> None:
    client = Moving(leader(2, [], [moving(2)]))

    async def lost(num: int | None = None) -> ShardMap:
        raise Timeout("query: no leader of the controllers answered within 10 s")

    client.query = lost  # type: ignore[method-assign]
    with pytest.raises(LocalFailure) as caught:
        wait(client)
    assert caught.value.exit_code is ExitCode.UNAVAILABLE
    assert str(caught.value) == (
        "Join 2: configuration 2 is made; then: query: no leader of the controllers answered within 10 s; " + GO_ON[:-1]
    )


def test_a_repeated_move_waits_for_its_shard_whatever_the_latest_configuration_moved() -> None:
    client = Moving(leader(2, [3], [moving(2)]))
    with pytest.raises(LocalFailure, match="1 shard of 1 has not arrived"):
        asyncio.run(wait_for_change(client, "Move 2", 1, 0.05, 2))
    asyncio.run(wait_for_change(client, "Move 3", 1, 0.05, 3))


def test_wait_waits_for_whatever_is_on_its_way() -> None:
    shell = Shell("raftkv-ctl")
    client = shell.fakes.controllers_client = Moving(None, leader(2, [3], [moving(2)]), leader(2, [2, 3]))
    assert run(shell, "wait") == (ExitCode.DONE, "OK\n")
    assert client.looks == 3
    assert client.calls == []


def test_wait_gives_up_without_progress_and_says_why() -> None:
    shell = Shell("raftkv-ctl")
    shell.fakes.controllers_client = Moving(leader(2, [3], [moving(2, waits_for="group 1 is away")]))
    with pytest.raises(LocalFailure) as caught:
        run(shell, "wait --timeout 50ms")
    assert caught.value.exit_code is ExitCode.UNAVAILABLE
    assert str(caught.value) == (
        "Wait: 1 shard of 4 has not arrived, without progress for 0.05 s: "
        "shard 2 from group 1 to 2: group 1 is away; " + GO_ON[:-1]
    )


def test_wait_has_nothing_to_do_without_groups() -> None:
    assert run(Shell("raftkv-ctl"), "wait") == (ExitCode.DONE, "OK\n")


def test_a_plan_shows_moves_and_changes_nothing() -> None:
    shell = Shell("raftkv-ctl")
    shell.fakes.controllers_client.shard_map = AFTER
    assert run(shell, "plan join 3:h:1") == (ExitCode.DONE, "3\t2\t3\n")
    assert [name for name, _ in shell.fakes.controllers_client.calls] == ["query"]
    shell = Shell("raftkv-ctl", output="json")
    shell.fakes.controllers_client.shard_map = AFTER
    code, out = run(shell, "Plan Leave 1")
    assert (code, out) == (
        ExitCode.DONE,
        '{"moves": [{"shard": 0, "from": 1, "to": 2}, {"shard": 1, "from": 1, "to": 2}]}\n',
    )


@pytest.mark.parametrize(
    ("line", "kind", "complaint"),
    [
        ("plan move 1 2", UsageError, "Plan: move is neither Join nor Leave"),
        ("plan join 3", UsageError, "Join: 3 is not GID:HOST:PORT"),
        ("plan join", UsageError, "Plan needs more words"),
        ("plan join 2:h:1", GroupExists, "group 2 has joined already"),
        ("plan leave 7", NoSuchGroup, "7"),
    ],
)
def test_plans_that_cannot_be(line: str, kind: type[Exception], complaint: str) -> None:
    shell = Shell("raftkv-ctl")
    shell.fakes.controllers_client.shard_map = AFTER
    with pytest.raises(kind) as caught:
        run(shell, line)
    assert complaint in str(caught.value)


def test_status_shows_what_moves_and_complains_of_what_waits() -> None:
    client = Moving(leader(2, [2], [moving(3, 4096)]))
    client.statuses["c:1"] = {**leader(0, []), "gid": 0, "address": "c:1", "members": {"0": "c:1"}}
    health = asyncio.run(cluster_health(client, ["c:1"], 5))
    assert health.problems == []
    assert [(shard.shard, shard.gid, shard.state) for shard in health.shards[2:]] == [
        (2, 2, "serving"),
        (3, 2, "arriving"),
    ]
    (move,) = health.moves
    assert (move.shard, move.source, move.target, move.size_bytes) == (3, 1, 2, 4096)
    client.pictures = [leader(2, [2], [moving(3, waits_for="group 1 has no leader")])]
    health = asyncio.run(cluster_health(client, ["c:1"], 5))
    assert health.problems == ["shard 3, on its way from group 1 to group 2, waits: group 1 has no leader"]
