"""The prompt: which program on which cluster, whether anybody answers there, and how the open transaction stands.

raftkv-kv local>
raftkv-kv 10.0.0.1:7000 (txn: 3)>       three operations so far
raftkv-kv 10.0.0.1:7000 (txn aborted)>  it lost its locks; Commit or Abort ends it
raftkv-kv 10.0.0.1:7000?>               no controller answers; it goes by itself
"""

from __future__ import annotations

from collections.abc import Sequence

from prompt_toolkit.filters import Filter
from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from raftkv.cli.session import Session

LOCAL = "local"


def cluster_name(controllers: Sequence[str]) -> str:
    """`local` for the cluster of this machine that is found without being named; else the first controller."""
    from raftkv.cli.local_state import default_controllers

    if not controllers:
        return ""
    return LOCAL if tuple(controllers) == default_controllers() else controllers[0]


def prompt_pieces(session: Session, cluster: str, operations: int, connected: bool) -> StyleAndTextTuples:
    """The prompt in styled pieces."""
    pieces: StyleAndTextTuples = [("class:prompt", f"{session.settings.program} {cluster}")]
    if not connected:
        pieces.append(("class:prompt.lost", "?"))
    if session.transaction is not None:
        phase = session.transaction.phase.value
        state = f": {operations}" if phase == "open" else f" {phase}"
        pieces.append(("class:prompt.transaction", f" (txn{state})"))
    pieces.append(("class:prompt", "> "))
    return pieces


def continuation(width: int, line_number: int, wrap_count: int) -> str:
    """What stands before the further lines of a quote."""
    return "" if wrap_count else "… ".rjust(width)


def line_keys(is_open: Filter) -> KeyBindings:
    """Enter in an open quote is a line end of the value, and nothing else: no indentation is added."""
    keys = KeyBindings()

    @keys.add("enter", filter=is_open)
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys
