"""SCAN, KEYS and DBSIZE: through the shards, page by page.

A cursor is a number for Redis' clients, and a place here, a shard and a key. So this daemon remembers the places that
it gave out; a fixed number of them, the oldest go first. A cursor that isn't known (any more, or at this node) is
refused: it never skips anything silently.
"""

from __future__ import annotations

import random
import re
from collections.abc import AsyncIterator, Sequence
from typing import Any

from raftkv.client.kv import RaftKV
from raftkv.daemons.redis.parser import Request, parse_int
from raftkv.daemons.redis.replies import Refusal
from raftkv.daemons.redis.strings import NOT_AN_INT, SYNTAX

CURSORS_MAX = 4_096
"""Places remembered, of a key each."""
CURSOR_BITS = 63
COUNT_DEFAULT = 10
COUNT_MAX = 10_000
PAGES_MAX = 64
"""Pages that one SCAN asks for: many shards may be empty."""
KEYS_MAX = 100_000
"""That KEYS and DBSIZE go through."""
KEYS_PAGE = 2_000
KEYS_BYTES_MAX = 16 * 1024 * 1024

_TOO_MANY = f"ERR there are more than {KEYS_MAX} keys to go through: use SCAN"

Place = tuple[int, "bytes | None"]
"""The position in the list of shards, and the last key seen there."""


class Scanner:
    """The cursors of one daemon. `rng` makes them: nobody can mistake one of another daemon for its own."""

    def __init__(self, kv: RaftKV, rng: random.Random) -> None:
        self._kv = kv
        self._rng = rng
        self._places: dict[int, Place] = {}

    async def scan(self, args: Request, shards: Sequence[int] | None) -> list[Any]:
        """[cursor, keys]; `shards` are those to go through, None for all. Raise Refusal."""
        cursor = int(args[1]) if args[1].isdigit() and len(args[1]) <= 20 else None
        if cursor is None:
            raise Refusal("ERR invalid cursor")
        pattern, count, kind = _options(args)
        if cursor == 0:
            place: Place = (0, None)
        elif cursor in self._places:
            place = self._places.pop(cursor)
            self._places[cursor] = place  # the youngest again
        else:
            raise Refusal("ERR the cursor isn't known here (any more): begin again with 0, and go on at the same node")
        glob = Glob(pattern)
        numbers = range(await self._kv.shard_count()) if shards is None else shards
        found: list[bytes] = []
        position, after = place
        pages = 0
        while count > 0 and position < len(numbers) and pages < PAGES_MAX:
            page, more = await self._kv.scan_shard(numbers[position], glob.prefix, after=after, limit=count)
            pages += 1
            count -= len(page)
            found += [key for key, _ in page if glob.matches(key)]
            if more:
                after = page[-1][0]
            else:
                position, after = position + 1, None
        if kind not in (None, b"string"):
            found = []
        return [b"%d" % (self._remember((position, after)) if position < len(numbers) else 0), found]

    async def keys(self, pattern: bytes, shards: Sequence[int] | None) -> list[bytes]:
        """All that match. Raise Refusal if that is too much."""
        glob = Glob(pattern)
        found: list[bytes] = []
        found_bytes = 0
        async for key in self._all(glob.prefix, shards):
            if glob.matches(key):
                found.append(key)
                found_bytes += len(key)
                if found_bytes > KEYS_BYTES_MAX:
                    raise Refusal(_TOO_MANY)
        return found

    async def count(self, shards: Sequence[int] | None) -> int:
        """Of all keys. Raise Refusal if that is too many."""
        count = 0
        async for _ in self._all(b"", shards):
            count += 1
        return count

    async def _all(self, prefix: bytes, shards: Sequence[int] | None) -> AsyncIterator[bytes]:
        seen = 0
        for shard in range(await self._kv.shard_count()) if shards is None else shards:
            after: bytes | None = None
            more = True
            while more:
                page, more = await self._kv.scan_shard(shard, prefix, after=after, limit=KEYS_PAGE)
                seen += len(page)
                if seen > KEYS_MAX:
                    raise Refusal(_TOO_MANY)
                for after, _ in page:
                    yield after

    def _remember(self, place: Place) -> int:
        if len(self._places) >= CURSORS_MAX:
            del self._places[next(iter(self._places))]
        cursor = self._rng.getrandbits(CURSOR_BITS) | 1
        self._places[cursor] = place
        return cursor


