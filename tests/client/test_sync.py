"""`SyncRaftKV` and `SyncControllers`: the same without await, and what Ctrl-C does."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

import pytest

from raftkv.client.sync import SyncControllers, SyncRaftKV
from raftkv.client.sync_transactions import SyncTransaction
from raftkv.protocol import errors
from raftkv.protocol.errors import Interrupted, Timeout, Unavailable
from raftkv.protocol.messages import Verb
from tests.client.fakes import drop, on_verb
from tests.client.served import Served
from tests.client.txn_fakes import TxnCluster, key_at


@pytest.fixture
def served() -> Iterator[Served]:
    made = Served()
    yield made
    made.stop()


def interrupt_when(condition: Callable[[], object]) -> threading.Thread:
    """Send SIGINT to this process once the condition holds."""

    def wait() -> None:
        deadline = time.monotonic() + 5
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_every_operation(served: Served) -> None:
    with SyncRaftKV(served.cluster.addresses) as kv:
        version = kv.put(b"k", b"1")
        found = kv.get(b"k")
        assert found is not None
        assert (found.value, found.version) == (b"1", version)
        assert kv.append(b"k", b"2") > version
        assert kv.cas(b"k", b"12", b"3") > version
        with pytest.raises(errors.CasMismatch):
            kv.cas(b"k", b"12", b"3")
        assert [(key, value.value) for key, value in kv.scan()] == [(b"k", b"3")]
        assert kv.delete(b"k")
        assert kv.get(b"k") is None
    with pytest.raises(Unavailable, match="closed"):
        kv.get(b"k")
    kv.close()


def test_controllers(served: Served) -> None:
    with SyncControllers(served.cluster.addresses) as controllers:
        assert controllers.query() == served.cluster.shard_map
        assert controllers.join({5: ["a:1"]}) == 7
        assert controllers.leave([5]) == 7
        assert controllers.move(0, 1) == 7
        assert set(controllers.status()) == set(served.cluster.addresses)
        assert controllers.status_of(served.cluster.addresses[0])["role"] == "controller"


def test_a_scan_may_be_left_and_mixed_with_other_requests(served: Served) -> None:
    with SyncRaftKV(served.cluster.addresses) as kv:
        for n in range(20):
            kv.put(b"k%02d" % n, b"")
        seen = []
        for key, _ in kv.scan(b"k"):
            seen.append(key)
            kv.put(b"other", key)
            if len(seen) == 5:
                break
        assert seen == [b"k%02d" % n for n in range(5)]
        left = kv.scan(b"k")
        assert next(left)[0] == b"k00"
    del left


def test_ctrl_c_of_a_write_that_was_sent_says_that_it_may_apply(served: Served) -> None:
    cluster = served.cluster
    with SyncRaftKV(cluster.addresses) as kv:
        kv.put(b"k", b"1")
        for gid in (1, 2):
            cluster.everywhere(gid, on_verb(Verb.WRITE, drop))
        before = len(cluster.asked(Verb.WRITE))
        thread = interrupt_when(lambda: len(cluster.asked(Verb.WRITE)) > before)
        with pytest.raises(Interrupted, match="interrupted: put 'k' may have applied"):
            kv.put(b"k", b"2")
        thread.join()
        hellos = sum(len(server.hellos) for server in cluster.servers)
        for servers in cluster.groups.values():
            for server in servers:
                server.rules.clear()
        assert kv.put(b"k", b"3") > 0  # on the same connection
        assert sum(len(server.hellos) for server in cluster.servers) == hellos
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_of_a_read_is_a_keyboard_interrupt(served: Served) -> None:
    cluster = served.cluster
    with SyncRaftKV(cluster.addresses) as kv:
        kv.put(b"k", b"1")
        for gid in (1, 2):
            cluster.everywhere(gid, drop)
        before = len(cluster.asked(Verb.READ))
        thread = interrupt_when(lambda: len(cluster.asked(Verb.READ)) > before)
        with pytest.raises(KeyboardInterrupt):
            kv.get(b"k")
        thread.join()
        for servers in cluster.groups.values():
            for server in servers:
                server.rules.clear()
        assert kv.get(b"k") is not None


def test_ctrl_c_of_a_write_that_nobody_took_is_a_keyboard_interrupt(served: Served) -> None:
    cluster = served.cluster
    with SyncRaftKV(cluster.addresses) as kv:
        for gid in (1, 2):
            for server in cluster.groups[gid]:
                served.do(server.stop)
        thread = interrupt_when(lambda: True)
        with pytest.raises(KeyboardInterrupt):
            kv.put(b"k", b"1")
        thread.join()
        served.restart_groups()
        assert kv.get(b"k") is None


def test_a_handler_of_the_programs_own_is_left_alone(served: Served) -> None:
    """Its KeyboardInterrupt strikes anywhere in the loop; the answer is the same."""
    cluster = served.cluster

    def handler(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGINT, handler)
    try:
        with SyncRaftKV(cluster.addresses) as kv:
            kv.put(b"k", b"1")
            for gid in (1, 2):
                cluster.everywhere(gid, on_verb(Verb.WRITE, drop))
            before = len(cluster.asked(Verb.WRITE))
            thread = interrupt_when(lambda: len(cluster.asked(Verb.WRITE)) > before)
            with pytest.raises(Interrupted):
                kv.put(b"k", b"2")
            thread.join()
            assert signal.getsignal(signal.SIGINT) is handler
            assert kv.get(b"k") is not None
    finally:
        signal.signal(signal.SIGINT, previous)


def test_outside_of_the_main_thread(served: Served) -> None:
    results: list[object] = []

    def work(n: int) -> None:
        with SyncRaftKV(served.cluster.addresses) as kv:
            results.append(kv.put(b"t%d" % n, b""))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4


def test_errors_and_deadlines(served: Served) -> None:
    for server in served.cluster.controllers:
        served.do(server.stop)
    with SyncRaftKV(served.cluster.addresses, timeout_s=0.3) as kv, pytest.raises(Timeout):
        kv.get(b"k")


@pytest.fixture
def transactions() -> Iterator[Served]:
    made = Served(TxnCluster(shards=4))
    yield made
    made.stop()


def test_transactions(transactions: Served) -> None:
    cluster = transactions.cluster
    assert isinstance(cluster, TxnCluster)
    a, c = key_at(0), key_at(1)
    with SyncRaftKV(cluster.addresses, timeout_s=5) as kv:
        with kv.transaction() as txn:
            assert txn.get(a) is None
            txn.put(a, b"1")
            txn.lock(c)
            txn.append(c, b"2")
            txn.put(key_at(2), b"x")
            txn.delete(key_at(2))
        assert [cluster.value(key) for key in (a, c, key_at(2))] == [b"1", b"2", None]
        assert kv.txn_status(txn.txid) == "committed"
        with pytest.raises(KeyError), kv.transaction() as txn:
            txn.get(a, for_update=True)
            raise KeyError
        assert cluster.locks() == 0
        by_hand = kv.transaction().begin()
        by_hand.put(a, b"2")
        by_hand.abort()
        by_hand = kv.transaction().begin()
        by_hand.put(a, b"3")
        by_hand.commit()
        assert cluster.value(a) == b"3"


def test_run_transaction(transactions: Served) -> None:
    cluster = transactions.cluster
    assert isinstance(cluster, TxnCluster)
    a, c = key_at(0), key_at(1)
    with SyncRaftKV(cluster.addresses, timeout_s=5) as kv, SyncRaftKV(cluster.addresses, timeout_s=0.2) as rival:
        count = 0

        def body(txn: SyncTransaction) -> int:
            nonlocal count
            count += 1
            found = txn.get(a)
            with contextlib.suppress(errors.Locked):
                rival.put(a, b"%d" % count)
            txn.put(c, b"%d" % count)
            return 0 if found is None else int(found.value)

        assert kv.run_transaction(body) == 3
        assert (count, cluster.value(c), cluster.locks()) == (4, b"4", 0)
        with pytest.raises(ZeroDivisionError):
            kv.run_transaction(lambda txn: 1 // 0)


def test_ctrl_c_during_a_commit_names_the_transaction(transactions: Served) -> None:
    cluster = transactions.cluster
    transactions.do(lambda: cluster.everywhere(1, on_verb(Verb.TXN, drop)))
    with SyncRaftKV(cluster.addresses, timeout_s=20) as kv:
        txn = kv.transaction().begin()
        txn.put(key_at(0), b"1")
        thread = interrupt_when(lambda: cluster.asked(Verb.TXN))
        with pytest.raises(Interrupted, match=f"commit of transaction {txn.txid.hex()} may have applied"):
            txn.commit()
        thread.join()
        assert kv.txn_status(txn.txid) == "unknown"
