"""The exact forms of results, and the exit code each stands for."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator
from io import BytesIO
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raftkv.cli.exit_codes import ExitCode
from raftkv.cli.printers import Printer, json_bytes, printable, ranges, table
from raftkv.cli.results import (
    ClusterHealth,
    Configuration,
    Done,
    Found,
    Missing,
    MoveHealth,
    Pairs,
    ReplicaHealth,
    Result,
    ShardHealth,
    Text,
)
from raftkv.machines.shard_map import ShardMap
from tests.cli.fakes import Shell

MAP = ShardMap(1, (1,) * 10, {1: ("h:1", "h:2", "h:3")})
BINARY = b"\x00\xff\n"


async def pairs_of(*pairs: tuple[bytes, bytes]) -> AsyncIterator[tuple[bytes, bytes]]:
    for pair in pairs:
        yield pair


def show(result: Result, output: str, *, nil: bool = False) -> tuple[bytes, ExitCode]:
    shell = Shell(output=output)
    shell.printer.nil = nil
    code = asyncio.run(shell.printer.show(result))
    return shell.out.getvalue(), code


@pytest.mark.parametrize(
    ("result", "plain"),
    [
        (Done({"version": 7}), b"OK\n"),
        (Found(b"k", b"v", 1), b"v\n"),
        (Found(b"k", b"", 1), b"\n"),
        (Found(b"k", BINARY, 1), BINARY + b"\n"),
        (Missing(b"k"), b""),
        (Configuration(MAP), b"Config #1: {Num:1 Shards:[1 1 1 1 1 1 1 1 1 1] Groups:map[1:[h:1 h:2 h:3]]}\n"),
        (
            Configuration(ShardMap.initial(10)),
            b"Config #0: {Num:0 Shards:[0 0 0 0 0 0 0 0 0 0] Groups:map[]}\n",
        ),
        (Text("a\nb"), b"a\nb\n"),
    ],
)
def test_plain_forms_are_exact(result: Result, plain: bytes) -> None:
    code = ExitCode.NOT_FOUND if isinstance(result, Missing) else ExitCode.DONE
    assert show(result, "plain") == (plain, code)


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (Done({"version": 7}), {"ok": True, "version": 7}),
        (Found(b"k", b"v", 1), {"key": "k", "value": "v", "version": 1}),
        (Found(BINARY, "ü".encode(), 1), {"key": {"b64": "AP8K"}, "value": "ü", "version": 1}),
        (Missing(b"k"), {"key": "k", "value": None}),
        (Configuration(MAP), {"num": 1, "shards": [1] * 10, "groups": {"1": ["h:1", "h:2", "h:3"]}}),
    ],
)
def test_json_is_one_object_a_line(result: Result, expected: dict[str, Any]) -> None:
    out, _ = show(result, "json")
    assert out.count(b"\n") == 1
    assert json.loads(out) == expected


def test_a_shell_shows_nil() -> None:
    assert show(Missing(b"k"), "plain", nil=True) == (b"(nil)\n", ExitCode.NOT_FOUND)
    assert show(Missing(b"k"), "table", nil=True) == (b"(nil)\n", ExitCode.NOT_FOUND)


def test_pairs_in_all_forms() -> None:
    pair = (b"a\tb", b"\xff\\")
    assert show(Pairs(pairs_of(pair, (b"c", b""))), "plain")[0] == b"a\\x09b\t\\xff\\\nc\t\n"
    assert [json.loads(line) for line in show(Pairs(pairs_of(pair)), "json")[0].splitlines()] == [
        {"key": "a\tb", "value": {"b64": "/1w="}}
    ]
    assert show(Pairs(pairs_of(pair)), "table")[0].split() == [b"a\\tb", b"\\xff\\"]
    assert show(Pairs(pairs_of()), "plain") == (b"", ExitCode.DONE)


def test_a_table_cuts_long_values_and_the_other_forms_do_not() -> None:
    long = b"x" * 5000
    assert show(Pairs(pairs_of((b"k", long))), "table")[0].endswith("x… (5000 bytes)\n".encode())
    assert len(show(Pairs(pairs_of((b"k", long))), "table")[0]) < 300
    for output in ("plain", "json"):
        assert long in show(Pairs(pairs_of((b"k", long))), output)[0]
    assert show(Found(b"k", long, 1), "table")[0] == long + b"\n"


@given(st.binary(max_size=50))
def test_json_bytes_are_reversible(data: bytes) -> None:
    import base64

    shown = json.loads(json.dumps(json_bytes(data)))
    assert (base64.b64decode(shown["b64"]) if isinstance(shown, dict) else shown.encode()) == data


@given(st.binary(max_size=50))
def test_nothing_printable_steers_a_terminal(data: bytes) -> None:
    assert printable(data).isprintable()


HEALTHY = ClusterHealth(
    1,
    (
        ReplicaHealth("controller", None, 0, "c:1", "leader", 2, 10, 10, 0),
        ReplicaHealth("shardkv", 1, 1, "g:1", "follower", 3, 20, 18, 2),
    ),
    tuple(ShardHealth(shard, 1, "serving") for shard in range(10)),
    (),
    (),
)


def test_health() -> None:
    out, code = show(HEALTHY, "plain")
    assert code is ExitCode.DONE
    assert out.decode().splitlines() == [
        "GROUP       ID  ADDRESS  STATE     TERM  COMMIT  APPLIED  LAG",
        "controller  0   c:1      leader    2     10      10       0",
        "1           1   g:1      follower  3     20      18       2",
        "",
        "Configuration #1",
        "GROUP  STATE    SHARDS",
        "1      serving  0-9",
        "",
        "healthy",
    ]


class Terminal(BytesIO):
    """A stream that says it is one."""

    def isatty(self) -> bool:
        return True


def test_what_is_unhealthy_has_a_colour_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    down = ReplicaHealth("shardkv", 1, 2, "g:2", "down")
    sick = ClusterHealth(1, (*HEALTHY.replicas, down), HEALTHY.shards, (), ("group 1: the replica at g:2 is down",))

    def shown(output: str, term: str = "xterm", no_color: str = "", stream: BytesIO | None = None) -> list[str]:
        monkeypatch.setenv("TERM", term)
        monkeypatch.setenv("NO_COLOR", no_color)
        stream = stream or Terminal()
        asyncio.run(Printer(output, stream).show(sick))
        return stream.getvalue().decode().splitlines()

    lines = shown("table")
    assert lines[1].startswith("\x1b[1mcontroller  0")
    assert lines[2].startswith("1           1")
    assert lines[3].startswith("\x1b[31m1           2   g:2") and lines[3].endswith("\x1b[0m")
    assert lines[-1] == "\x1b[31mUNHEALTHY: group 1: the replica at g:2 is down\x1b[0m"
    plain = shown("plain")
    assert [line.replace("\x1b[31m", "").replace("\x1b[1m", "").replace("\x1b[0m", "") for line in lines] == plain
    assert plain == shown("table", no_color="1") == shown("table", term="dumb") == shown("table", stream=BytesIO())


def test_unhealthy_is_exit_5_and_says_why() -> None:
    down = ReplicaHealth("shardkv", 1, None, "g:2", "down")
    sick = ClusterHealth(None, (down,), (), (), ("group 1: no leader",))
    for output in ("plain", "table"):
        out, code = show(sick, output)
        assert code is ExitCode.UNHEALTHY
        assert b"UNHEALTHY: group 1: no leader\n" in out
        assert b"1      -   g:2      down   -     -       -        -" in out
    out, code = show(sick, "json")
    assert code is ExitCode.UNHEALTHY
    assert json.loads(out) == {
        "healthy": False,
        "problems": ["group 1: no leader"],
        "config": None,
        "replicas": [
            {
                "role": "shardkv",
                "gid": 1,
                "id": None,
                "addr": "g:2",
                "state": "down",
                "term": None,
                "commit_index": None,
                "applied_index": None,
                "lag": None,
                "left": False,
            }
        ],
        "shards": [],
        "migrations": [],
    }


def test_shards_on_their_way() -> None:
    moving = dataclasses.replace(HEALTHY, moves=(MoveHealth(3, 2, 1, 7, "copy", 4096, 2.5, "group 2 has no leader"),))
    lines = show(moving, "plain")[0].decode().splitlines()
    at = lines.index("SHARD  FROM  TO  PHASE  BYTES  SECONDS  WAITS FOR")
    assert lines[at + 1] == "3      2     1   copy   4096   2        group 2 has no leader"
    assert json.loads(show(moving, "json")[0])["migrations"] == [
        {
            "shard": 3,
            "from": 2,
            "to": 1,
            "config": 7,
            "phase": "copy",
            "bytes": 4096,
            "age_s": 2.5,
            "waits_for": "group 2 has no leader",
            "slowed_by": None,
        }
    ]
    slowed = dataclasses.replace(moving, moves=(MoveHealth(3, 2, 1, 7, "copy", 4096, 2.5, None, "throttled"),))
    assert show(slowed, "plain")[0].decode().splitlines()[at + 1].endswith("2        throttled")
    assert json.loads(show(slowed, "json")[0])["migrations"][0]["slowed_by"] == "throttled"


def test_a_shard_that_waits_at_a_group_that_has_left() -> None:
    left = ReplicaHealth("shardkv", 1, 0, "g:1", "leader", 3, 20, 20, 0, has_left=True)
    move = MoveHealth(0, 1, 3, 7, "waiting", 0, None, "group 3 does not answer")
    shown = dataclasses.replace(HEALTHY, replicas=(left,), moves=(move,))
    lines = show(shown, "plain")[0].decode().splitlines()
    assert lines[1] == "1 (left)  0   g:1      leader  3     20      20       0"
    at = lines.index("SHARD  FROM  TO  PHASE    BYTES  SECONDS  WAITS FOR")
    assert lines[at + 1] == "0      1     3   waiting  0      -        group 3 does not answer"
    whole = json.loads(show(shown, "json")[0])
    assert whole["replicas"][0]["left"] is True
    assert (whole["migrations"][0]["phase"], whole["migrations"][0]["age_s"]) == ("waiting", None)


def test_small_helpers() -> None:
    assert [ranges(numbers) for numbers in ([], [3], [1, 0], [0, 1, 2, 5, 7, 8])] == ["", "3", "0-1", "0-2,5,7-8"]
    assert table(["A", "B"], [["long", "x"]]) == ["A     B", "long  x"]
