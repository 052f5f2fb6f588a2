"""Strict serializability of list-append transactions, by dependency cycles (after Adya, and Kingsbury's Elle).

Appended elements are unique per key, so that one read shows the order of all appends before it. From the
longest reads follow the dependencies: ww (next append), wr (read from), rw (read a state that was then
changed), and real time. The committed transactions are strictly serializable if and only if what was read
is consistent by itself and there is no cycle. An unknown outcome is a commit if any of its appends was seen,
else nothing depends on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Final, NamedTuple

from raftkv.sim.check.graph import Edge, Graph, Label
from raftkv.sim.check.history import Element, History, Kind, Operation, Status
from raftkv.sim.check.tokens import plain, show
from raftkv.sim.check.verdict import Anomaly, Verdict

List = tuple[Element, ...]

PER_NAME_MAX: Final = 5
"""So many anomalies of one name are reported; after one cause there can be thousands."""

WRITES: Final = Label.WW
READS: Final = Label.WW | Label.WR

CYCLES: Final = (
    ("G0", Label.WW, WRITES, "writes of transactions are interleaved"),
    ("G1c", Label.WR, READS, "information flows in a circle"),
    ("G-single", Label.RW, READS, "one saw a state both before and after another (read skew, lost update)"),
    ("G2", Label.RW, READS | Label.RW, "transactions each missed what the other wrote (write skew)"),
)
"""From the worst down: name, the edge that it needs once, the edges of the rest, what it means."""


class Writer(NamedTuple):
    """Who appended an element: a transaction, and the how manieth of its appends to that key it was."""

    txn: int
    place: int


def check_transactions(history: History | Iterable[Operation]) -> Verdict:
    """Check the transactions of a history; other operations are ignored."""
    operations = history.operations if isinstance(history, History) else list(history)
    transactions = [operation for operation in operations if operation.kind is Kind.TXN]
    return _Check(transactions).verdict()


class _Check:
    def __init__(self, transactions: Sequence[Operation]) -> None:
        self.transactions = transactions
        self.anomalies: list[Anomaly] = []
        self.writers: dict[tuple[bytes, Element], Writer] = {}
        self.appends: list[dict[bytes, List]] = []  # of each transaction, by key
        self.found: list[dict[bytes, List]] = []  # what it read of others, by key
        self.longest: dict[bytes, List] = {}
        self.longest_by: dict[bytes, int] = {}
        self.readers: dict[bytes, list[int]] = {}
        self.reasons: dict[Edge, tuple[bytes, List, Element | None]] = {}

    def verdict(self) -> Verdict:
        count = len(self.transactions)
        repeated = self._note_appends()
        if repeated is not None:
            return Verdict.of(count, [], f"the element {repeated} was appended twice: orders can't be told")
        self._note_reads()
        for key in self.longest:
            self._check_order(key)
        if not self.anomalies:
            self._check_intermediate()
        if not self.anomalies:
            self._check_cycles()
        return Verdict.of(count, self.anomalies)

    def _add(self, name: str, text: str, involved: Sequence[int], detail: str = "") -> None:
        if sum(anomaly.name == name for anomaly in self.anomalies) < PER_NAME_MAX:
            operations = tuple(self.transactions[index] for index in dict.fromkeys(involved))
            lines = detail or "\n".join(f"  {_describe(operation)}" for operation in operations)
            self.anomalies.append(Anomaly(name, text, operations, lines))

    # ---- what was appended and read

    def _note_appends(self) -> str | None:
        """Fill writers and appends; an element that has two writers, if there is one."""
        repeated: str | None = None
        for index, txn in enumerate(self.transactions):
            mine: dict[bytes, List] = {}
            for step in txn.steps:
                if step.element is None:
                    continue
                known = mine.get(step.key, ())
                other = self.writers.get((step.key, step.element))
                failed = txn.status is Status.FAIL
                if other is None or (other.txn != index and self.transactions[other.txn].status is Status.FAIL):
                    self.writers[step.key, step.element] = Writer(index, len(known))
                elif not failed or other.txn == index:
                    repeated = f"{_show(step.element)} of key {show(step.key)}"
                mine[step.key] = (*known, step.element)
            self.appends.append(mine)
        return repeated

    def _note_reads(self) -> None:
        """Fill found and longest from the committed transactions; each must agree with itself."""
        for index, txn in enumerate(self.transactions):
            found: dict[bytes, List] = {}
            mine: dict[bytes, List] = {}
            self.found.append(found)
            if txn.status is not Status.OK:
                continue
            for step in txn.steps:
                key, own = step.key, mine.get(step.key, ())
                if step.element is not None:
                    mine[key] = (*own, step.element)
                elif step.elements is not None:
                    external = step.elements[: len(step.elements) - len(own)]
                    if external + own != step.elements or found.get(key, external) != external:
                        text = f"a transaction disagrees with itself about key {show(key)}: read {_show(step.elements)}"
                        self._add("internal", text, [index])
                        continue
                    if key not in found:
                        self.readers.setdefault(key, []).append(index)
                    found[key] = external
                    if key not in self.longest or len(step.elements) > len(self.longest[key]):
                        self.longest[key] = step.elements
                        self.longest_by[key] = index

    def _check_order(self, key: bytes) -> None:
        """What was read of `key` must be one growing list of what was appended."""
        order, reader = self.longest[key], self.longest_by[key]
        seen: set[Element] = set()
        places: dict[int, int] = {}
        for element in order:
            writer = self.writers.get((key, element))
            if element in seen:
                text = f"{_show(element)} is twice in key {show(key)}: {_show(order)}"
                self._add("duplicate-elements", text, [reader])
            elif writer is None:
                self._add("phantom", f"nobody appended {_show(element)} to key {show(key)}", [reader])
            elif self.transactions[writer.txn].status is Status.FAIL:
                text = f"aborted read: {_show(element)} in key {show(key)} is of a transaction that was aborted"
                self._add("G1a", text, [writer.txn, reader])
            else:
                if writer.place != places.get(writer.txn, 0):
                    text = f"a transaction's own appends to key {show(key)} are in another order: {_show(order)}"
                    self._add("internal", text, [writer.txn, reader])
                places[writer.txn] = writer.place + 1
            seen.add(element)
        for index in self.readers[key]:
            mine = self.found[index][key]
            if mine != order[: len(mine)]:
                text = f"two readers saw different orders of key {show(key)}: {_show(mine)} and {_show(order)}"
                self._add("incompatible-order", text, [index, reader])

    def _check_intermediate(self) -> None:
        """Nobody may see the middle of another transaction's appends to a key."""
        for index, found in enumerate(self.found):
            for key, elements in found.items():
                if not elements:
                    continue
                writer = self.writers[key, elements[-1]]
                theirs = self.appends[writer.txn][key]
                if writer.place + 1 < len(theirs):
                    text = (
                        f"intermediate read: key {show(key)} ends with {_show(elements[-1])}, "
                        f"but the same transaction then appended {_show(theirs[writer.place + 1])}"
                    )
                    self._add("G1b", text, [writer.txn, index])

    # ---- dependencies

    def _check_cycles(self) -> None:
        graph = self._dependencies()
        for extra, suffix in ((0, ""), (Label.RT, "-realtime")):
            if extra:
                self._add_real_time(graph)
            for name, first, rest, meaning in CYCLES:
                cycle = graph.cycle_through(graph.edges(first), first, rest | extra)
                if cycle is not None:
                    rotated = _from_first(cycle)
                    text = f"{meaning}: a cycle of {len(cycle)} transactions"
                    self._add(name + suffix, text, [edge.source for edge in rotated], self._explain(rotated))
                    return

    def _took_place(self) -> list[bool]:
        """Which transactions committed for sure."""
        committed = [txn.status is Status.OK for txn in self.transactions]
        for key, order in self.longest.items():
            for element in order:
                committed[self.writers[key, element].txn] = True
        return committed

    def _dependencies(self) -> Graph:
        """The graph of ww, wr and rw."""
        graph = Graph(len(self.transactions))
        self.committed = self._took_place()
        unseen: dict[bytes, list[tuple[int, Element]]] = {}
        for index, mine in enumerate(self.appends):
            if not self.committed[index]:
                continue
            for key, elements in mine.items():
                shown = set(self.longest.get(key, ()))
                first = next((element for element in elements if element not in shown), None)
                if first is not None:
                    unseen.setdefault(key, []).append((index, first))
        for key, order in self.longest.items():
            for first, second in pairwise(order):
                writers = self._writer(key, first), self._writer(key, second)
                self._depend(graph, *writers, Label.WW, key, (first,), second)
            for later, element in unseen.get(key, ()):
                if order:
                    self._depend(graph, self._writer(key, order[-1]), later, Label.WW, key, order[-1:], element)
        for index, found in enumerate(self.found):
            for key, elements in found.items():
                self._depend_of_read(graph, index, key, elements, unseen.get(key, ()))
        return graph

    def _depend_of_read(
        self, graph: Graph, reader: int, key: bytes, elements: List, unseen: Sequence[tuple[int, Element]]
    ) -> None:
        order = self.longest[key]
        if elements:
            self._depend(graph, self._writer(key, elements[-1]), reader, Label.WR, key, elements[-1:], None)
        if len(elements) < len(order):
            following = order[len(elements)]
            self._depend(graph, reader, self._writer(key, following), Label.RW, key, elements[-1:], following)
        else:  # what nobody saw was appended after all that anybody saw
            for later, element in unseen:
                self._depend(graph, reader, later, Label.RW, key, elements[-1:], element)

    def _writer(self, key: bytes, element: Element) -> int:
        return self.writers[key, element].txn

    def _depend(
        self, graph: Graph, source: int, target: int, label: Label, key: bytes, before: List, after: Element | None
    ) -> None:
        graph.add(source, target, label)
        self.reasons.setdefault(Edge(source, target, label), (key, before, after))

    def _add_real_time(self, graph: Graph) -> None:
        """Returned before the other was called, as far as that doesn't follow from other such edges."""
        moments: list[tuple[int, int, int]] = []
        for index, txn in enumerate(self.transactions):
            if self.committed[index]:
                moments.append((txn.call_ns, 0, index))
                if txn.status is Status.OK and txn.return_ns is not None:
                    moments.append((txn.return_ns, 1, index))
        frontier: list[int] = []  # returned, and before no other one that has returned
        for _, side, index in sorted(moments):
            if side == 0:
                for earlier in frontier:
                    graph.add(earlier, index, Label.RT)
            else:
                call_ns = self.transactions[index].call_ns
                frontier = [other for other in frontier if (self.transactions[other].return_ns or 0) >= call_ns]
                frontier.append(index)

    # ---- for people

    def _explain(self, cycle: Sequence[Edge]) -> str:
        names = {edge.source: f"T{number}" for number, edge in enumerate(cycle, 1)}
        lines = [f"  {names[edge.source]} = {_describe(self.transactions[edge.source])}" for edge in cycle]
        lines += [f"  {names[edge.source]} < {names[edge.target]}: {self._because(edge)}" for edge in cycle]
        lines[-1] += ": a contradiction"
        return "\n".join(lines)

    def _because(self, edge: Edge) -> str:
        if edge.label is Label.RT:
            returned_ns = self.transactions[edge.source].return_ns or 0
            late_ns = self.transactions[edge.target].call_ns - returned_ns
            return f"it had returned {late_ns / 1e6:.3f} ms before the other was called (rt)"
        key, before, after = self.reasons[edge]
        if edge.label is Label.WR:
            return f"its append of {_show(before[-1])} to {show(key)} was read by the other (wr)"
        shown = _show(before[-1]) if before else "nothing"
        if edge.label is Label.WW:
            return f"in {show(key)}, its {shown} comes before the other's {_show(after)} (ww)"
        return f"it read {show(key)} up to {shown}, without the other's {_show(after)} (rw)"


def _from_first(cycle: list[Edge]) -> list[Edge]:
    """The cycle, beginning at the transaction with the lowest number."""
    start = min(range(len(cycle)), key=lambda place: cycle[place].source)
    return cycle[start:] + cycle[:start]


def _show(item: Element | List | None, limit: int = 8) -> str:
    if isinstance(item, tuple):
        shown = [_show(element) for element in item]
        if len(shown) > limit:
            shown = [*shown[: limit // 2], f"… {len(shown) - limit} more …", *shown[-limit // 2 :]]
        return "[" + " ".join(shown) + "]"
    return show(item) if isinstance(item, bytes) else str(item)


def _describe(txn: Operation) -> str:
    """One transaction in a line."""
    steps = [
        f"append {show(step.key)} {_show(step.element)}"
        if step.element is not None
        else f"read {show(step.key)} {'?' if step.elements is None else _show(step.elements)}"
        for step in txn.steps
    ]
    until = "…" if txn.return_ns is None else f"{txn.return_ns / 1e6:.3f}"
    return f"{{{', '.join(steps)}}} by {plain(txn.client)} at {txn.call_ns / 1e6:.3f}–{until} ms, {txn.status}"
