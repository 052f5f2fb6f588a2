"""Replies and errors into bytes, in RESP2 and RESP3.

A reply is a Python value: bytes (a bulk string), Status (a simple string), int, bool, None (nil), a list, a dict (a map
in RESP3, a flat array in RESP2), NO_ARRAY (the nil of EXEC), or a Refusal.
"""

from __future__ import annotations

from typing import Any, Final

from raftkv.protocol.errors import (
    Aborted,
    Busy,
    Conflict,
    Expired,
    Locked,
    NotLeader,
    RaftKVError,
    TooLarge,
    Unavailable,
    WrongGroup,
)


class Status(bytes):
    """A simple string: one line without data, such as OK."""


class Refusal(Exception):
    """An error reply; its text begins with the error's code in capitals."""


NO_ARRAY: Final = object()
"""What EXEC answers when a watched key has changed."""

OK: Final = Status(b"OK")
PONG: Final = Status(b"PONG")
QUEUED: Final = Status(b"QUEUED")

OK_BYTES: Final = b"+OK\r\n"
NIL_BYTES: Final = {False: b"$-1\r\n", True: b"_\r\n"}
"""By whether it is RESP3."""


def encode(value: Any, resp3: bool) -> bytes:
    """The bytes of one reply."""
    pieces: list[bytes] = []
    _encode(value, resp3, pieces.append)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _encode(value: Any, resp3: bool, put: Any) -> None:
    if type(value) is bytes:
        put(b"$%d\r\n%b\r\n" % (len(value), value))
    elif value is None:
        put(NIL_BYTES[resp3])
    elif type(value) is int:
        put(b":%d\r\n" % value)
    elif type(value) is Status:
        put(b"+%b\r\n" % bytes(value))
    elif isinstance(value, (list, tuple)):
        put(b"*%d\r\n" % len(value))
        for item in value:
            _encode(item, resp3, put)
    elif type(value) is dict:
        put(b"%%%d\r\n" % len(value) if resp3 else b"*%d\r\n" % (2 * len(value)))
        for key, item in value.items():
            _encode(key, resp3, put)
            _encode(item, resp3, put)
    elif isinstance(value, Refusal):
        put(error_line(str(value)))
    elif value is NO_ARRAY:
        put(b"_\r\n" if resp3 else b"*-1\r\n")
    else:
        raise TypeError(f"{value!r} is no reply")


def error_line(text: str) -> bytes:
    """An error's bytes; whatever would end the line in it is a blank."""
    line = text.encode("utf-8", "surrogateescape").translate(_ONE_LINE)
    return b"-%b\r\n" % line


_ONE_LINE = bytes(32 if byte in b"\r\n\0" else byte for byte in range(256))


def refusal_of(error: RaftKVError) -> Refusal:
    """One of our errors as Redis would say it: by the code that its clients know, if there is one."""
    if not error.definite:
        return Refusal(
            f"ERR outcome unknown: it may have been done, or may still be; read before a second try ({error})"
        )
    if isinstance(error, Busy):
        return Refusal(f"BUSY {error}")
    if isinstance(error, (Locked, Conflict, Aborted)):
        return Refusal(f"TRYAGAIN {error}")
    if isinstance(error, (Unavailable, NotLeader, WrongGroup, Expired)):
        return Refusal(f"CLUSTERDOWN {error}")
    return Refusal(f"ERR {error}")


def can_go_elsewhere(result: Any) -> bool:
    """Whether it is certain that nothing was done, and another way may lead to it."""
    return isinstance(result, RaftKVError) and result.definite and not isinstance(result, (Busy, TooLarge))
