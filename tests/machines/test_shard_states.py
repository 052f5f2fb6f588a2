"""The table of a shard's states: exactly the design's moves, and nothing else."""

from __future__ import annotations

from itertools import product

import pytest

from raftkv.machines.shard_states import TRANSITIONS, IllegalTransition, ShardEvent, ShardState, next_state


def test_the_moves_are_those_of_the_design() -> None:
    moves = {(before.name, after.name) for (before, _), after in TRANSITIONS.items()}
    assert moves == {
        ("ABSENT", "IMPORTING"),
        ("IMPORTING", "SERVING"),
        ("SERVING", "EXPORTING"),
        ("EXPORTING", "ABSENT"),
        ("ABSENT", "SERVING"),
        ("IMPORTING", "ABSENT"),
        ("SERVING", "ABSENT"),
        ("SERVING", "DRAINED"),
        ("DRAINED", "SERVING"),
        ("DRAINED", "ABSENT"),
    }
    assert {before.name for (before, event), _ in TRANSITIONS.items() if event is ShardEvent.GIVEN_UP} == {
        "IMPORTING",
        "SERVING",
        "EXPORTING",
        "DRAINED",
    }


@pytest.mark.parametrize(("state", "event"), list(product(ShardState, ShardEvent)))
def test_an_absent_entry_is_an_error(state: ShardState, event: ShardEvent) -> None:
    if (state, event) in TRANSITIONS:
        assert next_state(state, event) is TRANSITIONS[state, event]
    else:
        with pytest.raises(IllegalTransition, match=f"{event.name} in state {state.name}"):
            next_state(state, event)


def test_stored_numbers() -> None:
    assert [(state.name, state.value) for state in ShardState] == [
        ("ABSENT", 0),
        ("IMPORTING", 1),
        ("SERVING", 2),
        ("EXPORTING", 3),
        ("DRAINED", 4),
    ]
