"""What Redis clients see while leaders are killed: a linearizable history, and counters that lost nothing."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path
from typing import Any

import hiredis
import pytest

from raftkv.sim.check.file import check_history
from raftkv.sim.check.history import History, Kind, Operation, Output, Status
from raftkv.sim.check.verdict import Result
from tests.system.cluster import Cluster, Process, running
from tests.system.resp import Resp, packed

KEYS = [b"key-%d" % number for number in range(12)]
UNKNOWN = "outcome unknown"


class User(threading.Thread):
    """Works at the nodes in turn, with pipelines of some commands on different keys; notes what it saw."""

    def __init__(self, number: int, nodes: list[Process], history: History) -> None:
        super().__init__(name=f"user-{number}")
        self._number = number
        self._nodes = nodes
        self._history = history
        self._rng = random.Random(number)
        self._tokens = 0
        self._generation = 0
        self.counter = b"counter-%d" % (number % 3)
        self.incremented = 0
        self.maybe_incremented = 0
        self.answered = 0
        self.unknown = 0
        self.refused = 0
        self.failure: BaseException | None = None
        self.stopping = threading.Event()

    def run(self) -> None:
        try:
            while not self.stopping.is_set():
                node = self._rng.choice(self._nodes)
                try:
                    with Resp(node.redis_port, timeout_s=20) as resp:
                        for _ in range(self._rng.randrange(5, 40)):
                            if self.stopping.is_set():
                                break
                            self._step(resp)
                except OSError:
                    time.sleep(0.05)  # that node is down
        except BaseException as error:
            self.failure = error

    def _step(self, resp: Resp) -> None:
        """Some commands at once, each on a key of its own; and one increment."""
        keys = self._rng.sample(KEYS, self._rng.choice((1, 1, 2, 4)))
        todo: list[tuple[Kind, bytes, bytes | None]] = []
        for key in keys:
            kind = self._rng.choice((Kind.GET, Kind.GET, Kind.PUT, Kind.APPEND, Kind.DELETE))
            self._tokens += 1
            value = b"%d-%d;" % (self._number, self._tokens) if kind in (Kind.PUT, Kind.APPEND) else None
            todo.append((kind, key, value))
        commands = {Kind.GET: "GET", Kind.PUT: "SET", Kind.APPEND: "APPEND", Kind.DELETE: "DEL"}
        sent = b"".join(packed(commands[kind], key, *([] if value is None else [value])) for kind, key, value in todo)
        self._generation += 1
        called_ns = time.monotonic_ns()
        answers: list[tuple[Any, int]] = []
        try:
            resp.send(sent + packed("INCR", self.counter))
            for _ in range(len(todo) + 1):
                answers.append((resp.reply(), time.monotonic_ns()))
        except (OSError, EOFError) as error:
            answers += [(error, 0)] * (len(todo) + 1 - len(answers))
        for number, ((kind, key, value), (answer, returned_ns)) in enumerate(zip(todo, answers, strict=False)):
            self._note(f"{self.name}-{self._generation}-{number}", kind, key, value, answer, called_ns, returned_ns)
        self._note_increment(answers[-1][0])
        if isinstance(answers[-1][0], (OSError, EOFError)):
            raise OSError("the connection is lost")

    def _note(
        self, client: str, kind: Kind, key: bytes, value: bytes | None, answer: Any, called_ns: int, returned_ns: int
    ) -> None:
        lost = isinstance(answer, (OSError, EOFError))
        if isinstance(answer, hiredis.ReplyError) or lost:
            unknown = lost or UNKNOWN in str(answer)
            self.unknown += unknown
            self.refused += not unknown
            if kind is not Kind.GET:
                status = Status.UNKNOWN if unknown else Status.FAIL
                ended_ns = None if unknown else returned_ns
                self._history.add(Operation(client, kind, key, called_ns, ended_ns, status, value))
            return
        self.answered += 1
        if kind is Kind.GET:
            self._history.add(Operation.get(client, key, Output.read(answer), called_ns, returned_ns))
        else:
            output = Output.deleted(bool(answer)) if kind is Kind.DELETE else Output.written()
            self._history.add(Operation.write(client, kind, key, value, output, called_ns, returned_ns))

    def _note_increment(self, answer: Any) -> None:
        if isinstance(answer, int):
            self.incremented += 1
        elif not isinstance(answer, hiredis.ReplyError) or UNKNOWN in str(answer):
            self.maybe_incremented += 1

    def finish(self) -> None:
        self.stopping.set()
        self.join(60)
        assert not self.is_alive(), f"{self.name} hangs"
        if self.failure is not None:
            raise self.failure


@pytest.mark.long
def test_a_linearizable_history_while_leaders_die_and_shards_move(tmp_path: Path) -> None:
    with running(Cluster(tmp_path, groups=2, controllers=1, coordinators=1, redis="plain")) as cluster:
        nodes = [process for group in cluster.groups.values() for process in group]
        history = History({"test": "redis"})
        users = [User(number, nodes, history) for number in range(6)]
        for user in users:
            user.start()
        try:
            for gid in (1, 2, 1):
                wait_for_answers(users)
                with cluster.admin() as admin:
                    for shard in (0, 7):
                        admin.move(shard, gid)
                wait_for_answers(users)
                leader = cluster.leader(gid)
                leader.kill()
                wait_for_answers(users)
                leader.start()
                leader.wait_ready(60)
        finally:
            for user in users:
                user.finish()
        assert sum(user.unknown for user in users) < sum(user.answered for user in users) / 5
        with Resp(nodes[0].redis_port) as resp:
            for number, key in enumerate(KEYS):
                called_ns = time.monotonic_ns()
                value = resp.ask("GET", key)
                output = Output.read(value)
                history.add(Operation.get(f"final-{number}", key, output, called_ns, time.monotonic_ns()))
            for counter in {user.counter for user in users}:
                mine = [user for user in users if user.counter == counter]
                done = sum(user.incremented for user in mine)
                total = int(resp.ask("GET", counter))
                assert done <= total <= done + sum(user.maybe_incremented for user in mine)
        verdict = check_history(history)
        assert verdict.result is Result.PASSED, verdict


def test_a_node_that_is_told_to_stop_answers_what_it_was_asked(tmp_path: Path) -> None:
    """SIGTERM under load: exit 0, and what was answered is there."""
    with running(Cluster(tmp_path, groups=1, controllers=1, redis="plain")) as cluster:
        leader = cluster.leader(1)
        history = History({"test": "redis"})
        users = [User(number, [leader], history) for number in range(4)]
        for user in users:
            user.start()
        try:
            wait_for_answers(users)
            assert leader.terminate() == 0
        finally:
            for user in users:
                user.finish()
        assert sum(user.unknown for user in users) <= 10 * len(users)  # under way at the handover, and at the end
        with Resp(cluster.leader(1).redis_port) as resp:
            for number, key in enumerate(KEYS):
                called_ns = time.monotonic_ns()
                output = Output.read(resp.ask("GET", key))
                history.add(Operation.get(f"final-{number}", key, output, called_ns, time.monotonic_ns()))
        verdict = check_history(history)
        assert verdict.result is Result.PASSED, verdict


def wait_for_answers(users: list[User], count: int = 300, timeout_s: float = 60.0) -> None:
    """Until there are so many more."""
    wanted = sum(user.answered for user in users) + count
    deadline_s = time.monotonic() + timeout_s
    while sum(user.answered for user in users) < wanted:
        assert time.monotonic() < deadline_s, "there are no answers"
        time.sleep(0.05)
