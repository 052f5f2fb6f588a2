"""`raftkv local` and all commands on a real cluster: three controllers, two groups, a coordinator."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from raftkv.cli.local_state import command_line, new_state, save
from tests.cli.clusters import BIN, LocalCluster, clean_environment, cpu_s, run, start_python
from tests.cli.terminal import Terminal

RAFTKV_KV = [str(BIN / "raftkv-kv")]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """Groups of one replica: what replicas are for is tested with the long ones."""
    shape = ("--groups", "2", "--replicas", "1", "--coordinators", "1")
    cluster = LocalCluster(tmp_path_factory.mktemp("cluster"), shape)
    try:
        first = cluster.up()
        assert first.out.decode().startswith("raftkv-kv --controllers 127.0.0.1:")
        assert first.out.count(b"\n") == 1
        yield cluster
    finally:
        cluster.down("--wipe")


def test_up_joins_all_groups_at_once_and_is_idempotent(cluster: LocalCluster) -> None:
    before = cluster.status()
    again = cluster.up()
    assert again.err == ""
    assert cluster.status() == before
    groups = [f"{row['gid']}:[{row['addr']}]" for row in before["processes"] if row["gid"]]
    expected = f"Config #1: {{Num:1 Shards:[1 1 1 1 1 2 2 2 2 2] Groups:map[{' '.join(groups)}]}}\n"
    assert cluster.ctl("query").out.decode() == expected
    zero = "Config #0: {Num:0 Shards:[0 0 0 0 0 0 0 0 0 0] Groups:map[]}\n"
    assert cluster.ctl("Query", "0").out.decode() == zero


def test_who_answers_must_be_the_process_that_was_started(cluster: LocalCluster, tmp_path: Path) -> None:
    """Another cluster's daemons on the same addresses are alive and serve: but they are not ours."""
    state = new_state(2, 1, 10, int(cluster.controllers.split(",")[0].split(":")[1]))
    sleepers = []
    try:
        for process in state.processes:
            words = ("-c", "import time; time.sleep(60)", str(tmp_path / process.name))
            sleepers.append(subprocess.Popen([sys.executable, *words]))
            process.pid = sleepers[-1].pid
        save(tmp_path, state)
        refused = run("raftkv", "local", "up", "--data-dir", str(tmp_path))
    finally:
        for sleeper in sleepers:
            sleeper.kill()
            sleeper.wait()
    assert (refused.code, refused.out) == (1, b"")
    assert refused.err.count("\n") == 1
    assert f"process {cluster.status()['processes'][0]['pid']} of another cluster answers" in refused.err


def test_status_is_the_documented_object(cluster: LocalCluster) -> None:
    shown = cluster.status()
    assert set(shown) == {"data_dir", "controllers", "coordinators", "processes"}
    assert shown["data_dir"] == str(cluster.data_dir)
    assert ",".join(shown["controllers"]) == cluster.controllers
    (coordinator,) = cluster.processes(role="coordinator")
    assert shown["coordinators"] == [coordinator["addr"]]
    assert coordinator["state"] == "leader"
    for row in shown["processes"]:
        assert set(row) == {"role", "gid", "id", "addr", "redis", "metrics", "pid", "state"}
        assert row["state"] in ("leader", "follower")
        assert (row["redis"], row["metrics"]) == (None, None)
        assert (row["gid"] is None) == (row["role"] != "shardkv")
        Path(f"/proc/{row['pid']}/cmdline").read_bytes()
    assert [row["state"] for row in shown["processes"] if row["role"] == "controller"].count("leader") == 1
    plain = run("raftkv", "local", "status", "--data-dir", str(cluster.data_dir))
    assert len(plain.out.splitlines()) == 1 + len(shown["processes"])


def test_one_shot_commands(cluster: LocalCluster) -> None:
    assert cluster.kv("put", "k", "v").out == b"OK\n"
    assert cluster.kv("GET", "k").out == b"v\n"
    assert cluster.kv("append", "k", "w", "-o", "json").out.startswith(b'{"ok": true, "version": ')
    assert cluster.kv("get", "k").out == b"vw\n"
    assert cluster.kv("cas", "k", "vw", "x").out == b"OK\n"
    refused = cluster.kv("cas", "k", "vw", "y")
    assert (refused.code, refused.out) == (1, b"")
    assert refused.err.startswith("raftkv-kv: Cas k: compare failed: the value is 'x'")
    assert cluster.kv("delete", "k").out == b"OK\n"
    assert cluster.kv("delete", "k", "-o", "json").out == b'{"ok": true, "existed": false}\n'
    missing = cluster.kv("get", "k")
    assert (missing.code, missing.out, missing.err) == (4, b"", "")


