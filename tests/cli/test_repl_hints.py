"""The dim rest of a command: what it still takes."""

from __future__ import annotations

import pytest
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.document import Document
from prompt_toolkit.history import InMemoryHistory

from raftkv.cli.command_table import CommandTable
from raftkv.cli.programs import command_table
from raftkv.cli.repl_hints import SuggestEarlierLines, hint

KV, CTL = command_table("raftkv-kv"), command_table("raftkv-ctl")


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("", ""),
        ("pu", ""),
        ("put", " KEY VALUE [--if-version N]"),
        ("PUT ", "KEY VALUE [--if-version N]"),
        ("put k", " VALUE [--if-version N]"),
        ("put k ", "VALUE [--if-version N]"),
        ("put k v", " [--if-version N]"),
        ("put k v --if-version", " N"),
        ("put k v --if-version ", "N"),
        ("put --if-version 3 k", " VALUE"),
        ("put k v --if-version 3", ""),
        ("put --", ""),
        ("put -- ", "KEY VALUE [--if-version N]"),
        ("put k --if", ""),
        ("put k v too many", ""),
        ('put k "v', ""),
        ('put k "v\\q', ""),
        ("put k v | wc", ""),
        ("lock ", "KEY …"),
        ("lock a", " [KEY …]"),
        ("lock a b ", "[KEY …]"),
        ("scan", " [PREFIX] [--limit N]"),
        ("begin", ""),
        ("# put", ""),
        ("frobnicate ", ""),
    ],
)
def test_hints(line: str, shown: str) -> None:
    assert hint(KV, line) == shown


@pytest.mark.parametrize("table", [KV, CTL])
def test_the_hint_is_the_usage_line(table: CommandTable) -> None:
    for command in table.commands:
        assert command.name + hint(table, command.name.lower()) == command.usage
        assert f"{command.name} {hint(table, command.name + ' ')}".rstrip() == command.usage


def test_earlier_lines_are_suggested_while_a_word_is_typed() -> None:
    history = InMemoryHistory()
    for line in ("put greeting hello", "get greeting"):
        history.append_string(line)
    suggest, buffer = SuggestEarlierLines(), Buffer(history=history)

    def suggested(text: str) -> str | None:
        found = suggest.get_suggestion(buffer, Document(text))
        return found.text if found is not None else None

    assert suggested("put g") == "reeting hello"
    assert suggested("put ") is None
    assert suggested("x") is None
