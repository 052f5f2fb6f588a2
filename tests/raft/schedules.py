"""Randomised schedules: one seed makes one cluster, one series of faults, and one healing.

Safety is checked after every step by the harness; afterwards all faults end, and the cluster must elect, commit,
answer reads on every member and converge within bounded virtual time.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from raftkv.raft.changes import AddLearner, Change, Promote, Remove
from raftkv.raft.config import RaftConfig
from raftkv.raft.core import Raft
from raftkv.raft.errors import RaftRefusal
from tests.raft.network import Cluster, Faults, Server


def small_config(lease_reads: bool = False, pre_vote: bool = True) -> Callable[[int], RaftConfig]:
    """Limits low enough to be reached in a short schedule."""

    def config(replica: int) -> RaftConfig:
        return RaftConfig(
            replica,
            election_timeout_ms_min=150,
            election_timeout_ms_max=300,
            heartbeat_ms=50,
            inflight_messages_max=4,
            inflight_bytes_max=2000,
            append_bytes_max=300,
            uncommitted_bytes_max=4000,
            reserve_bytes=500,
            snapshot_chunk_bytes=64,
            snapshot_inflight_chunks=2,
            pre_vote=pre_vote,
            lease_reads=lease_reads,
        )

    return config


class Schedule:
    """Set up by the seed; `run` does it all and raises on any violation."""

    def __init__(self, seed: int, raft_class: Callable[..., Raft] | None = None, *, steps: int = 40) -> None:
        self.seed = seed
        rng = self.rng = random.Random(seed)
        self.steps = steps
        replicas = rng.choice((3, 3, 3, 4, 5))
        voters = replicas if replicas == 3 or rng.random() < 0.5 else replicas - 1
        bad = rng.random()
        faults = Faults(
            drop=rng.choice((0.0, 0.05, 0.2)) if bad < 0.8 else 0.0,
            duplicate=rng.choice((0.0, 0.1)),
            delay_ms_max=rng.choice((1, 10, 40)),
            slow=rng.choice((0.0, 0.0, 0.05)),
            slow_ms_max=600,
            sync_ms_max=rng.choice((0, 3, 60, 200)),
            apply_ms_max=rng.choice((0, 0, 20)),
            store_ms_max=rng.choice((1, 10, 300)),
        )
        self.cluster = Cluster(
            replicas,
            seed,
            faults=faults,
            voters=range(1, voters + 1),
            # Virtual clocks all run at one rate: a lease must then hold too.
            config=small_config(rng.random() < 0.25, rng.random() < 0.8),
            raft_class=raft_class,
        )
        self.number = 0
        self.final = b""
        harm = rng.choice((0.2, 0.5, 1.0))
        self.weights = {
            self.propose: 10,
            self.read: 6,
            self.crash: 2 * harm,
            self.boot: 3,
            self.cut_some: 2 * harm,
            self.cut_leader: 1 * harm,
            self.mend: 3,
            self.compact: 2,
            self.change: 2,
            self.transfer: 1,
            self.reset_link: 1,
            self.reboot: 1 * harm,
            self.strand_leader: 1 * harm,
        }
        if rng.random() < 0.3:
            # Leaders that fall while their entries are on a few disks only: Figure 8 country.
            self.weights |= {self.strand_leader: 8, self.reboot: 6, self.boot: 6, self.mend: 1, self.cut_some: 1}

    # ---- what can happen

    def any_live(self) -> Server | None:
        live = [server for server in self.cluster.servers.values() if server.raft is not None]
        return self.rng.choice(live) if live else None

    def propose(self) -> None:
        target = self.cluster.leader() if self.rng.random() < 0.7 else None
        server = self.cluster.servers[target] if target is not None else self.any_live()
        if server is None:
            return
        for _ in range(self.rng.choice((1, 1, 1, 3, 3, 10, 10, 60))):
            self.number += 1
            self.cluster.propose(b"%d/%d" % (self.seed, self.number) + bytes(self.rng.choice((0, 50))), server.replica)

    def read(self) -> None:
        server = self.any_live()
        if server is not None:
            self.cluster.read(server.replica)

    def crash(self) -> None:
        server = self.any_live()
        if server is not None:
            server.crash()

    def boot(self) -> None:
        for server in self.cluster.servers.values():
            if server.raft is None and self.rng.random() < 0.7:
                server.boot()

    def cut_some(self) -> None:
        replicas = list(self.cluster.servers)
        if self.rng.random() < 0.5:
            side = [replica for replica in replicas if self.rng.random() < 0.5]
            self.cluster.partition(side, [replica for replica in replicas if replica not in side])
        else:
            for _ in range(self.rng.randint(1, 4)):
                self.cluster.cut(self.rng.choice(replicas), self.rng.choice(replicas))

    def cut_leader(self) -> None:
        leader = self.cluster.leader()
        if leader is not None:
            self.cluster.isolate(leader)

    def strand_leader(self) -> None:
        """The leader keeps one follower, takes a proposal, and may die soon after; the others go on."""
        leader = self.cluster.leader()
        if leader is None:
            return
        others = [replica for replica in self.cluster.servers if replica != leader]
        self.rng.shuffle(others)
        self.cluster.partition([leader, others[0]], others[1:])
        self.propose()
        if self.rng.random() < 0.7:
            self.cluster.run(self.rng.randint(0, 10))
            server = self.cluster.servers[leader]
            if server.raft is not None:
                server.crash()
            self.cluster.partition(others)
        else:
            self.cluster.run(self.rng.randint(0, 400))

    def reboot(self) -> None:
        """A crash, and back at once."""
        server = self.any_live()
        if server is not None:
            server.crash()
            server.boot()

    def mend(self) -> None:
        self.cluster.heal()

    def compact(self) -> None:
        server = self.any_live()
        if server is not None:
            server.flush_and_compact()

    def change(self) -> None:
        leader = self.cluster.leader()
        if leader is None:
            return
        raft = self.cluster.raft(leader)
        membership = raft.membership
        outside = [replica for replica in self.cluster.servers if replica not in membership.members]
        possible: list[Change] = [AddLearner(replica) for replica in outside]
        possible += [Promote(replica) for replica in membership.learners] * 2
        if len(membership.voters) > 2:
            possible += [Remove(replica) for replica in membership.voters]
        possible += [Remove(replica) for replica in membership.learners]
        if not possible:
            return
        change = self.rng.choice(possible)
        self.refusable(leader, lambda raft: raft.propose_membership(change, self.cluster.now_ms))

    def transfer(self) -> None:
        server = self.any_live()
        if server is None:
            return
        target = self.rng.choice([None, *self.cluster.servers])
        self.refusable(server.replica, lambda raft: raft.transfer(target, self.cluster.now_ms))

    def reset_link(self) -> None:
        """A connection breaks and comes back: the core is told at one end."""
        server = self.any_live()
        if server is None:
            return
        peer = self.rng.choice(list(self.cluster.servers))
        server.step(lambda raft: raft.peer_unreachable(peer))
        server.later(self.rng.randint(1, 100), lambda raft: raft.peer_reachable(peer))

    def refusable(self, replica: int, what: Callable[[Raft], object]) -> None:
        def attempt(raft: Raft) -> None:
            try:
                what(raft)
            except RaftRefusal:
                pass

        self.cluster.servers[replica].step(attempt)

    # ---- the course of it

    def run(self) -> None:
        self.harm()
        self.heal()
        regressed = self.cluster.probes["PeerRegressed"]
        assert not regressed, f"seed {self.seed}: no disk lost anything, yet {regressed} are said to"

    def harm(self) -> None:
        actions = list(self.weights)
        weights = list(self.weights.values())
        if self.rng.random() < 0.8:
            self.cluster.run(400)
        for _ in range(self.steps):
            self.rng.choices(actions, weights)[0]()
            self.cluster.run(self.rng.choice((0, 1, 10, 50, 200)))

    def heal(self) -> None:
        """No more faults: within bounded time everything works again, and nothing committed is lost."""
        cluster = self.cluster
        cluster.heal()
        cluster.faults = Faults()
        for server in cluster.servers.values():
            if server.raft is None:
                server.boot()
        committed = cluster.checker.commit_index
        for attempt in range(5):
            # More than one, because a message still under way (a TimeoutNow, say) may yet move the leader.
            # The bound leaves room for an installation that was begun on the slowest of disks.
            assert cluster.run(12_000, self.agreed), f"seed {self.seed}: no leader that commits after healing"
            self.final = b"%d/final/%d" % (self.seed, attempt)
            cluster.propose(self.final)
            if cluster.run(2000, self.caught_up):
                break
        else:
            raise AssertionError(f"seed {self.seed}: members do not converge")
        leader = cluster.leader()
        assert leader is not None
        assert cluster.checker.commit_index > committed
        members = cluster.raft(leader).membership.members
        before = cluster.reads_done
        asked = [cluster.read(replica) for replica in members]
        assert all(asked), f"seed {self.seed}: a read was refused"
        assert cluster.run(1000, lambda: cluster.reads_done >= before + len(members)), (
            f"seed {self.seed}: reads are not answered"
        )

    def agreed(self) -> bool:
        cluster = self.cluster
        leader = cluster.leader()
        if leader is None:
            return False
        raft = cluster.raft(leader)
        return (
            raft.has_committed_in_term
            and raft.transferring is None
            and all(cluster.raft(member).leader == leader for member in raft.membership.members)
        )

    def caught_up(self) -> bool:
        cluster = self.cluster
        leader = cluster.leader()
        if leader is None:
            return False
        raft = cluster.raft(leader)
        if self.final not in cluster.payloads:
            return False
        return all(cluster.raft(member).applied_index == raft.last_index for member in raft.membership.members)
