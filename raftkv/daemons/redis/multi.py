"""MULTI, EXEC, DISCARD, WATCH and UNWATCH of one connection: a transaction of the store, carried out at EXEC.

The commands are kept until then. EXEC reads all their keys, runs them on that view, and commits under the condition
that nothing it read has changed: so it is serializable with everything else, native transactions too, and never half
done. It begins again when others were faster; only a watched key that isn't at the version it had at WATCH ends it. (A
key that was absent at WATCH and is absent at EXEC counts as unchanged, whatever it was in between.)
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from raftkv.daemons.redis import control, strings
from raftkv.daemons.redis.parser import Request
from raftkv.daemons.redis.replies import NO_ARRAY, OK, QUEUED, Refusal, can_go_elsewhere
from raftkv.daemons.redis.strings import View
from raftkv.daemons.redis.table import Kind, Spec

if TYPE_CHECKING:
    from raftkv.daemons.redis.connection import RedisConnection

NEVER_QUEUED = frozenset(("multi", "exec", "discard", "watch", "quit", "reset"))
QUEUED_MAX = 10_000
"""Commands in a MULTI."""
QUEUED_BYTES_MAX = 16 * 1024 * 1024
"""Bytes of their words."""
WATCHED_MAX = 1_000


class Multi:
    """What the connection has queued and watched. `is_spoilt`: a command was refused, so EXEC will be."""

    def __init__(self, connection: RedisConnection) -> None:
        self._connection = connection
        self.leave()

    def leave(self) -> None:
        """Forget it all."""
        self.is_open = False
        self.is_spoilt = False
        self.queued: list[tuple[Spec, Request]] = []
        self.watched: dict[bytes, int | None] = {}
        self._slot_keys: Request = []
        self._queued_bytes = 0

    def add(self, spec: Spec, args: Request) -> None:
        """Queue a command. Raise Refusal."""
        if spec.kind is Kind.WALK:
            raise Refusal(f"ERR {spec.name.upper()} is not possible inside MULTI")
        if spec.step == 2:
            strings.pairs_of(args)
        keys = spec.keys(args)
        self._connection.check_place([*self._slot_keys, *keys])
        for key in keys:
            strings.check_key(key)
        self._slot_keys = self._slot_keys or keys[:1]
        self._queued_bytes += sum(map(len, args))
        if len(self.queued) >= QUEUED_MAX or self._queued_bytes > QUEUED_BYTES_MAX:
            raise Refusal(f"ERR a MULTI holds at most {QUEUED_MAX} commands, of {QUEUED_BYTES_MAX} bytes")
        self.queued.append((spec, args))
        self._connection.answer(QUEUED)

    def carry_out(self, name: str, args: Request) -> None:
        """One of the commands of this module. Raise Refusal."""
        {
            "multi": self._begin,
            "exec": self._exec,
            "discard": self._discard,
            "watch": self._watch,
            "unwatch": self._unwatch,
        }[name](args)

    def _begin(self, args: Request) -> None:
        if self.is_open:
            self._connection.answer(Refusal("ERR MULTI calls can not be nested"))  # which doesn't spoil it
            return
        self.is_open, self.is_spoilt = True, False
        self._connection.answer(OK)

    def _discard(self, args: Request) -> None:
        if not self.is_open:
            raise Refusal("ERR DISCARD without MULTI")
        self.leave()
        self._connection.answer(OK)

    # ---- WATCH

    def _watch(self, args: Request) -> None:
        connection = self._connection
        if self.is_open:
            connection.answer(Refusal("ERR WATCH inside MULTI is not allowed"))
            return
        new = [key for key in dict.fromkeys(args[1:]) if key not in self.watched]
        connection.check_place([*self.watched, *new])
        for key in new:
            strings.check_key(key)
        if len(self.watched) + len(new) > WATCHED_MAX:
            raise Refusal(f"ERR at most {WATCHED_MAX} keys can be watched")
        if not new:
            connection.answer(OK)
            return
        connection.wait()
        listener = connection.listener
        run = partial(self._note_versions, new)
        if listener.direct.all_here(new):
            listener.direct.transact(new, run, self._watch_noted, (new, run))
        else:
            listener.forward.transact(new, run, connection.arrived, None)

    def _note_versions(self, keys: Request, view: View) -> Any:
        for key in keys:
            self.watched[key] = view.version(key)
        return OK

    def _watch_noted(self, token: tuple[Request, Any], result: Any) -> None:
        connection = self._connection
        if can_go_elsewhere(result) and not connection.is_gone:
            connection.listener.forward.transact(*token, connection.arrived, None)
        else:
            connection.arrived(None, result)

    def _unwatch(self, args: Request) -> None:
        self.watched = {}
        self._connection.answer(OK)

    # ---- EXEC

    def _exec(self, args: Request) -> None:
        if not self.is_open:
            raise Refusal("ERR EXEC without MULTI")
        if self.is_spoilt:
            self.leave()
            raise Refusal("EXECABORT Transaction discarded because of previous errors.")
        keys = self._keys()
        self._connection.wait()
        direct = self._connection.listener.direct
        if not keys:
            self._exec_done(False, self._run(View({})))
        elif direct.all_here(keys):
            direct.transact(keys, self._run, self._exec_done, True)
        else:
            self._exec_elsewhere()

    def _keys(self) -> list[bytes]:
        queued = (key for spec, args in self.queued for key in spec.keys(args))
        return list(dict.fromkeys((*self.watched, *queued)))

    def _exec_elsewhere(self) -> None:
        self._connection.listener.forward.transact(self._keys(), self._run, self._exec_done, False)

    def _exec_done(self, was_here: bool, result: Any) -> None:
        if self._connection.is_gone:
            return
        if was_here and can_go_elsewhere(result):
            self._exec_elsewhere()
            return
        self.leave()
        self._connection.arrived(None, result)

    def _run(self, view: View) -> Any:
        """All of it, on a view of its keys: the replies. Maybe more than once."""
        if any(view.version(key) != version for key, version in self.watched.items()):
            return NO_ARRAY
        replies: list[Any] = []
        for spec, args in self.queued:
            try:
                if spec.run is not None:
                    replies.append(spec.run(view, args))
                elif spec.kind is Kind.CONTROL:
                    replies.append(OK)  # UNWATCH, too late
                else:
                    replies.append(control.now(self._connection, spec.name, args))
            except Refusal as refusal:
                replies.append(refusal)
        return replies
