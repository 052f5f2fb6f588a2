"""What can be said of the files without an engine."""

from __future__ import annotations

import re
import tomllib

from packaging.requirements import Requirement

from tests.docker.stack import ROOT


def test_the_lock_file_fits_what_the_project_asks_for() -> None:
    """If this fails, run the command that stands at the top of requirements.lock."""
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    pins = dict(re.findall(r"^([a-z0-9-]+)==(\S+)(?: ;.*)? \\\n    --hash=sha256:", lock, re.MULTILINE))
    assert len(pins) == len(re.findall(r"^\S+==", lock, re.MULTILINE)), "every pin has a hash"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for text in [*project["project"]["dependencies"], *project["build-system"]["requires"]]:
        wanted = Requirement(text)
        assert wanted.specifier.contains(pins[wanted.name.replace("_", "-")]), text
