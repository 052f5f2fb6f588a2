"""The checks of a run can fail, and its figures say what they should."""

from __future__ import annotations

from tests.chaos.nemesis import Event
from tests.chaos.run import stalls
from tests.chaos.workload import Wait

S = 1_000_000_000


def test_the_table_of_stalls() -> None:
    events = [Event("kill", 10 * S, 12 * S, ""), Event("kill", 50 * S, 51 * S, ""), Event("cut", 11 * S, 20 * S, "")]
    waits = [
        Wait(0, 1 * S),  # met nothing
        Wait(9 * S, 14 * S),  # met both
        Wait(50 * S, 53 * S),  # one alone
        Wait(51 * S + S // 2, 53 * S),  # soon after it
        Wait(60 * S, 64 * S),  # too late for it
    ]
    rows = {line.split()[0]: line.split()[1:] for line in stalls(waits, events)[1:]}
    assert rows == {
        "cut": ["1", "9.0", "5.0", "-"],
        "kill": ["2", "2.0", "5.0", "3.0"],
        "(none)": ["4.0", "4.0"],
    }
