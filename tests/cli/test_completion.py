"""Completion in real shells: what TAB makes of a line, by the script of `raftkv completion`, with no server."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from raftkv.cli.completion import SHELLS, script
from tests.cli.clusters import BIN, run
from tests.cli.screen import Screen

PROMPT = "READY>"


class Typing:
    """A shell in which the script has been read, in a directory with some files."""

    def __init__(self, shell: str, path: Path, directory: Path) -> None:
        self.shell = shell
        arguments = {"bash": ("--norc", "--noprofile", "-i"), "zsh": ("-f", "-i"), "fish": ("--no-config", "-i")}[shell]
        program = shutil.which(shell)
        assert program is not None
        self._screen = Screen(program, *arguments, columns=200, cwd=directory, PS1=f"{PROMPT} ", HOME=str(directory))
        begin = {
            "bash": f"bind 'set bell-style none'; bind 'set enable-bracketed-paste off'; source {path}",
            "zsh": f"PS1='{PROMPT} '; unsetopt beep; autoload -U compinit; compinit -u -D; source {path}",
            "fish": f"function fish_prompt; echo -n '{PROMPT} '; end; set fish_autosuggestion_enabled 0; source {path}",
        }[shell]
        self._screen.wait_for(lambda lines: lines)
        self._screen.child.send(begin + '; echo read""y\r')
        self._screen.wait_for(lambda lines: lines[-1:] == [PROMPT] and "ready" in lines)

    def line(self) -> str:
        """The line that is being typed."""
        lines = self._screen.lines
        shown = max((n for n, line in enumerate(lines) if line.startswith(PROMPT)), default=0)
        return lines[shown].removeprefix(PROMPT).strip()

    def completes(self, typed: str, expected: str) -> None:
        """TAB makes `expected` of the line."""
        self._clear()
        self._screen.child.send(typed + "\t")
        self._screen.wait_for(lambda lines: self.line() == expected)

    def offers(self, typed: str, *expected: str, without: tuple[str, ...] = ()) -> None:
        """TAB shows these."""
        self._clear()
        self._screen.child.send(typed)
        self._screen.wait_for(lambda lines: self.line() == typed.strip())
        self._screen.child.send("\t\t" if self.shell == "bash" else "\t")
        shown = self._screen.wait_for(lambda lines: all(word in self._below(lines, typed) for word in expected))
        assert not set(without) & self._below(shown, typed)

    def offers_nothing(self, typed: str) -> None:
        """TAB leaves the line as it is, and shows nothing; what is typed after it comes through."""
        self._clear()
        self._screen.child.send(typed + "\t\tx")
        self._screen.wait_for(lambda lines: self.line() == (typed + "x").strip())
        assert self._below(self._screen.lines, typed) <= {typed.split()[-1], "x"}

    def _below(self, lines: list[str], typed: str) -> set[str]:
        """The words on the screen but the line itself."""
        return {word.lstrip("@") for line in lines if typed.strip() not in line for word in line.split()}

    def _clear(self) -> None:
        """An empty line on an empty screen."""
        self._screen.child.send("\x15clear\r")  # Ctrl-U, since what comes right after a Ctrl-C may be lost
        self._screen.wait_for(lambda lines: lines == [PROMPT])


@pytest.fixture(params=SHELLS, scope="module")
def typing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Typing]:
    shell = request.param
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    directory = tmp_path_factory.mktemp(shell)
    (directory / "pairs.tsv").touch()
    (directory / "photo.jpg").touch()
    (directory / "folder").mkdir()
    path = directory / f"script.{shell}"
    path.write_text(script(shell), encoding="utf-8")
    made = Typing(shell, path, directory)
    yield made
    made._screen.child.close(force=True)


def test_commands_in_any_case(typing: Typing) -> None:
    typing.completes("raftkv-kv imp", "raftkv-kv import")
    typing.completes("raftkv-kv IMP", "raftkv-kv import")
    typing.completes("raftkv-ctl --timeout 5 st", "raftkv-ctl --timeout 5 status")
    typing.completes(
        "raftkv-kv --controllers 10.0.0.1:7000,10.0.0.2:7000 sc",
        "raftkv-kv --controllers 10.0.0.1:7000,10.0.0.2:7000 scan",
    )
    typing.completes("raftkv kv sc", "raftkv kv scan")
    typing.completes("raftkv be", "raftkv bench")
    typing.completes("raftkv local do", "raftkv local down")
    typing.offers("raftkv-ctl ", "join", "leave", "move", "wait", "plan", "query", "status", "txns")


def test_options_of_the_command_and_of_the_program(typing: Typing) -> None:
    typing.completes("raftkv-kv scan --lim", "raftkv-kv scan --limit")
    typing.completes("raftkv-kv get --for", "raftkv-kv get --for-update")
    typing.completes("raftkv-kv get k --keep", "raftkv-kv get k --keep-going")
    typing.completes("raftkv kv put k v --if", "raftkv kv put k v --if-version")
    typing.completes("raftkv shardkv --move", "raftkv shardkv --move-bytes-per-s")
    typing.offers("raftkv local up --", "--groups", "--replicas", "--metrics", without=("--wipe", "--limit"))


def test_values_of_options(typing: Typing) -> None:
    typing.completes("raftkv-kv -o js", "raftkv-kv -o json")
    typing.completes("raftkv-kv get k --output pl", "raftkv-kv get k --output plain")
    typing.completes("raftkv-kv get k --output=pl", "raftkv-kv get k --output=plain")
    typing.completes("raftkv-kv export --format ts", "raftkv-kv export --format tsv")
    typing.completes("raftkv bench --scenario ycsb-f", "raftkv bench --scenario ycsb-f")
    typing.offers("raftkv controller --log-level ", "debug", "info", "warning", "error")
    typing.completes("raftkv-kv --tls-ca pai", "raftkv-kv --tls-ca pairs.tsv")
    typing.completes("raftkv local up --data-dir fo", "raftkv local up --data-dir folder/")
    typing.offers_nothing("raftkv-kv get k --timeout ")


def test_words_of_commands(typing: Typing) -> None:
    typing.completes("raftkv-kv import pai", "raftkv-kv import pairs.tsv")
    typing.completes("raftkv-kv import --format tsv pai", "raftkv-kv import --format tsv pairs.tsv")
    typing.completes("raftkv-kv put photo @pho", "raftkv-kv put photo @photo.jpg")
    typing.completes("raftkv-kv put photo @", "raftkv-kv put photo @")
    typing.offers("raftkv-kv put photo @", "pairs.tsv", "photo.jpg")
    typing.completes("raftkv-kv help sc", "raftkv-kv help scan")
    typing.offers("raftkv-kv help ", "put", "scan", "commit", without=("controller", "join"))
    typing.completes("raftkv-kv txn st", "raftkv-kv txn status")
    typing.completes("raftkv-ctl plan jo", "raftkv-ctl plan join")
    typing.completes("raftkv completion ba", "raftkv completion bash")
    typing.completes("raftkv check pai", "raftkv check pairs.tsv")
    typing.offers_nothing("raftkv-kv get pai")  # a key, which nobody asks a server for


def test_the_command_prints_the_scripts_and_needs_no_server() -> None:
    for shell in SHELLS:
        ran = run("raftkv", "completion", shell)
        assert (ran.code, ran.err) == (0, "")
        assert ran.out.decode() == script(shell)
    ran = run("raftkv", "completion", "tcsh")
    assert (ran.code, ran.out) == (2, b"")
    assert "'tcsh' is not one of 'bash', 'zsh', 'fish'" in ran.err
    assert (BIN / "raftkv").exists()
