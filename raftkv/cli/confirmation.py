"""Commands that lose data: asked for once more on a terminal, and with `--yes` where nobody can be asked.

What is lost stands in the command table, at the option that asks for it. A Leave whose shards move elsewhere loses
nothing, and is carried out as it stands.
"""

from __future__ import annotations

import sys

from raftkv.cli.command_table import Call
from raftkv.cli.exit_codes import UsageError


def question_about(call: Call) -> str | None:
    """What to ask before the call is carried out; None if it loses nothing, or was confirmed by --yes."""
    if call.options.get("yes"):
        return None
    for option in call.command.options:
        if option.danger and call.options.get(option.key):
            return f"{call} {option.names[-1]}: {option.danger}. Go on? (y/N) "
    return None


def is_yes(answer: str) -> bool:
    """Only a yes is one."""
    return answer.strip().lower() in ("y", "yes")


def require_yes(call: Call) -> None:
    """Raise UsageError if the call loses data and nobody can be asked whether that is meant."""
    if question_about(call) is not None:
        option = next(option for option in call.command.options if option.danger and call.options.get(option.key))
        raise UsageError(f"{call} {option.names[-1]}: {option.danger}; if that is meant, say so with --yes")


def ask_once(call: Call) -> bool:
    """Whether a one-shot call may be carried out: asks on a terminal. Raises UsageError elsewhere."""
    question = question_about(call)
    if question is None:
        return True
    if not (_is_terminal(sys.stdin) and _is_terminal(sys.stderr)):
        require_yes(call)
    print(question, end="", file=sys.stderr, flush=True)
    return is_yes(sys.stdin.readline())


def _is_terminal(stream: object) -> bool:
    isatty = getattr(stream, "isatty", None)
    return isatty is not None and isatty()
