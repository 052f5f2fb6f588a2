"""What the commands on keys do, each a function of a view of its keys: it reads, decides, writes, returns the reply.

They never wait and know nothing of groups, so the same ones are carried out on this replica, through the SDK, and
inside EXEC; by whom, and how it is made atomic, is decided elsewhere. What they raise is a Refusal, before they have
written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from raftkv.daemons.redis.parser import Request, parse_int
from raftkv.daemons.redis.replies import OK, Refusal, Status
from raftkv.protocol.limits import KEY_BYTES_MAX, VALUE_BYTES_MAX

INT_MIN, INT_MAX = -(1 << 63), (1 << 63) - 1

SYNTAX = "ERR syntax error"
NOT_AN_INT = "ERR value is not an integer or out of range"
NO_EXPIRY = "ERR keys of this store don't expire yet: EX, PX, EXPIRE and the like are not supported"
TOO_LONG = f"ERR string exceeds maximum allowed size ({VALUE_BYTES_MAX} bytes)"
KEY_TOO_LONG = f"ERR key exceeds maximum allowed size ({KEY_BYTES_MAX} bytes)"

REPLY_BYTES_MAX = 64 * 1024 * 1024
"""Of the values that one command, or one EXEC, answers with."""

Loaded = tuple["bytes | None", int]
"""A key's value and version; of an absent key None, and the version that says so where it was read."""


class View:
    """Some keys as they were read at one instant, and what has been written over them since."""

    __slots__ = ("loaded", "sent_bytes", "written")

    def __init__(self, loaded: Mapping[bytes, Loaded]) -> None:
        self.loaded = loaded
        self.written: dict[bytes, bytes | None] = {}
        self.sent_bytes = 0

    def get(self, key: bytes) -> bytes | None:
        if key in self.written:
            return self.written[key]
        return self.loaded[key][0]

    def put(self, key: bytes, value: bytes) -> None:
        self.written[key] = value

    def delete(self, key: bytes) -> None:
        self.written[key] = None

    def send(self, key: bytes) -> bytes | None:
        """The value, for a reply. Raise Refusal when that has become too large."""
        value = self.get(key)
        if value is not None:
            self.sent_bytes += len(value)
            if self.sent_bytes > REPLY_BYTES_MAX:
                raise Refusal(f"ERR the reply would have more than {REPLY_BYTES_MAX} bytes")
        return value

    def version(self, key: bytes) -> int | None:
        """As it was read; None for an absent key."""
        value, version = self.loaded[key]
        return None if value is None else version

    @property
    def changes(self) -> dict[bytes, bytes | None]:
        """What has to be written: not the deletion of what wasn't there."""
        loaded = self.loaded
        return {
            key: value
            for key, value in self.written.items()
            if value is not None or key not in loaded or loaded[key][0] is not None
        }


# ---- checks


def check_key(key: bytes) -> None:
    if len(key) > KEY_BYTES_MAX:
        raise Refusal(KEY_TOO_LONG)


def check_value(value: bytes) -> None:
    if len(value) > VALUE_BYTES_MAX:
        raise Refusal(TOO_LONG)


def is_plain_set(args: Request) -> bool:
    """Whether a SET needs nothing but to be written. One whose options are wrong isn't."""
    return len(args) == 3 or (len(args) == 4 and args[3].upper() == b"KEEPTTL")


def set_options(args: Request) -> frozenset[bytes]:
    """The options of a SET among NX, XX, GET. Raise Refusal."""
    found: set[bytes] = set()
    for at in range(3, len(args)):
        option = args[at].upper()
        if option in (b"EX", b"PX", b"EXAT", b"PXAT") and at + 1 < len(args):
            if found & {b"KEEPTTL"}:
                raise Refusal(SYNTAX)
            if parse_int(args[at + 1]) is None:
                raise Refusal(NOT_AN_INT)
            raise Refusal(NO_EXPIRY)
        if option not in (b"NX", b"XX", b"GET", b"KEEPTTL"):
            raise Refusal(SYNTAX)
        found.add(option)
    if found >= {b"NX", b"XX"}:
        raise Refusal(SYNTAX)
    return frozenset(found)


def _int(text: bytes) -> int:
    number = parse_int(text)
    if number is None:
        raise Refusal(NOT_AN_INT)
    return number


