"""The 28 Raft scenarios of the course, in virtual time and with the limits as written.

Positions are those in the list of commands, calls are our own messages and bytes our own encodings. Each test runs
for some seeds (network, timeouts, and what it picks at random); RAFTKV_SEED moves them, and each failure names its
own. Where these ask for more than the course did, it is because a virtual cluster has no excuse: a quiet one keeps
its term, a leader cut off steps down, and what was replaced must be gone.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from raftkv.protocol.frames import encode_body
from raftkv.raft.config import RaftConfig
from raftkv.raft.entry import Entry, EntryKind
from raftkv.raft.invariants import InvariantViolation
from tests.acceptance.raft_rig import Rig, Started, Steps, Task
from tests.raft.test_ablation import RANDOM

BASE_SEED = int(os.environ.get("RAFTKV_SEED", "0"))
ELECTION_TIMEOUT_MS = 1000
STATE_BYTES_MAX = 2000

Record = Callable[[str, object], None]


def seeds(quick: int, long: int) -> pytest.MarkDecorator:
    """So many seeds in every run, so many more in `make test-all`."""
    numbers = range(BASE_SEED, BASE_SEED + quick + long)
    values = [pytest.param(n, marks=pytest.mark.long if i >= quick else ()) for i, n in enumerate(numbers)]
    return pytest.mark.parametrize("seed", values)


# ---- 3A: election


@seeds(3, 30)
def test_initial_election_3a(seed: int) -> None:
    with Rig(3, seed) as rig:
        leader = rig.check_one_leader()
        rig.sleep(50)
        term = rig.check_terms()
        assert term >= 1
        rig.sleep(2 * ELECTION_TIMEOUT_MS)
        assert rig.check_one_leader() == leader and rig.check_terms() == term, "a change without a fault"


@seeds(3, 30)
def test_re_election_3a(seed: int) -> None:
    with Rig(3, seed) as rig:
        first = rig.check_one_leader()
        rig.disconnect(first)
        second = rig.check_one_leader()
        rig.connect(first)
        assert rig.check_one_leader() == second, "the old leader's return disturbed the new one"

        follower = rig.beside(second)
        rig.disconnect(second, follower)
        rig.sleep(2 * ELECTION_TIMEOUT_MS)
        rig.check_no_leader(rig.peers)  # not the one still connected, nor those that are cut off

        rig.connect(follower)
        third = rig.check_one_leader()
        rig.connect(second)
        assert rig.check_one_leader() == third, "the last one to join disturbed the leader"


@seeds(3, 30)
def test_many_elections_3a(seed: int) -> None:
    with Rig(7, seed) as rig:
        rig.check_one_leader()
        for _ in range(9):
            cut = [rig.rng.randint(1, 7) for _ in range(3)]
            rig.disconnect(*cut)
            rig.check_one_leader()
            rig.connect(*cut)
        rig.check_one_leader()


# ---- 3B: the log


@seeds(3, 30)
def test_basic_agree_3b(seed: int) -> None:
    with Rig(3, seed) as rig:
        for position in (1, 2, 3):
            assert rig.applied_count(position) == 0, "applied before it was started"
            assert rig.one(rig.token(), 3, retry=False) == position


@seeds(3, 30)
def test_rpc_bytes_3b(seed: int, record_property: Record) -> None:
    with Rig(3, seed) as rig:
        rig.one(rig.token(), 3, retry=False)
        before = rig.bytes
        for position in range(2, 12):
            assert rig.one(rig.token(5000), 3, retry=False) == position
        used = rig.bytes - before
        record_property("bytes", used)
        assert used <= 3 * 50_000 + 50_000


@seeds(3, 30)
def test_follower_failure_3b(seed: int) -> None:
    with Rig(3, seed) as rig:
        rig.one(rig.token(), 3, retry=False)
        follower = rig.beside(rig.check_one_leader())
        rig.disconnect(follower)
        rig.one(rig.token(), 2, retry=False)
        rig.sleep(ELECTION_TIMEOUT_MS)
        rig.one(rig.token(), 2, retry=False)

        leader = rig.check_one_leader()
        rig.disconnect(rig.beside(leader), rig.beside(leader, 2))
        started = rig.start(leader, rig.token())
        assert started is not None and started.position == 4
        rig.sleep(2 * ELECTION_TIMEOUT_MS)
        assert rig.applied_count(4) == 0, "applied without a quorum"


@seeds(3, 30)
def test_leader_failure_3b(seed: int) -> None:
    with Rig(3, seed) as rig:
        rig.one(rig.token(), 3, retry=False)
        rig.disconnect(rig.check_one_leader())
        rig.one(rig.token(), 2, retry=False)
        rig.sleep(ELECTION_TIMEOUT_MS)
        rig.one(rig.token(), 2, retry=False)

        rig.disconnect(rig.check_one_leader())
        accepted = [replica for replica in rig.peers if rig.start(replica, rig.token())]
        assert accepted, "nobody took the command"
        rig.sleep(2 * ELECTION_TIMEOUT_MS)
        assert rig.applied_count(4) == 0, "applied without a quorum"


@seeds(3, 30)
def test_fail_agree_3b(seed: int) -> None:
    with Rig(3, seed) as rig:
        rig.one(rig.token(), 3, retry=False)
        follower = rig.beside(rig.check_one_leader())
        rig.disconnect(follower)
        rig.one(rig.token(), 2, retry=False)
        rig.one(rig.token(), 2, retry=False)
        rig.sleep(ELECTION_TIMEOUT_MS)
        rig.one(rig.token(), 2, retry=False)
        rig.one(rig.token(), 2, retry=False)

        rig.connect(follower)
        rig.one(rig.token(), 3, retry=True)
        rig.sleep(ELECTION_TIMEOUT_MS)
        rig.one(rig.token(), 3, retry=True)


@seeds(3, 30)
def test_fail_no_agree_3b(seed: int) -> None:
    with Rig(5, seed) as rig:
        rig.one(rig.token(), 5, retry=False)
        leader = rig.check_one_leader()
        followers = [rig.beside(leader, steps) for steps in (1, 2, 3)]
        rig.disconnect(*followers)
        started = rig.start(leader, rig.token())
        assert started is not None and started.position == 2
        rig.sleep(2 * ELECTION_TIMEOUT_MS)
        assert rig.applied_count(2) == 0, "applied without a quorum"

        rig.connect(*followers)
        # Those cut off may have elected one of their own, whose log lacks the second command.
        started = rig.start(rig.check_one_leader(), rig.token())
        assert started is not None and started.position in (2, 3)
        rig.one(rig.token(), 5, retry=True)


@seeds(3, 30)
def test_concurrent_starts_3b(seed: int) -> None:
    with Rig(3, seed) as rig:
        for attempt in range(5):
            if attempt:
                rig.sleep(3000)
            leader = rig.check_one_leader()
            first = rig.start(leader, rig.token())
            if first is None:
                continue
            commands = [rig.token() for _ in range(5)]
            started = rig.start_together(leader, commands)
            if [s.term for s in started] != [first.term] * 5:
                continue
            applied = [rig.wait(s.position, 3, first.term) for s in started]
            if None not in applied:
                assert applied == commands
                return
        raise AssertionError("the term changed in each of 5 tries")


@seeds(3, 30)
def test_rejoin_3b(seed: int) -> None:
    with Rig(3, seed) as rig:
        rig.one(rig.token(), 3, retry=True)
        first = rig.check_one_leader()
        rig.disconnect(first)
        lost = [rig.token() for _ in range(3)]
        for command in lost:
            assert rig.start(first, command) is not None
        kept = [rig.token()]
        rig.one(kept[0], 2, retry=True)

        second = rig.check_one_leader()
        rig.disconnect(second)
        rig.connect(first)
        kept.append(rig.token())
        rig.one(kept[1], 2, retry=True)

        rig.connect(second)
        kept.append(rig.token())
        rig.one(kept[2], 3, retry=True)
        for peer in rig.peers.values():
            assert not set(lost) & set(peer.commands), "replaced, and yet applied"
            assert [command for command in peer.commands if command in kept] == kept


@seeds(3, 30)
def test_backup_3b(seed: int, record_property: Record) -> None:
    with Rig(5, seed) as rig:

        def strand(leader: int) -> None:
            """50 commands that can't be committed."""
            for _ in range(50):
                assert rig.start(leader, rig.token()) is not None
            rig.sleep(ELECTION_TIMEOUT_MS // 2)

        rig.one(rig.token(), 5, retry=True)
        first = rig.check_one_leader()
        companion = rig.beside(first)
        others = [rig.beside(first, steps) for steps in (2, 3, 4)]
        rig.disconnect(*others)
        strand(first)

        rig.disconnect(first, companion)
        rig.connect(*others)
        for _ in range(50):
            rig.one(rig.token(), 3, retry=True)

        second = rig.check_one_leader()
        third = others[0] if others[0] != second else others[1]
        rig.disconnect(third)
        strand(second)

        rig.disconnect(*rig.peers)
        rig.connect(first, companion, third)
        for _ in range(50):
            rig.one(rig.token(), 3, retry=True)

        rig.connect(*rig.peers)
        rig.one(rig.token(), 5, retry=True)
        record_property("virtual_ms", rig.now_ms)


@seeds(3, 30)
def test_count_3b(seed: int, record_property: Record) -> None:
    with Rig(3, seed) as rig:
        rig.check_one_leader()
        election = rig.requests.total()
        record_property("election", election)
        assert 1 <= election <= 30

        iterations = 10
        for attempt in range(5):
            if attempt:
                rig.sleep(3000)
            leader = rig.check_one_leader()
            before = rig.requests.total()
            commands = [rig.token() for _ in range(1 + iterations + 1)]
            started = [rig.start(leader, command) for command in commands]
            accepted = [s for s in started if s is not None]
            first = accepted[0] if accepted else None
            if first is None or len(accepted) < len(commands) or {s.term for s in accepted} != {first.term}:
                continue
            assert [s.position for s in accepted] == [first.position + i for i in range(len(commands))]
            applied = [rig.wait(s.position, 3, first.term) for s in accepted[1 : iterations + 1]]
            burst = rig.requests.total() - before
            if None in applied or any(raft.term != first.term for raft in rig.live()):
                continue
            assert applied == commands[1 : iterations + 1]
            record_property("burst", burst)
            assert burst <= (iterations + 1 + 3) * 3
            break
        else:
            raise AssertionError("the term changed in each of 5 tries")

        rig.sleep(ELECTION_TIMEOUT_MS // 10)  # the last command's replies are no idle traffic
        before = rig.requests.total()
        rig.sleep(ELECTION_TIMEOUT_MS)
        idle = rig.requests.total() - before
        record_property("idle", idle)
        assert idle <= 3 * 20


# ---- 3C: persistence


@seeds(3, 30)
def test_persist_1_3c(seed: int) -> None:
    with Rig(3, seed) as rig:
        rig.one(rig.token(), 3, retry=True)
        rig.restart(*rig.peers)
        rig.one(rig.token(), 3, retry=True)

        rig.restart(rig.check_one_leader())
        rig.one(rig.token(), 3, retry=True)

        leader = rig.check_one_leader()
        rig.disconnect(leader)
        rig.one(rig.token(), 2, retry=True)
        rig.restart(leader)
        rig.wait(4, 3)

        other = rig.beside(rig.check_one_leader())
        rig.disconnect(other)
        rig.one(rig.token(), 2, retry=True)
        rig.restart(other)
        rig.one(rig.token(), 3, retry=True)


@seeds(3, 30)
def test_persist_2_3c(seed: int) -> None:
    with Rig(5, seed) as rig:
        for _ in range(5):
            rig.one(rig.token(), 5, retry=True)
            leader = rig.check_one_leader()
            a, b, c, d = (rig.beside(leader, steps) for steps in (1, 2, 3, 4))
            rig.disconnect(a, b)
            rig.one(rig.token(), 3, retry=True)
            rig.disconnect(leader, c, d)
            rig.restart(a, b)
            rig.sleep(ELECTION_TIMEOUT_MS)
            rig.restart(c)
            rig.one(rig.token(), 3, retry=True)
            rig.connect(d, leader)
        rig.one(rig.token(), 5, retry=True)


@seeds(3, 30)
def test_persist_3_3c(seed: int) -> None:
    with Rig(3, seed) as rig:
        rig.one(rig.token(), 3, retry=True)
        leader = rig.check_one_leader()
        other, stale = rig.beside(leader), rig.beside(leader, 2)
        rig.disconnect(stale)
        committed = rig.token()
        position = rig.one(committed, 2, retry=True)
        rig.crash(leader, other)
        rig.connect(stale)
        rig.restart(leader)
        rig.one(rig.token(), 2, retry=True)
        rig.restart(other)
        rig.one(rig.token(), 3, retry=True)
        assert rig.applied_count(position, committed) == 3, "a committed command is lost"


@pytest.mark.parametrize("latency_us_max", [1_000, 15_000], ids=["as_written", "slow_links"])
@seeds(3, 30)
def test_figure_8_3c(seed: int, latency_us_max: int) -> None:
    """Leaders die while their entries are on a few disks only (Raft, Figure 8).

    On a quick network hardly one of them does: most entries arrive before the leader dies. On a slow one most do.
    """
    with Rig(5, seed, latency_us_max=latency_us_max) as rig:
        rng = rig.rng
        rig.one(rig.token(), 1, retry=True)
        for _ in range(1000):
            # Every live server is offered one; the last to accept it dies.
            accepted = [replica for replica in rig.peers if rig.start(replica, rig.token())]
            rig.sleep(rng.randrange(ELECTION_TIMEOUT_MS // 2) if rng.random() < 0.1 else rng.randrange(13))
            if accepted:
                rig.crash(accepted[-1])
            if len(rig.live()) < 3:
                replica = rng.randint(1, 5)
                if not rig.is_up(replica):
                    rig.restart(replica)
        rig.restart(*[replica for replica in rig.peers if not rig.is_up(replica)])
        rig.one(rig.token(), 5, retry=True)


@seeds(3, 30)
def test_unreliable_agree_3c(seed: int) -> None:
    with Rig(5, seed, reliable=False) as rig:
        tasks: list[Task[int]] = []
        commands: list[bytes] = []
        for _ in range(49):
            for _ in range(4):
                commands.append(rig.token())
                tasks.append(rig.spawn(rig.one_steps(commands[-1], 1, retry=True)))
            commands.append(rig.token())
            rig.one(commands[-1], 1, retry=True)
        rig.reliable = True
        for task in tasks:
            rig.finish(task)
        rig.one(rig.token(), 5, retry=True)
        assert len(commands) == 245
        for peer in rig.peers.values():
            assert set(commands) <= set(peer.commands)


@seeds(3, 30)
def test_figure_8_unreliable_3c(seed: int) -> None:
    """Figure 8 with leaders cut off instead of crashed, on a network that loses and, from 200 on, reorders a lot."""
    with Rig(5, seed, reliable=False) as rig:
        rng = rig.rng
        rig.one(rig.token(), 1, retry=True)
        for iteration in range(1000):
            rig.long_reordering = iteration >= 200
            # Those cut off are offered one too: they must not commit it.
            accepted = [replica for replica in rig.peers if rig.start(replica, rig.token())]
            leaders = [replica for replica in accepted if replica in rig.connected]
            rig.sleep(rng.randrange(ELECTION_TIMEOUT_MS // 2) if rng.random() < 0.1 else rng.randrange(13))
            if leaders and rng.random() < 0.5:
                rig.disconnect(leaders[-1])
            if len(rig.connected) < 3:
                rig.connect(rng.randint(1, 5))
        rig.connect(*rig.peers)
        rig.one(rig.token(), 5, retry=True)


def churn(seed: int, *, reliable: bool) -> None:
    with Rig(5, seed, reliable=reliable) as rig:
        rng = rig.rng
        stopped = False

        def client(number: int) -> Steps[list[bytes]]:
            """Offer commands everywhere; note those that were seen applied."""
            noted: list[bytes] = []
            while not stopped:
                command = rig.token()
                last: Started | None = None
                for replica in rig.peers:
                    last = rig.start(replica, command) or last
                if last is None:
                    yield 79 + number * 17
                    continue
                for wait_ms in (10, 20, 50, 100, 200):
                    if rig.applied_count(last.position):
                        if rig.agreed_commands[last.position - 1] == command:
                            noted.append(command)
                        break
                    yield wait_ms
            return noted

        clients = [rig.spawn(client(number)) for number in range(3)]
        for _ in range(20):
            if rng.random() < 0.2:
                rig.disconnect(rng.randint(1, 5))
            if rng.random() < 0.5:
                replica = rng.randint(1, 5)
                if rig.is_up(replica):
                    rig.connect(replica)
                else:
                    rig.restart(replica)
            if rng.random() < 0.2:
                replica = rng.randint(1, 5)
                if rig.is_up(replica):
                    rig.crash(replica)
            rig.sleep(700)
        rig.sleep(ELECTION_TIMEOUT_MS)
        rig.reliable = True
        rig.restart(*[replica for replica in rig.peers if not rig.is_up(replica)])
        rig.connect(*rig.peers)
        stopped = True
        noted = [command for task in clients for command in rig.finish(task)]
        rig.sleep(ELECTION_TIMEOUT_MS)
        last = rig.one(rig.token(), 5, retry=True)
        final = {rig.wait(position, 5) for position in range(1, last + 1)}
        assert len(noted) > 20, "the clients saw hardly anything"
        assert set(noted) <= final, "seen applied, and not in the log"


@seeds(3, 30)
def test_reliable_churn_3c(seed: int) -> None:
    churn(seed, reliable=True)


@seeds(3, 30)
def test_unreliable_churn_3c(seed: int) -> None:
    churn(seed, reliable=False)


# ---- 3D: snapshots


def small_chunks(replica: int) -> RaftConfig:
    """So that a snapshot of a few hundred commands travels in several pieces."""
    return RaftConfig(replica, snapshot_chunk_bytes=1024)


def snapshots(seed: int, record: Record, *, cut: bool = False, crash: bool = False, reliable: bool = True) -> None:
    """30 bursts of commands while a victim, if any, is away: it comes back to a log that has gone on without it."""
    with Rig(3, seed, reliable=reliable, snapshots=True, config=small_chunks) as rig:
        rig.one(rig.token(), 3, retry=True)
        leader = rig.check_one_leader()
        largest = 0
        for iteration in range(30):
            victim = leader if iteration % 3 == 1 else rig.beside(leader)
            present = 3
            if cut or crash:
                present = 2
                if cut:
                    rig.disconnect(victim)
                else:
                    rig.crash(victim)
                rig.one(rig.token(), 2, retry=True)
            sender = rig.leader() if cut or crash else leader
            for _ in range(rig.rng.randint(5, 14)):
                if sender is not None:
                    rig.start(sender, rig.token())
            rig.one(rig.token(), present, retry=True)
            for peer in rig.peers.values():
                largest = max(largest, peer.state_bytes)
            assert largest < STATE_BYTES_MAX, f"iteration {iteration}: {largest} bytes of Raft state"
            if cut:
                rig.connect(victim)
            elif crash:
                rig.restart(victim)
            if cut or crash:
                rig.one(rig.token(), 3, retry=True)
                leader = rig.check_one_leader()
        record("state_bytes", largest)
        record("snapshots_installed", rig.installed)
        record("virtual_ms", rig.now_ms)
        if cut or crash:
            assert rig.installed >= 10, "hardly any victim needed a snapshot"
        else:
            assert not rig.requests["InstallSnapshot"], "nobody was behind, and yet a snapshot was sent"


@seeds(3, 30)
def test_snapshot_basic_3d(seed: int, record_property: Record) -> None:
    snapshots(seed, record_property)


@seeds(3, 30)
def test_snapshot_install_3d(seed: int, record_property: Record) -> None:
    snapshots(seed, record_property, cut=True)


@seeds(3, 30)
def test_snapshot_install_unreliable_3d(seed: int, record_property: Record) -> None:
    snapshots(seed, record_property, cut=True, reliable=False)


@seeds(3, 30)
def test_snapshot_install_crash_3d(seed: int, record_property: Record) -> None:
    snapshots(seed, record_property, crash=True)


@seeds(3, 30)
def test_snapshot_install_un_crash_3d(seed: int, record_property: Record) -> None:
    snapshots(seed, record_property, crash=True, reliable=False)


@pytest.mark.parametrize("reliable", [True, False], ids=["2024", "2025"])
@seeds(3, 30)
def test_snapshot_all_crash_3d(seed: int, reliable: bool) -> None:
    with Rig(3, seed, reliable=reliable, snapshots=True) as rig:
        rig.one(rig.token(), 3, retry=True)
        for _ in range(5):
            for _ in range(rig.rng.randint(5, 14)):
                rig.one(rig.token(), 3, retry=True)
            before = rig.one(rig.token(), 3, retry=True)
            rig.restart(*rig.peers)
            assert rig.one(rig.token(), 3, retry=True) >= before + 1


@seeds(3, 30)
def test_snapshot_init_3d(seed: int) -> None:
    """What is persisted next after a restart must not wipe the snapshot that the restart began from."""
    with Rig(3, seed, snapshots=True) as rig:
        for _ in range(1 + 11):
            rig.one(rig.token(), 3, retry=True)
        for _ in range(2):
            rig.restart(*rig.peers)
            assert all(peer.disk.start_index >= 9 and len(peer.commands) >= 8 for peer in rig.peers.values())
            rig.one(rig.token(), 3, retry=True)
        assert all(peer.commands == rig.agreed_commands for peer in rig.peers.values())


# ---- the harness itself: what it would not notice, these tests would not prove


@pytest.mark.parametrize(
    ("rule", "scenario"),
    [
        ("up-to-date check", test_persist_2_3c),
        ("up-to-date check", lambda seed: test_figure_8_3c(seed, 15_000)),
        ("up-to-date check", test_figure_8_unreliable_3c),
        ("self-count after fsync", test_persist_1_3c),
        ("ack after fsync", test_persist_3_3c),
        ("commit only what matches", test_rejoin_3b),
        ("commit only what matches", test_figure_8_unreliable_3c),
    ],
)
def test_a_broken_rule_is_noticed(rule: str, scenario: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    raft_class, names = RANDOM[rule]
    monkeypatch.setattr(Rig, "raft_class", staticmethod(raft_class))
    for seed in range(10):
        try:
            scenario(seed)
        except InvariantViolation as violation:
            assert violation.name in names
            return
    raise AssertionError(f"10 seeds without {rule}, and nothing was noticed")


def test_the_safety_checker_notices() -> None:
    with Rig(3, 1, snapshots=True) as rig:
        for _ in range(12):
            rig.one(rig.token(), 3, retry=False)
        peer = rig.peers[1]
        entry = Entry.decode(rig.agreed[peer.stream_index])
        with pytest.raises(InvariantViolation, match="AppliedInOrder"):
            peer.take(entry)
        with pytest.raises(InvariantViolation, match="StateMachineSafety"):
            rig.check_applied(peer, Entry.make(entry.term, entry.index, EntryKind.COMMANDS, entry.stamp_ms, b"other"))
        index, _, _, body, _ = peer.disk.engine[0]
        commands = rig.check_snapshot(index, body)
        for wrong in ([index, 0, commands[:-1]], [index, 0, [*commands, b"other"]], [index - 1, 0, commands]):
            with pytest.raises(InvariantViolation, match="SnapshotIsState"):
                rig.check_snapshot(index, encode_body(wrong))


def test_the_helpers_give_up() -> None:
    with Rig(3, 1) as rig:
        leader = rig.check_one_leader()
        rig.disconnect(rig.beside(leader), rig.beside(leader, 2))
        with pytest.raises(AssertionError, match="2 s after"):
            rig.one(rig.token(), 2, retry=False)
        begin_ms = rig.now_ms
        with pytest.raises(AssertionError, match="in 10 s"):
            rig.one(rig.token(), 2, retry=True)
        assert rig.now_ms - begin_ms >= 10_000
        with pytest.raises(AssertionError, match="no leader"):
            rig.check_one_leader()
        with pytest.raises(AssertionError, match="0 of 2 servers"):
            rig.wait(1, 2)
    with pytest.raises(AssertionError, match="the test took"), Rig(3, 1) as rig:
        rig.sleep(121_000)


@pytest.mark.parametrize("reliable", [True, False])
def test_a_seed_is_one_history(reliable: bool) -> None:
    def history() -> list[object]:
        with Rig(5, BASE_SEED + 7, reliable=reliable) as rig:
            for _ in range(5):
                rig.one(rig.token(), 1, retry=True)
                rig.restart(rig.check_one_leader())
            return [rig.now_us, rig.bytes, sorted(rig.agreed.items()), sorted(rig.requests.items())]

    assert history() == history()
