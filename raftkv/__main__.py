"""`python -m raftkv` is the `raftkv` binary."""

from __future__ import annotations

from raftkv.cli.main import raftkv

raftkv()
