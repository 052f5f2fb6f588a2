"""The parts of the Redis gateway that need no group: replies, patterns, the table, lanes, cursors."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import hiredis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raftkv.daemons.redis import scanning, strings
from raftkv.daemons.redis.lanes import BATCH_MAX, Lanes
from raftkv.daemons.redis.replies import NO_ARRAY, OK, Refusal, Status, encode, refusal_of
from raftkv.daemons.redis.scanning import Glob, Scanner
from raftkv.daemons.redis.strings import View
from raftkv.daemons.redis.table import SPECS, Kind, find, unknown
from raftkv.protocol import errors
from raftkv.protocol.errors import Busy, NotLeader, RaftKVError

# ---- replies


@pytest.mark.parametrize(
    ("value", "resp2", "resp3"),
    [
        (b"a\r\n", b"$3\r\na\r\n\r\n", b"$3\r\na\r\n\r\n"),
        (None, b"$-1\r\n", b"_\r\n"),
        (NO_ARRAY, b"*-1\r\n", b"_\r\n"),
        (-5, b":-5\r\n", b":-5\r\n"),
        (OK, b"+OK\r\n", b"+OK\r\n"),
        ([1, [b"x", None]], b"*2\r\n:1\r\n*2\r\n$1\r\nx\r\n$-1\r\n", b"*2\r\n:1\r\n*2\r\n$1\r\nx\r\n_\r\n"),
        ({b"a": 1}, b"*2\r\n$1\r\na\r\n:1\r\n", b"%1\r\n$1\r\na\r\n:1\r\n"),
        (Refusal("ERR two\r\nlines"), b"-ERR two  lines\r\n", b"-ERR two  lines\r\n"),
    ],
)
def test_replies(value: Any, resp2: bytes, resp3: bytes) -> None:
    assert encode(value, False) == resp2
    assert encode(value, True) == resp3


def test_what_is_no_reply_is_a_bug() -> None:
    with pytest.raises(TypeError):
        encode(1.5, False)


def test_every_error_of_ours_is_one_of_redis() -> None:
    """An unknown outcome is never told as a refusal that a client may simply repeat."""
    examples: list[RaftKVError] = [
        NotLeader("a:1"), errors.WrongGroup(1, 2), errors.Locked(b"t" * 16), errors.Conflict([b"k"]),
        errors.Aborted("x"), Busy("full"), errors.TooLarge("the key", 5), errors.BadRequest("x"), errors.Expired("x"),
        errors.Timeout("x"), errors.ShuttingDown(), errors.OutcomeUnknown("x"), errors.CommitUnknown(b"t" * 16, "x"),
        errors.NoAnswer("x"), errors.ConnectionLost("x"),
    ]  # fmt: skip
    for error in examples:
        reader = hiredis.Reader()
        reader.feed(encode(refusal_of(error), False))
        text = str(reader.gets())
        assert text.startswith("ERR outcome unknown") is not error.definite, text
        if error.definite:
            assert text.split()[0] in ("BUSY", "TRYAGAIN", "CLUSTERDOWN", "ERR")


# ---- the table


def test_where_keys_are() -> None:
    def keys(*words: bytes) -> list[bytes]:
        spec = find(words[0])
        assert spec is not None
        return spec.keys(list(words))

    assert keys(b"get", b"a") == [b"a"]
    assert keys(b"MGET", b"a", b"b") == [b"a", b"b"]
    assert keys(b"MSet", b"a", b"1", b"b", b"2") == [b"a", b"b"]
    assert keys(b"ping", b"a") == []


def test_every_command_on_keys_says_what_it_does() -> None:
    for spec in SPECS:
        on_keys = spec.kind in (Kind.READ, Kind.WRITE, Kind.CHANGE, Kind.TRANSACTION)
        assert (spec.run is not None) is on_keys, spec.name
        assert spec.step or not spec.first
        encode(spec.described(), True)


def test_commands_that_read_never_write() -> None:
    """They are answered without the log."""
    for spec in SPECS:
        if spec.kind is Kind.READ and spec.run is not None:
            for value in (None, b"5"):
                view = View({b"k": (value, 1)})
                words = [spec.name.encode(), b"k", *[b"1"] * (abs(spec.arity) - 2)]
                try:
                    spec.run(view, words)
                except Refusal:
                    pass
                assert view.written == {}, spec.name


def test_unknown_commands_are_cut() -> None:
    text = str(unknown([b"x" * 1000, b"y" * 1000, b"z"]))
    assert text == f"ERR unknown command '{'x' * 128}', with args beginning with: '{'y' * 128}' "


# ---- views


def test_a_view_sees_its_own_writes() -> None:
    view = View({b"a": (b"1", 7), b"b": (None, 3)})
    assert (view.get(b"a"), view.version(b"a"), view.version(b"b")) == (b"1", 7, None)
    view.put(b"b", b"x")
    view.delete(b"a")
    assert (view.get(b"a"), view.get(b"b")) == (None, b"x")
    view.delete(b"b")
    assert view.changes == {b"a": None}  # b wasn't there before either


def test_replies_have_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strings, "REPLY_BYTES_MAX", 10)
    view = View({b"a": (b"123456", 1)})
    with pytest.raises(Refusal, match="more than 10 bytes"):
        strings.mget(view, [b"mget", b"a", b"a"])


# ---- patterns


@given(st.text("ab*?", max_size=8), st.text("ab", max_size=8))
def test_stars_and_question_marks(pattern: str, key: str) -> None:
    assert Glob(pattern.encode()).matches(key.encode()) is fnmatchcase(key, pattern)


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        (b"h[ae]llo", [b"hello", b"hallo"], [b"hillo", b"hllo"]),
        (b"h[^e]llo", [b"hallo", b"h\xffllo"], [b"hello"]),
        (b"h[a-c]*", [b"ha", b"hcx"], [b"hd", b"h"]),
        (b"h[c-a]", [b"hb"], [b"hd"]),
        (b"\\*x\\?", [b"*x?"], [b"axb"]),
        (b"[\\]]", [b"]"], [b"\\"]),
        (b"[ab", [b"a"], [b"[ab"]),
        (b"[]x", [], [b"x", b"]x"]),
        (b"a.c+", [b"a.c+"], [b"abcc"]),
        (b"*\n*", [b"a\nb"], [b"ab"]),
        (b"\\", [b"\\"], [b""]),
    ],
)
def test_patterns(pattern: bytes, yes: list[bytes], no: list[bytes]) -> None:
    glob = Glob(pattern)
    assert all(glob.matches(key) for key in yes)
    assert not any(glob.matches(key) for key in no)


def test_a_pattern_s_literal_beginning_narrows_the_scan() -> None:
    assert Glob(b"user:*").prefix == b"user:"
    assert Glob(b"us\\*er?x").prefix == b"us*er"
    assert Glob(b"[u]ser").prefix == b""


def test_no_pattern_takes_for_ever() -> None:
    began_s = time.process_time()
    assert not Glob(b"*a" * 30 + b"b").matches(b"a" * 8000)
    assert time.process_time() - began_s < 5


# ---- lanes


class Held:
    """Carries out when the test says so, and can fail."""

    def __init__(self) -> None:
        self.value: bytes | None = None
        self.todo: list[tuple[Any, Callable[[Any, Any], None], Any]] = []

    def transact(self, keys: Sequence[bytes], run: Any, deliver: Any, token: Any) -> None:
        assert list(keys) == [b"k"]
        self.todo.append((run, deliver, token))

    def go_on(self, error: RaftKVError | None = None) -> None:
        run, deliver, token = self.todo.pop(0)
        for _ in range(2):  # as after a conflict: once more, and only the last counts
            view = View({b"k": (self.value, 1)})
            run(view)
        if error is None:
            self.value = view.get(b"k")
        deliver(token, error)


def test_what_waits_for_a_key_makes_one_write() -> None:
    held = Held()
    lanes = Lanes(held.transact)
    answers: list[tuple[int, Any]] = []
    incr = find(b"incr")
    assert incr is not None
    for number in range(BATCH_MAX + 10):
        lanes.add(b"k", incr.bound([b"incr", b"k"]), lambda token, result: answers.append((token, result)), number)
    rounds = 0
    while held.todo:
        held.go_on()
        rounds += 1
    assert rounds == 3
    assert answers == [(number, number + 1) for number in range(BATCH_MAX + 10)]


def test_a_command_that_is_refused_spoils_no_other() -> None:
    held = Held()
    lanes = Lanes(held.transact)
    answers: list[Any] = []
    append, incr = find(b"append"), find(b"incr")
    assert append is not None and incr is not None
    for words in ([b"append", b"k", b"x"], [b"incr", b"k"], [b"append", b"k", b"y"]):
        spec = append if words[0] == b"append" else incr
        lanes.add(b"k", spec.bound(words), lambda token, result: answers.append(result), None)
    held.go_on()
    held.go_on()
    assert answers[0] == 1 and isinstance(answers[1], Refusal) and answers[2] == 2
    lanes.add(b"k", append.bound([b"append", b"k", b"z"]), lambda token, result: answers.append(result), None)
    held.go_on(Busy("full"))
    assert isinstance(answers[3], Busy)
    assert held.value == b"xy"


# ---- cursors


class Shards:
    """Three shards of some keys; the second is empty."""

    def __init__(self) -> None:
        self.keys = {0: [b"a%d" % n for n in range(5)], 1: [], 2: [b"b%d" % n for n in range(4)]}

    async def shard_count(self) -> int:
        return 3

    async def scan_shard(self, shard: int, prefix: bytes, *, after: bytes | None, limit: int) -> Any:
        keys = [key for key in self.keys[shard] if key.startswith(prefix) and (after is None or key > after)]
        return [(key, None) for key in keys[:limit]], len(keys) > limit


async def all_of(scanner: Scanner, *options: bytes) -> list[bytes]:
    cursor, found = b"0", []
    while True:
        cursor, page = await scanner.scan([b"scan", cursor, *options], None)
        found += page
        if cursor == b"0":
            return found


def run(coroutine: Any) -> Any:
    import asyncio

    return asyncio.run(coroutine)


def test_a_scan_finds_every_key_once() -> None:
    scanner = Scanner(Shards(), random.Random(1))  # type: ignore[arg-type]
    for count in (b"1", b"2", b"100"):
        assert run(all_of(scanner, b"COUNT", count)) == [b"a0", b"a1", b"a2", b"a3", b"a4", b"b0", b"b1", b"b2", b"b3"]
    assert run(all_of(scanner, b"MATCH", b"?3", b"COUNT", b"2")) == [b"a3", b"b3"]
    assert run(all_of(scanner, b"TYPE", b"hash")) == []
    assert run(scanner.count(None)) == 9
    assert run(scanner.keys(b"b*", None)) == [b"b0", b"b1", b"b2", b"b3"]
    assert run(scanner.keys(b"*", [2])) == [b"b0", b"b1", b"b2", b"b3"]


def test_a_cursor_can_be_used_twice_and_a_strange_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scanning, "CURSORS_MAX", 3)
    scanner = Scanner(Shards(), random.Random(1))  # type: ignore[arg-type]

    async def script() -> None:
        cursor, first = await scanner.scan([b"scan", b"0", b"count", b"2"], None)
        assert first == [b"a0", b"a1"]
        for _ in range(5):  # each makes a new one; this stays the youngest but one
            assert (await scanner.scan([b"scan", cursor, b"count", b"2"], None))[1] == [b"a2", b"a3"]
        with pytest.raises(Refusal, match="isn't known"):
            await scanner.scan([b"scan", b"12345"], None)
        for _ in range(3):
            await scanner.scan([b"scan", b"0", b"count", b"2"], None)
        with pytest.raises(Refusal, match="isn't known"):
            await scanner.scan([b"scan", cursor], None)

    run(script())


def test_keys_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scanning, "KEYS_MAX", 8)
    scanner = Scanner(Shards(), random.Random(1))  # type: ignore[arg-type]
    with pytest.raises(Refusal, match="use SCAN"):
        run(scanner.keys(b"*", None))


def test_status_is_no_bulk_string() -> None:
    assert encode(Status(b"PONG"), False) == b"+PONG\r\n"