# ---- one key


def get(view: View, args: Request) -> Any:
    return view.send(args[1])


def set_(view: View, args: Request) -> Any:
    options = set_options(args)
    key, value = args[1], args[2]
    check_key(key)
    check_value(value)
    before = view.get(key)
    answer = view.send(key) if b"GET" in options else OK
    if (b"NX" in options and before is not None) or (b"XX" in options and before is None):
        return answer if b"GET" in options else None
    view.put(key, value)
    return answer


def setnx(view: View, args: Request) -> int:
    check_value(args[2])
    if view.get(args[1]) is not None:
        return 0
    view.put(args[1], args[2])
    return 1


def getset(view: View, args: Request) -> Any:
    check_value(args[2])
    before = view.send(args[1])
    view.put(args[1], args[2])
    return before


def getdel(view: View, args: Request) -> Any:
    before = view.send(args[1])
    if before is not None:
        view.delete(args[1])
    return before


def getex(view: View, args: Request) -> Any:
    if len(args) > 2:
        option = args[2].upper()
        if option in (b"EX", b"PX", b"EXAT", b"PXAT") and len(args) == 4:
            raise Refusal(NO_EXPIRY)
        if option != b"PERSIST" or len(args) > 3:
            raise Refusal(SYNTAX)
    return view.send(args[1])


def append(view: View, args: Request) -> int:
    key, suffix = args[1], args[2]
    before = view.get(key)
    value = suffix if before is None else before + suffix
    check_value(value)
    if before is None or suffix:
        view.put(key, value)
    return len(value)


def strlen(view: View, args: Request) -> int:
    return len(view.get(args[1]) or b"")


def _add(view: View, key: bytes, delta: int, overflow: str = "increment or decrement would overflow") -> int:
    before = view.get(key)
    number = (0 if before is None else _int(before)) + delta
    if not INT_MIN <= number <= INT_MAX:
        raise Refusal(f"ERR {overflow}")
    view.put(key, b"%d" % number)
    return number


def incr(view: View, args: Request) -> int:
    return _add(view, args[1], 1)


def decr(view: View, args: Request) -> int:
    return _add(view, args[1], -1)


def incrby(view: View, args: Request) -> int:
    return _add(view, args[1], _int(args[2]))


def decrby(view: View, args: Request) -> int:
    delta = _int(args[2])
    if delta == INT_MIN:
        raise Refusal("ERR decrement would overflow")
    return _add(view, args[1], -delta)


def type_(view: View, args: Request) -> Status:
    return Status(b"none" if view.get(args[1]) is None else b"string")


def ttl(view: View, args: Request) -> int:
    """No key expires, so there is no more to it."""
    return -2 if view.get(args[1]) is None else -1


def persist(view: View, args: Request) -> int:
    view.get(args[1])
    return 0


def no_expiry(view: View, args: Request) -> NoReturn:
    raise Refusal(NO_EXPIRY)


# ---- several keys


def exists(view: View, args: Request) -> int:
    return sum(view.get(key) is not None for key in args[1:])


def delete(view: View, args: Request) -> int:
    there = [key for key in dict.fromkeys(args[1:]) if view.get(key) is not None]
    for key in there:
        view.delete(key)
    return len(there)


def mget(view: View, args: Request) -> list[bytes | None]:
    return [view.send(key) for key in args[1:]]


def pairs_of(args: Request) -> dict[bytes, bytes]:
    """What an MSET or MSETNX is to write: of a key that stands there twice, the last. Raise Refusal."""
    if len(args) % 2 == 0:
        raise Refusal(f"ERR wrong number of arguments for '{args[0].decode('latin-1').lower()}' command")
    pairs = dict(zip(args[1::2], args[2::2], strict=True))
    for key, value in pairs.items():
        check_key(key)
        check_value(value)
    return pairs


def mset(view: View, args: Request) -> Status:
    for key, value in pairs_of(args).items():
        view.put(key, value)
    return OK


def msetnx(view: View, args: Request) -> int:
    pairs = pairs_of(args)
    if any(view.get(key) is not None for key in pairs):
        return 0
    for key, value in pairs.items():
        view.put(key, value)
    return 1
