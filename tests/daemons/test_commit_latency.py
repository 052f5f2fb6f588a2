"""What a client waits for when it commits: messages and fsyncs one after the other, counted in the simulator.

All of them take the same time, once only the messages and once only the disks: so the time of a commit says how many
came in a row.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.daemons.transaction_rig import TxnClient, TxnRig

UNIT_S = 0.1
TURNS = 5


def in_a_row(kind: str, *, write: bool, slow_messages: bool) -> int:
    """Of the messages (there and back counts two), or of the fsyncs. The quickest of some commits, by a client that
    knows who leads."""
    with TxnRig(3) as rig:
        one, other = rig.keys(2)
        keys = [one, other] if kind == "two groups" else rig.keys(3)[::2]
        client = TxnClient(rig)

        async def commit(turn: int, write: bool) -> float:
            txn = await client.clerk.kv.transaction().begin()
            for key in keys:
                await txn.get(key)
                if write:
                    await txn.put(key, b"%d" % turn)
            began_s = rig.now
            await txn.commit()
            return rig.now - began_s

        client.do(commit(0, True))
        messages_s, sync_s = (UNIT_S, 1e-6) if slow_messages else (1e-6, UNIT_S)
        rig.network.profile = replace(rig.network.profile, latency_s=messages_s, jitter_s=0.0)
        for process in rig.cluster.daemons:
            process.media.profile = replace(process.media.profile, sync_s=sync_s, jitter_s=1e-9, spike=0.0)
        rig.sleep(2.0)
        times_s: list[float] = [client.do(commit(turn, write)) for turn in range(1, TURNS)]
        return round(min(times_s) / UNIT_S)


@pytest.mark.parametrize(
    ("kind", "write", "messages", "fsyncs"),
    [
        ("two groups", True, 8, 2),  # to the coordinators and back; PREPARE there and back, and inside; DECIDE inside
        ("one group", True, 4, 1),
        ("two groups", False, 4, 0),  # to the groups and back; each asks a majority whether it still leads
        ("one group", False, 4, 0),
    ],
)
def test_what_a_client_waits_for(kind: str, write: bool, messages: int, fsyncs: int) -> None:
    """At most two rounds of consensus over several groups, one at one group, none if nothing is written."""
    assert in_a_row(kind, write=write, slow_messages=True) == messages
    assert in_a_row(kind, write=write, slow_messages=False) == fsyncs
