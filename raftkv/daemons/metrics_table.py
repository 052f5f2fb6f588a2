"""Every metric of a daemon: name, kind, labels, who has it, what it means: for scrapes, and for docs/metrics.md."""

from __future__ import annotations

from typing import NamedTuple

ALL = ("controller", "shardkv", "coordinator")
COUNTER = "counter"
GAUGE = "gauge"
HISTOGRAM = "histogram"


class Metric(NamedTuple):
    """`roles` are those whose daemons have it, from their start on."""

    name: str
    kind: str
    help: str
    labels: tuple[str, ...] = ()
    roles: tuple[str, ...] = ALL


METRICS = (
    Metric("raftkv_build_info", GAUGE, "Always 1; its labels say who this is.", ("version", "role", "gid", "replica")),
    Metric("raftkv_ready", GAUGE, "Whether /readyz answers 200."),
    Metric("raftkv_connections", GAUGE, "Open connections that clients and other replicas have made."),
    Metric(
        "raftkv_requests_total", COUNTER, "Requests that were answered; outcome is ok or the error's name.",
        ("verb", "outcome"),
    ),
    Metric(
        "raftkv_request_duration_seconds", HISTOGRAM,
        "From a request's arrival to its answer; long polls (config) and waits for locks count as they are.", ("verb",),
    ),
    Metric("raftkv_loop_lag_seconds", HISTOGRAM, "How late the event loop ran a timer; two a second are looked at."),
    Metric("raftkv_wal_fsync_duration_seconds", HISTOGRAM, "Syncs of the log; writes are acknowledged after them."),
    Metric("raftkv_wal_append_bytes_total", COUNTER, "Bytes written to the log."),
    Metric("raftkv_wal_disk_bytes", GAUGE, "Size of the log's files."),
    Metric("raftkv_engine_flush_duration_seconds", HISTOGRAM, "Flushes of the engine, after which the log is cut."),
    Metric("raftkv_engine_checkpoint_duration_seconds", HISTOGRAM, "Checkpoints made to be sent as snapshots."),
    Metric("raftkv_engine_keys", GAUGE, "Rows in the engine, as it estimates; sessions and the like are rows too."),
    Metric("raftkv_engine_table_bytes", GAUGE, "Size of the engine's table files that are in use."),
    Metric("raftkv_snapshots_sent_total", COUNTER, "Snapshots that went to other replicas, whole or not."),
    Metric("raftkv_snapshots_installed_total", COUNTER, "Snapshots that took the place of this replica's state."),
    Metric("raftkv_raft_term", GAUGE, "The term of Raft."),
    Metric("raftkv_raft_is_leader", GAUGE, "Whether this replica leads its group."),
    Metric("raftkv_raft_has_leader", GAUGE, "Whether this replica knows a leader of its group."),
    Metric("raftkv_raft_leader_changes_seen_total", COUNTER, "How often the leader changed, as seen here."),
    Metric("raftkv_raft_log_entries", GAUGE, "Entries in the log; the engine has what was before."),
    Metric("raftkv_raft_proposals_committed_total", COUNTER, "Index of the last entry known to be committed."),
    Metric(
        "raftkv_raft_proposals_applied_total", COUNTER,
        "Index of the last entry applied; an entry holds up to 1,024 commands.",
    ),
    Metric("raftkv_raft_proposals_pending", GAUGE, "Commands that wait to be logged, committed or applied."),
    Metric(
        "raftkv_raft_proposals_failed_total", COUNTER,
        "Commands that were not logged, or of which this replica lost sight (their outcome is unknown).",
    ),
    Metric(
        "raftkv_raft_peer_lag_entries", GAUGE, "Entries of this leader that the peer hasn't acknowledged.", ("peer",)
    ),
    Metric(
        "raftkv_config_num", GAUGE, "Number of the latest configuration known here; 0 before the first.",
        roles=("shardkv", "coordinator"),
    ),
    Metric("raftkv_controller_config_num", GAUGE, "Number of the latest configuration.", roles=("controller",)),
    Metric(
        "raftkv_sessions", GAUGE, "Rows of client sessions in memory: one for each client and shard, of late.",
        roles=("controller", "shardkv"),
    ),
    Metric("raftkv_shards_serving", GAUGE, "Shards that the group serves.", roles=("shardkv",)),
    Metric("raftkv_shards_importing", GAUGE, "Shards that the group copies from another.", roles=("shardkv",)),
    Metric(
        "raftkv_shards_frozen", GAUGE, "Shards that the group keeps and doesn't serve: another takes them over.",
        roles=("shardkv",),
    ),
    Metric(
        "raftkv_migrations", GAUGE, "Moves to this group that are under way, and releases; at its leader.",
        roles=("shardkv",),
    ),
    Metric("raftkv_migrations_waiting", GAUGE, "Those of them that can't go on.", roles=("shardkv",)),
    Metric("raftkv_migration_age_seconds", GAUGE, "Age of the oldest of them.", roles=("shardkv",)),
    Metric(
        "raftkv_migration_bytes_total", COUNTER, "Keys and values copied to this group, by this replica.",
        roles=("shardkv",),
    ),
    Metric(
        "raftkv_migration_duration_seconds", HISTOGRAM, "Moves to this group that this replica has completed.",
        roles=("shardkv",),
    ),
    Metric(
        "raftkv_txn_open", GAUGE, "Transactions without an end: recorded at coordinators, prepared at a shardkv.",
        roles=("shardkv", "coordinator"),
    ),
    Metric(
        "raftkv_txn_commits_total", COUNTER,
        "Commits answered by this replica; way is one_group (shardkv) or coordinated, outcome committed, aborted or "
        "failed (not decided by this answer).",
        ("way", "outcome"), ("shardkv", "coordinator"),
    ),
    Metric("raftkv_locks_held", GAUGE, "Keys held by explicit locks of transactions.", roles=("shardkv",)),
    Metric("raftkv_lock_waiters", GAUGE, "Requests that wait for a lock.", roles=("shardkv",)),
)  # fmt: skip

PROCESS_METRICS = (
    Metric("process_cpu_seconds_total", COUNTER, "User and system time of the process."),
    Metric("process_max_fds", GAUGE, "How many file descriptors it may open."),
    Metric("process_open_fds", GAUGE, "How many it has open."),
    Metric("process_resident_memory_bytes", GAUGE, "Its resident memory."),
    Metric("process_start_time_seconds", GAUGE, "When it started, in seconds since 1970."),
    Metric("process_virtual_memory_bytes", GAUGE, "Its virtual memory."),
)
"""Of prometheus_client's collector, where there is a /proc."""


def as_markdown() -> str:
    """The table in docs/metrics.md."""
    lines = ["| metric | kind | labels | daemons | |", "|---|---|---|---|---|"]
    for metric in (*METRICS, *PROCESS_METRICS):
        roles = "all" if metric.roles == ALL else ", ".join(metric.roles)
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        lines.append(f"| `{metric.name}` | {metric.kind} | {labels} | {roles} | {metric.help} |")
    return "\n".join(lines) + "\n"
