"""The way out of a daemon's process."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.cli.clusters import clean_environment
from tests.system.cluster import free_port

LOOKUP_S = 40
NAME_SERVERS_THAT_DO_NOT_ANSWER = f"""
import socket, sys, time
sys.modules["uvloop"] = None  # whose lookups are no Python
look_up = socket.getaddrinfo

def slow(host, *arguments, **options):
    if host == "gone":
        print("looks for gone", flush=True)
        time.sleep({LOOKUP_S})
        raise socket.gaierror(socket.EAI_AGAIN, "temporary failure in name resolution")
    return look_up(host, *arguments, **options)

socket.getaddrinfo = slow
from raftkv.cli.main import raftkv
raftkv()
"""


def test_a_name_that_is_being_looked_up_holds_nobody_up(tmp_path: Path) -> None:
    """Nobody can stop such a lookup."""
    listen = f"127.0.0.1:{free_port()}"
    options = ("--id", "0", "--listen", listen, "--peers", f"0={listen},1=gone:1", "--data-dir", str(tmp_path))
    daemon = subprocess.Popen(
        [sys.executable, "-c", NAME_SERVERS_THAT_DO_NOT_ANSWER, "controller", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=clean_environment(),
        text=True,
    )
    try:
        assert daemon.stdout is not None
        said = [daemon.stdout.readline() for _ in range(2)]
        assert sorted(said) == ["looks for gone\n", f"raftkv controller 0 is ready on {listen}\n"]
        asked_s = time.monotonic()
        daemon.send_signal(signal.SIGTERM)
        _, errors = daemon.communicate(timeout=LOOKUP_S)
        assert time.monotonic() - asked_s < LOOKUP_S / 2
    finally:
        daemon.kill()
        daemon.communicate()
    assert daemon.returncode == 0
    assert errors.endswith("stopped\n")
