"""Colours: every part of a line has its own, and what can't be right is red; while it is typed it isn't wrong yet."""

from __future__ import annotations

import pytest
from hypothesis import given
from prompt_toolkit.document import Document

from raftkv.cli.programs import command_table
from raftkv.cli.repl_highlighting import LineLexer, styled
from tests.cli.test_typed_line import LINES

KV, CTL = command_table("raftkv-kv"), command_table("raftkv-ctl")


def names(line: str, program: str = "kv") -> list[tuple[str, str]]:
    pieces = styled(KV if program == "kv" else CTL, line)
    return [(style.removeprefix("class:line."), text) for style, text in pieces if text.strip()]


@pytest.mark.parametrize(
    ("line", "pieces"),
    [
        ("put k v", [("command", "put"), ("", "k"), ("", "v")]),
        ("Put k 5", [("command", "Put"), ("", "k"), ("number", "5")]),
        ("scan --limit 3", [("command", "scan"), ("option", "--limit"), ("number", "3")]),
        ('put "a\\n" x', [("command", "put"), ("string", '"a'), ("escape", "\\n"), ("string", '"'), ("", "x")]),
        ("put 'a\\n'", [("command", "put"), ("string", "'a\\n'")]),
        ('put "a\\q" x', [("command", "put"), ("string", '"a'), ("wrong", '\\q"'), ("", "x")]),
        ('put "a"b', [("command", "put"), ("string", '"a"'), ("wrong", "b")]),
        ("# note", [("comment", "# note")]),
        ("frob k", [("wrong", "frob"), ("", "k")]),
        ("get a b", [("command", "get"), ("", "a"), ("wrong", "b")]),
        ("get k --limit 5", [("command", "get"), ("", "k"), ("wrong", "--limit"), ("number", "5")]),
        ("get k --frob x", [("command", "get"), ("", "k"), ("wrong", "--frob"), ("wrong", "x")]),
        ("scan --limit x p", [("command", "scan"), ("option", "--limit"), ("wrong", "x"), ("", "p")]),
        ("get --pipeline 3", [("command", "get"), ("wrong", "--pipeline"), ("number", "3")]),
        ("get k | wc -l", [("command", "get"), ("", "k"), ("pipe", "|"), ("shell", " wc -l")]),
        ("txn state x", [("command", "txn"), ("wrong", "state"), ("", "x")]),
        ("put -- -o x", [("command", "put"), ("option", "--"), ("", "-o"), ("", "x")]),
        ("get a\nfrob x", [("command", "get"), ("", "a"), ("wrong", "frob"), ("", "x")]),
    ],
)  # fmt: skip
def test_pieces(line: str, pieces: list[tuple[str, str]]) -> None:
    assert names(line) == pieces


@pytest.mark.parametrize(
    "line", ["pu", "get k --for", "get k -o j", "txn sta", 'put "a\\', 'put "a\\x4', "scan --limit"]
)
def test_what_is_unfinished_is_not_wrong_yet(line: str) -> None:
    assert "wrong" not in [name for name, _ in names(line)]


@given(LINES)
def test_nothing_of_the_line_is_lost(line: str) -> None:
    assert "".join(text for _, text in styled(KV, line)) == line


def test_line_by_line() -> None:
    text = 'put k "a\nb" 3\nget k'
    lines = LineLexer(KV).lex_document(Document(text))
    assert ["".join(piece[1] for piece in lines(number)) for number in range(3)] == text.split("\n")
    assert lines(1)[0][:2] == ("class:line.string", 'b"')
    assert lines(3) == []


def test_commands_of_the_other_program_are_wrong() -> None:
    assert names("leave 1 --force", "ctl")[0] == ("command", "leave")
    assert names("leave 1 --force")[0] == ("wrong", "leave")
