"""`raftkv health`, on real daemons."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cli.clusters import run
from tests.system.cluster import Process, free_port


@contextmanager
def controller(folder: Path, *peers: str) -> Iterator[str]:
    """Replica 0 of controllers at these addresses; yields its own."""
    ids = ",".join(f"{replica}={address}" for replica, address in enumerate(peers))
    process = Process("c", ["controller", "--id", "0", "--listen", peers[0], "--peers", ids], peers[0], folder)
    process.start()
    try:
        process.wait_ready()
        yield peers[0]
    finally:
        process.kill()


def test_a_daemon_that_knows_a_leader_is_well(tmp_path: Path) -> None:
    with controller(tmp_path, f"127.0.0.1:{free_port()}") as address:
        while (health := run("raftkv", "health", RAFTKV_LISTEN=address)).code == 5:
            pass  # it elects itself
    assert (health.code, health.out, health.err) == (0, b"replica 0 of the controllers, leader\n", "")


def test_a_daemon_without_its_group_is_not(tmp_path: Path) -> None:
    with controller(tmp_path, f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}") as address:
        health = run("raftkv", "health", "--listen", address)
    assert (health.code, health.out, health.err.count("\n")) == (5, b"", 1)
    assert "replica 0 of the controllers, unformed: knows no leader" in health.err


def test_a_group_that_was_never_joined_is_well(tmp_path: Path) -> None:
    """A container that waits for its Join isn't sick; /readyz says that it serves nothing yet."""
    mine = f"127.0.0.1:{free_port()}"
    with controller(tmp_path, f"127.0.0.1:{free_port()}") as address:
        arguments = ["shardkv", "--gid", "1", "--id", "0", "--listen", mine, "--peers", f"0={mine}"]
        process = Process("s", [*arguments, "--controllers", address], mine, tmp_path)
        process.start()
        try:
            process.wait_ready()
            while (health := run("raftkv", "health", RAFTKV_LISTEN=mine)).code == 5:
                pass
        finally:
            process.kill()
    said = b"replica 0 of group 1, leader; no configuration is known yet\n"
    assert (health.code, health.out, health.err) == (0, said, "")


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["--listen", "127.0.0.1:1"], 3, "127.0.0.1:1: connection refused"),
        (["--listen", "x"], 2, "--listen: address 'x' is not HOST:PORT"),
        ([], 2, "Missing option '--listen'"),
    ],
)
def test_what_goes_wrong_is_one_line(arguments: list[str], code: int, complaint: str) -> None:
    health = run("raftkv", "health", *arguments)
    assert (health.code, health.out, health.err.count("\n")) == (code, b"", 1)
    assert complaint in health.err
