"""The main job on real input: the licence texts through script mode, with kill -9 in the middle."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.clusters import LocalCluster, clean_environment, run

pytestmark = [pytest.mark.long, pytest.mark.timeout(400)]

EXAMPLE = Path(__file__).parents[2] / "examples" / "load_text.py"
LICENCES = Path("/usr/share/common-licenses")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """Two groups of three."""
    cluster = LocalCluster(tmp_path_factory.mktemp("cluster"), ("--timeout", "120"))
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down("--wipe")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Debian's licence texts; where they are missing, a text of as many lines with every kind of byte."""
    if LICENCES.is_dir():
        return []
    path = tmp_path_factory.mktemp("texts") / "lines"
    path.write_bytes(b"\n".join(b'line %d \\ " @ \t%c' % (n, 128 + n % 128) for n in range(6000)))
    return [str(path)]


def example(cluster: LocalCluster, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(EXAMPLE), "--controllers", cluster.controllers, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env=clean_environment(),
    )


def finish(process: subprocess.Popen[str]) -> str:
    """The last line of an example that must have ended well."""
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    return out.splitlines()[-1]


def test_every_line_comes_back(cluster: LocalCluster, texts: list[str]) -> None:
    assert finish(example(cluster, "--prefix", "plain", *texts)).startswith("equal: ")


def test_it_notices_a_difference(cluster: LocalCluster, texts: list[str]) -> None:
    assert finish(example(cluster, "--prefix", "changed", *texts)).startswith("equal: ")
    key = cluster.kv("scan", "changed", "--limit", "1").out.split(b"\t")[0]
    assert cluster.kv("append", key, " ").code == 0
    verify = example(cluster, "--prefix", "changed", "--verify-only", *texts)
    verify.communicate(timeout=120)
    assert verify.returncode == 1


def test_kill_9_of_one_replica_everywhere_during_the_load(cluster: LocalCluster, texts: list[str]) -> None:
    victims = [
        next(iter(cluster.processes(role=role, gid=gid, state="leader")))
        for role, gid in (("controller", None), ("shardkv", 1), ("shardkv", 2))
    ]
    loading = example(cluster, "--prefix", "killed", "--copies", "3", *texts)
    assert loading.stdout is not None
    assert next(line for line in loading.stdout if line.startswith("2000 of "))
    for victim in victims:
        cluster.kill(victim, signal.SIGKILL)
    assert finish(loading).startswith("equal: ")
    assert {row["addr"] for row in cluster.processes(state="down")} == {row["addr"] for row in victims}
    assert cluster.ctl("status").code == 5

    # And now everything at once, the survivors with the dead.
    for process in cluster.processes():
        if process["state"] != "down":
            cluster.kill(process, signal.SIGKILL)
    cluster.up()
    verify = example(cluster, "--prefix", "killed", "--copies", "3", "--verify-only", *texts)
    assert finish(verify).startswith("equal: ")
    assert finish(example(cluster, "--prefix", "plain", "--verify-only", *texts)).startswith("equal: ")
    assert cluster.ctl("status").code == 0


def test_a_wiped_replica_is_complained_of_and_the_others_serve(cluster: LocalCluster, texts: list[str]) -> None:
    assert cluster.down().code == 0
    shutil.rmtree(cluster.data_dir / "group-1-1")
    again = run("raftkv", "local", "up", "--data-dir", str(cluster.data_dir), timeout_s=120)
    assert again.code == 1
    complaint = again.err.splitlines()[-1]
    assert complaint.startswith("raftkv: the cluster serves, but replica 1 of group 1 (")
    assert "is not taken back as a voter" in complaint
    assert finish(example(cluster, "--prefix", "plain", "--verify-only", *texts)).startswith("equal: ")
    assert cluster.ctl("status").code == 5
