"""The reference page is what is generated; every command has examples that it understands, every option help."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from raftkv.cli.catalogue import CommandRow, programs
from raftkv.cli.reference import page

ROOT = Path(__file__).parents[2]
ROWS = {row.path: row for program in programs() for row in program.all()}


def test_the_page_is_what_is_generated() -> None:
    command = "python -m raftkv.cli.reference > docs/commands.md"
    assert (ROOT / "docs" / "commands.md").read_text(encoding="utf-8") == page(), f"run `{command}`"


def test_every_command_is_on_the_page() -> None:
    titles = set(re.findall(r"^##+ (raftkv.*)$", page(), re.MULTILINE))
    assert titles == set(ROWS)
    links = re.findall(r"\]\(#([a-z-]+)\)", page())
    assert sorted(links) == sorted([*(title.replace(" ", "-") for title in titles), "in-the-shells", "exit-codes"])


def test_the_shells_own_commands_are_on_the_page() -> None:
    section = page().split("## In the shells\n")[1].split("\n## ")[0]
    for name in ("\\timing", "\\o", "\\pager", "\\watch", "\\e", "\\?"):
        assert f"```\n{name}" in section
    assert "Ctrl-R" in section


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_help_begins_with_examples_and_names_every_option(row: CommandRow) -> None:
    assert row.summary
    if row.path not in ("raftkv kv", "raftkv ctl"):
        first = "\n".join(row.text.splitlines()[:6])
        assert re.search(
            rf"^ *(raftkv |{row.path}|{row.name}\b)", first.split("\n", 1)[1], re.MULTILINE | re.IGNORECASE
        )
    for option in row.options:
        assert option.help, option.names


ASKED_ONCE = {"--wipe", "--chart", "--cleanup", "--version", "--help"}


def test_every_option_of_raftkv_has_a_variable_or_is_asked_of_one_command_only() -> None:
    for row in ROWS.values():
        if row.path.split()[0] != "raftkv" or row.path in ("raftkv sim", "raftkv check"):
            continue  # those of the tables are tested with them; sim and check run no cluster
        for option in row.options:
            assert option.variable.startswith("RAFTKV_") or option.names[-1] in ASKED_ONCE, (row.path, option.names)


def examples() -> list[tuple[str, str]]:
    """(what is before the options, the line) of each example for a shell."""
    found = []
    for row in ROWS.values():
        text = row.text.replace("\\\n", " ")
        found += [line.strip() for line in text.splitlines()[1:] if re.match(r" *raftkv(-kv|-ctl)? ", line)]
    return [(line.split("  ")[0] if "--peers" not in line else line, line) for line in found]


@pytest.mark.parametrize(("example", "line"), examples(), ids=[line for _, line in examples()])
def test_examples_are_commands_and_options_that_exist(example: str, line: str) -> None:
    words = shlex.split(re.split(r"[|<>]", example)[0], comments=True)
    path = words[0]
    for word in words[1:]:
        path = f"{path} {word.lower()}" if f"{path} {word.lower()}" in ROWS else path
    known = {name for row in (ROWS[path], ROWS[words[0]]) for option in row.options for name in option.names}
    assert path != "raftkv", line
    assert {word for word in words if re.match(r"--?[a-z]", word)} <= known, line
