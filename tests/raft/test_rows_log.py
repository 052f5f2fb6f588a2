"""Hard scenarios of log, commit and election: rows 1–20 of the acceptance table, as far as the core decides them.

Row 15 is storage's (its core part: nothing is acknowledged or committed while a disk is silent); row 20's other half
is the shells'.
"""

from __future__ import annotations

import pytest

from raftkv.raft.actions import (
    Commit,
    HardState,
    PeerRegressed,
    Persist,
    ReadFailed,
    RoleChanged,
    Send,
    SnapshotComplete,
)
from raftkv.raft.config import RaftConfig
from raftkv.raft.errors import Busy, NotLeader, SafetyViolation
from raftkv.raft.messages import AppendEntries, AppendReply, VoteReply
from tests.raft import scenarios
from tests.raft.network import Cluster, Disk, Faults
from tests.raft.schedules import small_config
from tests.raft.solo import (
    ack,
    append,
    candidate,
    drain,
    entries,
    follower,
    leader,
    of,
    reject,
    sent,
    vote_request,
)


def test_row_01_figure_8_old_entries_commit_only_with_one_of_the_leaders_own_term() -> None:
    cluster = scenarios.figure_8()
    assert b"entry of term 2" not in cluster.payloads, "it was overwritten, and never had been committed"


def test_row_02_stale_replies_do_not_move_match_back() -> None:
    raft = follower(log=(1,))
    leader(raft)
    last = raft.last_index
    for stale in (0, 1):
        ack(raft, 2, stale)
        raft.step(AppendReply(raft.term, 2, False, stale, 0, 0, last, 0, 1), 0)
        raft.step(AppendReply(raft.term - 1, 2, True, stale, stale, 0, stale, 0, 1), 0)
    assert raft.peer_progress()[2][:3] == (last, last + 1, "replicate")
    assert not sent(drain(raft), AppendEntries)


def test_row_02_figure_8_on_a_bad_net_converges() -> None:
    faults = Faults(drop=0.19, delay_ms_max=26, slow=0.3, slow_ms_max=2200, sync_ms_max=3)
    cluster = Cluster(5, 11, faults=faults)
    for number in range(300):
        leader_id = cluster.leader()
        if leader_id is not None:
            cluster.propose(b"%d" % number, leader_id)
            if cluster.rng.random() < 0.2:
                cluster.isolate(leader_id)
        cluster.run(cluster.rng.choice((12, 12, 12, 300)))
        if len(cluster.cuts) > 8:
            cluster.heal()
    cluster.heal()

    def works() -> bool:
        found = cluster.leader()
        return found is not None and bool(cluster.propose(b"final", found))

    assert cluster.run(10_000, works)
    assert cluster.run(10_000, lambda: b"final" in cluster.payloads), "10 s with the bad net still on"


@pytest.mark.parametrize("pre_vote", [True, False])
def test_row_03_a_higher_term_but_unsupported_tail_loses_to_a_longer_supported_log(pre_vote: bool) -> None:
    cluster = Cluster(5, config=lambda replica: RaftConfig(replica, pre_vote=pre_vote))
    for replica, terms in ((1, (1, 3)), (2, (1, 2, 2)), (3, (1, 2, 2)), (4, (1, 2, 2)), (5, (1, 3))):
        server = cluster.servers[replica]
        server.crash()
        server.disk.entries = list(entries(*terms))
        server.disk.hard_state = HardState(3, None)
        server.boot()
    # 1 and 5 hold entries of term 3 that no quorum has; they are out of reach for now.
    cluster.partition([2, 3, 4])
    cluster.elect()
    cluster.heal()
    assert cluster.run(5000, cluster.converged)
    assert cluster.raft(1).term_at(2) == 2 and cluster.raft(5).term_at(2) == 2


FIGURE_7 = {
    2: (1, 1, 1, 4, 4, 5, 5, 6, 6),
    3: (1, 1, 1, 4),
    4: (1, 1, 1, 4, 4, 5, 5, 6, 6, 6, 6),
    5: (1, 1, 1, 4, 4, 5, 5, 6, 6, 6, 7, 7),
    6: (1, 1, 1, 4, 4, 4, 4),
    7: (1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3),
}


