"""The benchmarks run, each on a cluster of its own, and measure something."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = {
    "durable": (
        ["--connections", "2"],
        r"^(?:put|get) +2 connections +([\d,]+)/s +mean +([\d.]+) ms +p99 +([\d.]+) ms",
        2,
    ),
    "transactions": (
        ["--conflicts", "0,50", "--clients", "2"],
        r"^ *\d+ % conflicts  2 clients +([\d,.]+) commits/s .* p50 +([\d.]+) ms  p99 +([\d.]+) ms$",
        2,
    ),
}
"""Options, what a line must look like, and how many of them there must be."""


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_prints_figures(name: str) -> None:
    options, pattern, count = SCRIPTS[name]
    command = [sys.executable, "-m", f"bench.{name}", "--seconds", "0.5", *options]
    ran = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=100, check=False
    )
    assert ran.returncode == 0, ran.stderr
    lines = re.findall(pattern, ran.stdout, re.MULTILINE)
    assert len(lines) == count, ran.stdout
    assert all(float(figure.replace(",", "")) > 0 for line in lines for figure in line), ran.stdout
    assert "errors" not in ran.stdout
