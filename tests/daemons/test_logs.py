"""The log of a daemon, as JSON: every line an object, whoever writes it."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.system.cluster import Process, free_port

SCRIPT = """
import logging, sys, warnings
from raftkv.daemons.logs import configure_logging, say_last
configure_logging("debug", sys.argv[1], {"role": "shardkv", "gid": 7, "replica": 2})
log = logging.getLogger("raftkv.test")
log.debug("two\\nlines, \\u00fcml\\u00e4ut, %s", b"bytes")
try:
    raise ValueError("inside")
except ValueError:
    log.exception("failed", stack_info=True)
warnings.warn("careful")
class Dies:
    def __del__(self):
        raise RuntimeError("nobody catches this")
Dies()
say_last("ends")
raise SystemError("uncaught")
"""


def lines_of(form: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", SCRIPT, form], capture_output=True, text=True, check=False)
    assert done.stdout == ""
    return done.stderr.splitlines()


def test_every_line_is_an_object_that_says_when_who_and_what() -> None:
    before = datetime.now(UTC)
    found: list[dict[str, Any]] = [json.loads(line) for line in lines_of("json")]
    for line in found:
        time = datetime.fromisoformat(line["time"])
        assert line["time"].endswith("Z") and time.utcoffset() is not None
        assert -1 < (time - before).total_seconds() < 60
        assert (line["role"], line["gid"], line["replica"]) == ("shardkv", 7, 2)
        assert line["logger"] and line["message"]
    levels = [line["level"] for line in found]
    assert levels == ["debug", "error", "warning", "error", "critical", "critical"]
    assert found[0]["message"] == "two\nlines, ümläut, b'bytes'" and found[0]["logger"] == "raftkv.test"
    assert "ValueError: inside" in found[1]["traceback"] and "Stack" in found[1]["stack"]
    assert "careful" in found[2]["message"]
    assert "nobody catches this" in found[3]["traceback"]
    assert found[4]["message"] == "ends"
    assert "uncaught" in found[5]["traceback"]


def test_as_text_the_last_words_are_for_people() -> None:
    lines = lines_of("text")
    assert "raftkv: ends" in lines
    assert any(line.endswith("DEBUG two") for line in lines)


def test_a_daemon_that_can_t_start_says_so_as_json(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    arguments = ["controller", "--id", "0", "--listen", address, "--peers", f"0={address}", "--log-format", "json"]
    process = Process("c", arguments, address, tmp_path)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "holiday.jpg").touch()
    process.start()
    assert process.wait() == 1
    (line,) = [json.loads(line) for line in process.log().splitlines()]
    assert line["level"] == "critical" and "holiday.jpg" in line["message"]
    assert (line["role"], line["replica"]) == ("controller", 0)
