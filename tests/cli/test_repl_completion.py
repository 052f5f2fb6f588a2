"""What completion offers, from the command table and what the session knows; nothing is asked of anybody."""

from __future__ import annotations

from pathlib import Path

import pytest

from raftkv.cli.command_table import parse
from raftkv.cli.programs import command_table
from raftkv.cli.repl_completion import candidates
from raftkv.cli.repl_known import KEY_BYTES_MAX, KEYS_MAX, Known
from raftkv.cli.words import split_words
from raftkv.machines.shard_map import ShardMap

KV, CTL = command_table("raftkv-kv"), command_table("raftkv-ctl")
MAP = ShardMap(3, (1, 1, 2, 12), {1: ("g1:1",), 2: ("g2:1", "g2:2"), 12: ("g12:1",)})


def known() -> Known:
    made = Known()
    made.shard_map = MAP
    made.note_keys([b"greeting", b"great day", b"User", b"b\xff"])
    made.note_txid("0a" * 16)
    return made


def texts(line: str, program: str = "kv", *, asked: bool = True) -> list[str]:
    return [found.text for found in candidates(KV if program == "kv" else CTL, known(), line, asked=asked)]


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("ge", ["get"]),
        ("GE", ["Get"]),
        ("Ge", ["Get"]),
        ("c", ["cas", "commit"]),
        ("nothing", []),
        ("get gre", ['"great day"', "greeting"]),
        ("get us", []),
        ("get U", ["User"]),
        ('get "gr', ['"great day"', "greeting"]),
        ("get 'great ", ['"great day"']),
        ('get "b\\xf', ['"b\\xff"']),
        ("put greeting ", []),
        ("lock greeting gree", ["greeting"]),
        ("scan --limit", ["--limit"]),
        ("scan --LIM", ["--limit"]),
        ("scan -", ["--limit", "--output", "--timeout"]),
        ("scan --limit 5 -", ["--output", "--timeout"]),
        ("get k -o ", ["plain", "json", "table"]),
        ("get k -o J", ["json"]),
        ("get k --output=t", ["table"]),
        ("get k ", ["--for-update", "--output", "--timeout"]),
        ("import x --format ", ["tsv", "jsonl"]),
        ("txn ", ["status"]),
        ("txn status ", ["0a" * 16]),
        ("help c", ["cas", "commit"]),
        ("# ge", []),
        ("get greeting | gr", []),
        ('get "\\q', []),
        ("put a 1\nget gree", ["greeting"]),
    ],
)
def test_candidates(line: str, offered: list[str]) -> None:
    assert texts(line) == offered


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("leave ", ["1", "12", "2"]),
        ("leave 1", ["1", "12"]),
        ("leave 2,1", ["1", "12"]),
        ("leave 2 --", ["--no-wait", "--force", "--yes", "--output", "--timeout"]),
        ("move ", ["0", "1", "2", "3"]),
        ("move 3 ", ["1", "12", "2"]),
        ("plan ", ["Join", "Leave"]),
        ("plan l", ["Leave"]),
        ("join ", []),
    ],
)
def test_groups_and_shards(line: str, offered: list[str]) -> None:
    assert sorted(texts(line, "ctl")) == sorted(offered)


def test_what_is_offered_says_what_it_is() -> None:
    (found,) = candidates(CTL, known(), "leave 2")
    assert (found.start, found.text, found.meta) == (6, "2", "shards 2 at g2:1, g2:2")
    (found,) = candidates(CTL, known(), "leave 1,2")
    assert (found.start, found.text) == (8, "2")
    (found,) = candidates(CTL, known(), "move 3")
    assert found.meta == "of group 12"
    (found,) = candidates(KV, known(), "sca")
    assert found.meta == "print keys that begin with PREFIX and their values, in key order"


def test_unasked_it_waits_for_a_beginning_and_is_silent_at_the_end() -> None:
    assert texts("", asked=False) == []
    assert texts("get ", asked=False) == []
    assert texts("get g", asked=False) == ['"great day"', "greeting"]
    assert texts("get", asked=False) == []
    assert texts("get greeting", asked=False) == []
    assert len(texts("", asked=True)) == len(KV.commands)


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("pairs.tsv", "pairs.jsonl", ".hidden", "a b"):
        (tmp_path / name).write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "inside").write_text("")
    assert texts("import ") == ["folder/", "pairs.jsonl", "pairs.tsv"]
    assert texts("import pairs.t") == ["pairs.tsv"]
    assert texts("import folder/") == ["folder/inside"]
    assert texts("import /no/such/") == []
    (found,) = candidates(KV, known(), "put k @pairs.t")
    assert (found.start, found.text) == (7, "pairs.tsv")
    assert texts("put k @@p") == []


def test_every_kind_of_word_in_the_tables_is_known_to_completion() -> None:
    kinds = {argument.completes for table in (KV, CTL) for row in table.commands for argument in row.arguments}
    assert kinds - {""} == {"keys", "gids", "shards", "txids", "files", "commands"}


def test_what_the_session_knows_is_bounded() -> None:
    made = Known()
    made.note_keys(b"k%d" % number for number in range(KEYS_MAX + 10))
    made.note_keys([b"k10", b"x" * (KEY_BYTES_MAX + 1), b""])
    made.note_keys([b"new"])
    assert len(made.keys(b"")) == KEYS_MAX
    kept = {*made.keys(b"")}
    assert kept >= {b"new", b"k10", b"k12"}
    assert not kept & {b"k9", b"k11", b""}  # met before all others


def test_keys_that_are_typed_are_known() -> None:
    made = Known()
    for line in ("put a v", "lock b c", "scan d", "help Put"):
        made.note_call(parse(KV, split_words(line.encode()), environment={}).call())
    assert made.keys(b"") == [b"a", b"b", b"c"]
