"""Each error of the tree ends a command with the exit code of the contract, in one line."""

from __future__ import annotations

import pytest

from raftkv.cli.exit_codes import (
    EXIT_CODE_HELP,
    ExitCode,
    LocalFailure,
    UsageError,
    describe,
    exit_code_of,
    one_line,
)
from raftkv.protocol import errors

CASES: list[tuple[BaseException, int]] = [
    (UsageError("x"), 2),
    (LocalFailure("x"), 1),
    (LocalFailure("x", ExitCode.UNAVAILABLE), 3),
    (KeyboardInterrupt(), 130),
    (errors.NotLeader(None), 3),
    (errors.NotLeader("h:1"), 3),
    (errors.WrongGroup(3, -1), 3),
    (errors.Unavailable("x"), 3),
    (errors.Timeout("x"), 3),
    (errors.ConnectFailed("h:1", "refused"), 3),
    (errors.ShuttingDown(), 3),
    (errors.ConnectionLost("x"), 3),
    (errors.Locked(b"t"), 1),
    (errors.Busy("x"), 1),
    (errors.TooLarge("the key", 8192), 1),
    (errors.BadRequest("x"), 1),
    (errors.CasMismatch(None, 0), 1),
    (errors.CasMismatch(b"a\nb", 4), 1),
    (errors.VersionMismatch(3), 1),
    (errors.NoSuchGroup(9), 1),
    (errors.GroupExists(9), 1),
    (errors.BadShard(99, 10), 1),
    (errors.LastGroup(1), 1),
    (errors.NoSuchConfig(9), 1),
    (errors.WrongCluster(b"a", b"b"), 1),
    (errors.WrongPeer("x"), 1),
    (errors.BadVersion(1, 2), 1),
    (errors.Malformed("x"), 1),
    (errors.ServerError(99, "x"), 1),
    (errors.OutcomeUnknown("put"), 6),
    (errors.Expired("x"), 6),
    (errors.Conflict([b"k"]), 7),
    (errors.Aborted("x"), 7),
    (errors.Interrupted("put"), 130),
]


@pytest.mark.parametrize(("error", "code"), CASES, ids=lambda case: type(case).__name__)
def test_exit_codes(error: BaseException, code: int) -> None:
    assert exit_code_of(error) == code


@pytest.mark.parametrize("error", [case[0] for case in CASES], ids=lambda error: type(error).__name__)
def test_every_error_is_one_line_that_says_something(error: BaseException) -> None:
    text = describe(error, controllers=("c:1", "c:2"))
    assert text
    assert text.isprintable()


def test_an_error_says_where_and_what_to_do() -> None:
    text = describe(errors.Timeout("no leader of group 1 answered in 10 s"), controllers=("c:1", "c:2"))
    assert text == (
        "no leader of group 1 answered in 10 s (controllers c:1, c:2); "
        "look at `raftkv-ctl Status`, or allow more time with --timeout"
    )


def test_who_was_tried_is_where_not_the_controllers_too() -> None:
    text = describe(
        errors.Timeout("no leader of group 1 answered within 3 s; tried a:1 (no answer)"), controllers=("c:1",)
    )
    assert text == (
        "no leader of group 1 answered within 3 s; tried a:1 (no answer); "
        "look at `raftkv-ctl Status`, or allow more time with --timeout"
    )


def test_where_nothing_listens_it_says_what_to_start() -> None:
    tried = "tried a:1 (connection refused), b:1 (connection refused)"
    text = describe(errors.Timeout(f"no leader of the controllers answered within 3 s; {tried}"))
    assert text.endswith(
        "; nothing runs there: `raftkv local up` starts the cluster of this machine, --controllers names another"
    )
    text = describe(errors.Timeout(f"no leader of group 2 answered within 3 s; {tried}"))
    assert text.endswith("; none of them runs: start a majority again; `raftkv-ctl Status` shows all")
    text = describe(errors.Timeout(f"no leader of group 2 answered within 3 s; {tried}, c:1 (no answer)"))
    assert text.endswith("; look at `raftkv-ctl Status`, or allow more time with --timeout")


def test_all_codes_are_documented() -> None:
    assert set(EXIT_CODE_HELP) == set(ExitCode)


def test_control_characters_never_reach_the_terminal() -> None:
    assert one_line("a\nb\x1b[31m\r") == r"a\nb\x1b[31m\r"
