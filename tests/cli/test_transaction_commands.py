"""Transactions on the command line: Begin to Commit in a script, what stops one, and what each end says."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from raftkv.cli.command_table import Call, parse
from raftkv.cli.exit_codes import ExitCode, UsageError
from raftkv.cli.oneshot import run_one
from raftkv.cli.repl_prompt import prompt_pieces
from raftkv.cli.session import Session
from raftkv.cli.words import split_words
from raftkv.client.transactions import TxnPhase
from raftkv.protocol.errors import Aborted, Busy, CommitUnknown, Conflict, Timeout
from tests.cli.fakes import FakeValue, Shell
from tests.cli.test_script import make_script, run

TXID = "0" * 31 + "1"


def call_of(shell: Shell, line: str) -> Call:
    return parse(shell.table, split_words(line.encode()), environment={}, on_a_line=True).call()


def prompt_text(session: Session, operations: int = 0, *, connected: bool = True) -> str:
    return "".join(piece[1] for piece in prompt_pieces(session, "local", operations, connected))


async def say(shell: Shell, line: str) -> bytes:
    """Run a line as the shell does; what it prints."""
    before = len(shell.out.getvalue())
    call = call_of(shell, line)
    await shell.printer.show(await call.command.run(shell.session, call), None)
    return shell.out.getvalue()[before:]


@pytest.mark.parametrize("window", [1, 16])
def test_a_transaction_spans_lines(tmp_path: Path, window: int) -> None:
    shell = Shell()
    text = b"put a 1\nput b 2\nBegin\nget a\nput a x\nappend a y\nget a --for-update\ndelete b\nlock c d\nCommit\n"
    text += b"get a\nscan\n"
    code, out = run(shell, text, tmp_path, window=window)
    assert (code, out.splitlines()) == (
        ExitCode.DONE,
        [b"OK", b"OK", b"OK " + TXID.encode(), b"1", b"OK", b"OK", b"xy", b"OK", b"OK", b"OK", b"xy", b"a\txy"],
    )
    verbs = [verb for verb, _ in shell.fakes.kv_client.order]
    assert verbs.index("txn commit") == len(verbs) - 3  # after all that it commits
    assert shell.fakes.kv_client.aborted == []


def test_abort_forgets_it(tmp_path: Path) -> None:
    shell = Shell(output="json")
    code, out = run(shell, b"begin\nput a 1\nget a\nabort\nget a\n", tmp_path)
    assert code is ExitCode.NOT_FOUND
    assert out.splitlines() == [
        b'{"ok": true, "txid": "%s"}' % TXID.encode(),
        b'{"ok": true}',
        b'{"key": "a", "value": "1", "version": 0}',
        b'{"ok": true}',
        b'{"key": "a", "value": null}',
    ]


def test_one_that_is_open_at_the_end_is_aborted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for end in (b"", b"exit\nput b 1\n"):
        shell = Shell()
        code, _ = run(shell, b"begin\nput a 1\n" + end, tmp_path)
        assert code is ExitCode.USAGE
        assert capsys.readouterr().err == (
            f"raftkv-kv: transaction {TXID} was open at the end: aborted, nothing was written\n"
        )
        assert shell.fakes.kv_client.data == {}
        assert shell.fakes.kv_client.closed


def test_what_stops_a_script_aborts_it_and_keeps_its_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shell = Shell()
    code, _ = run(shell, b"begin\nput a 1\nget nope\ncommit\n", tmp_path)
    assert code is ExitCode.NOT_FOUND
    assert capsys.readouterr().err.splitlines() == [
        "raftkv-kv: line 3: Get nope: key not found",
        f"raftkv-kv: transaction {TXID} was open at the end: aborted, nothing was written",
    ]
    assert shell.fakes.kv_client.data == {}


@pytest.mark.parametrize(
    ("error", "code", "complaint"),
    [
        (Conflict([b"a", b"b c"]), ExitCode.CONFLICT,
         "Commit: conflict: somebody else was first with 'a', 'b c', and has changed or holds it; nothing was written; "
         "run the transaction again"),
        (Aborted("it lost its locks"), ExitCode.CONFLICT,
         "Commit: the transaction was aborted: it lost its locks; nothing was written; run it again"),
        (CommitUnknown(bytes(15) + b"\x01", "no answer"), ExitCode.OUTCOME_UNKNOWN,
         f"Commit: outcome unknown: transaction {TXID} may be committed, or may still be (no answer); "
         f"`Txn resolve {TXID}` settles it, do not run it again before"),
        (Timeout("no leader"), ExitCode.UNAVAILABLE,
         "Commit: no leader (controllers c:1); look at `raftkv-ctl Status`, or allow more time with --timeout"),
    ],
)  # fmt: skip
def test_each_end_of_a_commit(
    tmp_path: Path, error: Exception, code: ExitCode, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shell = Shell()
    shell.fakes.kv_client.errors = {b"commit": error}  # type: ignore[dict-item]
    assert run(shell, b"begin\nput a 1\ncommit\nput b 1\n", tmp_path)[0] is code
    assert capsys.readouterr().err == f"raftkv-kv: line 3: {complaint}\n"
    assert shell.session.transaction is None
    assert shell.fakes.kv_client.data == {}


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        (b"commit", "line 1: Commit: no transaction is open; Begin opens one"),
        (b"abort", "line 1: Abort: no transaction is open; Begin opens one"),
        (b"lock a", "line 1: Lock: no transaction is open; Begin opens one"),
        (b"get a --for-update", "line 1: Get --for-update belongs between Begin and Commit"),
        (b"txn status xyz", "line 1: Txn status: xyz is not a TXID: 32 hexadecimal digits, as Begin prints them"),
        (b"txn status 00", "line 1: Txn status: 00 is not a TXID: 32 hexadecimal digits, as Begin prints them"),
        (b"txn list " + TXID.encode(), "line 1: Txn list: there are Txn status TXID and Txn resolve TXID"),
        (b"txn status", "line 1: Txn needs more words: usage: Txn status|resolve TXID"),
        (b"begin x", "line 1: Begin got too many words: usage: Begin"),
        (b"lock", "line 1: Lock needs more words: usage: Lock KEY …"),
    ],
)
def test_what_makes_no_sense(tmp_path: Path, lines: bytes, complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(Shell(), lines, tmp_path)[0] is ExitCode.USAGE
    assert capsys.readouterr().err == f"raftkv-kv: {complaint}\n"


@pytest.mark.parametrize("line", [b"begin", b"scan", b"cas a 1 2", b"put a 1 --if-version 3"])
def test_what_is_not_allowed_inside(tmp_path: Path, line: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    shell = Shell()
    assert run(shell, b"begin\nput a 1\n" + line + b"\ncommit\n", tmp_path)[0] is ExitCode.USAGE
    assert "is not allowed inside a transaction" in capsys.readouterr().err.splitlines()[0]
    assert shell.fakes.kv_client.data == {}


@pytest.mark.parametrize("window", [1, 16])
@pytest.mark.parametrize(
    "bad",
    [b"put bad 1", b"frobnicate", b'put "', b"scan", b"lock bad"],
    ids=["put", "unknown", "quote", "scan", "lock"],
)
def test_keep_going_never_carries_out_half_a_transaction(
    tmp_path: Path, window: int, bad: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    shell = Shell()
    shell.fakes.kv_client.errors = {b"bad": Busy("full")}
    text = b"begin\nput a 1\n" + bad + b"\nput b 1\ncommit\nput c 1\nget nope\n"
    code, out = run(shell, text, tmp_path, keep_going=True, window=window)
    assert code in (ExitCode.USAGE, ExitCode.REFUSED)
    assert set(shell.fakes.kv_client.data) == {b"c"}
    assert "line 5: Commit: the transaction was aborted: line 3 failed" in capsys.readouterr().err
    assert shell.fakes.kv_client.aborted == [bytes.fromhex(TXID)]
    assert out.splitlines()[-1] == b"OK"


def test_keep_going_skips_what_belongs_to_a_begin_that_failed(tmp_path: Path) -> None:
    shell = Shell()
    shell.fakes.kv_client.errors = {b"begin": Timeout("no leader")}
    code, _ = run(shell, b"begin\nput a 1\ncommit\nput b 1\nbegin\nabort\nput c 1\n", tmp_path, keep_going=True)
    assert code is ExitCode.UNAVAILABLE
    assert set(shell.fakes.kv_client.data) == {b"b", b"c"}


def test_a_missing_key_is_no_failure_for_keep_going(tmp_path: Path) -> None:
    shell = Shell()
    code, _ = run(shell, b"begin\nget nope\nput a 1\ncommit\n", tmp_path, keep_going=True)
    assert code is ExitCode.NOT_FOUND
    assert set(shell.fakes.kv_client.data) == {b"a"}


@pytest.mark.parametrize("line", ["begin", "commit", "abort", "lock a", "get a --for-update"])
def test_one_shot_commands_have_no_transaction(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    shell = Shell()
    code = asyncio.run(run_one(shell.session, shell.printer, call_of(shell, line)))
    assert code is ExitCode.USAGE
    assert capsys.readouterr().err.count("\n") == 1
    assert shell.fakes.kv_client.order == []


def test_the_status_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    async def dialogue() -> None:
        shell = Shell()
        assert await say(shell, f"txn STATUS {TXID}") == b"unknown\n"
        await say(shell, "begin")
        await say(shell, "commit")
        assert await say(shell, f"txn status {TXID}") == b"committed\n"
        assert await say(shell, f"Txn Resolve {TXID}") == b"committed\n"
        assert await say(shell, f"txn status {'0' * 32}") == b"unknown\n"
        assert await say(shell, f"txn resolve {'0' * 32}") == b"aborted\n"

    asyncio.run(dialogue())


def test_the_prompt_shows_it_and_a_lost_one_stays_until_it_is_ended() -> None:
    async def dialogue() -> None:
        shell = Shell()
        client = shell.fakes.kv_client
        assert prompt_text(shell.session) == "raftkv-kv local> "
        await say(shell, "begin")
        assert prompt_text(shell.session, 3) == "raftkv-kv local (txn: 3)> "
        assert prompt_text(shell.session, 3, connected=False) == "raftkv-kv local? (txn: 3)> "
        await say(shell, "put a 1 --timeout 3")
        assert shell.session.transaction is not None
        assert shell.session.transaction.timeout_s == 3
        shell.session.transaction.phase = TxnPhase.ABORTED  # type: ignore[misc]
        assert prompt_text(shell.session) == "raftkv-kv local (txn aborted)> "
        for line in ("put a 2", "get a", "commit"):  # the next line must not go through by itself
            with pytest.raises(Aborted):
                await say(shell, line)
        assert prompt_text(shell.session) == "raftkv-kv local> "
        assert client.data == {}
        client.data[b"k"] = FakeValue(b"v", 1)
        assert await say(shell, "get k") == b"v\n"
        await say(shell, "begin")
        with pytest.raises(UsageError, match="Begin is not allowed inside a transaction"):
            await say(shell, "begin")
        assert await say(shell, "abort") == b"OK\n"

    asyncio.run(dialogue())


def test_ctrl_c_in_a_script_aborts_it_and_a_commit_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    async def interrupted(lines: bytes, gate: bytes) -> Shell:
        shell = Shell()
        shell.fakes.kv_client.gates = {gate: asyncio.Event()}
        read_end, write_end = os.pipe()
        os.write(write_end, lines)
        running = asyncio.get_running_loop().create_task(make_script(shell).run(read_end))
        while not shell.fakes.kv_client.in_flight or shell.session.transaction is None:
            await asyncio.sleep(0.001)
        shell.session.interrupt(running)
        with pytest.raises(asyncio.CancelledError):
            await running
        os.close(read_end)
        os.close(write_end)
        return shell

    shell = asyncio.run(interrupted(b"begin\nput a 1\nget stuck\n", b"stuck"))
    assert shell.fakes.kv_client.aborted == [bytes.fromhex(TXID)]
    assert capsys.readouterr().err == "raftkv-kv: line 3: Get stuck: interrupted; nothing was changed\n"
    shell = asyncio.run(interrupted(b"begin\nput a 1\ncommit\n", b"commit"))
    assert shell.fakes.kv_client.aborted == []
    assert "may be committed, or may still be: `Txn resolve" in capsys.readouterr().err
