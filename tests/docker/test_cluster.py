"""The cluster of compose/compose.yaml, as containers: start, use, stop, scale, down and up."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path

import pexpect
import pytest

from tests.docker import stack
from tests.docker.conftest import Started
from tests.docker.load import Load

pytestmark = [pytest.mark.docker, pytest.mark.timeout(600), pytest.mark.usefixtures("cluster")]

FIRST_PUT_S_BAR = 60
PATIENCE = 3
"""So many times the bar, because machines are shared."""
OVER_BASE_BYTES_MAX = 200_000_000


def image_bytes(image: str) -> int:
    return int(stack.out("docker", "image", "inspect", "--format", "{{.Size}}", image))


def test_it_starts_fast(started: Started) -> None:
    print(f"\nfirst Put {started.first_put_s:.1f} s after `up --build`, which took {started.up_s:.1f} s")
    assert started.first_put_s <= PATIENCE * FIRST_PUT_S_BAR


def test_the_image_is_small_and_has_neither_root_nor_a_compiler() -> None:
    over_base = image_bytes(stack.NAME) - image_bytes(stack.base_image())
    print(f"\nimage: {over_base / 1e6:.0f} MB over its base")
    assert over_base <= OVER_BASE_BYTES_MAX
    assert stack.out("docker", "exec", "controller-0", "id", "-un") == "raftkv\n"
    assert stack.run("docker", "exec", "kv", "sh", "-c", "command -v cc gcc g++ clang make").stdout == ""


def test_every_daemon_becomes_healthy() -> None:
    shape = "{{.State.Health.Status}}"
    deadline_s = time.monotonic() + 60
    while states := stack.out("docker", "inspect", "--format", shape, *stack.DAEMONS).split():
        if set(states) == {"healthy"}:
            break
        assert time.monotonic() < deadline_s, dict(zip(stack.DAEMONS, states, strict=True))
        time.sleep(1)


def test_a_daemon_without_its_group_is_unhealthy() -> None:
    nobody = stack.run("docker", "exec", "-e", "RAFTKV_LISTEN=127.0.0.1:9", "kv", "raftkv", "health")
    assert (nobody.returncode, nobody.stdout, nobody.stderr.count("\n")) == (3, "", 1)
    alone = "raftkv controller --id 0 --peers 0=a:1,1=b:1 & sleep 5; raftkv health"
    options = ("--rm", "--label", stack.LABEL, "--network", "none", "--entrypoint", "sh")
    waits = stack.run("docker", "run", *options, stack.NAME, "-c", alone)
    assert waits.returncode == 5
    assert "replica 0 of the controllers, unformed: knows no leader" in waits.stderr


def test_nothing_outside_reaches_it() -> None:
    networks = stack.out("docker", "network", "ls", "--quiet", "--filter", f"label={stack.LABEL}").split()
    assert len(networks) == 1
    assert stack.out("docker", "network", "inspect", "--format", "{{.Internal}}", *networks) == "true\n"
    for name in stack.DAEMONS:
        assert stack.out("docker", "inspect", "--format", "{{len .NetworkSettings.Networks}}", name) == "1\n"
        assert stack.out("docker", "port", name) == ""


def test_that_a_container_is_gone_is_known_at_once() -> None:
    """Or a replica that comes back waits for its turn behind lookups of one that doesn't."""
    began_s = time.monotonic()
    assert stack.run("docker", "exec", "kv", "getent", "hosts", "shardkv9-0").returncode != 0
    assert time.monotonic() - began_s < 3


def test_a_daemon_stops_at_once_though_it_looks_for_names_that_nobody_knows() -> None:
    """Without the option of the compose file, which has such names be refused at once."""
    name = f"{stack.NAME}-alone"
    labelled = ("--name", name, "--label", stack.LABEL, "--network", stack.NETWORK)
    peers = ",".join(["0=127.0.0.1:8000", *(f"{peer}=gone-{peer}.example:8000" for peer in range(1, 5))])
    stack.out("docker", "run", "--detach", *labelled, stack.NAME, "controller", "--id", "0", "--peers", peers)
    try:
        deadline_s = time.monotonic() + 30
        while "waiting for 1 at gone-1" not in stack.run("docker", "logs", name).stderr:
            assert time.monotonic() < deadline_s
            time.sleep(0.2)
        stack.out("docker", "stop", "--time", "60", name)
        (asked,) = [
            line.split()[0]
            for line in stack.run("docker", "logs", "--timestamps", name).stderr.splitlines()
            if line.endswith("SIGTERM: hands over and stops")
        ]
        status, ended = stack.out(
            "docker", "inspect", "--format", "{{.State.ExitCode}} {{.State.FinishedAt}}", name
        ).split()
        took_s = (datetime.fromisoformat(ended) - datetime.fromisoformat(asked)).total_seconds()
        print(f"\nended {took_s:.2f} s after SIGTERM")
        assert status == "0"
        assert took_s < 3
    finally:
        stack.out("docker", "rm", "--force", "--volumes", name)


def test_a_script_on_standard_input() -> None:
    script = 'put s "from a script"\nget s\n# a remark\ndelete s\nget s\nput never 1\n'
    done = stack.run("docker", "exec", "-i", "kv", "raftkv-kv", stdin=script)
    assert (done.returncode, done.stdout) == (4, "OK\nfrom a script\nOK\n")
    assert stack.run("docker", "exec", "kv", "raftkv-kv", "get", "never").returncode == 4


def test_the_shell_on_a_terminal() -> None:
    shell = pexpect.spawn("docker", ["exec", "-it", "kv", "raftkv-kv"], timeout=30, encoding="utf-8")
    shell.expect(r"controller-0:8000[^>]*>")  # between them are colours
    shell.sendline("put typed 1")
    shell.expect("OK")
    shell.sendline("exit")
    shell.expect(pexpect.EOF)
    shell.close()
    assert shell.exitstatus == 0
    assert stack.kv("get", "typed") == "1\n"


def test_a_third_group_joins_under_load(tmp_path: Path) -> None:
    with Load(tmp_path, "scaled") as load:
        try:
            stack.compose(*stack.WITH_THIRD_GROUP, "up", "-d")
            with load.fault("join and leave", "group 3"):
                assert stack.ctl("join", "3:shardkv3-0:8000,shardkv3-1:8000,shardkv3-2:8000") == "OK\n"
                assert {shard["gid"] for shard in stack.status()["shards"]} == {1, 2, 3}
                assert stack.ctl("leave", "3") == "OK\n"
        finally:
            stack.compose("up", "-d", "--remove-orphans")
    print(load.report())


def test_down_and_up_keep_the_data() -> None:
    stack.kv("put", "kept", "over down and up")
    config = stack.ctl("query")
    stack.compose("stop")
    for name in stack.DAEMONS:
        assert stack.out("docker", "inspect", "--format", "{{.State.ExitCode}}", name) == "0\n", name
    stack.compose("down")
    assert "kv" not in stack.ours()
    stack.compose("up", "-d")
    assert stack.kv("get", "kept") == "over down and up\n"
    assert stack.ctl("query") == config, "a cluster that isn't new isn't joined again"
    stack.wait_healthy()