def test_row_04_figure_7_all_logs_converge_after_a_few_probes_each() -> None:
    cluster = Cluster(7, config=scenarios.calm)
    logs = FIGURE_7 | {1: (1, 1, 1, 4, 4, 5, 5, 6, 6, 6)}
    for replica, terms in logs.items():
        server = cluster.servers[replica]
        server.crash()
        server.disk.entries = list(entries(*terms))
        server.disk.hard_state = HardState(7, None)
        server.boot()
    refused: dict[int, int] = dict.fromkeys(FIGURE_7, 0)

    def count(source: int, to: int, message: object) -> bool:
        if isinstance(message, AppendReply) and not message.ok:
            refused[source] += 1
        return True

    cluster.message_filter = count
    cluster.make_leader(1)
    assert cluster.run(2000, cluster.converged)
    # One refusal finds the point where a log is merely short; a foreign tail costs one more.
    assert all(count <= 2 for count in refused.values()), refused


def test_row_05_a_delayed_older_append_cuts_nothing_off() -> None:
    raft = follower()
    raft.step(append(1, 2, (0, 0), entries(1, 1, 1)), 0)
    drain(raft)
    raft.step(append(1, 2, (0, 0), entries(1)), 0)
    actions = drain(raft)
    assert raft.last_index == 3 and not of(actions, Persist)
    (reply,) = sent(actions, AppendReply)
    assert reply.ok and reply.match_index == 1


def test_row_06_commit_goes_no_further_than_what_the_append_vouches_for() -> None:
    raft = follower(log=(1, 1, 2, 2))
    raft.step(append(3, 2, (2, 1), (), commit=4), 0)
    assert raft.commit_index == 2
    raft.step(append(3, 2, (2, 1), entries(3, first=3), commit=9), 0)
    assert raft.commit_index == 3 and raft.last_index == 3


def test_row_07_a_heartbeat_to_an_unmatched_follower_vouches_for_no_more_than_is_matched() -> None:
    raft = follower(log=(1, 1, 1))
    now_ms = leader(raft, matched=False)
    ack(raft, 2, raft.last_index)
    drain(raft)
    assert raft.commit_index == 4
    now_ms += 100
    raft.tick(now_ms)
    actions = drain(raft)
    assert [message.commit for message in sent(actions, AppendEntries, 2)] == [4]
    assert [message.commit for message in sent(actions, AppendEntries, 3)] == [0]


def test_row_08_previous_index_below_the_followers_commit_or_log_start_is_no_conflict() -> None:
    raft = follower(log=(1, 1), start=(5, 1), applied=7)
    for prev, new in (((2, 1), ()), ((5, 1), entries(1, first=6)), ((0, 0), entries(1, 1, 1))):
        raft.step(append(1, 2, prev, new), 0)
        (reply,) = sent(drain(raft), AppendReply)
        assert reply.ok and reply.match_index == 7, "the leader skips ahead to the commit index"
    raft.step(append(1, 2, (3, 1), entries(1, 1, 1, 1, 1, first=4)), 0)
    assert raft.last_index == 8, "what lies beyond is taken"


@pytest.mark.parametrize(
    ("prev", "new"), [((1, 1), entries(2, first=2)), ((2, 2), ()), ((1, 2), ()), ((0, 0), entries(1, 3))]
)
def test_row_09_a_conflict_at_or_below_the_commit_index_stops_the_replica(
    prev: tuple[int, int], new: tuple[object, ...]
) -> None:
    raft = follower(log=(1, 1, 1), applied=2)
    with pytest.raises(SafetyViolation):
        raft.step(append(3, 2, prev, new), 0)  # type: ignore[arg-type]
    assert raft.last_index == 3, "and never cuts"


def test_row_10_a_deposed_leaders_late_fsync_counts_for_nothing() -> None:
    raft = follower()
    leader(raft)
    raft.propose(b"x", 0)
    (persist,) = of(raft.take_actions(), Persist)
    commit = raft.commit_index
    raft.step(append(5, 2, (1, 1), entries(5, first=2)), 0)
    later = of(raft.take_actions(), Persist)
    raft.persisted(persist.seq)
    assert raft.commit_index == commit
    assert raft.node.log.stable_index == 1, "index 2 holds another entry now, not yet on disk"
    raft.persisted(later[-1].seq)
    assert raft.node.log.stable_index == 2


