"""What is wrong gets one clear line or a typed error: no traceback, no hang, and nothing acknowledged is lost."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgpack
import pytest

from raftkv.protocol.addresses import parse_address
from raftkv.protocol.channel import Channel
from raftkv.protocol.errors import (
    BadRequest,
    HandshakeRefused,
    RaftKVError,
    ReplicaMustBeReplaced,
    WrongCluster,
    WrongPeer,
)
from raftkv.protocol.limits import FRAME_BYTES_MAX
from raftkv.protocol.messages import (
    KIND_REFUSED,
    Hello,
    Verb,
    decode_refused,
    encode_hello,
    encode_request,
)
from tests.system.cluster import Cluster, Process, free_port, running


def one_line(process: Process) -> str:
    """The only line that a daemon, which refused to start, has said last; it must be fit for people."""
    assert process.wait() == 1
    log = process.log()
    assert "Traceback" not in log, log
    return log.strip().splitlines()[-1]


# ---- what comes over the wire


def talk(address: str, *frames: bytes, timeout_s: float = 5.0) -> list[list[object]]:
    """Send bytes, read frames until the other end closes."""
    with socket.create_connection(parse_address(address), timeout=timeout_s) as connection:
        for frame in frames:
            try:
                connection.sendall(frame)
            except OSError:
                break
        received = b""
        while True:
            try:
                data = connection.recv(65536)
            except ConnectionError:
                break
            if not data:
                break
            received += data
    answers = []
    while len(received) >= 4:
        length = int.from_bytes(received[:4], "big")
        answers.append(msgpack.unpackb(received[4 : 4 + length]))
        received = received[4 + length :]
    return answers


def frame(value: object) -> bytes:
    body: bytes = msgpack.packb(value)
    return len(body).to_bytes(4, "big") + body


HELLO = encode_hello(Hello.of_client())
HOSTILE = {
    "not a frame": b"GET / HTTP/1.1\r\n\r\n",
    "huge length": struct.pack(">I", 0xFFFFFFFF) + b"x" * 100,
    "frame over the limit": HELLO + struct.pack(">I", FRAME_BYTES_MAX + 1),
    "not msgpack": HELLO + struct.pack(">I", 3) + b"\xc1\xc1\xc1",
    "no array": HELLO + frame({"a": 1}),
    "empty array": HELLO + frame([]),
    "unknown kind": HELLO + frame([99, 1, 2]),
    "request before hello": encode_request(1, Verb.STATUS, []),
    "raft message from a client": HELLO + frame([22, 1, 0, 0, 0, [], 0, 0]),
    "deep nesting": HELLO + struct.pack(">I", 60_001) + b"\x91" * 60_000 + b"\x00",
    "hello of strings": frame([1, "one", "two"]),
    "other protocol version": frame([1, 999]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bytes_are_refused_and_harm_nobody(two_groups: Cluster, name: str) -> None:
    for address in (two_groups.controllers[0].address, two_groups.leader(1).address):
        answers = talk(address, HOSTILE[name])
        assert answers and answers[-1][0] == KIND_REFUSED, answers
        assert str(decode_refused(answers[-1]))
    with two_groups.client() as client:
        client.put(b"unharmed", name.encode())
    assert all(process.running for process in two_groups.processes)


def test_truncated_frames_and_silence_are_cut_off(two_groups: Cluster) -> None:
    address = two_groups.leader(1).address
    with socket.create_connection(parse_address(address)) as connection:
        connection.sendall(HELLO[: len(HELLO) // 2])
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(5)
        assert connection.recv(1) == b""
    with socket.create_connection(parse_address(address)) as connection:
        connection.settimeout(10)
        started_s = time.monotonic()
        data = b""
        while piece := connection.recv(1000):
            data += piece
        assert time.monotonic() - started_s < 8
        assert "hello" in str(decode_refused(msgpack.unpackb(data[4:])))


def test_random_bytes_do_not_hurt(two_groups: Cluster) -> None:
    rng = random.Random(11)
    address = two_groups.leader(2).address
    for _ in range(50):
        with socket.create_connection(parse_address(address)) as connection:
            connection.sendall(HELLO + rng.randbytes(rng.randrange(1, 300)))
            connection.settimeout(0.01)
            try:
                connection.recv(10)
            except OSError:
                continue
    with two_groups.client() as client:
        client.put(b"still", b"alive")
    assert all(process.running for process in two_groups.processes)


REQUESTS: dict[str, tuple[int, list[object]]] = {
    "unknown verb": (99, []),
    "no body": (Verb.WRITE, []),
    "too long a body": (Verb.STATUS, [1, 2, 3]),
    "command is not msgpack": (Verb.WRITE, [1, b"\xc1"]),
    "command is a map": (Verb.WRITE, [1, msgpack.packb({})]),
    "unknown command": (Verb.WRITE, [1, msgpack.packb([77, 0, b"c" * 16, 1, 1, 0])]),
    "system command": (Verb.WRITE, [1, msgpack.packb([32, b"config"])]),
    "strange types": (Verb.WRITE, [1, msgpack.packb([1, None, 3.5, [], {}, 0, 1, 2, 3])]),
    "negative shard": (Verb.READ, [1, 0, 1, -1, b"k"]),
    "huge scan": (Verb.READ, [1, 0, 2, 0, b"", None, 0, 0]),
    "bad config number": (Verb.CONFIG, ["x", -1, 0]),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_bad_requests_are_answered_and_the_connection_goes_on(two_groups: Cluster, name: str) -> None:
    verb, body = REQUESTS[name]

    async def ask(address: str) -> None:
        channel = await Channel.open(address, Hello.of_client())
        try:
            with pytest.raises(BadRequest) as refusal:
                await channel.request(verb, body, timeout_s=5)
            assert "\n" not in str(refusal.value)
            assert (await channel.request(Verb.STATUS, [], timeout_s=5))["pid"] > 0
        finally:
            channel.close()

    asyncio.run(ask(two_groups.leader(1).address))


async def refused(address: str, hello: Hello) -> RaftKVError:
    """What the daemon at `address` refuses this hello with."""
    with pytest.raises(RaftKVError) as refusal:
        channel = await Channel.open(address, hello)
        await channel.request(Verb.STATUS, [], timeout_s=5)
    return refusal.value


def test_foreign_peers_and_clients_are_refused(two_groups: Cluster) -> None:
    process = two_groups.groups[1][0]
    status = process.status()
    cluster_id = bytes.fromhex(status["cluster_id"])

    def peer(**changes: object) -> Hello:
        fields: dict[str, object] = {
            "cluster_id": cluster_id, "role": "shardkv", "gid": 1, "replica": 1, "store_id": b"s" * 16,
            "purpose": "peer", "formed": True, "peers": [0, 1, 2],
        }  # fmt: skip
        return Hello(**{**fields, **changes})  # type: ignore[arg-type]

    async def all_of_them() -> None:
        address = process.address
        stranger = await refused(address, Hello.of_client(b"x" * 16))
        assert isinstance(stranger, WrongCluster)
        assert isinstance(await refused(address, peer(cluster_id=b"x" * 16)), WrongCluster)
        assert isinstance(await refused(address, peer(gid=2)), WrongPeer)
        assert isinstance(await refused(address, peer(role="controller", gid=0)), WrongPeer)
        assert isinstance(await refused(address, peer(replica=7)), WrongPeer)
        assert isinstance(await refused(address, peer(replica=0)), WrongPeer)
        assert isinstance(await refused(address, peer(peers=[0, 1])), WrongPeer)
        assert isinstance(await refused(address, peer()), ReplicaMustBeReplaced)
        assert isinstance(await refused(address, peer(formed=False)), HandshakeRefused)

    asyncio.run(all_of_them())
    assert all(process.running for process in two_groups.processes)


# ---- how a daemon is started


def test_an_address_in_use(folder: Path) -> None:
    port = free_port()
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", port))
        taken.listen()
        address = f"127.0.0.1:{port}"
        process = Process(
            "taken", ["controller", "--id", "0", "--listen", address, "--peers", f"0={address}"], address, folder
        )
        process.start()
        line = one_line(process)
    assert address in line and "in use" in line


@pytest.mark.long
def test_a_directory_in_use_or_of_another(folder: Path) -> None:
    with running(Cluster(folder, groups=1)) as cluster:
        first, second, third = cluster.groups[1]
        twin = Process("twin", first.arguments, first.address, folder)
        twin.data_dir = first.data_dir
        twin.start()
        line = one_line(twin)
        assert str(first.data_dir) in line and "use" in line

        second.kill()
        second.data_dir, own = third.data_dir, second.data_dir
        third.kill()
        second.start()
        line = one_line(second)
        assert "replica" in line and str(third.data_dir) in line

        second.data_dir = own
        changed = Process("changed", [*second.arguments], second.address, folder)
        position = changed.arguments.index("--peers") + 1
        changed.arguments[position] += f",3=127.0.0.1:{free_port()}"
        changed.data_dir = own
        changed.start()
        assert "peers" in one_line(changed)

        other_gid = Process("gid", [*second.arguments], second.address, folder)
        other_gid.arguments[other_gid.arguments.index("--gid") + 1] = "9"
        other_gid.data_dir = own
        other_gid.start()
        assert "group" in one_line(other_gid)

        second.start()
        third.start()
        with cluster.client() as client:
            client.put(b"k", b"v")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster with some data, of which one replica of group 1 is down."""
    with running(Cluster(tmp_path_factory.mktemp("stopped"), groups=1)) as cluster:
        with cluster.client() as client:
            for number in range(200):
                client.put(b"k%d" % number, b"v" * 100)
        cluster.follower(1).kill()
        yield cluster


