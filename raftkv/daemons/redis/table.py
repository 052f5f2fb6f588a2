"""Every command: how many words it takes, where its keys are, what kind it is, and what it does.

One table for the dispatch and for COMMAND, which clients ask where a command's keys are.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Any, Final

from raftkv.daemons.redis import strings
from raftkv.daemons.redis.parser import Request
from raftkv.daemons.redis.replies import Refusal, Status
from raftkv.daemons.redis.strings import View

NAME_SHOWN_BYTES = 128


class Kind(IntEnum):
    """How a command is carried out."""

    NOW = 0
    """At once; it isn't about keys."""
    READ = 1
    """Reads keys, of one applied state."""
    WRITE = 2
    """Writes without reading first."""
    CHANGE = 3
    """Reads one key and writes it."""
    TRANSACTION = 4
    """Reads and writes several keys."""
    WALK = 5
    """Goes through the shards, page by page."""
    CONTROL = 6
    """Begins, ends or prepares a transaction."""


class Spec:
    """One command. `arity` counts its name; negative: at least so many. Keys: from `first` to `last` (negative: from
    the end), every `step`; first 0: none."""

    __slots__ = ("arity", "first", "flags", "kind", "last", "name", "run", "step")

    def __init__(
        self,
        name: str,
        arity: int,
        kind: Kind,
        flags: str,
        first: int = 0,
        last: int = 0,
        step: int = 0,
        run: Callable[[View, Request], Any] | None = None,
    ) -> None:
        self.name = name
        self.arity = arity
        self.kind = kind
        self.flags = tuple(flags.split())
        self.first = first
        self.last = last
        self.step = step
        self.run = run

    def keys(self, args: Request) -> Request:
        """The keys among the words."""
        if not self.first:
            return []
        last = self.last if self.last >= 0 else len(args) + self.last
        return args[self.first : last + 1 : self.step]

    def has_arity(self, args: Request) -> bool:
        return len(args) == self.arity if self.arity > 0 else len(args) >= -self.arity

    def check_arity(self, args: Request) -> None:
        """Raise Refusal."""
        if not self.has_arity(args):
            raise Refusal(f"ERR wrong number of arguments for '{self.name}' command")

    def kind_of(self, args: Request) -> Kind:
        """What kind it is with these words."""
        if self.run is strings.set_:
            return Kind.WRITE if strings.is_plain_set(args) else Kind.CHANGE
        if self.run is strings.delete:
            return Kind.WRITE if len(args) == 2 else Kind.TRANSACTION
        return self.kind

    def bound(self, args: Request) -> Callable[[View], Any]:
        """What it does with these words, to a view of its keys."""
        run = self.run
        assert run is not None, self.name
        return lambda view: run(view, args)

    def described(self) -> list[Any]:
        """As COMMAND shows it."""
        flags = [Status(flag.encode()) for flag in self.flags]
        category = b"@write" if "write" in self.flags else b"@read" if "readonly" in self.flags else b"@connection"
        return [
            self.name.encode(), self.arity, flags, self.first, self.last, self.step,
            [Status(category)], [], [], [],
        ]  # fmt: skip


def find(name: bytes) -> Spec | None:
    """The command of that name, in any case."""
    return _BY_NAME.get(name) or _BY_NAME.get(name.lower())


def unknown(args: Request) -> Refusal:
    """The error for a command that isn't there, in Redis' words."""
    name = args[0][:NAME_SHOWN_BYTES].decode("utf-8", "replace")
    shown = ""
    for arg in args[1:]:
        if len(shown) >= NAME_SHOWN_BYTES:
            break
        shown += f"'{arg[: NAME_SHOWN_BYTES - len(shown)].decode('utf-8', 'replace')}' "
    return Refusal(f"ERR unknown command '{name}', with args beginning with: {shown}")


_READ: Final = "readonly fast"
_WRITE: Final = "write denyoom fast"
_MANY: Final = "write denyoom"
_NOW: Final = "loading stale fast"
_TXN: Final = "noscript loading stale fast"

