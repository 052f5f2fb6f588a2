"""Unique tokens: what a read of one key says about which writes came before it, and in what order.

If all that is written to a key is unique, not empty, and no token is the beginning of another, a value has
one reading: the write that began it (its base) and the appends after it. All values with the same base are
stages of one chain. Nothing is guessed: without those properties there is no index.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from raftkv.sim.check.history import Kind, Operation, Status
from raftkv.sim.check.verdict import Anomaly


class Contradiction(Exception):
    """A value that can't have been there, given what else was seen."""

    def __init__(self, name: str, text: str, operations: Sequence[Operation]) -> None:
        super().__init__(text)
        self.anomaly = Anomaly(name, text, tuple(operations))


class Chain:
    """The longest value seen of one base: the writes that made it, in order, and where each one's token ends."""

    __slots__ = ("ends", "lengths", "value", "writers")

    def __init__(self) -> None:
        self.value = b""
        self.writers: list[int] = []
        self.lengths: list[int] = []  # of the value, after each writer
        self.ends: dict[int, int] = {}  # the same the other way round


def prefix_free(tokens: Iterable[bytes]) -> bool:
    """Whether all tokens differ, none is empty, and none is the beginning of another."""
    ordered = sorted(tokens)
    if ordered and not ordered[0]:
        return False
    return not any(later.startswith(token) for token, later in pairwise(ordered))


class Tokens:
    """The chains of one key. Positions are indices into `operations`, which include no reads without answer."""

    def __init__(self, operations: Sequence[Operation]) -> None:
        """Use `Tokens.of`: it checks that the tokens are fit."""
        self.operations = operations
        self.writer_of = {
            operation.value: index
            for index, operation in enumerate(operations)
            if operation.value is not None and _may_have_written(operation)
        }
        self._lengths = sorted({len(token) for token in self.writer_of})
        self.chains: dict[int, Chain] = {}  # by base writer
        self.place: dict[int, tuple[int, int]] = {}  # writer -> its base writer and its position in that chain
        self.seen_by: dict[int, int] = {}  # writer -> the first operation that showed its token

    @classmethod
    def of(cls, operations: Sequence[Operation]) -> Tokens | None:
        """The index for the operations of one key, without any value observed yet; None if tokens are unfit."""
        written = [op.value for op in operations if op.value is not None and _may_have_written(op)]
        return cls(operations) if prefix_free(written) else None

    def parse(self, value: bytes) -> list[int] | None:
        """The writers of `value`'s tokens, in order; None if it isn't a sequence of tokens."""
        writers: list[int] = []
        start = 0
        while start < len(value):
            for length in self._lengths:
                writer = self.writer_of.get(value[start : start + length])
                if writer is not None:
                    break
            else:
                return None
            writers.append(writer)
            start += length
        return writers or None

    def find(self, value: bytes) -> int | None:
        """The writer of the last token of `value`, if that was observed; None if it was not."""
        first = self._base_of(value)
        chain = self.chains.get(first) if first is not None else None
        if chain is None:
            return None
        position = chain.ends.get(len(value))
        return chain.writers[position] if position is not None and chain.value.startswith(value) else None

    def observe(self, value: bytes, observer: int) -> int:
        """Operation `observer` shows that `value` was there: the writer of its last token.

        Raises Contradiction: phantom, duplicate, fork.
        """
        first = self._base_of(value)
        chain = self.chains.get(first) if first is not None else None
        if first is None or chain is None:
            return self._extend(Chain(), value, observer)
        position = chain.ends.get(len(value))
        if position is not None and chain.value.startswith(value):
            return chain.writers[position]
        if len(value) > len(chain.value) and value.startswith(chain.value):
            return self._extend(chain, value, observer)
        if self.parse(value) is None:
            raise self._phantom(value, observer)
        other = self.seen_by[chain.writers[-1]]
        text = f"two readers saw different orders: {show(value)} and {show(chain.value)}"
        raise Contradiction("fork", text, [self.operations[other], self.operations[observer]])

    def stage(self, writer: int) -> bytes:
        """The value that ends with the token of `writer`, which was observed."""
        base, position = self.place[writer]
        chain = self.chains[base]
        return chain.value[: chain.lengths[position]]

    def _base_of(self, value: bytes) -> int | None:
        for length in self._lengths:
            writer = self.writer_of.get(value[:length])
            if writer is not None:
                return writer
        return None

    def _extend(self, chain: Chain, value: bytes, observer: int) -> int:
        """Lengthen `chain` to `value`."""
        writers = self.parse(value[len(chain.value) :])
        if writers is None:
            raise self._phantom(value, observer)
        operations = self.operations
        length = len(chain.value)
        base = chain.writers[0] if chain.writers else writers[0]
        for writer in writers:
            token = operations[writer].value
            assert token is not None
            earlier = self.place.get(writer)
            if earlier is not None:
                other = self.seen_by[writer]
                text = f"{show(token)} was written once, but was seen at two places: {show(value)}"
                involved = dict.fromkeys((writer, other, observer))
                raise Contradiction("duplicate", text, [operations[index] for index in involved])
            if chain.writers and operations[writer].kind is not Kind.APPEND:
                text = f"{show(token)} was {operations[writer].kind}, not appended, but follows others in {show(value)}"
                raise Contradiction("phantom", text, [operations[writer], operations[observer]])
            length += len(token)
            self.place[writer] = (base, len(chain.writers))
            self.seen_by[writer] = observer
            chain.ends[length] = len(chain.writers)
            chain.lengths.append(length)
            chain.writers.append(writer)
        chain.value = value
        self.chains[base] = chain
        return chain.writers[-1]

    def _phantom(self, value: bytes, observer: int) -> Contradiction:
        failed = [
            operation
            for operation in self.operations
            if operation.status is Status.FAIL and operation.value and operation.value in value
        ]
        text = f"nobody wrote {show(value)}" + (", but there are writes that failed" if failed else "")
        return Contradiction("phantom", text, [*failed[:3], self.operations[observer]])


def _may_have_written(operation: Operation) -> bool:
    return operation.status is not Status.FAIL and not operation.output.mismatch


def show(value: bytes | None, limit: int = 60) -> str:
    """`value` for people, cut in its middle."""
    if value is None:
        return "absent"
    text = value.decode("utf-8", "backslashreplace")
    if len(text) > limit:
        text = f"{text[: limit // 2 - 1]}…{text[-(limit // 2) :]}"
    return f'"{plain(text)}"'


def plain(text: str) -> str:
    """`text` without line ends and control characters, whatever a file contains."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)
