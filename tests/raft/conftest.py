"""Says at the end of a run which seeds the random schedules used."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.hookimpl
def pytest_terminal_summary(terminalreporter: Any) -> None:
    ranges = [
        f"{value} {report.outcome}"
        for reports in terminalreporter.stats.values()
        for report in reports
        for name, value in getattr(report, "user_properties", ())
        if name == "raft schedules"
    ]
    for line in sorted(set(ranges)):
        terminalreporter.write_line(f"raft schedules: {line}")
