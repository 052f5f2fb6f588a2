"""Scenarios of the course's Raft tests that set limits on the core alone: messages, bytes, rounds of back-up."""

from __future__ import annotations

from raftkv.raft.entry import EntryKind
from raftkv.raft.messages import AppendEntries, InstallSnapshot, Message, RequestVote
from tests.raft.network import Cluster, Faults


def is_request(message: Message) -> bool:
    return isinstance(message, AppendEntries | RequestVote | InstallSnapshot)


def test_initial_election_one_leader_and_a_stable_term() -> None:
    for seed in range(20):
        cluster = Cluster(3, seed)
        leader = cluster.elect(3000)
        term = cluster.raft(leader).term
        cluster.run(2000)
        assert cluster.leader() == leader and {raft.term for raft in cluster.live()} == {term}


def test_re_election() -> None:
    cluster = Cluster(3, 4)
    first = cluster.elect()
    cluster.isolate(first)
    assert cluster.run(3000, lambda: cluster.leader() not in (None, first))
    second = cluster.leader()
    assert second is not None
    cluster.heal()
    cluster.run(1000)
    assert cluster.leader() == second, "the old leader's return disturbs nothing"
    third = next(replica for replica in cluster.servers if replica not in (first, second))
    cluster.partition([first])
    cluster.run(2000)
    assert all(raft.role != "leader" for raft in cluster.live()), "nobody leads without a quorum"
    cluster.partition([first, third])
    assert cluster.run(3000, lambda: cluster.leader() in (first, third))
    cluster.heal()
    cluster.run(1000)
    assert cluster.leader() in (first, third)


def test_many_elections() -> None:
    cluster = Cluster(7, 2)
    cluster.elect()
    for _ in range(9):
        away = {cluster.rng.randint(1, 7) for _ in range(3)}
        present = set(cluster.servers) - away
        cluster.partition(present)
        assert cluster.run(5000, lambda present=present: cluster.leader() in present)  # type: ignore[misc]
        cluster.run(1500)
        assert sum(cluster.raft(replica).role == "leader" for replica in present) == 1
        cluster.heal()
    cluster.elect()


def test_count_of_messages_for_an_election_a_burst_and_an_idle_second() -> None:
    cluster = Cluster(3, 1)
    cluster.keep_messages = True

    def requests() -> int:
        count = sum(is_request(message) for _, _, message in cluster.messages)
        cluster.messages.clear()
        return count

    leader = cluster.elect()
    assert 1 <= requests() <= 30
    for number in range(12):
        cluster.propose(b"%d" % number, leader)
    assert cluster.run(2000, lambda: len(cluster.payloads) == 12)
    assert requests() <= 42
    cluster.run(200)
    requests()
    cluster.run(1000)
    assert requests() <= 60


def test_bytes_each_command_is_sent_to_each_peer_once() -> None:
    cluster = Cluster(3, 1)
    leader = cluster.elect()
    cluster.run(300)
    cluster.keep_messages = True
    for number in range(10):
        cluster.propose(b"%d" % number + bytes(5000), leader)
        cluster.run(2)
    cluster.run(500)
    total = sum(
        sum(entry.size_bytes for entry in message.entries) + 60
        for _, _, message in cluster.messages
        if isinstance(message, AppendEntries)
    ) + 60 * len(cluster.messages)
    assert total <= 200_000
    copies = [
        (to, entry.index)
        for _, to, message in cluster.messages
        if isinstance(message, AppendEntries)
        for entry in message.entries
    ]
    assert len(copies) == len(set(copies)) == 20


def test_backup_over_many_uncommitted_entries_takes_few_messages() -> None:
    cluster = Cluster(5, 9)
    leader = cluster.elect()
    cluster.propose(b"first", leader)
    cluster.run(300)
    number = 0

    def burst(replica: int) -> None:
        nonlocal number
        for _ in range(50):
            number += 1
            cluster.propose(b"%d" % number, replica)
        cluster.run(500)

    partner = next(replica for replica in cluster.servers if replica != leader)
    rest = [replica for replica in cluster.servers if replica not in (leader, partner)]
    cluster.partition([leader, partner], rest)
    burst(leader)
    assert cluster.run(5000, lambda: cluster.leader() in rest)
    second = cluster.elect()
    burst(second)
    other = next(replica for replica in rest if replica != second)
    third = next(replica for replica in rest if replica not in (second, other))
    cluster.partition([second, third])
    burst(second)
    cluster.partition([leader, partner, other])
    assert cluster.run(5000, lambda: cluster.leader() == other), "only it has what was committed"
    cluster.elect()
    burst(other)
    cluster.heal()
    cluster.messages.clear()
    cluster.keep_messages = True
    assert cluster.run(5000, cluster.converged)
    to_back_up = [m for _, to, m in cluster.messages if to in (second, third) and isinstance(m, AppendEntries)]
    assert len(to_back_up) < 30
    assert b"first" in cluster.payloads


def test_a_follower_that_returns_catches_up_while_writes_go_on() -> None:
    cluster = Cluster(3, 3)
    leader = cluster.elect()
    away = next(replica for replica in cluster.servers if replica != leader)
    cluster.isolate(away)
    for number in range(5):
        cluster.propose(b"%d" % number, leader)
        cluster.run(300)
    cluster.heal()
    cluster.propose(b"with all", leader)
    assert cluster.run(1000, cluster.converged)


def test_no_agreement_without_a_quorum() -> None:
    cluster = Cluster(5, 3)
    leader = cluster.elect()
    cluster.run(200)
    others = [replica for replica in cluster.servers if replica != leader]
    cluster.partition([leader, others[0]], others[1:2], others[2:3], others[3:])
    entry = cluster.propose(b"20", leader)
    assert entry is not None
    cluster.run(2000)
    assert b"20" not in cluster.payloads
    cluster.heal()
    cluster.elect()
    assert cluster.propose(b"1000")
    assert cluster.run(2000, cluster.converged)
    assert b"1000" in cluster.payloads


def test_churn_on_a_bad_net_keeps_every_value_that_was_seen_applied() -> None:
    cluster = Cluster(5, 17, faults=Faults(drop=0.1, delay_ms_max=26, sync_ms_max=5))
    for number in range(200):
        cluster.propose(b"%d" % number)
        cluster.run(70)
        if number % 10 == 0:
            cluster.heal()
            for server in cluster.servers.values():
                if server.raft is None:
                    server.boot()
            if cluster.rng.random() < 0.2:
                cluster.isolate(cluster.rng.randint(1, 5))
            if cluster.rng.random() < 0.4:
                cluster.servers[cluster.rng.randint(1, 5)].crash()
    seen = dict(cluster.payloads)
    assert len(seen) > 50
    cluster.heal()
    cluster.faults = Faults()
    for server in cluster.servers.values():
        if server.raft is None:
            server.boot()
    cluster.elect()
    assert cluster.run(5000, cluster.converged)
    for raft in cluster.live():
        kept = {entry.data: entry.index for entry in raft.node.log.entries if entry.kind == EntryKind.COMMANDS}
        assert all(kept[data] == index for data, index in seen.items())
