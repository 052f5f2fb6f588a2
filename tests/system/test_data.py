"""What users put in comes out again, byte for byte, whatever it is."""

from __future__ import annotations

import asyncio
import random
import time

import pytest

from raftkv.client.kv import RaftKV
from raftkv.protocol.errors import CasMismatch, TooLarge, VersionMismatch
from raftkv.protocol.limits import KEY_BYTES_MAX, VALUE_BYTES_MAX
from tests.system.cluster import Cluster

KEYS = [
    b"plain",
    b"with spaces and\ttabs",
    b"line\nbreak\r\n",
    b"\x00\x01\xff\xfe",
    b"{tag}one",
    b"{tag}two",
    b"{",
    b"{}empty",
    "ключ-鍵".encode(),
    b"k" * KEY_BYTES_MAX,
]


def test_any_bytes_are_kept_as_they_are(two_groups: Cluster) -> None:
    rng = random.Random(7)
    values = {key: rng.randbytes(rng.choice([0, 1, 17, 4096])) for key in KEYS}
    with two_groups.client() as client:
        for key, value in values.items():
            client.put(key, value)
        for key, value in values.items():
            found = client.get(key)
            assert found is not None and found.value == value
        scanned = {key: found.value for key, found in client.scan()}
        assert {key: scanned[key] for key in KEYS} == values
        assert list(scanned) == sorted(scanned)


def test_empty_value_differs_from_no_value(two_groups: Cluster) -> None:
    with two_groups.client() as client:
        client.put(b"empty", b"")
        found = client.get(b"empty")
        assert found is not None and found.value == b""
        assert client.get(b"never written") is None
        assert client.delete(b"empty") is True
        assert client.get(b"empty") is None
        assert client.delete(b"empty") is False


def test_values_of_one_mebibyte(two_groups: Cluster) -> None:
    value = random.Random(1).randbytes(VALUE_BYTES_MAX)
    with two_groups.client() as client:
        for number in range(8):
            client.put(b"large%d" % number, value)
        for number in range(8):
            found = client.get(b"large%d" % number)
            assert found is not None and found.value == value
        assert sum(1 for _ in client.scan(b"large")) == 8
        with pytest.raises(TooLarge):
            client.put(b"large", value + b"!")
        with pytest.raises(TooLarge):
            client.append(b"large0", b"!")
        with pytest.raises(TooLarge):
            client.put(b"k" * (KEY_BYTES_MAX + 1), b"")


def test_conditional_writes(two_groups: Cluster) -> None:
    with two_groups.client() as client:
        first = client.put(b"conditional", b"1", if_version=0)
        with pytest.raises(VersionMismatch):
            client.put(b"conditional", b"2", if_version=0)
        second = client.put(b"conditional", b"2", if_version=first)
        assert second > first
        with pytest.raises(CasMismatch) as mismatch:
            client.cas(b"conditional", b"1", b"3")
        assert mismatch.value.current == b"2"
        client.cas(b"conditional", b"2", b"3")
        found = client.get(b"conditional")
        assert found is not None and found.value == b"3"
        with pytest.raises(CasMismatch):
            client.cas(b"absent", b"", b"x")


def test_scan_by_prefix_in_key_order_over_all_shards(two_groups: Cluster) -> None:
    expected = {b"scan/%05d" % number: b"%d" % number for number in range(2_000)}

    async def load() -> None:
        async with RaftKV(two_groups.controller_addresses) as client:
            await asyncio.gather(*(client.put(key, value) for key, value in expected.items()))

    asyncio.run(load())
    with two_groups.client() as client:
        pairs = [(key, found.value) for key, found in client.scan(b"scan/")]
        assert pairs == sorted(expected.items())
        assert [key for key, _ in client.scan(b"scan/", limit=7)] == sorted(expected)[:7]


def test_four_hundred_concurrent_clients(two_groups: Cluster) -> None:
    """Each client's appends to a shared key are there once, in its order."""

    async def one(number: int) -> None:
        async with RaftKV(two_groups.controller_addresses, timeout_s=60) as client:
            for step in range(5):
                await client.append(b"shared%d" % (number % 40), b"%d.%d " % (number, step))

    async def everyone() -> None:
        await asyncio.gather(*(one(number) for number in range(400)))

    asyncio.run(everyone())
    with two_groups.client() as client:
        for shared in range(40):
            found = client.get(b"shared%d" % shared)
            assert found is not None
            tokens = [tuple(map(int, token.split(b"."))) for token in found.value.split()]
            assert len(tokens) == len(set(tokens)) == 50
            for number in range(shared, 400, 40):
                assert [step for who, step in tokens if who == number] == list(range(5))


def test_a_slow_reader_does_not_stop_the_others(two_groups: Cluster) -> None:
    """A client asks for 200 MB and reads nothing; another's small requests go on."""
    from raftkv.machines.slots import shard_of
    from raftkv.protocol.addresses import parse_address
    from raftkv.protocol.messages import Hello, ReadOp, Verb, encode_hello, encode_request

    value = b"s" * VALUE_BYTES_MAX
    with two_groups.client() as client:
        client.put(b"slow", value)
        shard = shard_of(b"slow", 10)
    with two_groups.admin() as admin:
        gid = admin.query().owner(shard)
    leader = two_groups.leader(gid)

    async def stalled_and_lively() -> float:
        host, port = parse_address(leader.address)
        reader, writer = await asyncio.open_connection(host, port, limit=1024)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(encode_hello(Hello.of_client()))
        for number in range(200):
            writer.write(encode_request(number, Verb.READ, [1, 0, ReadOp.GET, shard, b"slow"]))
        slowest_s = 0.0
        async with RaftKV(two_groups.controller_addresses) as client:
            for _ in range(50):
                started_s = time.monotonic()
                await client.put(b"{slow}lively", b"x")
                await client.get(b"{slow}lively")
                slowest_s = max(slowest_s, time.monotonic() - started_s)
        writer.close()
        del reader
        return slowest_s

    before = _resident_bytes(leader.pid)
    assert asyncio.run(stalled_and_lively()) < 5.0
    assert _resident_bytes(leader.pid) - before < 150 * 1024 * 1024


def _resident_bytes(pid: int) -> int:
    with open(f"/proc/{pid}/statm") as statm:
        return int(statm.read().split()[1]) * 4096
