"""The life of one shard at one group, as a table. A pair that isn't in the table is an error.

A shard is at a group in one state; only `SERVING` takes reads and writes. What moves it is in `imports` and
`exports`.
"""

from __future__ import annotations

from enum import IntEnum, unique


@unique
class ShardState(IntEnum):
    """Stored in the shard's meta row: the numbers never change."""

    ABSENT = 0
    """Nothing of it here (it has no meta row)."""
    IMPORTING = 1
    """This group copies it, while another one serves; or has logged its ask, and is bound to it."""
    SERVING = 2
    """At most one group at any instant."""
    EXPORTING = 3
    """Frozen by another group's ask; kept until that group has it durably."""
    DRAINED = 4
    """Empty, and closed: this group is about to be the last one to leave."""


@unique
class ShardEvent(IntEnum):
    """What happens to a shard; each is a log entry of this group."""

    FIRST_ASSIGNED = 0
    """A configuration gives it to this group, and no earlier one gave it to any."""
    IMPORT_STARTED = 1
    """The holder keeps a list of what is touched: this group begins to copy."""
    INSTALLED = 2
    """All of it has arrived."""
    SUPERSEDED = 3
    """The attempt is over: a later configuration gave the shard to someone else, or the holder lost its list."""
    FROZEN = 4
    """The next owner's ask is logged here."""
    RELEASED = 5
    """The next owner has it durably."""
    GIVEN_UP = 6
    """A configuration gives up all shards, with what is in them."""
    DRAINED = 7
    """Nothing is in it, and the last group is to leave."""
    LIFTED = 8
    """The last group stays after all."""


TRANSITIONS: dict[tuple[ShardState, ShardEvent], ShardState] = {
    (ShardState.ABSENT, ShardEvent.FIRST_ASSIGNED): ShardState.SERVING,
    (ShardState.ABSENT, ShardEvent.IMPORT_STARTED): ShardState.IMPORTING,
    (ShardState.IMPORTING, ShardEvent.INSTALLED): ShardState.SERVING,
    (ShardState.IMPORTING, ShardEvent.SUPERSEDED): ShardState.ABSENT,
    (ShardState.SERVING, ShardEvent.DRAINED): ShardState.DRAINED,
    (ShardState.DRAINED, ShardEvent.LIFTED): ShardState.SERVING,
    (ShardState.SERVING, ShardEvent.FROZEN): ShardState.EXPORTING,
    (ShardState.EXPORTING, ShardEvent.RELEASED): ShardState.ABSENT,
    (ShardState.IMPORTING, ShardEvent.GIVEN_UP): ShardState.ABSENT,
    (ShardState.SERVING, ShardEvent.GIVEN_UP): ShardState.ABSENT,
    (ShardState.EXPORTING, ShardEvent.GIVEN_UP): ShardState.ABSENT,
    (ShardState.DRAINED, ShardEvent.GIVEN_UP): ShardState.ABSENT,
}


class IllegalTransition(Exception):
    """The event can't happen in this state: a bug, or a log from a newer version."""


def next_state(state: ShardState, event: ShardEvent) -> ShardState:
    """Raise IllegalTransition for a pair that isn't in the table."""
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        raise IllegalTransition(f"{event.name} in state {state.name}") from None
