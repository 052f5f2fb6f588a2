"""Exhaustive checkers: every order that real time allows, on a concrete store. Slow, and obviously right.

They share no code with the checkers that they are compared with, and handle unknown outcomes by trying
every subset.
"""

from __future__ import annotations

from collections.abc import Sequence

from raftkv.sim.check.history import Element, Kind, Operation, Status

Changes = list[int | None]
"""The versions of a key's changes, in order: None while nothing has shown it."""


def naive_linearizable(operations: Sequence[Operation]) -> bool:
    """Whether one key's operations have a linearization."""
    relevant = [op for op in operations if op.status is not Status.FAIL and not (op.is_unknown and op.kind is Kind.GET)]
    return _any_order(tuple(relevant), None, [])


def _any_order(remaining: tuple[Operation, ...], value: bytes | None, changes: Changes) -> bool:
    if all(op.is_unknown for op in remaining):
        return _rising(changes)
    for index, operation in enumerate(remaining):
        if any(not other.is_unknown and _before(other, operation) for other in remaining):
            continue
        after = _apply(operation, value, changes)
        if after is not None and _any_order(remaining[:index] + remaining[index + 1 :], *after):
            return True
    return False


def _before(first: Operation, second: Operation) -> bool:
    return first is not second and first.return_ns is not None and first.return_ns < second.call_ns


def _rising(changes: Changes) -> bool:
    """Whether the unknown versions can be filled in so that all rise from 1."""
    lowest = 1
    for version in changes:
        if version is not None and version < lowest:
            return False
        lowest = (lowest if version is None else version) + 1
    return True


def _pin(changes: Changes, version: int | None) -> Changes | None:
    """The latest change was `version`."""
    if version is None:
        return changes
    if not changes or changes[-1] not in (None, version):
        return None
    return [*changes[:-1], version]


def _apply(op: Operation, value: bytes | None, changes: Changes) -> tuple[bytes | None, Changes] | None:
    """The value and changes after `op`; None if it can't have answered as it did (or did nothing, if unknown)."""
    out = op.output
    present = value is not None
    if op.kind is Kind.GET:
        pinned = _pin(changes, out.version)
        return None if value != out.value or pinned is None else (value, pinned)
    if out.mismatch:
        if op.kind is Kind.CAS and value == op.expected:
            return None
        if op.if_version == 0 and not present:
            return None
        if op.if_version and out.version == op.if_version:
            return None
        if (out.version == 0 and present) or (out.version and not present):
            return None
        if out.shows_value and out.value != value:
            return None
        pinned = _pin(changes, out.version or None)
        return None if pinned is None else (value, pinned)
    if op.kind is Kind.DELETE:
        if not op.is_unknown and out.existed is not None and out.existed != present:
            return None
        if not present:
            return None if op.is_unknown else (value, changes)
        return None, [*changes, out.version]
    if op.kind is Kind.CAS and value != op.expected:
        return None
    if op.if_version is not None:
        if present != (op.if_version > 0):
            return None
        pinned = _pin(changes, op.if_version or None)
        if pinned is None:
            return None
        changes = pinned
    assert op.value is not None
    new = (value or b"") + op.value if op.kind is Kind.APPEND else op.value
    return new, [*changes, out.version]


def naive_serializable(transactions: Sequence[Operation]) -> bool:
    """Whether the transactions are strictly serializable."""
    relevant = tuple(txn for txn in transactions if txn.status is not Status.FAIL)
    return _any_serial_order(relevant, {})


def _any_serial_order(remaining: tuple[Operation, ...], lists: dict[bytes, tuple[Element, ...]]) -> bool:
    if all(txn.is_unknown for txn in remaining):
        return True
    for index, txn in enumerate(remaining):
        if any(not other.is_unknown and _before(other, txn) for other in remaining):
            continue
        after = _run(txn, lists)
        if after is not None and _any_serial_order(remaining[:index] + remaining[index + 1 :], after):
            return True
    return False


def _run(txn: Operation, lists: dict[bytes, tuple[Element, ...]]) -> dict[bytes, tuple[Element, ...]] | None:
    after = dict(lists)
    for step in txn.steps:
        present = after.get(step.key, ())
        if step.element is not None:
            after[step.key] = (*present, step.element)
        elif step.elements is not None and step.elements != present:
            return None
    return after