SPECS: Final = (
    Spec("get", 2, Kind.READ, _READ, 1, 1, 1, strings.get),
    Spec("mget", -2, Kind.READ, _READ, 1, -1, 1, strings.mget),
    Spec("strlen", 2, Kind.READ, _READ, 1, 1, 1, strings.strlen),
    Spec("exists", -2, Kind.READ, _READ, 1, -1, 1, strings.exists),
    Spec("touch", -2, Kind.READ, _READ, 1, -1, 1, strings.exists),
    Spec("type", 2, Kind.READ, _READ, 1, 1, 1, strings.type_),
    Spec("ttl", 2, Kind.READ, _READ, 1, 1, 1, strings.ttl),
    Spec("pttl", 2, Kind.READ, _READ, 1, 1, 1, strings.ttl),
    Spec("expiretime", 2, Kind.READ, _READ, 1, 1, 1, strings.ttl),
    Spec("pexpiretime", 2, Kind.READ, _READ, 1, 1, 1, strings.ttl),
    Spec("getex", -2, Kind.READ, _WRITE, 1, 1, 1, strings.getex),
    Spec("persist", 2, Kind.READ, "write fast", 1, 1, 1, strings.persist),
    Spec("expire", -3, Kind.READ, "write fast", 1, 1, 1, strings.no_expiry),
    Spec("pexpire", -3, Kind.READ, "write fast", 1, 1, 1, strings.no_expiry),
    Spec("expireat", -3, Kind.READ, "write fast", 1, 1, 1, strings.no_expiry),
    Spec("pexpireat", -3, Kind.READ, "write fast", 1, 1, 1, strings.no_expiry),
    Spec("setex", 4, Kind.READ, _MANY, 1, 1, 1, strings.no_expiry),
    Spec("psetex", 4, Kind.READ, _MANY, 1, 1, 1, strings.no_expiry),
    Spec("set", -3, Kind.WRITE, _MANY, 1, 1, 1, strings.set_),
    Spec("del", -2, Kind.WRITE, "write", 1, -1, 1, strings.delete),
    Spec("unlink", -2, Kind.WRITE, "write fast", 1, -1, 1, strings.delete),
    Spec("mset", -3, Kind.WRITE, _MANY, 1, -1, 2, strings.mset),
    Spec("msetnx", -3, Kind.TRANSACTION, _MANY, 1, -1, 2, strings.msetnx),
    Spec("setnx", 3, Kind.CHANGE, _WRITE, 1, 1, 1, strings.setnx),
    Spec("getset", 3, Kind.CHANGE, _WRITE, 1, 1, 1, strings.getset),
    Spec("getdel", 2, Kind.CHANGE, "write fast", 1, 1, 1, strings.getdel),
    Spec("append", 3, Kind.CHANGE, _WRITE, 1, 1, 1, strings.append),
    Spec("incr", 2, Kind.CHANGE, _WRITE, 1, 1, 1, strings.incr),
    Spec("decr", 2, Kind.CHANGE, _WRITE, 1, 1, 1, strings.decr),
    Spec("incrby", 3, Kind.CHANGE, _WRITE, 1, 1, 1, strings.incrby),
    Spec("decrby", 3, Kind.CHANGE, _WRITE, 1, 1, 1, strings.decrby),
    Spec("scan", -2, Kind.WALK, "readonly"),
    Spec("keys", 2, Kind.WALK, "readonly"),
    Spec("dbsize", 1, Kind.WALK, "readonly"),
    Spec("multi", 1, Kind.CONTROL, _TXN),
    Spec("exec", 1, Kind.CONTROL, _TXN),
    Spec("discard", 1, Kind.CONTROL, _TXN),
    Spec("watch", -2, Kind.CONTROL, _TXN, 1, -1, 1),
    Spec("unwatch", 1, Kind.CONTROL, _TXN),
    Spec("ping", -1, Kind.NOW, "fast"),
    Spec("echo", 2, Kind.NOW, "fast"),
    Spec("select", 2, Kind.NOW, _NOW),
    Spec("hello", -1, Kind.NOW, f"noscript no_auth {_NOW}"),
    Spec("auth", -2, Kind.NOW, f"noscript no_auth {_NOW}"),
    Spec("quit", -1, Kind.NOW, f"noscript no_auth {_NOW}"),
    Spec("reset", 1, Kind.NOW, f"noscript no_auth {_NOW}"),
    Spec("client", -2, Kind.NOW, "noscript loading stale"),
    Spec("command", -1, Kind.NOW, "loading stale"),
    Spec("config", -2, Kind.NOW, "admin noscript loading stale"),
    Spec("info", -1, Kind.NOW, "loading stale"),
    Spec("cluster", -2, Kind.NOW, "stale"),
    Spec("readonly", 1, Kind.NOW, "stale fast"),
    Spec("readwrite", 1, Kind.NOW, "stale fast"),
)

_BY_NAME: Final[dict[bytes, Spec]] = {spec.name.encode(): spec for spec in SPECS} | {
    spec.name.upper().encode(): spec for spec in SPECS
}
