"""The engine over RocksDB (rocksdict), without RocksDB's own WAL: the Raft log is the WAL.

Measured with rocksdict 0.3.29, which decides what runs where: `open`, `write`, `get` and `checkpoint` hold
the GIL; `flush(wait=True)`, `compact_range` and `close` release it. So `flush` runs in this engine's own
thread, and a checkpoint follows a flush there: what then holds the GIL is a few milliseconds. `compact_range` has
a thread for itself, so that no flush waits for it. Tables that a range delete covers whole are dropped unread:
60 MB go in a tenth of a second.
`batch[key] = value` costs a third of `batch.put(key, value)`.

It must never: write with sync (it holds the GIL over an fsync), use another column family (`flush` flushes
the default one only), or wait in `write` (`no_slowdown`: a stall was measured to freeze every thread).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import rocksdict
from rocksdict import CompactOptions, Rdict, RdictIter, ReadOptions, WriteBatch

from raftkv.storage.disk import Worker
from raftkv.storage.engine import Range
from raftkv.storage.errors import EngineFailed, EngineUnreadable, WriteStall

BLOOM_BITS_PER_KEY = 10
CACHE_BYTES = 64 << 20
WRITE_BUFFER_BYTES = 32 << 20
"""A memtable. The log is flushed away every 16 MiB or so, so this is a bound, not the usual size."""
WRITE_BUFFERS_MAX = 4
LEVEL0_FILES_MAX = 64
"""Every flush makes a level-0 file; no slow-down below that many, for `no_slowdown` makes it a refusal."""
LOG_FILE_BYTES_MAX = 1 << 20


class RocksEngine:
    """See `StorageEngine`."""

    def __init__(
        self,
        directory: str,
        *,
        cache_bytes: int = CACHE_BYTES,
        write_buffer_bytes: int = WRITE_BUFFER_BYTES,
        level0_files_max: int = LEVEL0_FILES_MAX,
    ) -> None:
        self._directory = directory
        self._worker = Worker("rocksdb")
        self._cleaner = Worker("rocksdb-reclaim")
        self._cleaning = False
        self._closing = False
        write_options = rocksdict.WriteOptions()
        write_options.disable_wal = True  # type: ignore[method-assign,assignment] # a property, in fact
        write_options.no_slowdown = True
        try:
            self._db = Rdict(directory, _options(cache_bytes, write_buffer_bytes, level0_files_max))
            self._db.set_write_options(write_options)
        except Exception as error:  # rocksdict raises bare Exception
            raise EngineUnreadable(directory, _one_line(error)) from error

    def get(self, key: bytes) -> bytes | None:
        try:
            value: bytes | None = self._db.get(key)
        except Exception as error:  # a damaged block, for one
            raise EngineFailed(self._directory, _one_line(error)) from error
        return value

    def scan(self, start: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
        if start >= end:
            return iter(())
        options = ReadOptions()
        options.set_iterate_upper_bound(end)
        cursor = self._db.iter(options)
        cursor.seek(start)
        return self._walk(cursor, options)

    def _walk(self, cursor: RdictIter, options: ReadOptions) -> Iterator[tuple[bytes, bytes]]:
        """Raises EngineFailed where a block can't be read: there `Rdict.items` just ends.

        `options` holds the bytes of the upper bound, to which RocksDB keeps no more than a pointer.
        """
        valid, key, value, step = cursor.valid, cursor.key, cursor.value, cursor.next
        while valid():
            yield key(), value()
            step()
        try:
            cursor.status()
        except Exception as error:
            raise EngineFailed(self._directory, _one_line(error)) from error

    def write(self, changes: Mapping[bytes, bytes | None], range_deletes: Sequence[Range] = ()) -> None:
        batch = WriteBatch(raw_mode=True)
        for start, end in range_deletes:
            if start < end:
                batch.delete_range(start, end)
        for key, value in changes.items():
            if value is None:
                del batch[key]
            else:
                batch[key] = value
        try:
            self._db.write(batch)
        except Exception as error:
            if "Write stall" in str(error):
                raise WriteStall(self._directory) from None
            raise EngineFailed(self._directory, _one_line(error)) from error

    async def flush(self) -> None:
        await self._slow(self._db.flush, True)

    async def checkpoint(self, directory: str, keys: Sequence[bytes] = ()) -> list[bytes | None]:
        await self._slow(self._db.flush, True)
        values: list[bytes | None] = await self._slow(_checkpoint, self._db, directory, tuple(keys))
        return values

    async def reclaim(self, ranges: Sequence[Range]) -> None:
        if self._closing:
            return
        try:
            await self._cleaner.run(self._compact, tuple(ranges))
        except Exception as error:
            if not self._closing:
                raise EngineFailed(self._directory, _one_line(error)) from error

    def _compact(self, ranges: Sequence[Range]) -> None:
        self._cleaning = True
        try:
            options = CompactOptions()
            options.set_exclusive_manual_compaction(False)  # or RocksDB's own would wait for ours
            deletes = self._with_deletes()
            for start, end in ranges:
                if self._closing:
                    return
                if any(low < end and high >= start for low, high in deletes):
                    self._db.compact_range(start, end, options)
                    deletes = self._with_deletes()
        finally:
            self._cleaning = False

    def _with_deletes(self) -> list[Range]:
        """First and last key of each table that deletes anything: without one there is nothing to give back."""
        return [(file["start_key"], file["end_key"]) for file in self._db.live_files() if file["num_deletions"]]

    def close(self) -> None:
        self._stop_cleaning()
        self._worker.close()
        self._close_db()

    async def abandon(self) -> None:
        await self._slow(self._stop_cleaning)
        await self._slow(self._close_db)  # RocksDB flushes in it
        self._worker.close()

    def _stop_cleaning(self) -> None:
        """No compaction of ours runs any more: the database must not be closed under one."""
        self._closing = True
        if self._cleaning:
            self._db.cancel_all_background(False)
        self._cleaner.close()

    def _close_db(self) -> None:
        try:
            self._db.close()
        except Exception:
            pass  # its last flush failed: what it held comes back from the log

    def approximate_bytes(self, start: bytes, end: bytes) -> int:
        """From the table files that overlap the range: what is in memory doesn't count."""
        total = 0
        for file in self._db.live_files():
            low, high = file["start_key"], file["end_key"]
            if low < end and high >= start:
                total += file["size"]
        return total

    async def _slow(self, call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return await self._worker.run(call, *arguments)
        except Exception as error:
            raise EngineFailed(self._directory, _one_line(error)) from error


def _checkpoint(db: Rdict, directory: str, keys: tuple[bytes, ...]) -> list[bytes | None]:
    rocksdict.Checkpoint(db).create_checkpoint(directory)
    options = rocksdict.Options(raw_mode=True)
    options.set_max_open_files(16)  # or opening reads every table file
    options.set_skip_stats_update_on_db_open(True)
    copy = Rdict(directory, options, access_type=rocksdict.AccessType.read_only(False))
    try:
        return [copy.get(key) for key in keys]
    finally:
        copy.close()


def _options(cache_bytes: int, write_buffer_bytes: int, level0_files_max: int) -> rocksdict.Options:
    table = rocksdict.BlockBasedOptions()
    table.set_bloom_filter(BLOOM_BITS_PER_KEY, False)
    table.set_block_cache(rocksdict.Cache(cache_bytes))
    table.set_cache_index_and_filter_blocks(True)
    table.set_pin_l0_filter_and_index_blocks_in_cache(True)
    options = rocksdict.Options(raw_mode=True)
    options.create_if_missing(True)
    options.set_block_based_table_factory(table)
    options.set_write_buffer_size(write_buffer_bytes)
    options.set_max_write_buffer_number(WRITE_BUFFERS_MAX)
    options.set_level_zero_slowdown_writes_trigger(level0_files_max)
    options.set_level_zero_stop_writes_trigger(level0_files_max)
    options.set_max_background_jobs(2)
    options.set_keep_log_file_num(2)
    options.set_max_log_file_size(LOG_FILE_BYTES_MAX)
    options.set_stats_dump_period_sec(0)
    return options


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