def test_put_if_version(cluster: LocalCluster) -> None:
    assert cluster.kv("put", "versioned", "1", "--if-version", "0").code == 0
    version = json.loads(cluster.kv("get", "versioned", "-o", "json").out)["version"]
    assert cluster.kv("put", "versioned", "2", "--if-version", "0").code == 1
    assert cluster.kv("put", "versioned", "2", "--if-version", str(version)).code == 0


def test_binary_keys_and_values(cluster: LocalCluster, tmp_path: Path) -> None:
    every_byte = bytes(range(1, 256))
    assert cluster.kv("put", b"bin " + every_byte, every_byte).code == 0
    assert cluster.kv("get", b"bin " + every_byte).out == every_byte + b"\n"
    script = (
        rb'put "bin \x00\n" "\x00\xff"'
        b'\nget "bin \\x00\\n"\nput "bin empty" ""\nget "bin empty"\nput {tag}bin "-"\n'
    )
    assert cluster.kv(stdin=script).out == b"OK\n\x00\xff\nOK\n\nOK\n"
    assert cluster.kv("get", "{tag}bin").out == b"-\n"
    assert cluster.kv("scan", "bin empty").out == b"bin empty\t\n"
    assert cluster.kv("scan", b"bin \0"[:-1] + b"\0"[:0], "-o", "json", "--limit", "1").out == (
        b'{"key": "bin \\u0000\\n", "value": {"b64": "AP8="}}\n'
    )
    largest = os.urandom(1024 * 1024)
    (tmp_path / "value").write_bytes(largest)
    assert cluster.kv("put", "bin large", f"@{tmp_path / 'value'}").code == 0
    assert cluster.kv("get", "bin large").out == largest + b"\n"
    assert cluster.kv("put", "bin large", "-", stdin=b"from stdin\n").code == 0
    assert cluster.kv("get", "bin large").out == b"from stdin\n\n"


def test_too_large(cluster: LocalCluster) -> None:
    refused = cluster.kv("put", "k", "-", stdin=b"x" * (1024 * 1024 + 1))
    assert (refused.code, refused.err) == (
        1,
        "raftkv-kv: Put k: the value is larger than the limit of 1048576 bytes\n",
    )
    assert cluster.kv("put", "k" * 8193, "v").code == 1


def test_a_script_with_many_in_flight_and_a_scan_over_all_shards(cluster: LocalCluster) -> None:
    script = b"".join(b'put "many %04d" "value\\t%d"\n' % (n, n) for n in range(500))
    loaded = cluster.kv("--pipeline", "32", stdin=script)
    assert (loaded.code, loaded.out) == (0, b"OK\n" * 500)
    scanned = cluster.kv("scan", "many ")
    assert scanned.out == b"".join(b"many %04d\tvalue\\x09%d\n" % (n, n) for n in range(500))
    assert cluster.kv("scan", "many ", "--limit", "3").out.count(b"\n") == 3


def test_a_script_can_be_driven_line_by_line(cluster: LocalCluster) -> None:
    with subprocess.Popen(
        [*RAFTKV_KV, "--controllers", cluster.controllers],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=clean_environment(),
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for number in range(10):
            process.stdin.write(b"put driven %d\n" % number)
            process.stdin.flush()
            assert process.stdout.readline() == b"OK\n"
            process.stdin.write(b"get driven\n")
            process.stdin.flush()
            assert process.stdout.readline() == b"%d\n" % number
        process.stdin.write(b"get missing\nput driven never\n")
        process.stdin.close()
        assert process.wait(timeout=30) == 4
    assert cluster.kv("get", "driven").out == b"9\n"


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (("join", "1:h:1"), 1, "group 1 has joined already"),
        (("leave", "1,2"), 1, "is the last one, and holds data, or does not say"),
        (("leave", "9"), 1, "there is no group 9"),
        (("move", "99", "1"), 1, "there is no shard 99; shards are 0 to 9"),
        (("move", "-1", "1"), 1, "there is no shard -1"),
        (("move", "1", "9"), 1, "there is no group 9"),
        (("query", "77"), 1, "there is no configuration 77"),
    ],
)
def test_what_the_controllers_refuse(
    cluster: LocalCluster, arguments: tuple[str, ...], code: int, complaint: str
) -> None:
    refused = cluster.ctl(*arguments)
    assert (refused.code, refused.out) == (code, b"")
    assert complaint in refused.err
    assert refused.err.count("\n") == 1
    assert cluster.ctl("query").out.startswith(b"Config #1: ")


