"""What `raftkv top` knows: one poll of the whole cluster after the other, and the rates between two of them.

A poll is Status (health.py), with the raw answers kept, and how long each took. It goes on when controllers have lost
their majority: the groups are then those of the last configuration that was read. Daemons count no operations for
Status, so a rate is that of committed log entries: many writes at once share an entry, and reads make none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

from raftkv.cli.health import Answer, ask, cluster_health, replicas_of
from raftkv.cli.results import ClusterHealth

if TYPE_CHECKING:
    from raftkv.cli.session import ControllersClient
    from raftkv.machines.shard_map import ShardMap

PATIENCE_S = 1.0
"""How long one daemon may take before it counts as down: a stopped one must not stop the display."""

Group = tuple[str, int | None]
"""Role and gid."""


@dataclass(frozen=True, slots=True)
class Load:
    """Transactions as the leaders say: of coordinators those over several groups, of groups their locks."""

    open: int = 0
    oldest_s: float = 0.0
    prepared: int = 0
    locked_keys: int = 0
    waiting: int = 0


@dataclass(frozen=True, slots=True)
class Sample:
    """One poll; `at_s` is the loop's time."""

    at_s: float
    health: ClusterHealth
    latencies_s: Mapping[str, float] = field(default_factory=dict)  # by address, of those that answered
    load: Load = Load()

    def committed(self) -> dict[Group, int]:
        """The last entry known to be committed in each group, whoever knows it."""
        found: dict[Group, int] = {}
        for replica in self.health.replicas:
            if replica.commit_index is not None:
                group = (replica.role, replica.gid)
                found[group] = max(found.get(group, 0), replica.commit_index)
        return found


def rates(before: Sample | None, now: Sample) -> dict[Group, float]:
    """Entries a second that each group has committed between two polls; without those that nobody can say."""
    if before is None or now.at_s <= before.at_s:
        return {}
    earlier = before.committed()
    return {
        group: (index - earlier[group]) / (now.at_s - before.at_s)
        for group, index in now.committed().items()
        if index >= earlier.get(group, index + 1)  # less: another cluster is there now
    }


class Watch:
    """Polls a cluster through `client`."""

    def __init__(self, client: ControllersClient, controllers: Sequence[str], timeout_s: float) -> None:
        self._client = client
        self._controllers = controllers
        self._patience_s = min(timeout_s, PATIENCE_S)
        self._map: ShardMap | None = None
        self._coordinators: list[str] = []

    async def poll(self) -> Sample:
        """Raises RaftKVError if no controller answers, until one has."""
        recorder = _Recorder(self._client, self._map, self._patience_s)
        client = cast("ControllersClient", recorder)
        health = await cluster_health(client, self._controllers, self._patience_s)
        replicas, problems = list(health.replicas), [*recorder.problems, *health.problems]
        coordinators = [replica.address for replica in replicas if replica.role == "coordinator"]
        if not coordinators and self._coordinators:  # nobody says where they are, but they were there
            answers = await ask(client, self._coordinators, self._patience_s)
            replicas += replicas_of("coordinator", None, self._coordinators, answers, problems)
        self._map, self._coordinators = recorder.map, coordinators or self._coordinators
        health = replace(health, replicas=replicas, problems=problems)
        now_s = asyncio.get_running_loop().time()
        return Sample(now_s, health, recorder.latencies_s, _load(recorder.answers.values()))


class _Recorder:
    """A client of the controllers for one poll, which keeps what came, and knows the map where they don't say."""

    def __init__(self, client: ControllersClient, known: ShardMap | None, patience_s: float) -> None:
        self._client = client
        self._patience_s = patience_s
        self.map = known
        self.problems: list[str] = []
        self.answers: dict[str, Answer] = {}
        self.latencies_s: dict[str, float] = {}

    async def query(self, num: int | None = None) -> ShardMap:
        if num is not None or self.map is None:
            found = await self._client.query(num)
        else:
            try:
                async with asyncio.timeout(self._patience_s):
                    found = await self._client.query()
            except Exception as error:
                from raftkv.protocol.errors import RaftKVError

                if not isinstance(error, RaftKVError | OSError | TimeoutError):
                    raise
                self.problems = [f"the shard map can't be read; configuration {self.map.num} is the last that was"]
                return self.map
        if num is None:
            self.map = found
        return found

    async def status_of(self, address: str) -> Mapping[str, Any]:
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        self.answers[address] = answer = await self._client.status_of(address)
        self.latencies_s[address] = loop.time() - began_s
        return answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)


def _load(answers: Iterable[Answer]) -> Load:
    """The sum over the leaders."""
    by_group: dict[Group, list[Answer]] = {}
    for answer in answers:
        by_group.setdefault((answer["role"], answer["gid"]), []).append(answer)
    open_, oldest_ms, prepared, locked, waiting = 0, 0, 0, 0, 0
    for group in by_group.values():
        leading = [answer for answer in group if answer["state"] == "leader"]
        if not leading:
            continue
        leader = max(leading, key=lambda answer: int(answer["term"]))
        open_ += int(leader.get("open", 0))
        oldest_ms = max([oldest_ms, *(int(txn["age_ms"]) for txn in leader.get("transactions", ()))])
        prepared += int(leader.get("prepared", 0))
        locked += int(leader.get("explicit_locks", 0))
        waiting += int(leader.get("waiting_for_locks", 0))
    return Load(open_, oldest_ms / 1000, prepared, locked, waiting)
