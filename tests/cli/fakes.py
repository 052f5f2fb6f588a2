"""An SDK in memory for the tests of the command line: it answers, delays and fails as told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any, NamedTuple

from raftkv.cli.printers import Printer
from raftkv.cli.programs import command_table
from raftkv.cli.session import Session, Settings
from raftkv.client.transactions import TxnPhase
from raftkv.machines.shard_map import ShardMap
from raftkv.protocol.errors import Aborted, CasMismatch, RaftKVError, Unavailable


class FakeValue(NamedTuple):
    """A value with its version."""

    value: bytes
    version: int


@dataclass
class FakeKv:
    """Keys in a dict; `errors[key]` is raised, `delays_s[key]` waited for, `order` is what ran when."""

    data: dict[bytes, FakeValue] = field(default_factory=dict)
    errors: dict[bytes, RaftKVError] = field(default_factory=dict)
    delays_s: dict[bytes, float] = field(default_factory=dict)
    gates: dict[bytes, asyncio.Event] = field(default_factory=dict)
    order: list[tuple[str, bytes]] = field(default_factory=list)
    in_flight: int = 0
    in_flight_max: int = 0
    revision: int = 0
    closed: bool = False
    committed: list[bytes] = field(default_factory=list)
    aborted: list[bytes] = field(default_factory=list)

    async def _enter(self, verb: str, key: bytes) -> None:
        self.in_flight += 1
        self.in_flight_max = max(self.in_flight_max, self.in_flight)
        try:
            await asyncio.sleep(self.delays_s.get(key, 0))
            if key in self.gates:
                await self.gates[key].wait()
        finally:
            self.in_flight -= 1
        self.order.append((verb, key))
        if key in self.errors:
            raise self.errors[key]

    def _store(self, key: bytes, value: bytes) -> int:
        self.revision += 1
        self.data[key] = FakeValue(value, self.revision)
        return self.revision

    async def get(self, key: bytes) -> FakeValue | None:
        await self._enter("get", key)
        return self.data.get(key)

    async def put(self, key: bytes, value: bytes, *, if_version: int | None = None) -> int:
        await self._enter("put", key)
        return self._store(key, value)

    async def append(self, key: bytes, suffix: bytes) -> int:
        await self._enter("append", key)
        found = self.data.get(key)
        return self._store(key, (found.value if found else b"") + suffix)

    async def delete(self, key: bytes) -> bool:
        await self._enter("delete", key)
        return self.data.pop(key, None) is not None

    async def cas(self, key: bytes, expected: bytes, new: bytes) -> int:
        await self._enter("cas", key)
        found = self.data.get(key)
        if found is None or found.value != expected:
            raise CasMismatch(found.value if found else None, found.version if found else 0)
        return self._store(key, new)

    async def scan(
        self, prefix: bytes = b"", *, after: bytes | None = None, limit: int | None = None
    ) -> AsyncIterator[tuple[bytes, Any]]:
        await self._enter("scan", prefix)
        keys = sorted(key for key in self.data if key.startswith(prefix) and (after is None or key > after))
        for key in keys[:limit]:
            if key in self.errors:
                raise self.errors[key]
            if key in self.gates:
                await self.gates[key].wait()
            yield key, self.data[key]

    def transaction(self) -> FakeTransaction:
        return FakeTransaction(self)

    async def txn_status(self, txid: bytes) -> str:
        await self._enter("status", txid)
        return "committed" if txid in self.committed else "unknown"

    async def resolve_txn(self, txid: bytes) -> str:
        await self._enter("resolve", txid)
        return "committed" if txid in self.committed else "aborted"

    def unsettled_writes(self) -> list[str]:
        return ["a write"] * self.in_flight

    async def close(self) -> None:
        self.closed = True


class FakeTransaction:
    """Writes into a copy; `errors[b"commit"]` and `errors[b"begin"]` of the client are raised there."""

    def __init__(self, kv: FakeKv) -> None:
        self._kv = kv
        self._data: dict[bytes, FakeValue] = {}
        self.timeout_s = 0.0
        self.txid = b""
        self.phase = TxnPhase.NEW
        self.locked: list[bytes] = []

    async def begin(self) -> None:
        await self._kv._enter("begin", b"begin")
        self.txid = (len(self._kv.committed) + len(self._kv.aborted) + 1).to_bytes(16)
        self._data = dict(self._kv.data)
        self.phase = TxnPhase.OPEN

    async def _enter(self, verb: str, key: bytes) -> None:
        if self.phase is TxnPhase.ABORTED:
            raise Aborted("it lost its locks")
        await self._kv._enter(f"txn {verb}", key)

    async def get(self, key: bytes, *, for_update: bool = False) -> FakeValue | None:
        await self._enter("get", key)
        self.locked += [key] if for_update else []
        return self._data.get(key)

    async def put(self, key: bytes, value: bytes) -> None:
        await self._enter("put", key)
        self._data[key] = FakeValue(value, 0)

    async def append(self, key: bytes, suffix: bytes) -> None:
        await self._enter("append", key)
        found = self._data.get(key)
        self._data[key] = FakeValue((found.value if found else b"") + suffix, 0)

    async def delete(self, key: bytes) -> None:
        await self._enter("delete", key)
        self._data.pop(key, None)

    async def lock(self, *keys: bytes) -> None:
        await self._enter("lock", keys[0])
        self.locked += keys

    async def commit(self) -> None:
        await self._enter("commit", b"commit")
        self._kv.data = self._data
        self._kv.committed.append(self.txid)
        self.phase = TxnPhase.COMMITTED

    async def abort(self) -> None:
        self._kv.aborted.append(self.txid)
        self.phase = TxnPhase.ABORTED


@dataclass
class FakeControllers:
    """A shard map that Join and the like record calls of; `statuses[address]` answers Status."""

    shard_map: ShardMap = field(default_factory=lambda: ShardMap.initial(10))
    statuses: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    calls: list[tuple[str, Any]] = field(default_factory=list)
    error: RaftKVError | None = None
    coordinator_groups: dict[int, Sequence[str]] = field(default_factory=dict)
    silent: bool = False

    def _call(self, name: str, details: Any) -> int:
        self.calls.append((name, details))
        if self.error is not None:
            raise self.error
        return self.shard_map.num + 1

    async def join(self, groups: Mapping[int, Sequence[str]]) -> int:
        return self._call("join", dict(groups))

    async def leave(self, gids: Sequence[int], *, force: bool = False) -> int:
        return self._call("leave by force" if force else "leave", list(gids))

    async def move(self, shard: int, gid: int) -> int:
        return self._call("move", (shard, gid))

    async def query(self, num: int | None = None) -> ShardMap:
        self._call("query", num)
        return self.shard_map

    async def wait_beyond(self, num: int) -> ShardMap:
        if not self.silent and self.shard_map.num <= num:
            await asyncio.sleep(0.02)  # a held back answer
        if self.silent:
            raise Unavailable("nobody answers")
        return self.shard_map

    async def coordinators(self) -> Mapping[int, Sequence[str]]:
        return self.coordinator_groups

    async def status_of(self, address: str) -> Mapping[str, Any]:
        if address not in self.statuses:
            raise ConnectionRefusedError(address)
        return self.statuses[address]

    def unsettled_writes(self) -> list[str]:
        return []

    async def close(self) -> None:
        self.calls.append(("close", None))


@dataclass
class Fakes:
    """A connector that hands out one of each, and remembers the timeouts that were asked for."""

    kv_client: FakeKv = field(default_factory=FakeKv)
    controllers_client: FakeControllers = field(default_factory=FakeControllers)
    timeouts_s: list[float] = field(default_factory=list)

    def kv(self, controllers: Sequence[str], timeout_s: float) -> FakeKv:
        self.timeouts_s.append(timeout_s)
        return self.kv_client

    def controllers(self, controllers: Sequence[str], timeout_s: float) -> FakeControllers:
        self.timeouts_s.append(timeout_s)
        return self.controllers_client


class Shell:
    """A session on fakes with a printer into memory."""

    def __init__(self, program: str = "raftkv-kv", output: str = "plain") -> None:
        self.fakes = Fakes()
        self.out = BytesIO()
        self.table = command_table(program)
        self.session = Session(Settings(program, ("c:1",), output=output), self.fakes)
        self.printer = Printer(output, self.out)
