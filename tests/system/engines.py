"""What lies in the engines of daemons that have been stopped: rows, shards, bytes on disk.

Only a graceful stop flushes an engine; after SIGKILL part of the rows is in the log alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from raftkv.machines.rows import DATA_PREFIX, META_PREFIX, unpack_meta
from raftkv.machines.shard_states import ShardState
from raftkv.machines.shards import META_KEY_BYTES
from raftkv.storage.rocks import RocksEngine
from raftkv.storage.store import APPLIED_KEY, read_applied

COMPARED = (b"gc", b"gh", b"gn", META_PREFIX, DATA_PREFIX)
"""What replicas must have in common whatever index each has reached while its group was being stopped."""

Rows = dict[bytes, bytes]


def engine_dir(data_dir: Path) -> Path:
    return data_dir / "engine" / (data_dir / "CURRENT").read_text().strip()


def rows_of(data_dir: Path) -> tuple[int, Rows]:
    """The applied index, and all rows but the store's own."""
    engine = RocksEngine(str(engine_dir(data_dir)))
    try:
        rows = dict(engine.scan(b"\x01", b"\xff"))
        assert APPLIED_KEY not in rows
        return read_applied(str(data_dir), engine).index, rows
    finally:
        engine.close()


def engine_bytes(data_dir: Path) -> int:
    """Of the tables, as they lie there."""
    return sum(path.stat().st_size for path in engine_dir(data_dir).glob("*.sst"))


def wal_bytes(data_dir: Path) -> int:
    return sum(path.stat().st_size for path in (data_dir / "wal").iterdir())


def misplaced(groups: Mapping[int, Sequence[Path]], owners: Sequence[int]) -> tuple[list[str], int]:
    """Problems, and how many rows the shards have: `groups` are the data directories of each group's replicas.

    Each shard's rows must lie in the engines of its owner only, under one incarnation and in the state Serving; nothing
    of a migration may be left; and the replicas of a group must be equal, row for row.
    """
    problems: list[str] = []
    total = 0
    for gid, data_dirs in groups.items():
        contents = [rows_of(data_dir) for data_dir in data_dirs]
        index, rows = contents[0]
        for number, (other_index, other) in enumerate(contents[1:], 1):
            kinds = COMPARED if index != other_index else (b"",)
            differing = [key for key in sorted(rows.keys() | other.keys()) if rows.get(key) != other.get(key)]
            differing = [key for key in differing if key.startswith(kinds)]
            if differing:
                first = differing[0]
                text = f"{data_dirs[0].name} (applied {index}) and {data_dirs[number].name} (applied {other_index})"
                text += (
                    f" differ in {len(differing)} rows, first {first!r}: {rows.get(first)!r} and {other.get(first)!r}"
                )
                problems.append(text[:600])
        total += sum(key.startswith(DATA_PREFIX) for key in rows)
        problems += [f"group {gid}: {text}" for text in _of_one(gid, rows, owners)]
    return problems, total


def _of_one(gid: int, rows: Rows, owners: Sequence[int]) -> Iterator[str]:
    held: dict[int, set[bytes]] = {}
    for key in rows:
        if key.startswith(DATA_PREFIX):
            held.setdefault(int.from_bytes(key[1:3]), set()).add(key[:15])
    serving = set()
    for key in rows:
        if not key.startswith(META_PREFIX):
            continue
        shard = int.from_bytes(key[1:META_KEY_BYTES])
        if len(key) != META_KEY_BYTES:
            yield f"a row of a migration is left of shard {shard}: {key!r}"
        elif (state := unpack_meta(rows[key]).state) is not ShardState.SERVING:
            yield f"shard {shard} is {state.name}"
        else:
            serving.add(shard)
    mine = {shard for shard, owner in enumerate(owners) if owner == gid}
    if serving != mine:
        yield f"serves the shards {sorted(serving)}, owns {sorted(mine)}"
    for shard, prefixes in sorted(held.items()):
        if shard not in mine:
            count = sum(key[:15] in prefixes for key in rows)
            yield f"{count} rows of shard {shard}, which group {owners[shard]} owns"
        elif len(prefixes) > 1:
            yield f"rows of shard {shard} under {len(prefixes)} incarnations"
