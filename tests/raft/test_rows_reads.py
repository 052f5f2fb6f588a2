"""Hard scenarios of reads: rows 29–34 of the acceptance table."""

from __future__ import annotations

import pytest

from raftkv.raft.actions import ReadFailed, ReadReady
from raftkv.raft.config import RaftConfig
from raftkv.raft.errors import NotLeader
from raftkv.raft.messages import AppendEntries, ReadIndexReply, ReadIndexRequest
from tests.raft import scenarios
from tests.raft.network import Cluster, Faults
from tests.raft.schedules import small_config
from tests.raft.solo import ack, append, drain, entries, follower, leader, of, sent


def test_row_29_a_read_before_the_no_op_is_committed_is_held_and_then_served() -> None:
    raft = follower(log=(1, 1))
    leader(raft, matched=False)
    read = raft.read(0)
    raft.step(ReadIndexRequest(raft.term, 3, 77), 0)
    actions = drain(raft)
    for source in (2, 3):
        ack(raft, source, 2)
    actions += drain(raft)
    assert not of(actions, ReadReady) and not sent(actions, ReadIndexReply)
    ack(raft, 2, 3)
    drain(raft)
    ack(raft, 3, 2)
    actions = drain(raft)
    assert of(actions, ReadReady) == [ReadReady(read, read, 3)]
    assert sent(actions, ReadIndexReply, 3) == [ReadIndexReply(raft.term, 1, 77, 3)]


def test_row_30_acks_of_rounds_begun_before_the_read_do_not_confirm_it() -> None:
    raft = follower(voters=(1, 2, 3, 4, 5))
    leader(raft)
    before = raft.node.round
    raft.read(0)
    drain(raft)
    for source in (2, 3, 4, 5):
        ack(raft, source, raft.last_index, round_number=before)
    assert not of(drain(raft), ReadReady)
    ack(raft, 2, raft.last_index, round_number=before + 1)
    ack(raft, 2, raft.last_index, round_number=before + 1)
    assert not of(drain(raft), ReadReady), "the same follower twice is no majority"
    ack(raft, 3, raft.last_index, round_number=before + 1)
    assert len(of(drain(raft), ReadReady)) == 1


def test_row_30_a_late_ack_in_a_cluster_confirms_nothing() -> None:
    scenarios.stale_ack()


def test_row_30_a_later_round_confirms_earlier_reads_too() -> None:
    raft = follower()
    now_ms = leader(raft)
    first = raft.read(now_ms)
    drain(raft)
    second = raft.read(now_ms)
    drain(raft)
    ack(raft, 2, raft.last_index)
    ready = of(drain(raft), ReadReady)
    assert [(r.first_id, r.last_id) for r in ready] == [(first, first), (second, second)]


def test_row_30_reads_during_two_open_rounds_wait_for_the_next_and_flood_nobody() -> None:
    raft = follower()
    now_ms = leader(raft)
    messages = 0
    for _ in range(100):
        raft.read(now_ms)
        messages += len(sent(drain(raft), AppendEntries))
    assert messages == 4, "two rounds, two followers"
    ack(raft, 2, raft.last_index)
    actions = drain(raft)
    assert [(r.first_id, r.last_id) for r in of(actions, ReadReady)] == [(1, 1), (2, 2)]
    ack(raft, 3, raft.last_index)
    assert [(r.first_id, r.last_id) for r in of(drain(raft), ReadReady)] == [(3, 100)]


def test_row_30_a_lost_round_is_made_good_by_the_next_heartbeat() -> None:
    raft = follower()
    now_ms = leader(raft)
    raft.read(now_ms)
    drain(raft)  # its messages are lost
    raft.tick(now_ms + 100)
    assert len(sent(drain(raft), AppendEntries)) == 2
    ack(raft, 3, raft.last_index)
    assert len(of(drain(raft), ReadReady)) == 1


def test_row_31_an_isolated_old_leader_answers_no_read_while_the_majority_writes() -> None:
    cluster = Cluster(5)
    old = cluster.elect()
    partner = next(replica for replica in cluster.servers if replica != old)
    rest = [replica for replica in cluster.servers if replica not in (old, partner)]
    cluster.partition([old, partner], rest)
    assert cluster.run(5000, lambda: cluster.leader() in rest)
    cluster.elect()
    assert cluster.propose(b"newer", cluster.leader())
    cluster.run(50)
    for _ in range(40):
        for replica in (old, partner):
            cluster.read(replica)
        cluster.run(50)
    assert cluster.reads_done == 0
    cluster.heal()
    assert cluster.run(3000, lambda: cluster.read(old) is not None and cluster.reads_done > 0)


def test_row_32_a_confirmed_read_waits_for_the_state_machine() -> None:
    cluster = Cluster(3, faults=Faults(apply_ms_max=500))
    cluster.elect()
    for number in range(20):
        cluster.propose(b"%d" % number)
        cluster.run(20)
        for replica in cluster.servers:
            cluster.read(replica)
    cluster.run(2000)  # the harness asserts `applied >= index` on each answer
    assert cluster.reads_done == 60


