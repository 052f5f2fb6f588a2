"""Whether a replica can do its part: what `/readyz` answers, and what STATUS tells `raftkv health`.

A check that fails says why in one line. It looks at this replica only, and changes nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from raftkv.daemons.replica import Replica

BEHIND_S_MAX = 1.0
"""A replica that has applied all that it knew to be committed within this time isn't behind."""
CONFIGURATION = "configuration"
"""The check that a group fails until it is joined. A container that waits for that is well, so `raftkv health` lets it
pass."""


class Check(NamedTuple):
    """`problem` is None where all is well."""

    name: str
    problem: str | None


def readiness(replica: Replica | None, waits_for: str, now_s: float, config_num: int | None) -> list[Check]:
    """All checks, in the order in which they come to be met.

    `waits_for` names the replicas without which a new group isn't formed. `config_num` is the latest configuration
    known here, 0 before the first; None for a role that needs none.
    """
    if replica is None:
        unformed = f"the group is not formed yet; waits for {waits_for}" if waits_for else "the group is not formed yet"
        return [Check("formed", unformed)]
    checks = [
        Check("formed", None),
        Check("leader", None if replica.raft.leader is not None else "no leader of the group is known"),
        Check("applied", _why_behind(replica, now_s)),
    ]
    if config_num is not None:
        checks.append(Check(CONFIGURATION, None if config_num else "no configuration is known yet"))
    return checks


def _why_behind(replica: Replica, now_s: float) -> str | None:
    if replica.snapshots.installing:
        return "a snapshot is being installed"
    since_s = replica.behind_since_s
    if since_s is None or now_s - since_s <= BEHIND_S_MAX:
        return None
    return (
        f"entries up to {replica.raft.commit_index} are committed, and applied are those up to "
        f"{replica.applied_index}, for {now_s - since_s:.1f} s now"
    )
