"""Screenshots as text in testdata/: RAFTKV_REWRITE=1 writes what is shown into the files; read the diff."""

from __future__ import annotations

import os
from pathlib import Path

TESTDATA = Path(__file__).parent / "testdata"


def agrees(name: str, shown: str) -> None:
    """Fail unless testdata/`name` is this text."""
    path = TESTDATA / name
    if os.environ.get("RAFTKV_REWRITE"):
        path.write_text(shown, encoding="utf-8")
    assert shown == path.read_text(encoding="utf-8"), name
