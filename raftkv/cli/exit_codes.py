"""Exit codes, and the one line that an error becomes: what happened, where, what to do next.

The codes are those of the command-line contract and never change their meaning. Nothing here prints.
"""

from __future__ import annotations

import re
from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raftkv.protocol.errors import RaftKVError


class ExitCode(IntEnum):
    """What the exit status of a command says."""

    DONE = 0
    REFUSED = 1  # the server said no: CAS mismatch, bad gid, Locked, Busy, TooLarge, …
    USAGE = 2
    UNAVAILABLE = 3  # no server or no leader before --timeout
    NOT_FOUND = 4  # key not found
    UNHEALTHY = 5
    OUTCOME_UNKNOWN = 6  # or expired: the write may have applied
    CONFLICT = 7  # transaction aborted by a conflict: safe to run again
    INTERRUPTED = 130


EXIT_CODE_HELP = {
    ExitCode.DONE: "done",
    ExitCode.REFUSED: "the server said no (CAS mismatch, unknown gid, too large, busy, …)",
    ExitCode.USAGE: "usage: unknown command, wrong arguments, bad option",
    ExitCode.UNAVAILABLE: "no server or no leader before --timeout",
    ExitCode.NOT_FOUND: "key not found",
    ExitCode.UNHEALTHY: "unhealthy (Status)",
    ExitCode.OUTCOME_UNKNOWN: "outcome unknown or expired: the write may have applied",
    ExitCode.CONFLICT: "transaction aborted by a conflict: safe to run again",
    ExitCode.INTERRUPTED: "interrupted",
}


class UsageError(Exception):
    """The command can't be understood; nothing was sent. str() is one human line."""


class LocalFailure(Exception):
    """Something on this machine failed (a port in use, a daemon that died); str() is one human line."""

    def __init__(self, message: str, exit_code: ExitCode = ExitCode.REFUSED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def exit_code_of(error: BaseException) -> ExitCode:
    """The exit code that `error` ends a command with."""
    if isinstance(error, UsageError):
        return ExitCode.USAGE
    if isinstance(error, LocalFailure):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return ExitCode.INTERRUPTED
    from raftkv.protocol import errors

    if isinstance(error, errors.Interrupted):
        return ExitCode.INTERRUPTED
    if isinstance(error, errors.OutcomeUnknown | errors.Expired):
        return ExitCode.OUTCOME_UNKNOWN
    if isinstance(error, errors.Conflict | errors.Aborted):
        return ExitCode.CONFLICT
    # NotLeader and WrongGroup are answers of one server; when they outlive all retries, nobody served.
    # Of a broken connection the SDK makes OutcomeUnknown when it was a write.
    if isinstance(error, errors.Unavailable | errors.NotLeader | errors.WrongGroup | errors.ConnectionLost):
        return ExitCode.UNAVAILABLE
    return ExitCode.REFUSED


def describe(error: BaseException, *, controllers: tuple[str, ...] = ()) -> str:
    """One line on `error`: what happened, where (which controllers, if it matters), what to do next."""
    text = one_line(str(error) or type(error).__name__)
    if isinstance(error, UsageError | LocalFailure):
        return text
    from raftkv.protocol import errors

    if not isinstance(error, errors.RaftKVError):
        return f"{type(error).__name__}: {text}"
    names_addresses = "; tried " in text
    if exit_code_of(error) is ExitCode.UNAVAILABLE and controllers and not names_addresses:
        text = f"{text} (controllers {', '.join(controllers)})"
    advice = _advice_if_nothing_listens(text) or _advice(error)
    if not advice:
        return text
    return f"{text.rstrip('.')}; {advice}"


def _advice_if_nothing_listens(text: str) -> str:
    """What to do next if every address that was tried refused the connection; empty if one did anything else."""
    reasons = re.findall(r"\((.*?)\)(?:, |$)", text.partition("; tried ")[2])
    if not reasons or any(reason != "connection refused" for reason in reasons):
        return ""
    if "of the controllers" in text:
        return "nothing runs there: `raftkv local up` starts the cluster of this machine, --controllers names another"
    return "none of them runs: start a majority again; `raftkv-ctl Status` shows all"


def _advice(error: RaftKVError) -> str:
    """What to do next, by the error's class."""
    from raftkv.protocol import errors

    advice: list[tuple[type[RaftKVError], str]] = [  # only where the error's own text doesn't say it
        (errors.ShuttingDown, ""),
        (errors.Unavailable, "look at `raftkv-ctl Status`, or allow more time with --timeout"),
        (errors.NotLeader, "look at `raftkv-ctl Status`, or allow more time with --timeout"),
        (errors.WrongGroup, "look at `raftkv-ctl Query` and `raftkv-ctl Status`"),
        (errors.ConnectionLost, "try again, or look at `raftkv-ctl Status`"),
        (errors.GroupExists, "`raftkv-ctl Wait` waits for shards that are still on their way to it"),
        (errors.CasMismatch, "read the key and decide again"),
        (errors.VersionMismatch, "read the key and decide again"),
    ]
    return next((text for kind, text in advice if isinstance(error, kind)), "")


def one_line(text: str) -> str:
    """`text` without line ends and control characters: an error is one line whatever a key contains."""
    shown = (char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)
    return "".join(shown)