def test_a_one_shot_get_is_cheap(cluster: LocalCluster) -> None:
    """250 ms of CPU where Python with asyncio needs 65: the yardstick is measured beside it, turn by turn."""
    cluster.kv("put", "quick", "v")
    costs = [(cpu_s(lambda: cluster.kv("get", "quick")), cpu_s(start_python)) for _ in range(5)]
    get_s, python_s = (min(column) for column in zip(*costs, strict=True))
    assert get_s <= 4 * python_s, costs


def test_a_missing_controller_is_no_trouble(cluster: LocalCluster) -> None:
    cluster.kv("put", "k", "v")
    ran = run("raftkv-kv", "--controllers", f"127.0.0.1:9,{cluster.controllers}", "get", "k")
    assert (ran.code, ran.out) == (0, b"v\n")


def terminal(cluster: LocalCluster, state_home: Path, *arguments: str) -> Terminal:
    return Terminal("raftkv-kv", *arguments, controllers=cluster.controllers, state_home=state_home)


def test_the_shell(cluster: LocalCluster, tmp_path: Path) -> None:
    shell = terminal(cluster, tmp_path)
    assert shell.lines()[0] == (
        f"raftkv-kv: {cluster.controllers.replace(',', ', ')}. `help` lists the commands, Ctrl-D leaves."
    )
    dialogue = [
        ('put shell "a b"', "OK"),
        ("GET shell", "a b"),
        ("get shell-missing", "(nil)"),
        ("frobnicate", "unknown command frobnicate; `help` lists the commands"),
        ("get", "Get needs more words: usage: Get KEY [--for-update]"),
        ('put "\\q"', 'column 6: unknown escape \\q; there are \\\\ \\" \\n \\r \\t \\0 \\xHH'),
        ('put escaped "\\x1b[31m"', "OK"),
        ("get escaped", "\\x1b[31m"),
        ("get shell -o plain", "a b"),
    ]
    for line, answer in dialogue:
        assert shell.ask(line) == [answer], line
    assert shell.ask("help put")[0] == "Put KEY VALUE [--if-version N]"
    assert shell.ask("# a comment") == []
    shell.send("put typed")
    shell.send("\x03")  # at the prompt it only clears the line
    assert shell.ask("get typed") == ["(nil)"]
    shell.send("\x04")
    assert shell.wait_for_end() == 0
    history = tmp_path / "raftkv" / "raftkv-kv.history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert "+GET shell\n" in history.read_text()


def test_ctrl_c_in_the_shell_cancels_the_request_only(cluster: LocalCluster, tmp_path: Path) -> None:
    cluster.kv("put", "stalled", "0")
    groups = cluster.processes(role="shardkv")
    shell = terminal(cluster, tmp_path, "--timeout", "60")
    assert shell.ask("get stalled") == ["0"]
    try:
        for process in groups:
            cluster.kill(process, signal.SIGSTOP)
        for line, answer in [
            ("put stalled 1", "it was sent and may have applied, or may still: read before you try again"),
            ("get stalled", "nothing was changed"),
        ]:
            shell.send(line + "\r")
            time.sleep(1)
            shell.send("\x03\x03")
            shown, said, *_ = shell.answer(line)  # the second Ctrl-C may have met the prompt already
            assert shown.startswith("^C")
            assert said.endswith(f"stalled: interrupted; {answer}")
    finally:
        for process in groups:
            cluster.kill(process, signal.SIGCONT)
    assert shell.ask("append stalled x") == ["OK"]
    shell.send("exit\r")
    assert shell.wait_for_end() == 0
    assert cluster.kv("get", "stalled").out in (b"0x\n", b"1x\n")


def test_ctrl_c_ends_a_script_with_130_and_says_whether_the_write_was_sent(cluster: LocalCluster) -> None:
    groups = cluster.processes(role="shardkv")
    unsent = [*RAFTKV_KV, "--controllers", cluster.controllers, "--timeout", "60", "put", "k", "v"]
    try:
        with subprocess.Popen(
            unsent[:-3], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=clean_environment()
        ) as script:
            assert script.stdin is not None
            assert script.stdout is not None
            assert script.stderr is not None
            script.stdin.write(b"put k 1\n")
            script.stdin.flush()
            assert script.stdout.readline() == b"OK\n"
            for process in groups:
                cluster.kill(process, signal.SIGSTOP)
            script.stdin.write(b"put k 2\n")
            script.stdin.flush()
            with subprocess.Popen(unsent, stderr=subprocess.PIPE, env=clean_environment()) as one_shot:
                time.sleep(1.5)
                for child in (script, one_shot):
                    child.send_signal(signal.SIGINT)
                    assert child.wait(timeout=20) == 130
                assert one_shot.stderr is not None
                assert one_shot.stderr.read() == b"raftkv-kv: Put k: interrupted; nothing was changed\n"
            assert script.stderr.read() == (
                b"raftkv-kv: line 2: Put k: interrupted; it was sent and may have applied, or may still: "
                b"read before you try again\n"
            )
    finally:
        for stopped in groups:
            cluster.kill(stopped, signal.SIGCONT)


