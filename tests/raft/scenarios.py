"""Histories laid down step by step, for the rules that chance seldom puts to the test.

Each takes the class of Raft to run: with the real one nothing may be violated; with one rule ablated, the scenario
that was made for it must end in a violation. No timer fires by itself: timeouts are far away.
"""

from __future__ import annotations

from collections.abc import Callable

from raftkv.raft.actions import Persist, Send
from raftkv.raft.changes import Promote, Remove
from raftkv.raft.config import RaftConfig
from raftkv.raft.core import Raft
from raftkv.raft.entry import Entry, EntryKind
from raftkv.raft.errors import ChangeRefused
from raftkv.raft.invariants import InvariantViolation
from raftkv.raft.membership import Membership
from raftkv.raft.messages import AppendEntries, AppendReply, Message
from tests.raft.network import Cluster
from tests.raft.solo import follower

MakeRaft = Callable[..., Raft]


def calm(replica: int) -> RaftConfig:
    """Nobody campaigns unasked; one entry in each append, so that they can be lost one by one."""
    return RaftConfig(
        replica,
        election_timeout_ms_min=100_000,
        election_timeout_ms_max=100_000,
        heartbeat_ms=20,
        append_bytes_max=1,
    )


def figure_8(make: MakeRaft = Raft) -> Cluster:
    """Acceptance row 1; Raft, Figure 8."""
    cluster = Cluster(5, config=calm, raft_class=make)
    cluster.make_leader(2)  # term 1
    cluster.run(100)
    cluster.make_leader(1)  # term 2
    cluster.run(100)
    cluster.partition([1, 2])
    assert cluster.propose(b"entry of term 2", 1)
    cluster.run(50)
    cluster.servers[1].crash()
    cluster.partition([3, 4, 5])
    cluster.message_filter = lambda source, to, message: not (source == 5 and isinstance(message, AppendEntries))
    cluster.campaign(5)  # term 3, votes of 3 and 4; its entry stays with it
    cluster.run(50)
    assert cluster.raft(5).role == "leader" and cluster.raft(5).term == 3
    cluster.servers[5].crash()

    def only_old_terms(source: int, to: int, message: Message) -> bool:
        return not (isinstance(message, AppendEntries) and any(entry.term == 4 for entry in message.entries))

    cluster.message_filter = only_old_terms
    cluster.partition([1, 2, 3])
    cluster.servers[1].boot()
    cluster.campaign(1)  # term 3, in which 3 has voted for 5
    cluster.run(20)
    cluster.campaign(1)  # term 4: copies its entry of term 2 to 3, and no more
    cluster.run(200)
    assert cluster.raft(3).last_term == 2, "the entry of term 2 is on a majority"
    cluster.servers[1].crash()
    cluster.message_filter = None
    cluster.partition([2, 3, 4, 5])
    cluster.servers[5].boot()
    cluster.campaign(5)  # term 4, in which the others have voted for 1
    cluster.run(20)
    cluster.campaign(5)  # term 5: may win, and overwrites it
    cluster.run(200)
    assert cluster.raft(5).role == "leader"
    cluster.heal()
    cluster.servers[1].boot()
    assert cluster.run(1000, cluster.converged)
    return cluster


