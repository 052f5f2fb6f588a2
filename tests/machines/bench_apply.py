"""What applying PUTs costs in Python, per command: `python -m tests.machines.bench_apply`.

Over a dict for an engine (the machine's own cost, which is what counts here) and over RocksDB (reads and the
write of the batch included). A figure to look at, not a test.
"""

from __future__ import annotations

import statistics
import tempfile
import time

from raftkv.machines.kv import MAP_TIME, PUT, KvMachine
from raftkv.raft.entry import Entry, EntryKind
from raftkv.storage.engine import Overlay, StorageEngine
from raftkv.storage.rocks import RocksEngine
from tests.machines.support import Client, DictEngine, config_command, one_group

ENTRIES = 400
KEYS = 100_000


def prepared(engine: StorageEngine) -> KvMachine:
    machine = KvMachine(1)
    machine.load(engine)
    view = Overlay(engine)
    machine.apply(view, Entry.make(1, 1, EntryKind.COMMANDS, 0, b""), [config_command(one_group())])
    engine.write(view.changes)
    return machine


def measure(engine: StorageEngine, batch: int, clients: int) -> tuple[float, float]:
    """Median µs per command of apply, and of apply and write."""
    machine = prepared(engine)
    senders = [Client(number) for number in range(clients)]
    number, apply_s, total_s = 0, [], []
    for index in range(2, ENTRIES + 2):
        commands = []
        for _ in range(batch):
            number += 1
            key = b"key-%06d" % (number * 7919 % KEYS)
            commands.append(senders[number % clients].command(PUT, key, b"x" * 100, None))
        entry = Entry.make(1, index, EntryKind.COMMANDS, 0, b"")
        started_s = time.perf_counter()
        view = Overlay(engine)
        machine.apply(view, entry, commands)
        applied_s = time.perf_counter()
        engine.write(view.changes)
        apply_s.append(applied_s - started_s)
        total_s.append(time.perf_counter() - started_s)
    return statistics.median(apply_s) / batch * 1e6, statistics.median(total_s) / batch * 1e6


def measure_sweep(engine: StorageEngine, rows: int) -> float:
    """The longest time in ms that one MAP_TIME takes with `rows` sessions that have expired."""
    machine = prepared(engine)
    replica_index, worst_s = 2, 0.0
    for start in range(0, rows, 500):
        commands = [Client(number).command(PUT, b"k%d" % number, b"", None) for number in range(start, start + 500)]
        view = Overlay(engine)
        machine.apply(view, Entry.make(1, replica_index, EntryKind.COMMANDS, 0, b""), commands)
        engine.write(view.changes)
    passes = 0
    while passes == 0 or machine.sweep_pending:
        passes += 1
        started_s = time.perf_counter()
        view = Overlay(engine)
        machine.apply(view, Entry.make(1, 3, EntryKind.COMMANDS, 0, b""), [[MAP_TIME, 2**40]])
        engine.write(view.changes)
        worst_s = max(worst_s, time.perf_counter() - started_s)
    return worst_s * 1e3


def main() -> None:
    print("batch clients | dict: apply µs | RocksDB: apply µs, with write µs")
    for batch, clients in ((1, 1), (16, 64), (64, 64), (256, 256), (64, 20_000)):
        own, _ = measure(DictEngine(), batch, clients)
        with tempfile.TemporaryDirectory() as directory:
            engine = RocksEngine(f"{directory}/engine")
            apply_us, total_us = measure(engine, batch, clients)
            engine.close()
        print(f"{batch:5} {clients:7} | {own:14.2f} | {apply_us:17.2f} {total_us:14.2f}")
    with tempfile.TemporaryDirectory() as directory:
        engine = RocksEngine(f"{directory}/engine")
        print(f"sweep of 20,000 expired sessions in RocksDB: at most {measure_sweep(engine, 20_000):.1f} ms an entry")
        engine.close()


if __name__ == "__main__":
    main()