def _options(args: Request) -> tuple[bytes, int, bytes | None]:
    """(pattern, count, type) of a SCAN. Raise Refusal."""
    pattern, count, kind = b"*", COUNT_DEFAULT, None
    if len(args) % 2:
        raise Refusal(SYNTAX)
    for option, value in zip(args[2::2], args[3::2], strict=True):
        match option.upper():
            case b"MATCH":
                pattern = value
            case b"TYPE":
                kind = value.lower()
            case b"COUNT":
                number = parse_int(value)
                if number is None:
                    raise Refusal(NOT_AN_INT)
                if number < 1:
                    raise Refusal(SYNTAX)
                count = min(number, COUNT_MAX)
            case _:
                raise Refusal(SYNTAX)
    return pattern, count, kind


class Glob:
    """A pattern as Redis has them: * ? [a-z] [^x] and \\ before what is meant literally.

    Its parts between the stars are looked for one after the other, each as early as can be: so the time is bounded by
    the product of both lengths, whatever somebody thinks up.
    """

    def __init__(self, pattern: bytes) -> None:
        parts, literal = _parts(pattern)
        self.prefix = literal
        """All matching keys begin with this."""
        self._parts = [re.compile(part, re.DOTALL) for part in parts]

    def matches(self, key: bytes) -> bool:
        parts = self._parts
        if len(parts) == 1:
            return parts[0].fullmatch(key) is not None
        first = parts[0].match(key)
        if first is None:
            return False
        at = first.end()
        for part in parts[1:-1]:
            found = part.search(key, at)
            if found is None:
                return False
            at = found.end()
        last = parts[-1]
        # No part has a repetition, so each matches strings of one length only.
        start = len(key) - _length(last)
        return start >= at and last.match(key, start) is not None


def _length(part: re.Pattern[bytes]) -> int:
    return part.pattern.count(b"(?:")


def _parts(pattern: bytes) -> tuple[list[bytes], bytes]:
    """The regular expressions of what stands between the stars, a group for each byte; and the literal beginning."""
    parts: list[bytes] = []
    part = b""
    literal, is_literal = b"", True
    at, size = 0, len(pattern)
    while at < size:
        byte = pattern[at : at + 1]
        at += 1
        if byte == b"*":
            if not parts or part:
                parts.append(part)
            part, is_literal = b"", False
            continue
        if byte == b"?":
            part, is_literal = part + b"(?:.)", False
        elif byte == b"[":
            members, at = _set(pattern, at)
            part, is_literal = part + b"(?:%b)" % members, False
        else:
            if byte == b"\\" and at < size:
                byte = pattern[at : at + 1]
                at += 1
            part += b"(?:%b)" % _literal(byte[0])
            if is_literal:
                literal += byte
    return [*parts, part], literal


def _set(pattern: bytes, at: int) -> tuple[bytes, int]:
    """The expression of a set of bytes that begins at `at`, and where the pattern goes on. It need not be closed."""
    size = len(pattern)
    negated = at < size and pattern[at] == ord("^")
    at += negated
    members: set[int] = set()
    while at < size and pattern[at] != ord("]"):
        if pattern[at] == ord("\\") and at + 1 < size:
            members.add(pattern[at + 1])
            at += 2
        elif at + 2 < size and pattern[at + 1] == ord("-"):
            low, high = sorted((pattern[at], pattern[at + 2]))
            members.update(range(low, high + 1))
            at += 3
        else:
            members.add(pattern[at])
            at += 1
    if negated:
        members = set(range(256)) - members
    expression = b"".join(map(_literal, sorted(members)))
    return b"[%b]" % expression if expression else b"(?!)", min(at + 1, size)


def _literal(byte: int) -> bytes:
    return b"\\x%02x" % byte
