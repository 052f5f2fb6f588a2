"""Scenarios as data: what cluster, what work, what goes wrong how often. Read from TOML; see scenarios/.

A number may be given as a range [low, high]: each seed then draws its own. Nothing here acts.
"""

from __future__ import annotations

import dataclasses
import random
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

SCENARIOS = Path(__file__).parent / "scenarios"

Range = tuple[float, float]


class ScenarioError(ValueError):
    """The file is no scenario; the text is one line for a person."""


@dataclass(frozen=True)
class ClusterPlan:
    """How many of what; `coordinators` decide transactions over several groups. `snapshot_…` and
    `wal_segment_kib` bound the log, so that snapshots and rolls happen. `clock_step_ms` is what the loops' clocks count
    in: uvloop's count whole milliseconds, asyncio's own are finer (0)."""

    controllers: int = 3
    groups: int = 2
    replicas: int = 3
    shards: int = 10
    snapshot_entries: Range = (5, 400)
    snapshot_kib: Range = (0.5, 32)
    wal_segment_kib: Range = (32, 256)
    reads: str = "readindex"
    coordinators: int = 0
    clock_step_ms: float = 1.0


@dataclass(frozen=True)
class WorkPlan:
    """`clients` processes with `workers` sequential users each; `mix` are the weights of the operations.

    Keys whose name begins with `a` are only read and appended to.
    """

    clients: int = 4
    workers: int = 3
    keys: int = 24
    users_per_key: int = 4
    think_s: Range = (0.1, 0.5)
    timeout_s: Range = (1.0, 10.0)
    value_bytes: Range = (0, 120)
    follower_reads: float = 0.3
    """Share of the client processes that read from any replica."""
    scans: float = 0.01
    """Share of the operations that are scans; each counts as a read of every key that it covers."""
    mix: dict[str, float] = field(
        default_factory=lambda: {"get": 40, "put": 20, "append": 20, "delete": 4, "cas": 12, "put_if": 4}
    )


@dataclass(frozen=True)
class TxnPlan:
    """`users` of each client process run transactions; `mix` are the weights of their kinds.

    `lists`, `accounts` and `ring` are numbers of keys, `elements` the length at which a list is followed by an empty
    one; `locked`, `retried` and `abandoned` the shares of transactions that lock first, that go through
    `run_transaction`, and whose client doesn't wait for the commit.
    """

    users: int = 0
    lists: int = 8
    elements: int = 10_000
    accounts: int = 6
    ring: int = 6
    think_s: Range = (0.05, 0.4)
    locked: float = 0.1
    retried: float = 0.3
    abandoned: float = 0.03
    mix: dict[str, float] = field(
        default_factory=lambda: {"lists": 40, "read": 15, "plain": 10, "transfer": 15, "audit": 8, "swap": 12}
    )


@dataclass(frozen=True)
class NetworkPlan:
    latency_ms: Range = (0.5, 2.0)
    jitter_ms: Range = (0.1, 2.0)
    loss: Range = (0.0, 0.002)
    split: float = 0.02


@dataclass(frozen=True)
class DiskPlan:
    sync_ms: Range = (0.3, 4.0)
    jitter_ms: Range = (0.1, 2.0)
    spike: float = 0.002


@dataclass(frozen=True)
class NemesisPlan:
    """A fault begins every `every_s` on average, `at_once` at the same time; `faults` are weights by name."""

    every_s: Range = (0.6, 2.5)
    at_once: int = 4
    start_s: Range = (0.0, 4.0)
    faults: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Scenario:
    """`virtual_seconds` is the safety phase; it goes on, up to twice as long, until there were `operations_min`
    and `faults_min`. `liveness_seconds` is how long everything may take to be well after it."""

    name: str = "calm"
    virtual_seconds: float = 60.0
    operations_min: int = 0
    faults_min: int = 0
    liveness_seconds: float = 30.0
    cluster: ClusterPlan = field(default_factory=ClusterPlan)
    workload: WorkPlan = field(default_factory=WorkPlan)
    transactions: TxnPlan = field(default_factory=TxnPlan)
    network: NetworkPlan = field(default_factory=NetworkPlan)
    disk: DiskPlan = field(default_factory=DiskPlan)
    nemesis: NemesisPlan = field(default_factory=NemesisPlan)

    def with_seconds(self, virtual_seconds: float) -> Scenario:
        return dataclasses.replace(self, virtual_seconds=virtual_seconds)


def load(name_or_path: str) -> Scenario:
    """A scenario from a file, or one of ours by name. Raises ScenarioError."""
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = SCENARIOS / f"{name_or_path}.toml"
    try:
        with path.open("rb") as file:
            return parse(tomllib.load(file), path.stem)
    except OSError as error:
        known = ", ".join(names())
        raise ScenarioError(f"{path}: {error.strerror or error}; the scenarios here are {known}") from None
    except tomllib.TOMLDecodeError as error:
        raise ScenarioError(f"{path}: {error}") from None


def names() -> list[str]:
    return sorted(path.stem for path in SCENARIOS.glob("*.toml"))


def parse(document: dict[str, Any], name: str) -> Scenario:
    """Raises ScenarioError for a name that isn't known, or a value of another kind than the default's."""
    document = {"name": name, **document}
    document.pop("description", None)
    scenario = _fill(Scenario(), document, name)
    cluster = scenario.cluster
    if min(cluster.controllers, cluster.replicas, cluster.shards) < 1 or min(cluster.groups, cluster.coordinators) < 0:
        raise ScenarioError(f"{name}: a cluster has at least one controller, replica and shard")
    if min(scenario.nemesis.faults.values(), default=0.0) < 0 or any(
        min(plan.mix.values()) < 0 for plan in (scenario.workload, scenario.transactions)
    ):
        raise ScenarioError(f"{name}: a weight is never below 0")
    return scenario


def _fill(default: T, values: dict[str, Any], where: str) -> T:
    fields = {item.name for item in dataclasses.fields(default)}  # type: ignore[arg-type]
    changes: dict[str, Any] = {}
    for key, value in values.items():
        if key not in fields:
            raise ScenarioError(f"{where}: unknown setting {key!r}; there are {', '.join(sorted(fields))}")
        present = getattr(default, key)
        if dataclasses.is_dataclass(present) and not isinstance(present, type):
            if not isinstance(value, dict):
                raise ScenarioError(f"{where}.{key} must be a table")
            changes[key] = _fill(present, value, f"{where}.{key}")
        else:
            changes[key] = _convert(present, value, f"{where}.{key}")
    return dataclasses.replace(default, **changes)  # type: ignore[type-var]


def _convert(default: Any, value: Any, where: str) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(default, tuple):
        if number:
            return (float(value), float(value))
        if isinstance(value, list) and len(value) == 2 and value[0] <= value[1]:
            return (float(value[0]), float(value[1]))
        raise ScenarioError(f"{where} must be a number or a range [low, high]")
    if isinstance(default, dict):
        if isinstance(value, dict) and all(isinstance(weight, int | float) for weight in value.values()):
            return {str(key): float(weight) for key, weight in value.items()}
        raise ScenarioError(f"{where} must be a table of weights")
    if isinstance(default, float) and number:
        return float(value)
    if type(value) is not type(default):
        raise ScenarioError(f"{where} must be like {default!r}, not {value!r}")
    return value


def draw(rng: random.Random, bounds: Range) -> float:
    """A number from the range; small ones as often as large ones when it spans much."""
    low, high = bounds
    if low > 0 and high / low > 8:
        return float(low * (high / low) ** rng.random())
    return rng.uniform(low, high)
