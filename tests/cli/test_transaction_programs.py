"""The real programs and their transactions on a scripted cluster of real machines: output, exits, the shell."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from raftkv.protocol.messages import Verb
from tests.cli.clusters import BIN, Ran, clean_environment, run
from tests.cli.terminal import Terminal
from tests.client.fakes import apply_and_drop, drop, on_verb
from tests.client.served import Served
from tests.client.txn_fakes import COORDINATORS, SHARDS, TxnCluster, key_at

A, C = key_at(0), key_at(1)
"""At group 1 and at group 2."""


class Store(Served):
    """The cluster, and programs that find it."""

    cluster: TxnCluster

    def kv(self, *arguments: str | bytes, stdin: bytes = b"") -> Ran:
        return run("raftkv-kv", *arguments, stdin=stdin, RAFTKV_CONTROLLERS=self.controllers, RAFTKV_TIMEOUT="5")

    @property
    def controllers(self) -> str:
        return ",".join(self.cluster.addresses)


@pytest.fixture
def store() -> Iterator[Store]:
    made = Store(TxnCluster(shards=SHARDS))
    yield made
    made.stop()


def test_a_script_commits_over_two_groups(store: Store) -> None:
    lines = [b"begin", b"put %s 1" % A, b"get %s" % A, b"append %s 2" % C, b"lock %s" % C, b"commit", b"get %s" % C]
    ran = store.kv(stdin=b"\n".join(lines))
    assert (ran.code, ran.err) == (0, "")
    begun, *rest = ran.out.splitlines()
    assert rest == [b"OK", b"1", b"OK", b"OK", b"OK", b"2"]
    txid = begun.split()[1]
    assert len(txid) == 32
    assert store.kv("txn", "status", txid).out == b"committed\n"
    assert store.kv("txn", "status", "0" * 32).out == b"expired\n"


def test_a_conflict_is_exit_7_and_says_on_what(store: Store) -> None:
    with subprocess.Popen(
        [str(BIN / "raftkv-kv"), "--controllers", store.controllers],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=clean_environment(),
    ) as script:
        assert script.stdin is not None
        assert script.stdout is not None
        script.stdin.write(b"put %s 1\nbegin\nget %s\nput %s 2\n" % (A, A, C))
        script.stdin.flush()
        answers = [script.stdout.readline() for _ in range(4)]
        assert answers[1].startswith(b"OK 0")
        assert store.kv("put", A, "other").code == 0
        out, err = script.communicate(b"commit\nput %s 3\n" % C, timeout=30)
        assert (script.returncode, out) == (7, b"")
    assert err.decode() == (
        f"raftkv-kv: line 5: Commit: conflict: somebody else was first with '{A.decode()}'; "
        "nothing was written; run the transaction again\n"
    )
    assert store.cluster.value(C) is None


def test_an_unknown_outcome_is_exit_6_and_the_status_tells_later(store: Store) -> None:
    store.do(lambda: store.cluster.everywhere(1, on_verb(Verb.TXN, apply_and_drop)))
    store.do(lambda: store.cluster.everywhere(COORDINATORS, drop))
    ran = store.kv("--timeout", "2", stdin=b"put %s 0\nbegin\nput %s 1\ncommit\n" % (A, A))
    assert ran.code == 6
    txid = ran.out.split()[2].decode()
    assert ran.err.startswith(
        f"raftkv-kv: line 4: Commit: outcome unknown: transaction {txid} may be committed, or may "
    )
    assert ran.err.endswith(f"`Txn resolve {txid}` settles it, do not run it again before\n")
    for servers in (*store.cluster.groups.values(), store.cluster.coordinators):
        for server in servers:
            server.rules.clear()
    assert store.kv("txn", "status", txid).out == b"committed\n"


@pytest.mark.parametrize("arguments", [("begin",), ("commit",), ("get", "k", "--for-update"), ("lock", "k")])
def test_one_shot_commands_have_none(store: Store, arguments: tuple[str, ...]) -> None:
    ran = store.kv(*arguments)
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, b"", 1)


def test_a_script_that_ends_inside_one(store: Store) -> None:
    ran = store.kv(stdin=b"begin\nput %s 1\nlock %s\n" % (A, C))
    assert ran.code == 2
    assert "was open at the end: aborted, nothing was written" in ran.err
    assert store.cluster.value(A) is None
    assert store.cluster.locks() == 0


def test_several_groups_without_coordinators(store: Store) -> None:
    store.cluster.with_coordinators = False
    ran = store.kv(stdin=b"begin\nput %s 1\nput %s 1\ncommit\n" % (A, C))
    assert ran.code == 3
    assert "its keys are at several groups, and no coordinator is registered; nothing was written" in ran.err


def test_the_shell(store: Store, tmp_path: Path) -> None:
    shell = Terminal("raftkv-kv", controllers=store.controllers, state_home=tmp_path)
    plain = shell.prompt

    def inside(operations: int) -> str:
        return f"{plain[:-1]} (txn: {operations})>"

    def ask(line: str, then: str) -> list[str]:
        before = shell.prompt
        shell.type(line)
        shell.send("\r")
        shell.prompt = then
        shell.wait_for_prompt()
        lines = shell.lines()
        typed = max(i for i, shown in enumerate(lines) if shown == f"{before} {line}")
        silent = ": no leader answers"  # the shell's watcher asks for STATUS, which nobody here knows
        return [shown for shown in lines[typed + 1 : -1] if not shown.endswith(silent)]

    key = A.decode()
    assert ask("begin", inside(0))[0].startswith("OK 0")
    assert ask(f"put {key} 1", inside(1)) == ["OK"]
    assert ask(f"get {key}", inside(2)) == ["1"]
    assert ask("scan", inside(2)) == ["Scan is not allowed inside a transaction; Commit or Abort it first"]
    assert ask("commit", plain) == ["OK"]
    assert ask("commit", plain) == ["Commit: no transaction is open; Begin opens one"]
    assert ask("begin", inside(0))[0].startswith("OK 0")
    assert ask(f"get {key} --for-update", inside(1)) == ["1"]
    question = "A transaction is open. Abort it and leave? (y/n)"
    shell.send("\x04")
    time.sleep(0.3)
    shell.prompt = question
    shell.wait_for_prompt()
    shell.prompt = inside(1)
    shell.send("n\r")
    time.sleep(0.3)
    shell.wait_for_prompt()
    assert store.cluster.locks() == 1
    shell.send("exit\r")
    time.sleep(0.3)
    shell.prompt = question
    shell.wait_for_prompt()
    shell.send("y\r")
    assert shell.wait_for_end() == 0
    assert store.cluster.locks() == 0


def test_plain_commands_do_not_load_transactions() -> None:
    code = (
        "import sys\nimport raftkv.cli.programs, raftkv.cli.kv_commands, raftkv.client.kv\n"
        "print([name for name in sys.modules if 'transactions' in name or 'commit' in name or 'attempts' in name])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=True)
    assert done.stdout.decode().strip() == "[]"