def test_row_10_a_candidates_late_own_vote_after_a_lost_election_counts_for_nothing() -> None:
    raft = follower(voters=(1, 2, 3, 4, 5))
    candidate(raft)
    (persist,) = of(raft.take_actions(), Persist)
    raft.step(VoteReply(1, 2, True, False), 0)
    raft.step(VoteReply(1, 3, True, False), 0)
    raft.step(append(1, 4, (0, 0)), 0)
    raft.persisted(persist.seq)
    assert (raft.role, raft.leader) == ("follower", 4)
    # Nor does it in the next campaign, whose own vote is not on disk.
    candidate(raft)
    raft.persisted(persist.seq)
    raft.step(VoteReply(2, 2, True, False), 0)
    raft.step(VoteReply(2, 3, True, False), 0)
    assert raft.role == "candidate"


def test_row_10_granted_pre_votes_do_not_count_as_votes() -> None:
    raft = follower(voters=(1, 2, 3, 4, 5))
    candidate(raft)
    drain(raft)
    for source in (2, 3, 4, 5):
        raft.step(VoteReply(1, source, True, True), 0)
    assert raft.role == "candidate"


def test_row_11_an_fsync_counts_only_for_what_no_later_write_replaces() -> None:
    scenarios.overwritten_twice()


def test_row_12_a_single_node_commits_after_its_own_fsync() -> None:
    raft = follower(voters=(1,))
    leader(raft)
    entry = raft.propose(b"x", 0)
    actions = raft.take_actions()
    (persist,) = of(actions, Persist)
    assert not of(actions, Commit) and raft.commit_index < entry.index
    raft.persisted(persist.seq)
    assert [commit.entries for commit in of(raft.take_actions(), Commit)] == [(entry,)]


def test_row_13_after_a_restart_committed_entries_are_applied_again_from_the_applied_index() -> None:
    raft = follower(log=(1, 1, 1, 1), start=(3, 1), applied=5)
    assert raft.commit_index == 5, "the commit index is not on disk: the applied one is a floor for it"
    raft.step(append(1, 2, (7, 1), commit=7), 0)
    (commit,) = of(drain(raft), Commit)
    assert [entry.index for entry in commit.entries] == [6, 7]


def test_row_13_a_replica_whose_engine_is_ahead_of_its_log_restarts_the_log_there() -> None:
    ahead = 0
    for seed in range(12):
        cluster = Cluster(3, seed)
        leader_id = cluster.elect()
        cluster.run(200)
        slow = next(server for server in cluster.servers.values() if server.replica != leader_id)
        slow.sync_ms_max = 1 << 30
        for number in range(5):
            cluster.propose(b"%d" % number)
            cluster.run(60)
        cluster.run(200)
        assert cluster.raft(slow.replica).applied_index == cluster.checker.commit_index
        assert cluster.raft(slow.replica).node.log.stable_index < cluster.checker.commit_index
        slow.crash()
        slow.sync_ms_max = None
        slow.boot()
        ahead += cluster.probes["engine ahead of the log"]
        assert cluster.propose(b"after")
        assert cluster.run(3000, cluster.converged)
    assert ahead


def test_row_14_no_second_vote_in_a_term_over_a_restart() -> None:
    scenarios.vote_and_reboot()
    raft = follower(term=3, vote=2)
    raft.step(vote_request(3, 3, (9, 2)), 0)
    assert [reply.granted for reply in sent(drain(raft), VoteReply)] == [False]


def test_row_15_while_a_disk_is_silent_nothing_depends_on_it() -> None:
    raft = follower(term=1)
    raft.step(append(1, 2, (0, 0), entries(1, 1)), 0)
    for action in of(raft.take_actions(), Send):
        assert isinstance(action.message, AppendReply)
        assert action.after > raft.node.persisted_seq or action.message.match_index == 0


def test_row_16_a_follower_that_lost_what_it_acknowledged_is_reported_and_counts_no_more() -> None:
    raft = follower()
    now_ms = leader(raft)
    entry = raft.propose(b"x", 0)
    drain(raft)
    for source in (2, 3):
        ack(raft, source, entry.index)
    drain(raft)
    now_ms += 100
    raft.tick(now_ms)
    drain(raft)
    reject(raft, 3, entry.index, (0, 0), 0, now_ms)
    actions = drain(raft)
    assert of(actions, PeerRegressed) == [PeerRegressed(3, entry.index, 0)]
    assert sent(actions, AppendEntries, 3), "it is still served"
    another = raft.propose(b"y", now_ms)
    drain(raft)
    ack(raft, 3, another.index, now_ms)
    assert raft.commit_index == entry.index, "but its acks commit nothing"
    raft.read(now_ms)
    drain(raft)
    ack(raft, 3, another.index, now_ms)
    assert not raft.node.reads.waiting and raft.node.reads.batches, "and confirm no read"
    ack(raft, 2, another.index, now_ms)
    assert raft.commit_index == another.index