def test_corruption_before_the_durable_end_is_refused_with_file_and_offset(stopped: Cluster) -> None:
    victim = next(process for process in stopped.groups[1] if not process.running)
    wal = min((victim.data_dir / "wal").glob("*.wal"), key=lambda path: path.name)
    good = wal.read_bytes()
    used = len(good.rstrip(b"\x00"))
    damaged = bytearray(good)
    position = next(at for at in range(used // 2, used) if good[at])  # not the padding between batches
    damaged[position] ^= 0xFF
    wal.write_bytes(bytes(damaged))
    victim.start()
    line = one_line(victim)
    assert str(wal) in line and any(word.strip(".,:;()").isdigit() for word in line.split()), line
    wal.write_bytes(good)
    victim.start()
    victim.wait_ready()
    victim.kill()


def test_a_corrupt_engine_is_refused(stopped: Cluster) -> None:
    victim = next(process for process in stopped.groups[1] if not process.running)
    manifest = next(path for path in (victim.data_dir / "engine").rglob("MANIFEST-*"))
    good = manifest.read_bytes()
    manifest.write_bytes(b"\xff" * len(good))
    victim.start()
    assert str(victim.data_dir) in one_line(victim)
    manifest.write_bytes(good)
    victim.start()
    victim.wait_ready()
    victim.kill()


@pytest.mark.long
def test_no_controller_is_said_and_the_rest_goes_on(folder: Path) -> None:
    cluster = Cluster(folder, groups=1)
    try:
        for process in cluster.groups[1]:
            process.start()
        for process in cluster.groups[1]:
            process.wait_ready()
        time.sleep(6)
        assert any("waiting for a controller" in process.log() for process in cluster.groups[1])
        with cluster.client(timeout_s=2) as client, pytest.raises(RaftKVError) as refusal:
            client.get(b"k")
        assert cluster.controller_addresses[0] in str(refusal.value)
        for process in cluster.controllers:
            process.start()
        with cluster.admin() as admin:
            admin.join({1: [process.address for process in cluster.groups[1]]})
        with cluster.client() as client:
            client.put(b"k", b"v")
        for process in cluster.controllers:
            process.kill()
        for process in cluster.groups[1]:
            process.kill()
            process.start()
        with cluster.client(timeout_s=2) as client, pytest.raises(RaftKVError):
            client.get(b"k")
        for process in cluster.controllers:
            process.start()
        with cluster.client() as client:
            found = client.get(b"k")
            assert found is not None and found.value == b"v"
    finally:
        cluster.stop()


@pytest.mark.long
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_ends_the_replica_and_loses_nothing(folder: Path) -> None:
    small = folder / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        cluster = Cluster(folder / "cluster", groups=1)
        victim = cluster.groups[1][0]
        victim.data_dir = small / "data"
        with running(cluster):
            acknowledged = 0
            value = random.Random(3).randbytes(500_000)
            with cluster.client() as client:
                while victim.running and acknowledged < 400:
                    client.put(b"full%d" % acknowledged, value)
                    acknowledged += 1
                assert victim.wait() == 1
                log = victim.log()
                assert "Traceback" not in log
                line = log.strip().splitlines()[-1].lower()
                assert "space" in line or "room" in line, line
                for number in range(acknowledged):
                    found = client.get(b"full%d" % number)
                    assert found is not None and found.value == value
                # With more room it comes back on what it has.
                subprocess.run(["mount", "-o", "remount,size=600m", str(small)], check=True)
                victim.start()
                victim.wait_ready()
                leader = cluster.leader(1)
                deadline_s = time.monotonic() + 30
                while victim.status().get("applied_index", 0) < leader.status()["commit_index"]:
                    assert time.monotonic() < deadline_s
                    time.sleep(0.1)
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_options_that_cannot_be_right(folder: Path) -> None:
    bad = [
        ["controller", "--id", "5", "--listen", "127.0.0.1:1", "--peers", "0=127.0.0.1:1"],
        ["controller", "--id", "0", "--listen", "nowhere", "--peers", "0=127.0.0.1:1"],
        ["controller", "--id", "0", "--listen", "127.0.0.1:1", "--peers", "rubbish"],
        ["shardkv", "--gid", "0", "--id", "0", "--listen", "127.0.0.1:1", "--peers", "0=127.0.0.1:1",
         "--controllers", "127.0.0.1:2"],
        ["shardkv", "--gid", "1", "--id", "0", "--listen", "127.0.0.1:1", "--peers", "0=127.0.0.1:1"],
    ]  # fmt: skip
    for arguments in bad:
        done = subprocess.run(
            [sys.executable, "-m", "raftkv", *arguments, "--data-dir", str(folder / "never")],
            capture_output=True, text=True, timeout=30,
        )  # fmt: skip
        assert done.returncode == 2, (arguments, done.stderr)
        assert "Traceback" not in done.stderr and done.stderr.strip()
        assert not (folder / "never").exists()


def test_a_data_directory_that_cannot_be_written(folder: Path) -> None:
    blocked = folder / "file"
    blocked.write_text("not a directory")
    address = f"127.0.0.1:{free_port()}"
    process = Process(
        "blocked", ["controller", "--id", "0", "--listen", address, "--peers", f"0={address}"], address, folder
    )
    process.data_dir = blocked
    process.start()
    assert str(blocked) in one_line(process)
