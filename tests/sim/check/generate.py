"""Random histories from a simulated store, with an injected lie in many of them."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from raftkv.sim.check.history import Element, Kind, Operation, Output, Status, Step

KEY = b"k"


@dataclass
class Store:
    """One key, as a correct store has it."""

    value: bytes | None = None
    version: int = 0
    revision: int = 0

    def change(self, value: bytes | None, rng: random.Random) -> int:
        self.revision += rng.choice([1, 1, 1, 2, 5])  # other keys of the shard take revisions too
        self.value, self.version = value, self.revision
        return self.revision


@dataclass(frozen=True)
class Shape:
    """What kind of history to make."""

    operations: int = 6
    clients: int = 3
    kinds: tuple[Kind, ...] = (Kind.GET, Kind.PUT, Kind.APPEND, Kind.DELETE, Kind.CAS)
    versions: float = 0.5  # how likely an answer shows its version
    unique: bool = True
    unknown: float = 0.15
    conditional: float = 0.3
    lies: float = 0.5  # how likely the history has one
    spread: int = 6  # how long operations take, against the time between them


def random_history(rng: random.Random, shape: Shape) -> list[Operation]:
    """A history of one key; it is linearizable if nothing was made up."""
    plans: list[tuple[int, int, int, str]] = []  # when it takes effect, call, return, client
    free = [0] * shape.clients
    for _ in range(shape.operations):
        client = min(range(shape.clients), key=lambda index: (free[index], index))
        call = free[client] + rng.randrange(1, 4)
        end = call + rng.randrange(0, shape.spread)
        free[client] = end + 1
        plans.append((rng.randint(call, end), call, end, f"c{client}"))
    store = Store()
    done: list[Operation] = []
    late: list[tuple[int, Operation]] = []
    for number, (effect, call, end, name) in enumerate(sorted(plans)):
        for moment, operation in [item for item in late if item[0] <= effect]:
            _execute(operation, store, rng)
            late.remove((moment, operation))
        asked = _random_request(rng, shape, number, store, name, call, end)
        if asked.kind is not Kind.GET and rng.random() < shape.unknown:
            lost = replace(asked, status=Status.UNKNOWN, return_ns=rng.choice([None, end]), output=Output())
            done.append(lost)
            late.append((effect + rng.choice([0, 0, 3, 10, 1000]), lost))
            continue
        output = _execute(asked, store, rng)
        if rng.random() >= shape.versions:
            output = replace(output, version=0 if output.mismatch and output.version == 0 else None)
            if output.mismatch and asked.if_version:
                output = replace(output, version=store.version if store.value is not None else 0)
        done.append(replace(asked, output=output))
    if rng.random() < shape.lies:
        _lie(done, rng)
    return done


def _token(rng: random.Random, shape: Shape, number: int) -> bytes:
    return b"%d;" % number if shape.unique else rng.choice([b"x", b"y", b"xy"])


def _random_request(
    rng: random.Random, shape: Shape, number: int, store: Store, client: str, call: int, end: int
) -> Operation:
    kind = rng.choice(shape.kinds)
    if kind is Kind.GET:
        return Operation.get(client, KEY, Output.read(None), call, end)
    value = None if kind is Kind.DELETE else _token(rng, shape, number)
    expected = if_version = None
    if kind is Kind.CAS:
        guess = rng.choice([store.value, store.value, _token(rng, shape, rng.randrange(shape.operations))])
        expected = guess if guess is not None else b"0;"
    if kind is Kind.PUT and rng.random() < shape.conditional:
        present = store.version if store.value is not None else 0
        if_version = rng.choice([present, present, 0, rng.randrange(1, 8)])
    return Operation.write(
        client, kind, KEY, value, Output.written(), call, end, expected=expected, if_version=if_version
    )


def _execute(operation: Operation, store: Store, rng: random.Random) -> Output:
    """What the store answers."""
    kind, value = operation.kind, operation.value
    present = store.version if store.value is not None else 0
    if kind is Kind.GET:
        return Output.read(store.value, present or None)
    if kind is Kind.DELETE:
        if store.value is None:
            return Output.deleted(False)
        version = store.change(None, rng)
        return Output.deleted(rng.choice([True, True, None]), version)
    if kind is Kind.CAS and store.value != operation.expected:
        return Output.mismatched(present, rng.choice([store.value, None]))
    if operation.if_version is not None and operation.if_version != present:
        return Output.mismatched(present)
    assert value is not None
    return Output.written(store.change((store.value or b"") + value if kind is Kind.APPEND else value, rng))


def _lie(operations: list[Operation], rng: random.Random) -> None:
    """Change one answer, or when it was given."""
    answered = [index for index, operation in enumerate(operations) if not operation.is_unknown]
    if not answered:
        return
    index = rng.choice(answered)
    operation = operations[index]
    output = operation.output
    if rng.random() < 0.3:
        other = rng.choice(answered)
        operations[index] = replace(operation, call_ns=operations[other].call_ns, return_ns=operations[other].return_ns)
    elif operation.kind is Kind.GET:
        seen = [other.output for other in operations if other.kind is Kind.GET]
        seen += [Output.read(other.value) for other in operations if other.value is not None]
        operations[index] = replace(operation, output=rng.choice([*seen, Output.read(None)]))
    elif operation.kind is Kind.DELETE:
        operations[index] = replace(operation, output=Output.deleted(not output.existed))
    elif output.version and not output.mismatch:
        operations[index] = replace(operation, output=Output.written(max(1, output.version + rng.choice([-2, -1, 1]))))
    elif operation.kind is Kind.CAS:
        lied = Output.written() if output.mismatch else Output.mismatched()
        operations[index] = replace(operation, output=lied)
    else:
        later_ns = operation.call_ns + 20
        operations[index] = replace(operation, call_ns=later_ns, return_ns=later_ns + 3)


def random_transactions(
    rng: random.Random, *, count: int = 6, keys: int = 2, clients: int = 3, lies: float = 0.5
) -> list[Operation]:
    """List-append transactions of a store that is serializable, or in many histories only pretends to be."""
    return _Transactions(rng, count, keys, clients, rng.random() < lies).history()


class _Transactions:
    """A store with an isolation level: serial (at one instant), snapshot (lost updates, write skew), none."""

    def __init__(self, rng: random.Random, count: int, keys: int, clients: int, lying: bool) -> None:
        self.rng = rng
        self.lists: dict[bytes, tuple[Element, ...]] = {}
        self.views: dict[int, dict[bytes, tuple[Element, ...]]] = {}
        self.done: dict[int, list[Step]] = {}
        self.level = rng.choice(["snapshot", "none", "stale"]) if lying else "serial"
        self.leaks = lying and rng.random() < 0.3  # what was aborted may stay
        self.plans: list[tuple[int, int, Status, list[tuple[bool, bytes]]]] = []
        free = [0] * clients
        for _ in range(count):
            client = free.index(min(free))
            call = free[client] + rng.randrange(1, 4)
            end = call + rng.randrange(0, 7)
            free[client] = end + 1
            fate = rng.choice([Status.OK] * 8 + [Status.UNKNOWN, Status.FAIL])
            steps = [(rng.random() < 0.5, b"%c" % rng.randrange(120, 120 + keys)) for _ in range(rng.randrange(1, 4))]
            self.plans.append((call, end, fate, steps))

    def history(self) -> list[Operation]:
        rng = self.rng
        events: list[tuple[int, int, int]] = []  # when, transaction, how many of its steps to do
        for number, (call, end, fate, steps) in enumerate(self.plans):
            self.done[number] = []
            if self.level == "none":
                events += sorted((rng.randint(call, end), number, 1) for _ in steps)
            else:
                late = rng.choice([0, 0, 5, 50]) if fate is Status.UNKNOWN else 0
                events.append((rng.randint(call, end) + late, number, len(steps)))
                if self.level == "snapshot":
                    events.append((call, number, 0))
        rng.shuffle(events)
        events.sort(key=lambda event: event[0])
        for _, number, steps_now in events:
            self._execute(number, steps_now)
        return [self._operation(number) for number in range(len(self.plans))]

    def _execute(self, number: int, steps_now: int) -> None:
        rng = self.rng
        _, _, fate, steps = self.plans[number]
        if self.level == "snapshot" and steps_now == 0:
            self.views[number] = dict(self.lists)
            return
        if self.level == "stale" and rng.random() < 0.3 and self.views:
            view = dict(self.views[rng.choice(sorted(self.views))])
        elif self.level == "none":
            view = dict(self.lists)
        else:
            view = self.views.get(number, dict(self.lists))
        self.views[number] = dict(view)
        applies = fate is Status.OK or (rng.random() < 0.6 and (fate is Status.UNKNOWN or self.leaks))
        for is_append, key in steps[len(self.done[number]) :][:steps_now]:
            if is_append:
                element = number * 10 + len(self.done[number])
                self.done[number].append(Step.append(key, element))
                view[key] = (*view.get(key, ()), element)
                if applies:
                    self.lists[key] = (*self.lists.get(key, ()), element)
            else:
                self.done[number].append(Step.read(key, view.get(key, ()) if fate is Status.OK else None))

    def _operation(self, number: int) -> Operation:
        call, end, fate, _ = self.plans[number]
        return Operation.txn(f"t{number}", self.done[number], call, None if fate is Status.UNKNOWN else end, fate)
