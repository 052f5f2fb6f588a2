"""The importer's side of a migration: log entries of the group that gets a shard.

    Absent ── start ──> Importing ── ask ──> Importing, asked ── install ──> Serving
                            └───────── drop ────────┘── drop ──> Absent

While it copies, the import follows the map: a configuration that gives the shard to somebody else ends it, because
nothing was frozen for it. Once it has *asked* it is bound, whatever later configurations say: the holder may have
frozen the shard for it. Only the holder's word lets it go, logged as `drop`: that a later configuration supersedes the
ask, or that the holder has lost the list which the copy is based on.

Why a drop after "list lost" is safe although the same ask may be under way a second time: an ask names its list by
attempt and id, and a list that is gone never comes back (ids are log indices of the holder, and a higher attempt's list
is never replaced by a lower one's). The answer comes from the holder's log, so an ask that had frozen the shard before
would have been answered with yes; one that comes after finds no such list and freezes nothing.

Nothing here may serve a row before `install`, or forget a release that the source hasn't acknowledged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from raftkv.machines.machine import Command
from raftkv.machines.results import OK, Result
from raftkv.machines.rows import (
    META_END,
    META_PREFIX,
    ImportProgress,
    Incarnation,
    ShardMeta,
    import_key,
    pack_gid,
    pack_import,
    release_key,
    split_release_key,
    unpack_gid,
    unpack_import,
)
from raftkv.machines.shard_states import ShardEvent, ShardState
from raftkv.machines.shards import META_KEY_BYTES, Shard, Shards

if TYPE_CHECKING:
    from raftkv.storage.engine import Overlay, StorageEngine


class Imports:
    """The imports of one group, and the releases that it still has to have acknowledged.

    Every command answers [0, whether it changed anything]: one that comes too late changes nothing.
    """

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self.progress: dict[int, ImportProgress] = {}
        self.releases: dict[tuple[int, int], int] = {}
        """(shard, configuration number) → the gid that still holds what has arrived here."""

    def load(self, engine: StorageEngine | None) -> None:
        self.progress.clear()
        self.releases.clear()
        if engine is None:
            return
        for key, row in engine.scan(META_PREFIX, META_END):
            kind = key[META_KEY_BYTES : META_KEY_BYTES + 1]
            if kind == b"i":
                self.progress[int.from_bytes(key[1:META_KEY_BYTES])] = unpack_import(row)
            elif kind == b"r":
                self.releases[split_release_key(key)] = unpack_gid(row)

    def config_taken(self, view: Overlay) -> None:
        """End the imports that nobody is bound to and that the map doesn't want any more."""
        for number, progress in sorted(self.progress.items()):
            shard = self._shards.here[number]
            if not progress.asked and not self._shards.is_ours(number, shard.incarnation.config_num):
                self._end(view, shard)

    def give_up(self, view: Overlay) -> None:
        """All shards are given up: nothing is awaited, and nothing has to be released."""
        for number in self.progress:
            view.delete(import_key(number))
        for number, config_num in self.releases:
            view.delete(release_key(number, config_num))
        self.progress.clear()
        self.releases.clear()

    # ---- commands

    def start(self, view: Overlay, command: Command) -> Result:
        _, number, config_num, attempt, source_gid, list_id = command
        shards = self._shards
        if number in shards.here or not shards.is_ours(number, config_num):
            return [OK, False]
        meta = ShardMeta(ShardState.IMPORTING, Incarnation(config_num, attempt), 0, 0, 0)
        shards.arrive(view, number, ShardEvent.IMPORT_STARTED, meta)
        self._keep(view, number, ImportProgress(source_gid, list_id, False, 0, 0, list_id, 0, 0, b""))
        return [OK, True]

    def chunk(self, view: Overlay, command: Command) -> Result:
        _, number, config_num, attempt, list_id, chunk_number, rows, cursor, index = command
        shard = self._find(number, config_num, attempt, list_id)
        if shard is None or self.progress[number].chunks != chunk_number:
            return [OK, False]
        progress = self.progress[number]
        size_bytes = _write(view, shard, rows)
        next_since = progress.next_since or index
        progress = progress._replace(
            chunks=chunk_number + 1,
            size_bytes=progress.size_bytes + size_bytes,
            cursor=cursor or b"",
            next_since=next_since,
        )
        if cursor is None and not progress.asked:
            progress = progress._replace(passes=progress.passes + 1, since=next_since, next_since=0)
        self._keep(view, number, progress)
        return [OK, True]

    def ask(self, view: Overlay, command: Command) -> Result:
        """Bind this group. What was touched since the last whole pass is what the last one will bring; a page that was
        read before the ask is no part of it, so it counts as a chunk."""
        _, number, config_num, attempt, list_id = command
        shard = self._find(number, config_num, attempt, list_id)
        if shard is None or self.progress[number].asked or self.progress[number].passes == 0:
            return [OK, False]
        progress = self.progress[number]
        self._keep(view, number, progress._replace(asked=True, chunks=progress.chunks + 1, cursor=b""))
        return [OK, True]

    def install(self, view: Overlay, command: Command) -> Result:
        """The last rows, read from the frozen shard, and its counters: from here on it is served here."""
        _, number, config_num, attempt, list_id, chunk_number, rows, revision, last_delete, floor_ms, _ = command
        shard = self._find(number, config_num, attempt, list_id)
        if shard is None or not self.progress[number].asked or self.progress[number].chunks != chunk_number:
            return [OK, False]
        _write(view, shard, rows)
        shard.revision, shard.last_delete_revision, shard.stamp_floor_ms = revision, last_delete, floor_ms
        self._shards.change(view, shard, ShardEvent.INSTALLED)
        source_gid = self.progress.pop(number).source_gid
        view.delete(import_key(number))
        self.releases[number, config_num] = source_gid
        view.put(release_key(number, config_num), pack_gid(source_gid))
        return [OK, True]

    def drop(self, view: Overlay, command: Command) -> Result:
        _, number, config_num, attempt, list_id = command
        shard = self._find(number, config_num, attempt, list_id)
        if shard is None:
            return [OK, False]
        self._end(view, shard)
        return [OK, True]

    def released(self, view: Overlay, command: Command) -> Result:
        _, number, config_num = command
        if self.releases.pop((number, config_num), None) is None:
            return [OK, False]
        view.delete(release_key(number, config_num))
        self._shards.changes += 1
        return [OK, True]

    # ---- inside

    def _find(self, number: int, config_num: int, attempt: int, list_id: int) -> Shard | None:
        """The shard, if exactly this attempt is being imported, by this list."""
        progress = self.progress.get(number)
        if progress is None or progress.list_id != list_id:
            return None
        shard = self._shards.here[number]
        return shard if shard.incarnation == (config_num, attempt) else None

    def _keep(self, view: Overlay, number: int, progress: ImportProgress) -> None:
        self.progress[number] = progress
        view.put(import_key(number), pack_import(progress))

    def _end(self, view: Overlay, shard: Shard) -> None:
        del self.progress[shard.number]
        view.delete(import_key(shard.number))
        self._shards.leave(view, shard, ShardEvent.SUPERSEDED)


def _write(view: Overlay, shard: Shard, rows: list[list[bytes | None]]) -> int:
    """Put what was copied under this group's own prefix; its size in bytes."""
    size_bytes = 0
    for suffix, row in rows:
        assert suffix is not None
        if row is None:
            view.delete(shard.prefix + suffix)
        else:
            view.put(shard.prefix + suffix, row)
        size_bytes += len(suffix) + len(row or b"")
    return size_bytes
