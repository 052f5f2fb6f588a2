"""What completion may offer without asking anybody: the shard map last seen, and the keys that this session has met.

A key is met when it is typed or printed. All of it is bounded, and lost with the session.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeVar

from raftkv.cli.command_table import Call

if TYPE_CHECKING:
    from raftkv.machines.shard_map import ShardMap

T = TypeVar("T")

KEYS_MAX = 2_000
KEY_BYTES_MAX = 200
"""Nobody completes a longer one."""
TXIDS_MAX = 50


class Known:
    """Filled by the shell and the watcher, read by completion."""

    def __init__(self) -> None:
        self.shard_map: ShardMap | None = None
        self._keys: dict[bytes, None] = {}
        self._txids: dict[str, None] = {}

    def keys(self, prefix: bytes) -> list[bytes]:
        """Those that begin so, in order."""
        return sorted(key for key in self._keys if key.startswith(prefix))

    def txids(self) -> list[str]:
        """Of transactions that this session began, the latest first."""
        return [*reversed(self._txids)]

    def note_call(self, call: Call) -> None:
        """Remember the keys that were typed."""
        arguments = [*call.command.arguments]
        for word in call.words:
            if not arguments:
                return
            if arguments[0].completes == "keys" and arguments[0].name == "KEY":
                self.note_keys([word])
            if not arguments[0].many:
                arguments.pop(0)

    def note_keys(self, keys: Iterable[bytes]) -> None:
        """Remember keys; the ones met longest ago are forgotten."""
        for key in keys:
            if 0 < len(key) <= KEY_BYTES_MAX:
                _note(self._keys, key, KEYS_MAX)

    def note_txid(self, txid: str) -> None:
        """Remember a transaction."""
        _note(self._txids, txid, TXIDS_MAX)


def _note(known: dict[T, None], item: T, most: int) -> None:
    known.pop(item, None)
    known[item] = None
    if len(known) > most:
        del known[next(iter(known))]
