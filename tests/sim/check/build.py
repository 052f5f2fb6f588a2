"""Short words for hand-made histories: times in plain numbers, one key."""

from __future__ import annotations

from raftkv.sim.check.history import Kind, Operation, Output, Status, Step

KEY = b"k"
OPEN = None
"""As a return time: no answer came."""


def get(value: bytes | None, start: int, end: int, version: int | None = None) -> Operation:
    return Operation.get(f"r{start}", KEY, Output.read(value, version), start, end)


def put(
    value: bytes, start: int, end: int | None, version: int | None = None, if_version: int | None = None
) -> Operation:
    return _write(Kind.PUT, value, start, end, Output.written(version), if_version=if_version)


def append(value: bytes, start: int, end: int | None, version: int | None = None) -> Operation:
    return _write(Kind.APPEND, value, start, end, Output.written(version))


def delete(existed: bool | None, start: int, end: int | None) -> Operation:
    return _write(Kind.DELETE, None, start, end, Output.deleted(existed))


def cas(expected: bytes, new: bytes, start: int, end: int | None, version: int | None = None) -> Operation:
    return _write(Kind.CAS, new, start, end, Output.written(version), expected=expected)


def cas_refused(
    expected: bytes, start: int, end: int, version: int | None = None, found: bytes | None = None
) -> Operation:
    new = b"never%d;" % start
    return _write(Kind.CAS, new, start, end, Output.mismatched(version, found), expected=expected)


def put_refused(if_version: int, start: int, end: int, version: int) -> Operation:
    return _write(Kind.PUT, b"never%d;" % start, start, end, Output.mismatched(version), if_version=if_version)


def failed(value: bytes, start: int, end: int) -> Operation:
    return Operation(f"w{start}", Kind.PUT, KEY, start, end, Status.FAIL, value)


def txn(text: str, start: int, end: int | None, status: Status = Status.OK) -> Operation:
    """Steps as words: `x+1` appends 1 to x, `x=12` read [1 2] (one digit each), `x=` read nothing."""
    steps: list[Step] = []
    for word in text.split():
        key = word[0].encode()
        if word[1] == "+":
            steps.append(Step.append(key, int(word[2:])))
        else:
            steps.append(Step.read(key, [int(digit) for digit in word[2:]]))
    return Operation.txn(f"t{start}", steps, start, end, Status.UNKNOWN if end is None else status)


def _write(
    kind: Kind,
    value: bytes | None,
    start: int,
    end: int | None,
    output: Output,
    *,
    expected: bytes | None = None,
    if_version: int | None = None,
) -> Operation:
    """A write; one without a return time has an unknown outcome."""
    shown = None if end is None else output
    return Operation.write(f"w{start}", kind, KEY, value, shown, start, end, expected=expected, if_version=if_version)
