"""`raftkv local up --redis`: every replica of a group listens to Redis clients, and status says where."""

from __future__ import annotations

import json
import socket
from pathlib import Path

from tests.cli.clusters import run
from tests.system.cluster import free_port
from tests.system.resp import Resp

UP = ("--groups", "2", "--replicas", "1", "--coordinators", "1")


def test_redis_clients_are_served_and_see_what_others_wrote(tmp_path: Path) -> None:
    where = ("--data-dir", str(tmp_path / "c"))
    started = run("raftkv", "local", "up", *UP, "--redis", *where, RAFTKV_REDIS_LISTEN="127.0.0.1:1")
    try:
        assert started.code == 0, started.err
        status = json.loads(run("raftkv", "local", "status", "-o", "json", *where).out)
        listeners = [process["redis"] for process in status["processes"]]
        assert [listener is not None for listener in listeners] == [
            process["role"] == "shardkv" for process in status["processes"]
        ]
        controllers = ("--controllers", ",".join(status["controllers"]))
        for number, listener in enumerate(listener for listener in listeners if listener is not None):
            with Resp(int(listener.rpartition(":")[2])) as resp:
                assert resp.ask("SET", f"from-redis-{number}", "hello") == b"OK"
                assert run("raftkv-kv", *controllers, "get", f"from-redis-{number}").out == b"hello\n"
                assert run("raftkv-kv", *controllers, "put", f"to-redis-{number}", "hi").code == 0
                assert resp.ask("GET", f"to-redis-{number}") == b"hi"
        header, *_ = run("raftkv", "local", "status", *where).out.decode().splitlines()
        assert header.split() == ["ROLE", "GID", "ID", "ADDR", "REDIS", "PID", "STATE"]
        assert run("raftkv", "local", "up", *where).code == 0  # as it is
    finally:
        run("raftkv", "local", "down", "--wipe", *where)


def test_a_port_for_redis_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        taken = f"127.0.0.1:{stranger.getsockname()[1]}"
        own = f"127.0.0.1:{free_port()}"
        ran = run(
            "raftkv", "shardkv", "--gid", "1", "--id", "0", "--listen", own, "--peers", f"0={own}",
            "--controllers", own, "--data-dir", str(tmp_path / "d"), "--redis-listen", taken,
        )  # fmt: skip
    assert (ran.code, ran.out) == (1, b"")
    assert ran.err.startswith(f"raftkv: replica 0 of group 1: can't listen on {taken} for Redis clients: ")
    assert ran.err.count("\n") == 1
