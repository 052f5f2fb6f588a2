"""What the README and the architecture say about the command line and the files is true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from raftkv.cli.command_table import parse
from raftkv.cli.exit_codes import ExitCode
from raftkv.cli.programs import OPTIONS, command_table
from raftkv.cli.words import split_words

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")


def test_the_readme_has_every_command_and_option() -> None:
    for program in ("raftkv-kv", "raftkv-ctl"):
        for command in command_table(program).commands:
            assert re.search(rf"`{command.name}[ `]", README, re.IGNORECASE), command.name
    for option in OPTIONS[:-1]:
        assert any(name in README for name in option.names), option.names


def test_the_readme_has_every_exit_code() -> None:
    section = README.split("## Exit codes")[1].split("\n## ")[0]
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", section, re.MULTILINE)} == set(ExitCode)


def test_the_commands_of_the_first_minutes_are_commands() -> None:
    table = command_table("raftkv-kv")
    lines = re.findall(r"^raftkv-kv local> (.+)$", README, re.MULTILINE)
    assert len(lines) >= 5
    for line in lines:
        parse(table, split_words(line.encode()), environment={}, on_a_line=True).call()


@pytest.mark.parametrize("target", ["run", "stop", "test", "test-all", "test-docker", "check"])
def test_the_readme_and_the_makefile_agree(target: str) -> None:
    assert f"make {target}" in README
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


def test_ci_runs_the_commands_of_the_readme() -> None:
    commands = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert commands[-4:] == ["make check", "make test", "make test-all", "make test-docker"]
    assert all(re.search(rf"^{command} +#", README, re.MULTILINE) for command in commands[-4:])


def test_the_architecture_names_files_that_exist() -> None:
    named = set(re.findall(r"`((?:[a-z]+/)*[a-z_0-9]+\.py)`", ARCHITECTURE))
    assert len(named) > 50
    present = {path.relative_to(ROOT / "raftkv").as_posix() for path in (ROOT / "raftkv").rglob("*.py")}
    names = {path.rsplit("/", 1)[-1] for path in present}
    missing = {
        name
        for name in named
        if name not in present and not ("/" not in name and name in names) and not (ROOT / name).exists()
    }
    assert missing == set()


def test_the_architecture_explains_every_layer() -> None:
    layers = {path.name for path in (ROOT / "raftkv").iterdir() if (path / "__init__.py").exists()}
    assert {layer for layer in layers if f"`raftkv/{layer}/`" not in ARCHITECTURE} == set()


def test_the_recorded_walk_is_that_of_its_script() -> None:
    page = (ROOT / "docs" / "terminal-walk.md").read_text(encoding="utf-8")
    script = (ROOT / "examples" / "terminal_walk.py").read_text(encoding="utf-8")
    headings = [heading.replace("{PAIRS:,}", "50,000") for heading in re.findall(r'say\(f?"(## .+)"\)', script)]
    assert len(headings) == 7
    assert [line for line in page.splitlines() if line.startswith("## ")] == headings
    assert "Traceback" not in page
    assert set(re.findall(r"^exit (\d+)$", page, re.MULTILINE)) == {"0", "1", "2", "3", "4", "7"}
