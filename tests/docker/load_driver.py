"""Users of the store, as a program inside the container `kv`: `… -m tests.docker.load_driver NAME TRANSACTORS THINK_S`.

They are those of the chaos, with keys of their own for each NAME, and go on until standard input ends. Then everything
is read once more, and standard output gets the history (docs/histories.md), whose header has `waits`, a list of
[call, answer] in nanoseconds, and `problems`. Meanwhile standard error gets lines with the number of answers so far.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys

from raftkv.client.kv import RaftKV
from raftkv.sim.scenario import TxnPlan
from raftkv.sim.txn_workload import TxnRecorder
from raftkv.sim.workload import read_all_transactions
from tests.chaos.workload import Recorder, Workload, visit_all

CLIENTS = 2
USERS = 3
SLOTS = 12
PROGRESS_S = 0.1
FINAL_TIMEOUT_S = 60.0


async def main(name: str, transactors: int, think_s: float) -> None:
    """Raise whatever ends a user."""
    controllers = os.environ["RAFTKV_CONTROLLERS"].split(",")
    problems: list[str] = []
    recorder = Recorder()
    transactions = TxnRecorder(recorder, TxnPlan(users=transactors), problems.append)
    transactions.lists = [b"l%s%d" % (name.encode(), number) for number in range(transactions.plan.lists)]
    rng = random.Random(name)
    size = {"clients": CLIENTS, "users": USERS, "slots": SLOTS}
    workload = Workload(controllers, recorder, transactions, rng, **size, think_s=think_s, name=name)
    work = asyncio.create_task(workload.run())
    asked_to_end = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
    while not asked_to_end.done():
        await asyncio.wait([work, asked_to_end], timeout=PROGRESS_S, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            work.result()
        print(len(recorder.waits), file=sys.stderr, flush=True)
    workload.stop.set()
    await work
    refused = await visit_all(controllers, recorder, FINAL_TIMEOUT_S)
    async with RaftKV(controllers, timeout_s=FINAL_TIMEOUT_S) as kv:
        refused += await read_all_transactions(kv, transactions, "final")
    transactions.close()
    problems += [f"not served at the end: {what}" for what in refused]
    waits = [[wait.start_ns, wait.end_ns] for wait in recorder.waits]
    outcomes = {f"{kind} {status}": count for (kind, status), count in sorted(transactions.outcomes.items())}
    recorder.history.header.update(workload="appends", waits=waits, transactions=outcomes, problems=problems)
    sys.stdout.buffer.writelines(f"{line}\n".encode() for line in recorder.history.lines())


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))
