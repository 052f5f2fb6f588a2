"""The simulator's scenarios against real processes: the same TOML, as far as processes and a proxy can follow.

What has no counterpart here (power losses, flipped bits, clocks, what happens inside a machine) is named, not
silently left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from raftkv.sim.scenario import Scenario
from tests.chaos.faults import MAP, NEED_COORDINATORS, NETWORK, PROCESS
from tests.chaos.run import LIST_ELEMENTS, Plan

KINDS: Mapping[str, tuple[str, ...]] = {
    "kill": ("kill_follower", "kill_controller_leader"),
    "kill_leader": ("kill_leader", "kill_coordinator_leader"),
    "kill_group": ("kill_group", "kill_controllers", "kill_coordinators"),
    "kill_all": ("kill_all", "kill_all_groups"),
    "restart_storm": ("restart_storm",),
    "graceful_stop": ("graceful_stop", "rolling_restart"),
    "pause": (
        *("pause_leader", "pause_follower", "pause_group", "pause_controller_leader", "pause_coordinator"),
        "pause_some",
    ),
    "crash_at_step": ("crash_at_step",),
    "stall_at_step": ("stall_at_step",),
    "full_disk": ("full_disk",),
    "isolate": ("isolate_follower", "one_way_in", "one_way_out"),
    "isolate_leader": ("isolate_leader", "leader_without_peers"),
    "partial_partition": ("partial_partition", "majority_ring"),
    "split": ("split", "cut_groups", "cut_coordinators"),
    "cut_controllers": ("cut_controllers",),
    "cut_client": ("cut_client",),
    "late_answers": ("lost_answers",),
    "half_open": ("half_open", "refuse"),
    "reset": ("reset_before", "reset_midway", "reset_after", "reset_at_answer"),
    "lossy": ("delay",),
    "clog": ("trickle",),
    "join": ("join",),
    "leave": ("leave",),
    "move": ("move",),
}
"""The simulator's name of a fault → what comes near to it here."""

SNAPSHOT_ENTRIES_MIN = 20
"""Real disks don't take a checkpoint every few entries and serve a load as well."""


def plan_of(scenario: Scenario, *, minutes: float, seed: int, each: int) -> tuple[Plan, list[str]]:
    """The plan, and the faults of the scenario that real processes can't have. Ranges become their middle. Where groups
    join and leave, one is not in the map at the start."""
    wanted = {kind for name in scenario.nemesis.faults for kind in KINDS.get(name, ())}
    cluster, work = scenario.cluster, scenario.workload
    if not cluster.coordinators:
        wanted -= {*NEED_COORDINATORS}
    spares = 1 if "join" in wanted else 0
    entries = max(SNAPSHOT_ENTRIES_MIN, round(sum(cluster.snapshot_entries) / 2))
    plan = Plan(
        minutes=minutes,
        seed=seed,
        each=each,
        replicas=[cluster.replicas] * (cluster.groups - spares),
        spares=[cluster.replicas] * spares,
        coordinators=cluster.coordinators,
        transactions=replace(scenario.transactions, elements=LIST_ELEMENTS),
        shards=cluster.shards,
        clients=work.clients,
        users=work.workers,
        think_s=sum(work.think_s) / 2,
        options=[
            *("--snapshot-entries", str(entries)),
            *("--snapshot-bytes", str(round(512 * sum(cluster.snapshot_kib)))),
            *("--reads", cluster.reads),
        ],
        process=[kind for kind in PROCESS if kind in wanted],
        network=[kind for kind in NETWORK if kind in wanted],
        map_changes=[kind for kind in MAP if kind in wanted],
    )
    return plan, sorted(name for name in scenario.nemesis.faults if name not in KINDS)
