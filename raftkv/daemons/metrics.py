"""`--metrics-listen`: /livez, /readyz and /metrics of one daemon, over HTTP.

Everything is looked up when somebody asks, from what the daemon keeps anyway and from the meters. Imported only where
metrics are asked for: prometheus_client would slow down every other start. It must never change anything in the daemon.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from raftkv import __version__
from raftkv.daemons.controller import ControllerRole
from raftkv.daemons.coordinator import CoordinatorRole
from raftkv.daemons.daemon import Daemon
from raftkv.daemons.histogram import Histogram
from raftkv.daemons.http_server import Answer, HttpServer
from raftkv.daemons.meters import MeteredEngine, Meters
from raftkv.daemons.metrics_table import COUNTER, GAUGE, METRICS
from raftkv.daemons.shardkv import ShardKvRole
from raftkv.machines.coordinator import TxnState
from raftkv.machines.shard_states import ShardState
from raftkv.protocol.addresses import parse_address
from raftkv.protocol.errors import BY_CODE
from raftkv.protocol.messages import Verb

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Labels = tuple[str, ...]
Values = Mapping[Labels, "float | Histogram"]
"""A metric's values by those of its labels."""


class MetricsServer:
    """The listener of one daemon: from before its start, so that probes get an answer, to its end."""

    def __init__(self, daemon: Daemon, meters: Meters) -> None:
        self._daemon = daemon
        self._meters = meters
        self._registry = CollectorRegistry()
        self._registry.register(DaemonCollector(daemon, meters))
        ProcessCollector(registry=self._registry)
        self._http = HttpServer({"/livez": self._livez, "/readyz": self._readyz, "/metrics": self._metrics})

    async def listen(self, address: str) -> None:
        """Raise OSError if the address can't be had."""
        await self._http.listen(*parse_address(address))
        self._meters.loop.start()

    def close(self) -> None:
        self._meters.loop.stop()
        self._http.close()

    def _livez(self, query: str) -> Answer:
        """It answers, so the loop turns. A store that fails ends the process; this is for the moments in between."""
        has_failed = self._daemon.serving and self._daemon.store.wal.ended
        return _report([("loop", None), ("store", "the log has failed" if has_failed else None)], query)

    def _readyz(self, query: str) -> Answer:
        return _report(list(self._daemon.readiness()), query)

    def _metrics(self, query: str) -> Answer:
        return Answer(HTTPStatus.OK, generate_latest(self._registry), CONTENT_TYPE)


def _report(checks: list[tuple[str, str | None]], query: str) -> Answer:
    """As etcd and Kubernetes write it: ok, or what failed, a line each; with ?verbose all checks."""
    failed = [name for name, problem in checks if problem is not None]
    status = HTTPStatus.SERVICE_UNAVAILABLE if failed else HTTPStatus.OK
    is_verbose = query.split("&")[0].partition("=")[0] == "verbose"
    if not failed and not is_verbose:
        return Answer(status, b"ok\n")
    lines = [
        f"[+]{name} ok" if problem is None else f"[-]{name} failed: {problem}"
        for name, problem in checks
        if is_verbose or problem is not None
    ]
    if is_verbose:
        lines.append("not ok" if failed else "ok")
    return Answer(status, "".join(f"{line}\n" for line in lines).encode())