def two_memberships(make: MakeRaft = Raft) -> Cluster:
    """Acceptance row 44: one leader adds a voter, the next removes one, and their quorums don't meet."""
    cluster = Cluster(5, voters=(1, 2, 3, 4), config=calm, raft_class=make)
    for server in cluster.servers.values():
        server.crash()
        server.disk.start_membership = Membership((1, 2, 3, 4), (5,))
        server.disk.engine = [(0, 0, 0, b"", server.disk.start_membership)]
        server.boot()
    cluster.make_leader(1)
    cluster.run(100)
    cluster.partition([1, 5], [2, 3, 4])
    cluster.servers[1].step(lambda raft: raft.propose_membership(Promote(5), cluster.now_ms))
    cluster.run(100)
    assert cluster.raft(5).membership.voters == (1, 2, 3, 4, 5)
    cluster.message_filter = lambda source, to, message: (
        not (source == 2 and to == 4 and isinstance(message, AppendEntries))
    )
    cluster.campaign(2)
    cluster.run(10)
    assert cluster.raft(2).role == "leader"
    try:
        cluster.servers[2].step(lambda raft: raft.propose_membership(Remove(1), cluster.now_ms))
    except ChangeRefused:
        pass
    cluster.run(100)  # without the barrier, 2 and 3 commit without 4
    cluster.message_filter = None
    cluster.partition([1, 4, 5])
    cluster.servers[1].crash()
    cluster.servers[1].boot()
    cluster.campaign(1)  # term 2, in which 4 has voted for 2
    cluster.run(20)
    cluster.campaign(1)
    cluster.run(100)
    assert cluster.raft(1).role == "leader"
    cluster.heal()
    cluster.run(200)
    return cluster


def vote_and_reboot(make: MakeRaft = Raft) -> Cluster:
    """Acceptance row 14: a voter forgets nothing over a restart in one term."""
    cluster = Cluster(3, config=calm, raft_class=make)
    cluster.message_filter = lambda source, to, message: not isinstance(message, AppendEntries)
    cluster.partition([1, 2])
    cluster.campaign(1)
    cluster.run(20)
    assert cluster.raft(1).role == "leader"
    cluster.servers[2].crash()
    cluster.servers[2].boot()
    cluster.partition([2, 3])
    cluster.campaign(3)
    cluster.run(20)
    assert cluster.raft(3).term == 1
    return cluster


def overwritten_twice(make: MakeRaft = Raft) -> None:
    """Acceptance row 11: A → B → A leaders rewrite one index while the disk is slow.

    The completion of the first write says nothing about what the third one put there.
    """
    raft = follower(3, make=make)
    written = []
    for term, leader in ((1, 1), (2, 2), (3, 1)):
        entry = Entry.make(term, 1, EntryKind.COMMANDS, 0, b"of term %d" % term)
        for new in ((), (entry,)):  # the term is written before the entry
            raft.step(AppendEntries(term, leader, 0, 0, new, 0, 1), 0)
            written += [action for action in raft.take_actions() if isinstance(action, Persist)]
    assert [(len(persist.entries), persist.hard_state is not None) for persist in written] == [
        (0, True), (1, False), (0, True), (1, False), (0, True), (1, False)
    ]  # fmt: skip
    raft.persisted(written[4].seq)
    raft.step(AppendEntries(3, 1, 1, 3, (), 0, 2), 1)
    for action in raft.take_actions():
        if isinstance(action, Send) and isinstance(action.message, AppendReply) and action.message.ok:
            durable = action.after <= raft.node.persisted_seq
            if durable and action.message.match_index > 0:
                raise InvariantViolation("AckedBeforeDurable", str(action))
    assert raft.node.log.stable_index == 0
    raft.persisted(written[5].seq)
    assert raft.node.log.stable_index == 1


def stale_ack(make: MakeRaft = Raft) -> Cluster:
    """Acceptance rows 30 and 31: an ack that was under way before the read, at a leader already replaced."""
    cluster = Cluster(3, config=calm, raft_class=make)
    cluster.make_leader(1)
    cluster.run(100)
    late: list[Message] = []

    def hold(source: int, to: int, message: Message) -> bool:
        if to == 1 and isinstance(message, AppendReply):
            late.append(message)
            return False
        return True

    cluster.message_filter = hold
    cluster.run(30)  # a heartbeat's acks are held back
    assert late
    cluster.message_filter = None
    cluster.partition([2, 3])
    cluster.make_leader(2)
    assert cluster.propose(b"newer", 2)
    cluster.run(50)
    assert cluster.raft(1).role == "leader"
    assert cluster.read(1)
    for message in late:
        cluster.servers[1].step(lambda raft, message=message: raft.step(message, cluster.now_ms))  # type: ignore[misc]
    assert cluster.reads_done == 0
    return cluster