def test_row_16_a_reordered_refusal_from_before_the_ack_is_no_regression() -> None:
    raft = follower()
    leader(raft, matched=False)
    ack(raft, 2, raft.last_index)
    raft.step(AppendReply(1, 2, False, 0, 0, 0, 0, 0, 1), 0)
    assert not of(drain(raft), PeerRegressed)


def test_row_16_a_wiped_directory_under_its_old_number_is_noticed_in_a_cluster() -> None:
    cluster = Cluster(3)
    leader_id = cluster.elect()
    for number in range(10):
        cluster.propose(b"%d" % number)
    cluster.run(300)
    victim = next(replica for replica in cluster.servers if replica != leader_id)
    server = cluster.servers[victim]
    server.crash()
    membership = server.disk.start_membership
    server.disk = Disk(start_membership=membership, engine=[(0, 0, 0, b"", membership)])
    cluster.checker.restarted(victim, 0)
    server.boot()
    cluster.run(1000)
    assert cluster.probes["PeerRegressed"] == 1
    assert [p.replica for p in cluster.raft(leader_id).node.election.counted] != [victim]


def test_row_17_proposals_on_a_cut_leader_are_bounded() -> None:
    raft = follower(config=small_config()(1))
    leader(raft)
    accepted = 0
    with pytest.raises(Busy) as refusal:
        for _ in range(1000):
            raft.propose(bytes(75), 0)
            accepted += 1
    assert refusal.value.limit_bytes == 4000 and accepted == 40
    assert raft.uncommitted_bytes == 4000
    assert raft.propose(bytes(75), 0, reserved=True), "the reserve lets through what ends waits"
    with pytest.raises(Busy):
        for _ in range(1000):
            raft.propose(bytes(75), 0, reserved=True)
    drain(raft)
    ack(raft, 2, raft.last_index)
    assert raft.uncommitted_bytes == 0 and raft.propose(b"x", 0)


def test_row_17_one_proposal_larger_than_the_bound_passes_when_nothing_waits() -> None:
    raft = follower(config=small_config()(1))
    leader(raft)
    assert raft.propose(bytes(9000), 0)
    with pytest.raises(Busy):
        raft.propose(b"", 0)


def test_row_17_a_new_leader_counts_what_earlier_leaders_left_uncommitted() -> None:
    raft = follower(log=(1, 1, 1))
    leader(raft, matched=False)
    assert raft.uncommitted_bytes == sum(e.size_bytes for e in raft.entries_from(1, 1 << 30))
    ack(raft, 2, raft.last_index)
    assert raft.uncommitted_bytes == 0


def test_row_18_a_full_window_stops_and_acks_open_it() -> None:
    config = RaftConfig(1, inflight_messages_max=3)
    raft = follower(config=config)
    leader(raft)
    messages = []
    for number in range(6):
        raft.propose(b"%d" % number, 0)
        messages += sent(drain(raft), AppendEntries, 2)
    assert len(messages) == 3
    ack(raft, 2, messages[0].entries[-1].index)
    (message,) = sent(drain(raft), AppendEntries, 2)
    assert len(message.entries) == 3, "what has gathered meanwhile goes in one message"


def test_row_18_a_window_full_of_bytes_stops_too() -> None:
    config = RaftConfig(1, inflight_bytes_max=1000, append_bytes_max=400)
    raft = follower(config=config)
    leader(raft)
    for _ in range(20):
        raft.propose(bytes(175), 0)
    sizes = [sum(e.size_bytes for e in m.entries) for m in sent(drain(raft), AppendEntries, 2)]
    assert sizes == [400, 400, 400]


def test_row_18_lost_acks_are_made_good_by_a_heartbeats_reply() -> None:
    raft = follower(config=RaftConfig(1, inflight_messages_max=3))
    now_ms = leader(raft)
    for number in range(5):
        raft.propose(b"%d" % number, 0)
        drain(raft)
    waiting = raft.peer_progress()[2][1]
    assert waiting <= raft.last_index
    now_ms += 100
    raft.tick(now_ms)
    (beat,) = sent(drain(raft), AppendEntries, 2)
    assert beat.entries == () and beat.prev_index == waiting - 1
    ack(raft, 2, beat.prev_index, now_ms)
    (message,) = sent(drain(raft), AppendEntries, 2)
    assert message.entries[0].index == waiting, "no stall"