class DaemonCollector(Collector):
    """One daemon's metrics, in the order of the table; before it has started, only who it is."""

    def __init__(self, daemon: Daemon, meters: Meters) -> None:
        self._daemon = daemon
        self._meters = meters

    def describe(self) -> list[Family]:
        return []  # or registering would collect

    def collect(self) -> Iterator[Family]:
        values = self._values()
        role = self._daemon.options.role
        for metric in METRICS:
            if role in metric.roles and metric.name in values:
                yield _family(metric.name, metric.kind, metric.help, metric.labels, values[metric.name])

    def _values(self) -> dict[str, Values]:
        daemon = self._daemon
        options = daemon.options
        build = (__version__, options.role, str(options.gid), str(options.replica))
        values: dict[str, Any] = {
            "raftkv_build_info": {build: 1},
            "raftkv_ready": all(problem is None for _, problem in daemon.readiness()),
        }
        if daemon.serving:
            values |= self._requests() | self._storage() | self._raft() | self._role()
        return {name: value if isinstance(value, Mapping) else {(): value} for name, value in values.items()}

    def _requests(self) -> dict[str, Any]:
        totals: dict[Labels, float] = {}
        durations: dict[Labels, Histogram] = {}
        known = {*self._daemon.role.verbs, Verb.STATUS, Verb.TRANSFER}
        for number, meter in self._meters.requests.verbs.items():
            if number not in known and not meter.count:
                continue
            verb = _VERBS.get(number, "unknown")
            durations[verb,] = meter
            refused = dict(meter.refused)
            totals[verb, "ok"] = meter.count - sum(refused.values())
            for code, count in refused.items():
                totals[verb, _outcome(code)] = count
        return {
            "raftkv_connections": self._daemon.connections,
            "raftkv_requests_total": totals,
            "raftkv_request_duration_seconds": durations,
            "raftkv_loop_lag_seconds": self._meters.loop.lags,
        }

    def _storage(self) -> dict[str, Any]:
        store, meters = self._daemon.store, self._meters
        engine = store.engine
        assert isinstance(engine, MeteredEngine)
        replica = self._daemon.replica
        return {
            "raftkv_wal_fsync_duration_seconds": meters.disk.syncs,
            "raftkv_wal_append_bytes_total": meters.disk.appended_bytes,
            "raftkv_wal_disk_bytes": store.wal.bytes_on_disk,
            "raftkv_engine_flush_duration_seconds": meters.engine.flushes,
            "raftkv_engine_checkpoint_duration_seconds": meters.engine.checkpoints,
            "raftkv_engine_keys": engine.estimated_keys,
            "raftkv_engine_table_bytes": engine.table_bytes,
            "raftkv_snapshots_sent_total": 0 if replica is None else replica.snapshots.sent,
            "raftkv_snapshots_installed_total": 0 if replica is None else replica.snapshots.installed,
        }

    def _raft(self) -> dict[str, Any]:
        replica = self._daemon.replica
        raft = None if replica is None else replica.raft
        peers = {} if raft is None or raft.role != "leader" else raft.peer_progress()
        return {
            "raftkv_raft_term": raft.term if raft else 0,
            "raftkv_raft_is_leader": raft is not None and raft.role == "leader",
            "raftkv_raft_has_leader": raft is not None and raft.leader is not None,
            "raftkv_raft_leader_changes_seen_total": replica.leader_changes if replica else 0,
            "raftkv_raft_log_entries": raft.last_index - raft.start_index if raft else 0,
            "raftkv_raft_proposals_committed_total": raft.commit_index if raft else 0,
            "raftkv_raft_proposals_applied_total": replica.applied_index if replica else 0,
            "raftkv_raft_proposals_pending": replica.pending if replica else 0,
            "raftkv_raft_proposals_failed_total": replica.failed if replica else 0,
            "raftkv_raft_peer_lag_entries": {
                (str(peer),): max(0, raft.last_index - match) for peer, (match, *_) in peers.items() if raft
            },
        }

    def _role(self) -> dict[str, Any]:
        role = self._daemon.role
        if isinstance(role, ControllerRole):
            machine = role.machine
            return {
                "raftkv_controller_config_num": machine.config_num,
                "raftkv_sessions": machine.sessions_in_memory,
            }
        return _shardkv(role) if isinstance(role, ShardKvRole) else _coordinator(role)


def _shardkv(role: ShardKvRole) -> dict[str, Any]:
    machine = role.machine
    states = [state for _, state in machine.shard_states()]
    moves = role.migrations.status()
    return {
        "raftkv_config_num": machine.config_num,
        "raftkv_sessions": machine.sessions_in_memory,
        "raftkv_shards_serving": states.count(ShardState.SERVING),
        "raftkv_shards_importing": states.count(ShardState.IMPORTING),
        "raftkv_shards_frozen": states.count(ShardState.EXPORTING) + states.count(ShardState.DRAINED),
        "raftkv_migrations": len(moves),
        "raftkv_migrations_waiting": sum(move["waits_for"] is not None for move in moves),
        "raftkv_migration_age_seconds": max((move["age_s"] for move in moves), default=0),
        "raftkv_migration_bytes_total": role.migrations.copied_bytes,
        "raftkv_migration_duration_seconds": role.migrations.durations_s,
        "raftkv_txn_open": len({txid for txid, *_ in machine.in_doubt()}),
        "raftkv_txn_commits_total": {
            ("one_group", outcome): role.commits[outcome] for outcome in ("committed", "aborted", "failed")
        },
        "raftkv_locks_held": machine.explicit_locks,
        "raftkv_lock_waiters": role.waiting_for_locks,
    }


def _coordinator(role: CoordinatorRole) -> dict[str, Any]:
    return {
        "raftkv_config_num": role.config_num,
        "raftkv_txn_open": len(role.machine.open),
        "raftkv_txn_commits_total": {
            ("coordinated", "committed"): role.ended.get(TxnState.COMMITTED, 0),
            ("coordinated", "aborted"): role.ended.get(TxnState.ABORTED, 0),
        },
    }


def _family(name: str, kind: str, text: str, labels: Labels, values: Values) -> Family:
    if kind == GAUGE:
        family: Any = GaugeMetricFamily(name, text, labels=labels)
    elif kind == COUNTER:
        family = CounterMetricFamily(name, text, labels=labels)
    else:
        family = HistogramMetricFamily(name, text, labels=labels)
    for label_values, value in values.items():
        if isinstance(value, Histogram):
            family.add_metric(label_values, value.cumulative(), value.total)
        else:
            family.add_metric(label_values, float(value))
    return family  # type: ignore[no-any-return]


def _outcome(code: int) -> str:
    """The name of an error as a label: NotLeader is not_leader."""
    error = BY_CODE.get(code)
    return "other" if error is None else re.sub(r"(?<!^)(?=[A-Z])", "_", error.__name__).lower()


_VERBS = {int(verb): verb.name.lower() for verb in Verb}
