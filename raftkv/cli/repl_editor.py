"""`\\e KEY`: a value in the user's editor. What is saved is stored, unless somebody else was faster.

The value goes through a file that only its owner can read, as it is, so any bytes survive.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from raftkv.cli.exit_codes import LocalFailure


def find_editor(environment: Mapping[str, str]) -> list[str]:
    """`$VISUAL`, `$EDITOR`, or what there is. Raises LocalFailure."""
    for name in ("VISUAL", "EDITOR"):
        if environment.get(name):
            try:
                return shlex.split(environment[name])
            except ValueError as error:
                raise LocalFailure(f"{name} can't be understood: {error}") from None
    for name in ("sensible-editor", "nano", "vi"):
        if shutil.which(name):
            return [name]
    raise LocalFailure("no editor: set EDITOR to one")


async def edit(value: bytes, editor: list[str]) -> bytes:
    """What the user makes of `value`. The line end that most editors add to a text without one is taken off again.

    Raises LocalFailure if the editor can't be run, or says by its exit status that it failed.
    """
    with _file_with(value) as path:
        try:
            process = await asyncio.create_subprocess_exec(*editor, str(path))
        except OSError as error:
            raise LocalFailure(f"can't run {editor[0]}: {error.strerror}; EDITOR names another one") from None
        status = await process.wait()
        if status != 0:
            raise LocalFailure(f"{editor[0]} ended with status {status}: nothing was changed")
        edited = _read(path)
    if edited.endswith(b"\n") and not value.endswith(b"\n") and not edited.endswith(b"\n\n"):
        return edited[:-1]
    return edited


@contextmanager
def _file_with(value: bytes) -> Iterator[Path]:
    """A file that is there while the block runs."""
    descriptor, name = tempfile.mkstemp(prefix="raftkv-", suffix=".txt")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(value)
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise LocalFailure(f"can't read what the editor left at {path}: {error.strerror}") from None
