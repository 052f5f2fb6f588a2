"""The shell's history: a file in `$XDG_STATE_HOME/raftkv/` for its owner's eyes only, of bounded size.

Lines that begin with a space are not kept, nor very long ones.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from prompt_toolkit.history import FileHistory, History, InMemoryHistory

from raftkv.cli.printers import note

HISTORY_BYTES_MAX = 1_000_000
"""When the file has grown beyond this, the older half goes at the next start."""
LINE_CHARS_MAX = 10_000


class BoundedHistory(FileHistory):
    """Each line is appended when it has been typed, so that several shells share the file."""

    def append_string(self, string: str) -> None:
        """Remember a line, in memory and in the file."""
        if not string.startswith(" ") and len(string) <= LINE_CHARS_MAX:
            super().append_string(string)

    def store_string(self, string: str) -> None:
        """In the file, as long as that can be written."""
        try:
            super().store_string(string)
        except OSError:
            pass  # the disk is full, or the folder is gone: no reason to end a session


def open_history(program: str, environment: Mapping[str, str]) -> History:
    """The history of that program; in memory, and a word about it, if there can be no file."""
    state_home = environment.get("XDG_STATE_HOME") or ""
    try:
        base = Path(state_home) if Path(state_home).is_absolute() else Path.home() / ".local" / "state"
    except RuntimeError:  # nobody's home: no HOME, and a user without a name
        return InMemoryHistory()
    path = base / "raftkv" / f"{program}.history"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.fchmod(descriptor, 0o600)
            if os.fstat(descriptor).st_size > HISTORY_BYTES_MAX:
                _drop_older_half(path)
        finally:
            os.close(descriptor)
    except OSError as error:
        note(f"no history is kept: {path}: {error.strerror}")
        return InMemoryHistory()
    return BoundedHistory(str(path))


def _drop_older_half(path: Path) -> None:
    """Rewrite the file whole or not at all; it goes on with a whole entry, which begins with its time."""
    with path.open("rb") as file:
        file.seek(-HISTORY_BYTES_MAX // 2, os.SEEK_END)
        kept = file.read()
    begin = kept.find(b"\n# ")
    temporary = path.with_suffix(f".{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(kept[begin:] if begin >= 0 else b"")
    temporary.replace(path)
