"""Every transcript under testdata/ prints what it printed when it was last reviewed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.raft.transcript import check_file

FILES = sorted((Path(__file__).parent / "testdata").glob("*.txt"))


def test_there_are_transcripts() -> None:
    assert len(FILES) >= 10


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_transcript(path: Path) -> None:
    expected, actual = check_file(path, rewrite=bool(os.environ.get("RAFTKV_REWRITE")))
    assert actual == expected
