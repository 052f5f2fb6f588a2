"""The search for a linearization: Wing and Gong's, with Lowe's cache of (linearized set, state).

Of a problem it knows no more than calls, returns and a step function on states. G. Lowe, "Testing for
linearizability", 2016, and Porcupine have the plain algorithm. Aids that a problem may offer, each sound
only under the conditions that its builder has to see to:

- *greedy*: a step that is pure and leaves the state as it is may always be taken at once, never to be undone;
- *eager*: so may what `eager` names, whatever it does to the state, where it is allowed at all;
- `before`: orders that every linearization has, or that one can be given without loss;
- `stay`: what must be done before a state is left for another one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final, Generic, TypeVar

from raftkv.sim.check.verdict import Deadline

State = TypeVar("State", bound=Hashable)

Mask = tuple[int, int]
"""A set of required operations as (shift, bits): bit i stands for operation shift + i."""

EMPTY: Final[Mask] = (0, 0)
DEADLINE_INTERVAL_STEPS: Final = 2048


def mask_of(bits: int) -> Mask:
    """`bits` without the zeros below its lowest one."""
    shift = (bits & -bits).bit_length() - 1 if bits else 0
    return shift, bits >> shift


@dataclass(slots=True)
class Problem(Generic[State]):
    """Operations 0…n-1 are required, in the order of their calls; n… are optional and never return.

    `step(state, i)` is the state after operation i, None if it is impossible there. `returns_ns` is for the
    required ones. `pure` are those that only observe. Without `before`, `stay`, `eager` there is no such aid.
    """

    initial: State
    step: Callable[[State, int], State | None]
    calls_ns: Sequence[int]
    returns_ns: Sequence[int]
    pure: frozenset[int] = frozenset()
    greedy: bool = True
    eager: Callable[[State, int], bool] | None = None
    before: Sequence[Mask] = ()
    optional_after: dict[int, int] = field(default_factory=dict)  # an optional one -> the one to be used first
    stay: Callable[[State], tuple[Mask, int]] | None = None  # what must be done; the only one that may leave, or -1


@dataclass(slots=True)
class Outcome(Generic[State]):
    """`found` None: the deadline passed. `order`: the linearization, or the longest that was tried."""

    found: bool | None
    order: list[int]
    state: State
    steps: int


class _Node:
    """One step on the stack, with what is needed to undo it."""

    __slots__ = ("entry", "final", "operation", "state")

    def __init__(self, entry: int, operation: int, state: int, final: bool) -> None:
        self.entry = entry  # where the walk stood; -1 for an optional operation
        self.operation = operation
        self.state = state
        self.final = final  # there is no need for another way


def search(problem: Problem[State], deadline: Deadline) -> Outcome[State]:
    """Find a linearization of all required operations, with any optional ones between."""
    return _Search(problem, deadline).run()


class _Search(Generic[State]):
    """The state of one search. Entries 1…2n are calls and returns in the order of time; 0 is the head."""

    def __init__(self, problem: Problem[State], deadline: Deadline) -> None:
        self.problem = problem
        self.deadline = deadline
        self.required = len(problem.returns_ns)
        self._link()
        self.states: list[State] = [problem.initial]  # interned: a state is its place here
        self.ids: dict[State, int] = {problem.initial: 0}
        self.stays: list[tuple[int, int, int]] = [self._stay(problem.initial)]
        self.stepped: dict[int, int] = {}
        self.visited: set[tuple[int, int, int, int]] = set()
        self.done = 0  # bits of required operations
        self.used = 0  # bits of optional ones
        self.state = 0
        self.stack: list[_Node] = []
        self.longest: list[int] = []
        self.longest_state = 0
        self.steps = 0

    def _link(self) -> None:
        """Calls before returns at equal times: intervals are closed, so those operations are concurrent."""
        problem, count = self.problem, self.required
        assert all(call_ns <= next_ns for call_ns, next_ns in pairwise(problem.calls_ns[:count]))
        moments = [(problem.calls_ns[i], 0, i) for i in range(count)]
        moments += [(problem.returns_ns[i], 1, i) for i in range(count)]
        moments.sort()
        self.operation_at: list[int] = [-1, *(operation for _, _, operation in moments), -1]
        self.is_call = [False, *(side == 0 for _, side, _ in moments), False]
        self.time_at: list[int] = [0, *(moment for moment, _, _ in moments), 0]
        self.end = len(moments) + 1
        self.after: list[int] = [*range(1, self.end + 1), 0]
        self.previous: list[int] = [0, *range(self.end)]
        self.return_entry = [0] * count
        for entry in range(1, self.end):
            if not self.is_call[entry]:
                self.return_entry[self.operation_at[entry]] = entry

    def run(self) -> Outcome[State]:
        entry = self.after[0]
        while entry != self.end:
            self.steps += 1
            if self.steps % DEADLINE_INTERVAL_STEPS == 0 and self.deadline.passed:
                return self._outcome(None)
            if self.is_call[entry]:
                taken = self._try(entry, self.operation_at[entry])
                if taken is None:  # greedy, but known as a dead end
                    entry = self._back()
                elif taken:
                    entry = self.after[0]
                else:
                    entry = self.after[entry]
            elif self._try_optional(self.required, self.time_at[entry]):
                entry = self.after[0]
            else:
                entry = self._back()
            if entry < 0:
                return self._outcome(False)
        return self._outcome(True)

    def _try(self, entry: int, operation: int) -> bool | None:
        """Linearize a required operation next, if that is possible and new. None: it is a must, but not new."""
        problem, done = self.problem, self.done
        if problem.before:
            shift, bits = problem.before[operation]
            if (done >> shift) & bits != bits:
                return False
        state = self._step(operation)
        if state < 0:
            return False
        pure = operation in problem.pure
        if not pure and not self._may_leave(operation):
            return False
        if pure:
            final = problem.greedy and state == self.state
        else:
            final = problem.eager is not None and problem.eager(self.states[self.state], operation)
        self.done = done | (1 << operation)
        self._lift(entry)
        if not self._visit(state):
            self._unlift(entry)
            self.done = done
            return None if final else False
        self._push(_Node(entry, operation, self.state, final), state)
        return True

    def _try_optional(self, first: int, until_ns: int) -> bool:
        """Linearize the first optional operation from `first` on that was called by then, is possible and new."""
        problem = self.problem
        for operation in range(first, len(problem.calls_ns)):
            bit = 1 << operation - self.required
            if problem.calls_ns[operation] > until_ns:
                break
            if self.used & bit:
                continue
            earlier = problem.optional_after.get(operation)
            if earlier is not None and not self.used >> earlier - self.required & 1:
                continue
            state = self._step(operation)
            if state < 0 or not self._may_leave(operation):
                continue
            self.used |= bit
            if self._visit(state):
                self._push(_Node(-1, operation, self.state, False), state)
                return True
            self.used ^= bit
        return False

    def _back(self) -> int:
        """Undo steps until there is another way: the entry to go on with; -1 if there is none."""
        if len(self.stack) > len(self.longest):
            self.longest = [node.operation for node in self.stack]
            self.longest_state = self.state
        while self.stack:
            node = self.stack.pop()
            self.state = node.state
            if node.entry >= 0:
                self.done ^= 1 << node.operation
                self._unlift(node.entry)
                if not node.final:
                    return self.after[node.entry]
                continue
            self.used ^= 1 << node.operation - self.required
            if self._try_optional(node.operation + 1, self._until_ns()):
                return self.after[0]
        return -1

    def _until_ns(self) -> int:
        """The first return among what remains."""
        entry = self.after[0]
        while self.is_call[entry]:
            entry = self.after[entry]
        return self.time_at[entry]

    def _step(self, operation: int) -> int:
        key = self.state * len(self.problem.calls_ns) + operation
        known = self.stepped.get(key)
        if known is not None:
            return known
        state = self.problem.step(self.states[self.state], operation)
        if state is None:
            number = -1
        else:
            number = self.ids.setdefault(state, len(self.states))
            if number == len(self.states):
                self.states.append(state)
                self.stays.append(self._stay(state))
        self.stepped[key] = number
        return number

    def _stay(self, state: State) -> tuple[int, int, int]:
        if self.problem.stay is None:
            return (0, 0, -1)
        (shift, bits), only = self.problem.stay(state)
        return (shift, bits, only)

    def _may_leave(self, operation: int) -> bool:
        """Whether `operation` may change the value now: all is done that needs it, and nothing else must follow."""
        shift, bits, only = self.stays[self.state]
        if only >= 0 and only != operation:
            return False
        missing = bits & ~(self.done >> shift)
        return missing == 0 or (shift <= operation < self.required and missing == 1 << operation - shift)

    def _visit(self, state: int) -> bool:
        """Note where the search is after a step to `state`; False if it was there before."""
        first = self.after[0]
        base = self.operation_at[first] if first != self.end else self.required
        key = (base, self.done >> base, self.used, state)
        if key in self.visited:
            return False
        self.visited.add(key)
        return True

    def _push(self, node: _Node, state: int) -> None:
        self.stack.append(node)
        self.state = state

    def _lift(self, entry: int) -> None:
        for gone in (entry, self.return_entry[self.operation_at[entry]]):
            self.after[self.previous[gone]] = self.after[gone]
            self.previous[self.after[gone]] = self.previous[gone]

    def _unlift(self, entry: int) -> None:
        for back in (self.return_entry[self.operation_at[entry]], entry):
            self.after[self.previous[back]] = back
            self.previous[self.after[back]] = back

    def _outcome(self, found: bool | None) -> Outcome[State]:
        if found:
            order, state = [node.operation for node in self.stack], self.state
        else:
            order, state = self.longest, self.longest_state
        return Outcome(found, order, self.states[state], self.steps)
