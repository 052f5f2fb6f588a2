"""The compose files fit the compose specification, so `docker compose` takes them as well as docker-compose 1.29.

Its JSON schema is the one that check-jsonschema carries. No engine is needed.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.docker.stack import ROOT

FILES = sorted((ROOT / "compose").glob("*.yaml"))


def check(path: Path) -> subprocess.CompletedProcess[str]:
    options = ("--builtin-schema", "vendor.compose-spec", "--color", "never")
    command = [sys.executable, "-m", "check_jsonschema", *options, str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_it_fits_the_specification(path: Path) -> None:
    done = check(path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_does_not_fit_is_refused_in_an_anchor_too(tmp_path: Path) -> None:
    path = tmp_path / "compose.yaml"
    text = (ROOT / "compose" / "compose.yaml").read_text(encoding="utf-8")
    path.write_text(text.replace("stop_grace_period: 30s", "stop_grace: 30s", 1), encoding="utf-8")
    done = check(path)
    assert done.returncode == 1
    assert "'stop_grace' was unexpected" in done.stdout