def test_row_33_a_duplicated_request_of_a_follower_is_answered_and_its_second_answer_ignored() -> None:
    head = follower()
    leader(head)
    request = ReadIndexRequest(head.term, 3, 42)
    head.step(request, 0)
    head.step(request, 0)
    drain(head)
    ack(head, 2, head.last_index)
    assert len(sent(drain(head), ReadIndexReply, 3)) == 2

    raft = follower()
    raft.step(append(1, 2, (0, 0), entries(1), commit=1), 0)
    raft.read(0, forward=True)
    (asked,) = sent(drain(raft), ReadIndexRequest)
    for _ in range(2):
        raft.step(ReadIndexReply(1, 2, asked.context, 1), 0)
    assert len(of(drain(raft), ReadReady)) == 1
    assert not raft.node.reads.forwarded and not raft.node.reads.waiting


def test_row_33_on_step_down_queued_and_open_reads_fail_and_nothing_leaks() -> None:
    raft = follower()
    leader(raft)
    for _ in range(5):
        raft.read(0)
        drain(raft)
    raft.step(ReadIndexRequest(raft.term, 3, 7), 0)
    raft.step(append(5, 2, (0, 0)), 0)
    actions = drain(raft)
    failed = [i for f in of(actions, ReadFailed) for i in range(f.first_id, f.last_id + 1)]
    assert failed == [1, 2, 3, 4, 5]
    assert [reply.index for reply in sent(actions, ReadIndexReply, 3)] == [-1]
    reads = raft.node.reads
    assert not (reads.batches or reads.forwarded or reads.waiting or reads.queued)


def test_row_33_forwarded_reads_fail_when_the_leader_changes_or_does_not_answer() -> None:
    raft = follower()
    raft.step(append(1, 2, (0, 0)), 0)
    first = raft.read(0, forward=True)
    drain(raft)
    raft.step(append(2, 3, (0, 0)), 10)
    assert of(drain(raft), ReadFailed) == [ReadFailed(first, first)]
    second = raft.read(10, forward=True)
    drain(raft)
    for now_ms in range(10, 1011, 100):
        raft.step(append(2, 3, (0, 0)), now_ms)
        raft.tick(now_ms)
    assert of(drain(raft), ReadFailed) == [ReadFailed(second, second)]
    with pytest.raises(NotLeader):
        follower().read(0, forward=True)


def test_row_33_a_refusal_of_the_leader_fails_the_reads_at_once() -> None:
    raft = follower()
    raft.step(append(1, 2, (0, 0)), 0)
    read = raft.read(0, forward=True)
    (request,) = sent(drain(raft), ReadIndexRequest)
    raft.step(ReadIndexReply(1, 2, request.context, -1), 0)
    assert of(drain(raft), ReadFailed) == [ReadFailed(read, read)]


def test_row_33_an_answer_to_an_earlier_life_of_the_follower_is_not_taken() -> None:
    contexts = set()
    for seed in range(50):
        raft = follower(seed=seed)
        raft.step(append(1, 2, (0, 0)), 0)
        raft.read(0, forward=True)
        (request,) = sent(drain(raft), ReadIndexRequest)
        contexts.add(request.context)
    assert len(contexts) == 50


def test_row_34_leases_are_off_by_default() -> None:
    raft = follower()
    now_ms = leader(raft)
    assert not RaftConfig(1).lease_reads and not raft.lease_valid(now_ms)


def test_row_34_a_lease_counts_from_the_sending_not_from_the_ack() -> None:
    config = RaftConfig(1, lease_reads=True)
    raft = follower(config=config)
    now_ms = leader(raft) + 100
    raft.tick(now_ms)
    drain(raft)
    ack(raft, 2, raft.last_index, now_ms + 300)
    assert config.lease_ms < config.election_timeout_ms_min
    assert raft.lease_valid(now_ms + config.lease_ms - 1)
    assert not raft.lease_valid(now_ms + config.lease_ms)


def test_row_34_after_a_pause_the_lease_is_over_and_a_read_needs_a_round() -> None:
    raft = follower(config=RaftConfig(1, lease_reads=True))
    now_ms = leader(raft)
    read = raft.read(now_ms + 5000)  # the process was stopped for 5 s
    actions = drain(raft)
    assert not of(actions, ReadReady) and len(sent(actions, AppendEntries)) == 2
    ack(raft, 2, raft.last_index, now_ms + 5001)
    assert of(drain(raft), ReadReady) == [ReadReady(read, read, raft.commit_index)]


def test_row_34_a_voter_that_restarts_honours_the_lease_it_may_have_granted() -> None:
    from tests.raft.solo import vote_request

    raft = follower(config=RaftConfig(1, lease_reads=True), term=1)
    raft.step(vote_request(2, 3, (9, 1)), 499)
    assert raft.term == 1
    raft.step(vote_request(2, 3, (9, 1)), 500)
    assert raft.vote == 3


def test_row_34_lease_reads_stay_linearizable_through_partitions() -> None:
    for seed in range(10):
        cluster = Cluster(3, seed, config=small_config(lease_reads=True), faults=Faults(delay_ms_max=20))
        for number in range(15):
            leader_id = cluster.leader()
            if leader_id is not None and cluster.rng.random() < 0.4:
                cluster.heal()
                cluster.isolate(leader_id)
            for step in range(20):
                cluster.propose(b"%d.%d" % (number, step))
                for raft in cluster.live():
                    if raft.role == "leader":
                        cluster.read(raft.replica)
                cluster.run(10)
        assert cluster.reads_done > 100
