"""Whether the operations of one key are linearizable: the search, with as many aids as are sound there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from raftkv.sim.check.guide import Guide, Unfit, concurrent_parts, earlier_versions
from raftkv.sim.check.history import Kind, Operation
from raftkv.sim.check.model import INITIAL, Register, RegisterModel, is_pure, matters, shows_versions
from raftkv.sim.check.search import Problem, search
from raftkv.sim.check.tokens import Contradiction, Tokens, show
from raftkv.sim.check.verdict import Anomaly, Deadline


class Mode(StrEnum):
    """The aids of a search: each has those of the modes before it."""

    PLAIN = "plain"
    GREEDY = "greedy"
    GUIDED = "guided"  # by tokens and versions if the key's values are fit for it, else by versions alone


@dataclass(frozen=True, slots=True)
class KeyOutcome:
    """What came of one key. `linearizable` None: undecided.

    `order`: a linearization, or the longest one that was tried before the search got stuck; `state`: what
    is there after it. `contradiction`: what was found without any search.
    """

    linearizable: bool | None
    order: tuple[Operation, ...] = ()
    state: Register = INITIAL
    contradiction: Anomaly | None = None
    steps: int = 0


def by_key(operations: Iterable[Operation]) -> dict[bytes, list[Operation]]:
    """The operations of each key that say anything, in the order of their calls; transactions have no key."""
    keys: dict[bytes, list[Operation]] = {}
    for operation in operations:
        if operation.kind is not Kind.TXN and matters(operation):
            keys.setdefault(operation.key, []).append(operation)
    for of_key in keys.values():
        of_key.sort(key=lambda operation: operation.call_ns)
    return keys


def check_key(operations: Sequence[Operation], deadline: Deadline, mode: Mode = Mode.GUIDED) -> KeyOutcome:
    """Whether the operations of one key are linearizable; all of them must matter (see by_key)."""
    operations = sorted(operations, key=lambda operation: operation.call_ns)
    if mode is Mode.GUIDED:
        guided = _guided(operations, deadline)
        if guided is not None:
            return guided
    required = [operation for operation in operations if not operation.is_unknown]
    ordered = required + [operation for operation in operations if operation.is_unknown]
    model = RegisterModel(versions=shows_versions(operations))
    returns_ns = [operation.return_ns for operation in required if operation.return_ns is not None]
    problem = Problem(
        initial=INITIAL,
        step=lambda state, number: model.step(state, ordered[number]),
        calls_ns=[operation.call_ns for operation in ordered],
        returns_ns=returns_ns,
        pure=frozenset(number for number, operation in enumerate(ordered) if is_pure(operation)),
        greedy=mode is not Mode.PLAIN,
    )
    if mode is Mode.GUIDED:
        shown = [
            (operation.output.version, is_pure(operation), number)
            for number, operation in enumerate(required)
            if operation.output.version
        ]
        problem.before = concurrent_parts(earlier_versions(shown, len(required)), problem.calls_ns, returns_ns)
    outcome = search(problem, deadline)
    order = tuple(ordered[number] for number in outcome.order)
    return KeyOutcome(outcome.found, order, outcome.state, steps=outcome.steps)


def _guided(operations: Sequence[Operation], deadline: Deadline) -> KeyOutcome | None:
    """The same by a guided search; None if this key is not fit for one."""
    tokens = Tokens.of(operations)
    if tokens is None:
        return None
    try:
        try:
            guide = Guide(operations, tokens)
        except Unfit:
            guide = Guide(operations, tokens, whole=True)
    except Contradiction as found:
        return KeyOutcome(False, contradiction=found.anomaly)
    outcome = search(guide.problem(), deadline)
    order = tuple(operations[guide.numbers[number]] for number in outcome.order)
    return KeyOutcome(outcome.found, order, outcome.state, steps=outcome.steps)


def not_linearizable(key: bytes, operations: Sequence[Operation], detail: str = "") -> Anomaly:
    """The anomaly of a key for which there is no order."""
    text = f"key {show(key)}: no order of its {len(operations)} operations explains their answers"
    return Anomaly("not-linearizable", text, tuple(operations), detail)
