"""What a correct store may answer: one key as a register with a version.

The sequential specification, after Porcupine's models. A state stands for all states that fit what was
shown so far: the version of a value is known once some operation has shown it, and a lower bound until
then. Versions of a key only rise; they need not be dense, because a shard's keys share one revision.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from raftkv.sim.check.history import Kind, Operation, Output, Status


class Register(NamedTuple):
    """The key's value (None: absent) and the version of its last change; at least that unless `exact`."""

    value: bytes | None = None
    version: int = 0
    exact: bool = False


INITIAL = Register()


def matters(operation: Operation) -> bool:
    """Whether the operation says anything: a failed one does not, nor a read without an answer."""
    if operation.status is Status.FAIL:
        return False
    return not (operation.is_unknown and operation.kind is Kind.GET)


def is_pure(operation: Operation) -> bool:
    """Whether the operation, as it was answered, changed nothing."""
    if operation.is_unknown:
        return False
    output = operation.output
    return operation.kind is Kind.GET or output.mismatch or (operation.kind is Kind.DELETE and output.existed is False)


def shows_versions(operations: Iterable[Operation]) -> bool:
    """Whether versions matter at all; if not, states are smaller without them."""
    return any(operation.output.version or operation.if_version for operation in operations)


class RegisterModel:
    """The steps of one register; `versions` False leaves versions out of the state (see shows_versions)."""

    def __init__(self, *, versions: bool = True) -> None:
        self._versions = versions

    def step(self, state: Register, operation: Operation) -> Register | None:
        """The state after `operation` with its output; None if it can't have answered so in `state`.

        An unknown outcome: the state after it has taken effect; None if it would have no effect.
        """
        kind, output = operation.kind, operation.output
        if operation.is_unknown:
            return self._effect(state, operation)
        if output.mismatch:
            return self._refused(state, operation)
        if kind is Kind.GET:
            return self._at(state, output.version) if state.value == output.value else None
        if kind is Kind.DELETE and state.value is None:
            return None if output.existed else state
        if kind is Kind.DELETE and output.existed is False:
            return None
        return self._effect(state, operation)

    def _effect(self, state: Register, operation: Operation) -> Register | None:
        """The state after the write was done; None if it can't be."""
        kind, version = operation.kind, operation.output.version
        if kind is Kind.APPEND:
            return self._written(state, (state.value or b"") + (operation.value or b""), version)
        if kind is Kind.CAS:
            return self._written(state, operation.value, version) if state.value == operation.expected else None
        if kind is Kind.DELETE:
            return None if state.value is None else self._written(state, None, version)
        assert kind is Kind.PUT, kind
        wanted = operation.if_version
        if wanted is not None:
            if (state.value is None) != (wanted == 0):
                return None
            found = self._at(state, wanted or None)
            if found is None:
                return None
            state = found
        return self._written(state, operation.value, version)

    def _refused(self, state: Register, operation: Operation) -> Register | None:
        """The state after a cas or a conditional put that did not match."""
        output: Output = operation.output
        if output.version == 0 and state.value is not None:
            return None
        if output.version and state.value is None:
            return None
        if output.shows_value and state.value != output.value:
            return None
        if operation.kind is Kind.CAS:
            return None if state.value == operation.expected else self._at(state, output.version or None)
        wanted = operation.if_version
        assert wanted is not None
        if wanted == 0:
            return None if state.value is None else self._at(state, output.version or None)
        if output.version == wanted or (state.value is not None and state.exact and state.version == wanted):
            return None
        return self._at(state, output.version or None)

    def _at(self, state: Register, version: int | None) -> Register | None:
        return at_version(state, version) if self._versions else state

    def _written(self, state: Register, value: bytes | None, version: int | None) -> Register | None:
        return written(state, value, version) if self._versions else Register(value)


def at_version(state: Register, version: int | None) -> Register | None:
    """The state if its version is `version` (None: any)."""
    if version is None:
        return state
    if state.exact:
        return state if state.version == version else None
    return Register(state.value, version, True) if version >= state.version else None


def written(state: Register, value: bytes | None, version: int | None) -> Register | None:
    """The state after a write that made `version` (None: unknown); None if versions would fall."""
    if version is None:
        return Register(value, state.version + 1, False)
    if version <= state.version:
        return None
    # Of an absent key no version is ever shown, so there is nothing that must equal this one.
    return Register(value, version, value is not None)