def test_row_18_lost_appends_are_made_good_by_a_heartbeats_refusal() -> None:
    raft = follower(config=RaftConfig(1, inflight_messages_max=3))
    now_ms = leader(raft)
    first = raft.propose(b"lost", 0)
    drain(raft)
    now_ms += 100
    raft.tick(now_ms)
    drain(raft)
    reject(raft, 2, first.index, (first.index - 1, 1), first.index - 1, now_ms)
    (message,) = sent(drain(raft), AppendEntries, 2)
    assert message.entries == (first,)
    raft.propose(b"next", now_ms)
    assert not sent(drain(raft), AppendEntries, 2), "one probe at a time: no flood"


def test_row_18_an_unreachable_peer_gets_one_probe_a_heartbeat_until_it_is_back() -> None:
    raft = follower()
    now_ms = leader(raft)
    raft.peer_unreachable(2)
    for number in range(10):
        raft.propose(b"%d" % number, now_ms)
        assert not sent(drain(raft), AppendEntries, 2)
    raft.peer_reachable(2)
    (message,) = sent(drain(raft), AppendEntries, 2)
    assert len(message.entries) == 10


@pytest.mark.parametrize("direction", ["cannot send", "cannot receive"])
def test_row_19_one_way_links_leave_a_working_cluster(direction: str) -> None:
    cluster = Cluster(3, 5)
    leader_id = cluster.elect()
    term = cluster.raft(leader_id).term
    victim = next(replica for replica in cluster.servers if replica != leader_id)
    for other in cluster.servers:
        if other != victim:
            cluster.cut(victim, other) if direction == "cannot send" else cluster.cut(other, victim)
    cluster.run(10_000)
    assert (cluster.leader(), cluster.raft(leader_id).term) == (leader_id, term)
    if direction == "cannot send":
        assert cluster.raft(victim).role == "follower", "it hears the leader"
    else:
        assert cluster.raft(victim).role == "precandidate", "pre-votes alone disturb nobody"
        assert cluster.raft(victim).term == term
    cluster.heal()
    assert cluster.propose(b"x")
    assert cluster.run(1000, cluster.converged)


@pytest.mark.parametrize("direction", ["cannot send", "cannot receive"])
def test_row_19_a_leader_with_one_way_links_is_replaced(direction: str) -> None:
    cluster = Cluster(3, 5)
    leader_id = cluster.elect()
    for other in cluster.servers:
        if other != leader_id:
            cluster.cut(leader_id, other) if direction == "cannot send" else cluster.cut(other, leader_id)
    assert cluster.run(5000, lambda: cluster.leader() not in (None, leader_id))
    assert cluster.run(1100, lambda: cluster.raft(leader_id).role != "leader")


def test_row_20_when_leadership_is_lost_every_waiter_is_told_at_once() -> None:
    raft = follower()
    leader(raft)
    raft.propose(b"x", 0)
    reads = [raft.read(0), raft.read(0)]
    drain(raft)
    reads.append(raft.read(0))
    raft.step(append(7, 3, (0, 0)), 0)
    actions = drain(raft)
    failed = {i for f in of(actions, ReadFailed) for i in range(f.first_id, f.last_id + 1)}
    assert failed == set(reads)
    assert RoleChanged("follower", 7, 3) in actions
    with pytest.raises(NotLeader):
        raft.propose(b"y", 0)


def test_row_20_a_snapshot_past_a_waiters_index_does_not_commit_what_waited_there() -> None:
    from raftkv.raft.membership import Membership
    from raftkv.raft.messages import InstallSnapshot

    raft = follower()
    leader(raft)
    lost = raft.propose(b"lost", 0)
    drain(raft)
    raft.step(InstallSnapshot(5, 2, b"s", 9, 4, Membership((1, 2, 3)), 1, 0, b"x", 2363233923), 0)
    drain(raft)
    raft.snapshot_stored(b"s", 1, 0)
    actions = drain(raft)
    assert of(actions, SnapshotComplete)
    raft.snapshot_installed(b"s", 0)
    actions += drain(raft)
    assert raft.commit_index == 9
    assert not [c for c in of(actions, Commit) if lost in c.entries], "(index, term) decides, not the index"
