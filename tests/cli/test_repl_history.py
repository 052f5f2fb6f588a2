"""The history's file: its owner's only, bounded, and no reason for the shell to fail."""

from __future__ import annotations

import asyncio
import stat
from pathlib import Path

import pytest
from prompt_toolkit.history import History, InMemoryHistory

from raftkv.cli.repl_history import HISTORY_BYTES_MAX, LINE_CHARS_MAX, open_history


def opened(folder: Path) -> History:
    return open_history("raftkv-kv", {"XDG_STATE_HOME": str(folder)})


def loaded(history: History) -> list[str]:
    """The lines, the latest first."""

    async def load() -> list[str]:
        return [line async for line in history.load()]

    return asyncio.run(load())


def test_lines_are_kept_for_the_next_session(tmp_path: Path) -> None:
    for line in ("get a", 'put k "two\nlines"', "get b"):
        opened(tmp_path).append_string(line)  # each by a shell of its own
    assert loaded(opened(tmp_path)) == ["get b", 'put k "two\nlines"', "get a"]


def test_it_is_for_its_owner_only(tmp_path: Path) -> None:
    file = tmp_path / "raftkv" / "raftkv-kv.history"
    file.parent.mkdir()
    file.write_text("")
    file.chmod(0o644)
    opened(tmp_path)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_what_is_not_kept(tmp_path: Path) -> None:
    history = opened(tmp_path)
    history.append_string(" put secret 1")
    history.append_string("put k " + "x" * LINE_CHARS_MAX)
    assert loaded(opened(tmp_path)) == []


def test_it_does_not_grow_without_end(tmp_path: Path) -> None:
    history = opened(tmp_path)
    file = tmp_path / "raftkv" / "raftkv-kv.history"
    for number in range(HISTORY_BYTES_MAX // 900 + 10):
        history.append_string(f"put k{number} {'x' * 900}")
    assert file.stat().st_size > HISTORY_BYTES_MAX
    everything = loaded(history)
    kept = loaded(opened(tmp_path))
    assert HISTORY_BYTES_MAX / 2 * 0.9 < file.stat().st_size <= HISTORY_BYTES_MAX / 2
    assert kept == everything[: len(kept)]  # whole lines, the latest
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_there_can_be_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "raftkv").write_text("in the way")
    assert isinstance(opened(tmp_path), InMemoryHistory)
    assert capsys.readouterr().err.startswith("no history is kept: ")


def test_a_file_that_goes_away_is_no_error(tmp_path: Path) -> None:
    history = opened(tmp_path)
    file = tmp_path / "raftkv" / "raftkv-kv.history"
    file.unlink()
    file.parent.rmdir()
    history.append_string("get a")
    assert history.get_strings() == ["get a"]