@pytest.mark.long
def test_a_dead_group_is_unavailable_and_unhealthy_until_up_starts_it_again(cluster: LocalCluster) -> None:
    assert cluster.ctl("status").code == 0
    script = b"".join(b"put dead%d v\n" % n for n in range(20))
    assert cluster.kv(stdin=script).code == 0
    (victim,) = cluster.processes(role="shardkv", gid=2)
    cluster.kill(victim)
    sick = cluster.ctl("status")
    assert sick.code == 5
    assert f"UNHEALTHY: group 2: the replica at {victim['addr']} is down" in sick.out.decode()
    assert "UNHEALTHY: group 2: no leader" in sick.out.decode()
    began = time.monotonic()
    failed = cluster.kv("--timeout", "1", "--keep-going", stdin=b"".join(b"get dead%d\n" % n for n in range(6)))
    assert time.monotonic() - began < 20
    assert failed.code == 3
    assert all(line.count("Get dead") == 1 for line in failed.err.splitlines())
    (row,) = cluster.processes(gid=2)
    assert (row["state"], row["pid"]) == ("down", None)
    others = {row["pid"] for row in cluster.processes() if row["state"] != "down"}
    again = cluster.up()
    assert "starting 1 of 6 processes" in again.err
    assert others < {row["pid"] for row in cluster.processes()}
    assert cluster.kv("scan", "dead").out.count(b"\n") == 20
    assert cluster.ctl("status").code == 0


def test_a_dead_coordinator_is_unhealthy(cluster: LocalCluster) -> None:
    assert b"coordinator" in cluster.ctl("status").out
    (victim,) = cluster.processes(role="coordinator")
    cluster.kill(victim)
    sick = cluster.ctl("status")
    assert sick.code == 5
    assert f"UNHEALTHY: the coordinators: the replica at {victim['addr']} is down" in sick.out.decode()
    assert "UNHEALTHY: the coordinators: no leader" in sick.out.decode()
    assert cluster.kv("put", "without", "them").code == 0
    assert "starting 1 of 6 processes" in cluster.up().err
    assert cluster.ctl("status").code == 0


@pytest.mark.long
def test_kill_9_of_everything_then_up_again(cluster: LocalCluster, tmp_path: Path) -> None:
    script = b"".join(b"put all%d v%d\n" % (n, n) for n in range(50))
    assert cluster.kv("--pipeline", "16", stdin=script).code == 0
    shell = terminal(cluster, tmp_path, "--timeout", "30")
    assert shell.ask("get all7") == ["v7"]
    for process in cluster.processes():
        cluster.kill(process)
    cluster.up()
    assert cluster.kv("scan", "all").out.count(b"\n") == 50
    assert shell.ask("append all7 +") == ["OK"]  # it found the cluster again by itself
    assert shell.ask("get all7") == ["v7+"]
    shell.send("\x04")
    assert shell.wait_for_end() == 0


def test_down_ends_every_process_and_up_brings_the_data_back(cluster: LocalCluster) -> None:
    cluster.kv("put", "kept", "v")
    pids = [row["pid"] for row in cluster.processes()]
    stopped = cluster.down()
    assert (stopped.code, stopped.out, stopped.err) == (0, b"", "stopped 6 processes\n")
    for pid in pids:
        assert not any(command_line(pid))  # gone, or a zombie that nobody has collected
    assert {row["state"] for row in cluster.status()["processes"]} == {"down"}
    assert cluster.down().code == 0
    cluster.up()
    assert cluster.kv("get", "kept").out == b"v\n"


def test_a_daemon_on_a_directory_or_address_in_use(cluster: LocalCluster, tmp_path: Path) -> None:
    (leader,) = cluster.processes(role="controller", id=0)
    peers = ",".join(f"{number}={address}" for number, address in enumerate(cluster.controllers.split(",")))
    common = ("raftkv", "controller", "--id", "0", "--peers", peers)
    busy_directory = run(*common, "--listen", "127.0.0.1:1", "--data-dir", str(cluster.data_dir / "controller-0"))
    busy_address = run(*common, "--listen", leader["addr"], "--data-dir", str(tmp_path / "new"))
    for ran in (busy_directory, busy_address):
        assert (ran.code, ran.out) == (1, b"")
        assert ran.err.count("\n") == 1
    assert "in use" in busy_directory.err
    assert leader["addr"] in busy_address.err
