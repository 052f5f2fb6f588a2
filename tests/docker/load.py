"""Checked load on the cluster of containers, and the faults that it meets.

The users are a program in the container `kv` (`load_driver.py`), which is sent there with what it imports of the tests:
traffic stays on the cluster's own network, where its names mean something. The history comes back on standard output,
and is checked here as `raftkv check` checks a file: linearizability, unique appends, transactions. Containers and this
process share one monotonic clock, so waits can be compared with the faults that were done from here.
"""

from __future__ import annotations

import io
import subprocess
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from raftkv.machines.slots import shard_of
from raftkv.sim.check.file import check_history
from raftkv.sim.check.history import History, Kind
from tests.chaos.nemesis import AFTERMATH_S, Event
from tests.chaos.run import stalls
from tests.chaos.workload import Wait
from tests.docker import stack

SENT = (
    "tests/__init__.py",
    "tests/chaos/__init__.py",
    "tests/chaos/workload.py",
    "tests/docker/__init__.py",
    "tests/docker/load_driver.py",
)
FIRST_ANSWERS = 20
FINISH_TIMEOUT_S = 180
CHECK_DEADLINE_S = 120.0


class Load:
    """Runs from `with` to its end, where the history is checked; `transactors` of each of the two clients run
    transactions, and other users pause for `think_s` on average. Afterwards `history` and `waits` are there."""

    def __init__(self, folder: Path, name: str, *, transactors: int = 1, think_s: float = 0.05) -> None:
        self.events: list[Event] = []
        self.history = History({})
        self.waits: list[Wait] = []
        self.answers = 0
        self._name = name
        self._numbers = (str(transactors), str(think_s))
        self._file = folder / f"{name}.jsonl"
        self._said: list[str] = []

    def __enter__(self) -> Self:
        send_driver()
        driver = ("python", "-m", "tests.docker.load_driver", self._name, *self._numbers)
        with self._file.open("wb") as out:
            self._process = subprocess.Popen(
                ["docker", "exec", "-i", "kv", *driver],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.PIPE,
                text=True,
            )
        assert self._process.stderr is not None
        self._listener = threading.Thread(target=self._listen, args=(self._process.stderr,), daemon=True)
        self._listener.start()
        try:
            self.wait_for(FIRST_ANSWERS)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        status = self._end()
        if error is None:
            assert status == 0, f"the load ended with {status}: {self._text()}"
            self._check()

    def wait_for(self, more: int, timeout_s: float = 60) -> None:
        """Until that many more answers have come."""
        goal = self.answers + more
        deadline_s = time.monotonic() + timeout_s
        while self.answers < goal:
            assert self._process.poll() is None, f"the load has ended: {self._text()}"
            assert time.monotonic() < deadline_s, f"{self.answers} of {goal} answers after {timeout_s:g} s"
            time.sleep(0.05)

    @contextmanager
    def fault(self, kind: str, text: str) -> Iterator[None]:
        """What is done inside is a fault of that kind: the waits that meet it are its stalls."""
        start_ns = time.monotonic_ns()
        yield
        self.events.append(Event(kind, start_ns, time.monotonic_ns(), text))

    def stall_s(self, event: Event) -> float:
        """The longest wait that met the fault."""
        end_ns = event.end_ns + int(AFTERMATH_S * 1e9)
        met = [wait.seconds for wait in self.waits if wait.end_ns >= event.start_ns and wait.start_ns <= end_ns]
        return max(met, default=0.0)

    def silence_s(self, event: Event, shards: Sequence[int]) -> float:
        """The longest time during the fault, or just after it, in which nobody got an answer from these shards of
        ten."""
        end_ns = event.end_ns + int(AFTERMATH_S * 1e9)
        answers_ns = [
            operation.return_ns
            for operation in self.history.operations
            if operation.kind is not Kind.TXN and operation.return_ns and shard_of(operation.key, 10) in shards
        ]
        inside_ns = [event.start_ns, *sorted(at for at in answers_ns if event.start_ns < at < end_ns), end_ns]
        return max(later - earlier for earlier, later in pairwise(inside_ns)) / 1e9

    def report(self) -> str:
        """Figures for people."""
        kinds = Counter(str(operation.kind) for operation in self.history.operations)
        counts = ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items()))
        longest_s = max(wait.seconds for wait in self.waits)
        text = f"{len(self.history)} operations checked ({counts}); longest stall {longest_s:.2f} s"
        return "\n".join(["", f"{self._name}: {text}", *(stalls(self.waits, self.events) if self.events else [])])

    def _listen(self, errors: IO[str]) -> None:
        for line in errors:
            if line.strip().isdecimal():
                self.answers = int(line)
            else:
                self._said.append(line)

    def _end(self) -> int:
        """Its standard input ends, so it does; its exit status."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            return self._process.wait(FINISH_TIMEOUT_S)
        finally:
            self._process.kill()
            self._process.wait()
            self._listener.join()

    def _text(self) -> str:
        return "".join(self._said)[-4000:]

    def _check(self) -> None:
        self.history = History.read(self._file)
        self.waits = [Wait(*wait) for wait in self.history.header["waits"]]
        assert self.history.header["problems"] == []
        verdict = check_history(self.history, deadline_s=CHECK_DEADLINE_S)
        assert verdict.passed, str(verdict)[:20_000]


def send_driver() -> None:
    """The driver and what it imports, into the home of the container `kv`."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name in SENT:
            archive.add(stack.ROOT / name, name)
    unpack = ["docker", "exec", "-i", "kv", "tar", "-x", "--no-same-owner"]
    subprocess.run(unpack, input=packed.getvalue(), check=True, timeout=60)
