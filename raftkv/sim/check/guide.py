"""A search for one key that unique tokens and versions guide: what was seen leaves few orders to try.

Only for keys whose tokens are fit (see tokens): a state is then the last token of the value, or NAMELESS if
nobody ever saw the value, so that all writes that nobody saw look alike. What holds besides:

- after a token that was seen with a successor, only that successor can change the value, and a value that
  was seen can't come back: who saw it comes before the next change;
- versions rise, so operations that show them are in their order;
- of two operations that do the same, the one that was called and returned first may come first;
- where nothing can tell whether a write that nobody saw was done, it is done at once (or, if its outcome
  is unknown, never): see `_is_insensitive`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from enum import IntEnum
from itertools import accumulate
from typing import Final, NamedTuple

from raftkv.sim.check.history import Kind, Operation, Output, Status
from raftkv.sim.check.model import INITIAL, Register, RegisterModel, at_version, is_pure, shows_versions, written
from raftkv.sim.check.search import EMPTY, Mask, Problem, mask_of
from raftkv.sim.check.tokens import Contradiction, Tokens

NAMELESS: Final = b""
"""The value that nobody saw: no token is empty."""


class Need(IntEnum):
    """What an operation, as it was answered, says about the value that it found."""

    ANY = 0
    PRESENT = 1
    ABSENT = 2
    IS = 3
    NOT = 4
    NEVER = 5


class Move(NamedTuple):
    """One operation as a step between tokens: equal moves are interchangeable."""

    need: Need
    token: bytes | None = None  # for IS and NOT
    at: int | None = None  # the version that it found
    not_at: int | None = None  # the version that it did not find
    changes: bool = False
    target: bytes | None = None
    version: int | None = None  # the one that it made


BLIND: Final = Move(Need.ANY, changes=True, target=NAMELESS)
"""A put or an append whose value nobody saw, nor its version."""


class Unfit(Exception):
    """Some operation depends on values that nobody saw: states must be whole values."""


class Guide:
    """The guided problem of one key, and which operation each of its numbers is."""

    def __init__(self, operations: Sequence[Operation], tokens: Tokens, *, whole: bool = False) -> None:
        """Raises Contradiction if what was seen is impossible by itself; Unfit, unless `whole`.

        `whole`: states are whole values, so that writes that nobody saw don't look alike.
        """
        self.operations = operations
        self.tokens = tokens
        self._whole = whole
        self._tracks = shows_versions(operations)
        self._observe()
        self._versions = self._versions_of_writers()
        self._insensitive = _is_insensitive(operations)
        self._may_be_eager = self._insensitive and not self._tracks and not whole
        self._named = self._guessed()
        required, optional = self._sort()
        self.numbers = required + optional
        self._moves = [self._move(self.operations[index]) for index in self.numbers]
        self._required = len(required)
        self._returns_ns = self._returns(required)
        self._stays = self._stay_rules()
        self._model = RegisterModel(versions=self._tracks)
        self._answers = [self._with_version(index) for index in self.numbers] if whole else []

    def problem(self) -> Problem[Register]:
        """The problem for the search."""
        return Problem(
            initial=INITIAL,
            step=self._step_whole if self._whole else self._step,
            calls_ns=[self.operations[index].call_ns for index in self.numbers],
            returns_ns=self._returns_ns,
            pure=frozenset(number for number, move in enumerate(self._moves) if not move.changes),
            eager=self._is_eager if self._may_be_eager else None,
            before=self._before(),
            optional_after=self._optional_order(),
            stay=lambda state: self._stays.get(state.value or NAMELESS, (EMPTY, -1)),
        )

    # ---- what was seen

    def _observe(self) -> None:
        """Take note of every value that was certainly there."""
        waiting: list[int] = []
        for index, operation in enumerate(self.operations):
            if operation.is_unknown:
                if operation.kind is Kind.CAS:
                    waiting.append(index)
                continue
            value = _seen(operation)
            if value is not None:
                self.tokens.observe(value, index)
        # A cas without an answer was done if its new value was seen: then it found what it expected.
        while waiting:
            done = [index for index in waiting if index in self.tokens.place]
            for index in done:
                expected = self.operations[index].expected
                assert expected is not None
                self.tokens.observe(expected, index)
            if not done:
                return
            waiting = [index for index in waiting if index not in done]

    def _versions_of_writers(self) -> dict[int, int]:
        """The version that each writer made, as far as an answer or a reader showed it."""
        operations = self.operations
        versions: dict[int, int] = {}
        for index, operation in enumerate(operations):
            if operation.output.version and not is_pure(operation):
                versions[index] = operation.output.version
        shown_by: dict[int, int] = {}
        for index, operation in enumerate(operations):
            output = operation.output
            if not (output.shows_value and output.value is not None and output.version):
                continue
            writer = self.tokens.observe(output.value, index)
            if versions.setdefault(writer, output.version) != output.version:
                text = f"one value at two versions, {versions[writer]} and {output.version}"
                involved = dict.fromkeys((writer, shown_by.get(writer, writer), index))
                raise Contradiction("version-conflict", text, [operations[i] for i in involved])
            shown_by.setdefault(writer, index)
        return versions

    def _sort(self) -> tuple[list[int], list[int]]:
        """What is required, and what is optional, each in the order of calls."""
        required: list[int] = []
        optional: list[int] = []
        for index, operation in sorted(enumerate(self.operations), key=lambda item: (item[1].call_ns, item[0])):
            if not operation.is_unknown or index in self.tokens.place:
                required.append(index)
            elif not self._insensitive:
                optional.append(index)
        return required, optional

    def _returns(self, required: Sequence[int]) -> list[int]:
        """Return times; a write without an answer returns after all others."""
        times = [self.operations[index].call_ns for index in required]
        times += [time for index in required if (time := self.operations[index].return_ns) is not None]
        last_ns = max(times, default=0) + 1
        returns: list[int] = []
        for index in required:
            operation = self.operations[index]
            known = None if operation.is_unknown else operation.return_ns
            returns.append(last_ns if known is None else known)
        return returns

    # ---- operations as moves

    def _move(self, operation: Operation) -> Move:
        output, kind = operation.output, operation.kind
        if output.mismatch:
            return self._refused(operation)
        if kind is Kind.GET:
            if output.value is None:
                return Move(Need.ABSENT)
            return Move(Need.IS, self._last_token(output.value), output.version)
        if kind is Kind.DELETE:
            if operation.is_unknown or output.existed:
                return Move(Need.PRESENT, changes=True, version=output.version)
            return Move(Need.ABSENT) if output.existed is False else Move(Need.ANY, changes=True)
        return self._write(operation)

    def _write(self, operation: Operation) -> Move:
        """A put, append or cas that was done, or may have been."""
        token, kind = operation.value, operation.kind
        assert token is not None
        writer = self.tokens.writer_of[token]
        version = self._versions.get(writer)
        place = self.tokens.place.get(writer)
        target = token if place is not None or writer in self._named else NAMELESS
        if kind is Kind.CAS:
            found = self._expected_token(operation)
            if found is None:
                return Move(Need.NEVER)
            return Move(Need.IS, found, changes=True, target=target, version=version)
        if kind is Kind.PUT:
            wanted = operation.if_version
            need = Need.ANY if wanted is None else Need.PRESENT if wanted else Need.ABSENT
            return Move(need, at=wanted or None, changes=True, target=target, version=version)
        if place is None:
            return Move(Need.ANY, changes=True, target=target, version=version)
        base, position = place
        if position == 0:
            return Move(Need.ABSENT, changes=True, target=target, version=version)
        previous = self.tokens.chains[base].writers[position - 1]
        return Move(Need.IS, self._token(previous), changes=True, target=target, version=version)

    def _refused(self, operation: Operation) -> Move:
        """A cas or a conditional put that did not match."""
        output, wanted = operation.output, operation.if_version
        at = output.version or None
        if output.shows_value:
            assert output.value is not None
            impossible = output.value == operation.expected or (wanted is not None and at == wanted)
            return Move(Need.NEVER) if impossible else Move(Need.IS, self._last_token(output.value), at)
        if wanted is not None:
            if output.version == wanted:
                return Move(Need.NEVER)
            if output.version == 0:
                return Move(Need.ABSENT)
            if wanted == 0 or at is not None:
                return Move(Need.PRESENT, at=at)
            return Move(Need.ANY, not_at=wanted)
        if output.version == 0:
            return Move(Need.ABSENT)
        found = self._expected_token(operation)
        if found is not None:
            return Move(Need.NOT, found, at)
        return Move(Need.PRESENT if at else Need.ANY, at=at)

    def _expected_token(self, operation: Operation) -> bytes | None:
        """The state that the expected value of a cas is; None if it never was there. Raises Unfit."""
        assert operation.expected is not None
        found = self.tokens.find(operation.expected)
        if found is not None:
            return self._token(found)
        writers = self.tokens.parse(operation.expected)
        if writers is None:
            return None
        if self._whole:
            return operation.expected  # no token: nothing is known of it
        if len(writers) > 1 or writers[0] not in self._named:
            raise Unfit
        return self._token(writers[0])

    def _guessed(self) -> frozenset[int]:
        """The writers of values that a cas expected, but nobody saw: their states need names too."""
        named: set[int] = set()
        for operation in self.operations:
            if operation.expected is not None and self.tokens.find(operation.expected) is None:
                writers = self.tokens.parse(operation.expected)
                if writers is not None and len(writers) == 1 and self.operations[writers[0]].kind is not Kind.APPEND:
                    named.add(writers[0])
        return frozenset(named)

    def _token(self, writer: int) -> bytes:
        token = self.operations[writer].value
        assert token is not None
        return token

    def _last_token(self, value: bytes) -> bytes:
        writer = self.tokens.find(value)
        assert writer is not None, "every value that was shown has been observed"
        return self._token(writer)

    def _step(self, state: Register, number: int) -> Register | None:
        need, token, at, not_at, changes, target, version = self._moves[number]
        value = state.value
        if need == Need.IS:
            if value != token:
                return None
        elif need == Need.ABSENT:
            if value is not None:
                return None
        elif need == Need.PRESENT:
            if value is None:
                return None
        elif (need == Need.NOT and value == token) or need == Need.NEVER:
            return None
        if at is not None:
            if value is None:
                return None
            found = at_version(state, at)
            if found is None:
                return None
            state = found
        if not_at is not None and value is not None and state.exact and state.version == not_at:
            return None
        if not changes or (value is None and target is None):
            return state
        return written(state, target, version) if self._tracks else Register(target)

    def _with_version(self, index: int) -> Operation:
        """The operation, with the version that readers saw if it had no answer that shows it."""
        operation, version = self.operations[index], self._versions.get(index)
        if version is None or operation.output.version is not None:
            return operation
        return replace(
            operation,
            status=Status.OK,
            return_ns=operation.call_ns if operation.return_ns is None else operation.return_ns,
            output=Output.written(version),
        )

    def _step_whole(self, state: Register, number: int) -> Register | None:
        after = self._model.step(state, self._answers[number])
        index = self.numbers[number]
        if after is None or index not in self.tokens.place or after.value == self.tokens.stage(index):
            return after
        return None  # it is known what was there after this write

    # ---- aids

    def _stay_rules(self) -> dict[bytes, tuple[Mask, int]]:
        """For each token that was seen: who has to see it before the value changes, and who changes it."""
        observers: dict[bytes, int] = {}
        for number, move in enumerate(self._moves[: self._required]):
            if move.need is Need.IS and move.token is not None:
                observers[move.token] = observers.get(move.token, 0) | (1 << number)
        number_of = {index: number for number, index in enumerate(self.numbers)}
        rules: dict[bytes, tuple[Mask, int]] = {}
        for chain in self.tokens.chains.values():
            for position, writer in enumerate(chain.writers):
                token = self._token(writer)
                last = position + 1 == len(chain.writers)
                follower = -1 if last else number_of[chain.writers[position + 1]]
                state = self.tokens.stage(writer) if self._whole else token
                rules[state] = (mask_of(observers.get(token, 0)), follower)
        return rules

    def _is_eager(self, state: Register, number: int) -> bool:
        """Whether this is a write that nobody saw, in a place where nothing tells when it was done.

        The value that it replaces is as good as gone, since all who saw that come before; and whatever
        comes next in any order puts a value of its own, so that it may as well come later.
        """
        return self._may_be_eager and state.value is not None and self._moves[number] == BLIND

    def _before(self) -> list[Mask]:
        """For each required operation those that must come before it: by versions, and among equal moves."""
        shown: list[tuple[int, bool, int]] = []
        for number, move in enumerate(self._moves[: self._required]):
            version = move.version if move.changes else move.at
            if version is not None:
                shown.append((version, not move.changes, number))
        masks = earlier_versions(shown, self._required)
        self._order_equals(masks)
        return concurrent_parts(masks, [self.operations[index].call_ns for index in self.numbers], self._returns_ns)

    def _order_equals(self, masks: list[int]) -> None:
        """Add to `masks` the earlier of equal moves, where they overlap: each is as good as the other."""
        calls = [self.operations[index].call_ns for index in self.numbers]
        open_moves: dict[Move, list[int]] = {}
        for number in range(self._required):
            move = self._moves[number]
            if not self._are_alike(move):
                continue
            still_open = [other for other in open_moves.get(move, ()) if self._returns_ns[other] >= calls[number]]
            for other in still_open:
                if self._returns_ns[other] <= self._returns_ns[number]:
                    masks[number] |= 1 << other
            open_moves[move] = [*still_open, number]

    def _optional_order(self) -> dict[int, int]:
        """Of equal optional moves the one that was called first is used first."""
        latest: dict[Move, int] = {}
        order: dict[int, int] = {}
        for number in range(self._required, len(self.numbers)):
            move = self._moves[number]
            if self._are_alike(move):
                if move in latest:
                    order[number] = latest[move]
                latest[move] = number
        return order

    def _are_alike(self, move: Move) -> bool:
        """Whether all operations that make this move are interchangeable, and it matters."""
        return move.changes and (move.target is None or not self._whole)


def earlier_versions(shown: list[tuple[int, bool, int]], count: int) -> list[int]:
    """For each of `count` operations the bits of those that must come before it, because versions rise.

    `shown`: version, whether it was only seen (else it was made), and number of an operation.
    """
    masks = [0] * count
    earlier = same = 0
    last: tuple[int, bool] | None = None
    for version, seen, number in sorted(shown):
        if last != (version, seen):
            earlier, same, last = earlier | same, 0, (version, seen)
        masks[number] = earlier
        same |= 1 << number
    return masks


def concurrent_parts(masks: Sequence[int], calls_ns: Sequence[int], returns_ns: Sequence[int]) -> list[Mask]:
    """`masks` without what has returned before the call anyway."""
    latest = list(accumulate(returns_ns, max))
    parts: list[Mask] = []
    for bits, call_ns in zip(masks, calls_ns, strict=False):
        first = bisect_left(latest, call_ns)
        shift, rest = mask_of(bits >> first)
        parts.append((first + shift, rest))
    return parts


def _seen(operation: Operation) -> bytes | None:
    """The whole value that an answered operation certainly found."""
    if operation.kind is Kind.CAS and not operation.output.mismatch:
        return operation.expected
    return operation.output.value


def _is_insensitive(operations: Sequence[Operation]) -> bool:
    """Whether nothing here can tell a value that nobody saw from another one, nor that it has been there.

    A deletion needs a value, a hidden mismatch needs another value than the expected one, and a
    conditional put a version that need not have been seen with a value.
    """
    for operation in operations:
        if operation.kind is Kind.DELETE or operation.if_version is not None:
            return False
        output = operation.output
        if output.mismatch and not output.shows_value and output.version != 0:
            return False
    return True
