"""However a run ends, no process of it is left."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks into /proc")


def processes_in(folder: Path) -> list[str]:
    """The command lines, of any process, that mention the folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(folder).encode() in command:
                found.append(command.replace(b"\0", b" ").decode(errors="replace"))
    return found


def mounts_in(folder: Path) -> list[str]:
    lines = Path("/proc/self/mounts").read_text().splitlines()
    return [line.split()[1] for line in lines if str(folder) in line]


@pytest.mark.long
@pytest.mark.timeout(400)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_after(number: signal.Signals, tmp_path: Path) -> None:
    folder = tmp_path / "chaos"
    command = [sys.executable, "-m", "tests.chaos", "--minutes", "5", "--seed", "1", "--folder", str(folder)]
    try:
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2], stderr=subprocess.DEVNULL
        ) as popen:
            try:
                assert popen.stdout is not None
                for line in popen.stdout:
                    if "started" in line:
                        break
                assert len(processes_in(folder)) > 1, "the daemons can't be told by their folder"
                time.sleep(2.0)
                popen.send_signal(number)
                popen.stdout.read()
                assert popen.wait(60) != 0
            finally:
                popen.kill()
        deadline_s = time.monotonic() + 10
        while processes_in(folder) and time.monotonic() < deadline_s:
            time.sleep(0.1)
        assert processes_in(folder) == []
        if number is not signal.SIGKILL:  # the one thing that a process that is killed can't clean up
            assert mounts_in(folder) == []
    finally:
        for mount in mounts_in(folder):
            subprocess.run(["umount", "-l", mount], check=True)
