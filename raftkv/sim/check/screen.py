"""The screen: what linear time finds in a register history with unique tokens, by name and with the culprits.

It finds no more than the search does, but within milliseconds, and it says what happened: phantom,
duplicate, fork, future-read, stale-read, lost-write, order-against-real-time, version-conflict,
version-order. It raises no false alarm; that it finds nothing means nothing.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

from raftkv.sim.check.history import History, Kind, Operation, Status
from raftkv.sim.check.model import is_pure, matters
from raftkv.sim.check.tokens import Chain, Contradiction, Tokens, show
from raftkv.sim.check.verdict import Anomaly, Verdict

PER_KEY_MAX = 3
"""So many anomalies of one key are reported."""

NEVER_NS = 1 << 200
"""Later than all times."""


class Moment(NamedTuple):
    """By when something certainly had happened, and the operation that shows it."""

    time_ns: int
    operation: int


NEVER = Moment(NEVER_NS, -1)


def screen(history: History | Iterable[Operation]) -> Verdict:
    """Screen every key: violated, or passed in the sense that nothing was found."""
    operations = history.operations if isinstance(history, History) else list(history)
    keys: dict[bytes, list[Operation]] = {}
    for operation in operations:
        if operation.kind is not Kind.TXN and (matters(operation) or operation.value is not None):
            keys.setdefault(operation.key, []).append(operation)
    anomalies = [anomaly for key in keys for anomaly in screen_key(keys[key])]
    return Verdict.of(sum(map(len, keys.values())), anomalies)


def screen_key(operations: Sequence[Operation]) -> list[Anomaly]:
    """What is wrong with the operations of one key; failed writes among them help to explain."""
    found = _version_anomalies([operation for operation in operations if matters(operation)])
    tokens = Tokens.of(operations)
    if tokens is not None:
        found += _Screen(operations, tokens).anomalies()
    return found[:PER_KEY_MAX]


class _Screen:
    def __init__(self, operations: Sequence[Operation], tokens: Tokens) -> None:
        self.operations = operations
        self.tokens = tokens
        self.seen: list[tuple[int, int, int]] = []  # observer, base writer, position
        self.observers: dict[int, list[tuple[int, int]]] = {}  # base writer -> observer, position

    def anomalies(self) -> list[Anomaly]:
        try:
            self._observe()
        except Contradiction as found:
            return [found.anomaly]
        self.reached = {base: self._reached(chain) for base, chain in self.tokens.chains.items()}
        return [
            *self._future_reads(),
            *self._order_in_chains(),
            *self._stale_in_chains(),
            *self._overwritten(),
            *self._lost_appends(),
            *self._lost_values(),
        ]

    def _observe(self) -> None:
        last: list[tuple[int, int]] = []
        for index, operation in enumerate(self.operations):
            if operation.status is not Status.OK:
                continue
            value = operation.output.value
            if operation.kind is Kind.CAS and not operation.output.mismatch:
                value = operation.expected
            if value is not None:
                last.append((index, self.tokens.observe(value, index)))
        self.seen = [(index, *self.tokens.place[writer]) for index, writer in last]
        for index, base, position in self.seen:
            self.observers.setdefault(base, []).append((index, position))

    def _reached(self, chain: Chain) -> list[Moment]:
        """For each position by when the chain had reached it: acknowledged there or later, or seen."""
        base = chain.writers[0]
        moments = [self._acknowledged(writer) for writer in chain.writers]
        for index, position in self.observers[base]:
            moments[position] = min(moments[position], Moment(self._return(index), index))
        return list(accumulate(reversed(moments), min))[::-1]

    def _return(self, index: int) -> int:
        operation = self.operations[index]
        returned_ns = operation.return_ns
        return NEVER_NS if returned_ns is None or operation.status is not Status.OK else returned_ns

    def _acknowledged(self, writer: int) -> Moment:
        return Moment(self._return(writer), writer)

    def _anomaly(self, name: str, text: str, *indices: int) -> Anomaly:
        involved = [self.operations[index] for index in dict.fromkeys(indices)]
        return Anomaly(name, f"key {show(involved[0].key)}: {text}", tuple(involved))

    # ---- within one chain

    def _future_reads(self) -> Iterator[Anomaly]:
        """A value was seen before the call of a write in it."""
        latest = {
            base: list(accumulate(((self.operations[w].call_ns, w) for w in chain.writers), max))
            for base, chain in self.tokens.chains.items()
        }
        for index, base, position in self.seen:
            call_ns, writer = latest[base][position]
            if self._return(index) < call_ns:
                text = f"{show(self.operations[writer].value)} was seen before it was written"
                yield self._anomaly("future-read", text, writer, index)

    def _order_in_chains(self) -> Iterator[Anomaly]:
        """An append was called after a later one in the value was there already."""
        for base, chain in self.tokens.chains.items():
            for position, writer in enumerate(chain.writers[:-1]):
                later = self.reached[base][position + 1]
                if self.operations[writer].call_ns > later.time_ns:
                    value = show(self.operations[writer].value)
                    text = f"{value} was written after what follows it in the value was already there"
                    yield self._anomaly("order-against-real-time", text, later.operation, writer)

    def _stale_in_chains(self) -> Iterator[Anomaly]:
        """A value was seen after a longer one had been seen or acknowledged."""
        for index, base, position in self.seen:
            reached = self.reached[base]
            if position + 1 < len(reached) and self.operations[index].call_ns > reached[position + 1].time_ns:
                missing = self.operations[self.tokens.chains[base].writers[position + 1]].value
                text = f"a read without {show(missing)}, which was there before the read was called"
                yield self._anomaly("stale-read", text, reached[position + 1].operation, index)

    # ---- between chains

    def _enders(self) -> list[tuple[int, Moment]]:
        """What replaces the whole value: its call, and by when it certainly had happened."""
        enders: list[tuple[int, Moment]] = []
        for index, operation in enumerate(self.operations):
            moment = NEVER
            if operation.status is Status.OK and not is_pure(operation):
                replaces = operation.kind in (Kind.PUT, Kind.CAS)
                if replaces or (operation.kind is Kind.DELETE and operation.output.existed):
                    moment = self._acknowledged(index)
            if index in self.tokens.chains:
                moment = min(moment, self.reached[index][0])
            if moment.time_ns < NEVER_NS:
                enders.append((operation.call_ns, moment))
        return sorted(enders)

    def _overwritten(self) -> Iterator[Anomaly]:
        """A value was seen after another one had certainly replaced it."""
        enders = self._enders()
        calls = [call_ns for call_ns, _ in enders]
        first_done = list(accumulate((moment for _, moment in reversed(enders)), min))[::-1]
        for index, base, _ in self.seen:
            known_ns = self.reached[base][0].time_ns
            place = bisect_right(calls, known_ns)
            if place < len(enders) and first_done[place].time_ns < self.operations[index].call_ns:
                value = show(self.operations[base].value)
                text = f"a read of {value}, which had been replaced before the read was called"
                yield self._anomaly("stale-read", text, base, first_done[place].operation, index)

    def _lost_appends(self) -> Iterator[Anomaly]:
        """An append was acknowledged to a value that was seen later, without it."""
        appends = sorted(
            (operation.call_ns, index)
            for index, operation in enumerate(self.operations)
            if operation.kind is Kind.APPEND and operation.status is Status.OK
        )
        calls = [call_ns for call_ns, _ in appends]
        # From each place on: the first acknowledged append, and the first that is of another chain than that.
        first: tuple[Moment, int] = (NEVER, -1)
        other: tuple[Moment, int] = (NEVER, -1)
        best: list[tuple[tuple[Moment, int], tuple[Moment, int]]] = []
        for _, index in reversed(appends):
            chain = self.tokens.place.get(index, (-1, 0))[0]
            mine = (self._acknowledged(index), chain)
            if mine[0] < first[0]:
                first, other = mine, (other if chain == first[1] else first)
            elif chain != first[1] and mine[0] < other[0]:
                other = mine
            best.append((first, other))
        best.reverse()
        for index, base, _ in self.seen:
            place = bisect_right(calls, self.reached[base][0].time_ns)
            if place == len(appends):
                continue
            moment, chain = best[place][0]
            if chain == base:
                moment, chain = best[place][1]
            if moment.time_ns < self.operations[index].call_ns:
                value = show(self.operations[moment.operation].value)
                text = f"the append of {value} was acknowledged, but a later read of that value is without it"
                yield self._anomaly("lost-write", text, moment.operation, index)

    def _lost_values(self) -> Iterator[Anomaly]:
        """Nothing was found after a write, and nobody deleted anything."""
        if any(operation.kind is Kind.DELETE and operation.status is not Status.FAIL for operation in self.operations):
            return
        moments = [reached[0] for reached in self.reached.values()]
        for index, operation in enumerate(self.operations):
            if operation.value is not None and operation.status is Status.OK and not is_pure(operation):
                moments.append(self._acknowledged(index))
        first = min(moments, default=NEVER)
        for index, operation in enumerate(self.operations):
            output = operation.output
            absent = output.version == 0 or (output.shows_value and output.value is None)
            if absent and operation.call_ns > first.time_ns:
                text = "the key was not found after it had been written, and nobody deleted it"
                yield self._anomaly("lost-write", text, first.operation, index)


def _version_anomalies(operations: Sequence[Operation]) -> list[Anomaly]:
    """Versions rise with time, each is made once, and belongs to one value."""
    timeline = sorted(
        (operation.output.version, is_pure(operation), index)
        for index, operation in enumerate(operations)
        if operation.output.version
    )
    found: list[Anomaly] = []

    def report(name: str, text: str, *involved: int) -> None:
        of_key = [operations[index] for index in involved]
        found.append(Anomaly(name, f"key {show(of_key[0].key)}: {text}", tuple(of_key)))

    made: dict[int, int] = {}
    value_at: dict[int, tuple[bytes, int]] = {}
    latest = (-1, -1)  # call time and operation, of those with a lower version
    same = latest
    for place, (version, pure, index) in enumerate(timeline):
        operation = operations[index]
        if place and timeline[place - 1][:2] != (version, pure):
            latest, same = max(latest, same), (-1, -1)
        returned_ns = operation.return_ns
        if returned_ns is not None and returned_ns < latest[0]:
            text = f"version {version} was shown before the call of an operation that comes before it"
            report("version-order", text, index, latest[1])
        same = max(same, (operation.call_ns, index))
        if not pure and made.setdefault(version, index) != index:
            report("version-conflict", f"version {version} was made twice", made[version], index)
        value = operation.output.value if pure else operation.value
        if value is None or (not pure and operation.kind is Kind.APPEND):
            continue
        other, by = value_at.setdefault(version, (value, index))
        if other != value:
            text = f"version {version} is of two values, {show(other)} and {show(value)}"
            report("version-conflict", text, by, index)
    return found
