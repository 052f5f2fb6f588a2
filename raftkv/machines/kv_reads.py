"""Scans: one bounded page of a shard's pairs, from one applied state. Must never write."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from raftkv.machines.rows import prefix_end, unpack_value
from raftkv.protocol.limits import SCAN_BYTES_MAX, SCAN_PAIRS_MAX

if TYPE_CHECKING:
    from raftkv.storage.engine import StorageEngine


def read_page(
    engine: StorageEngine,
    value_prefix: bytes,
    prefix: bytes,
    after_key: bytes | None,
    max_pairs: int,
    max_bytes: int,
) -> tuple[list[list[Any]], bool]:
    """Pairs [key, value, version] under the user's `prefix` and after `after_key`, ascending; and whether
    there are more.

    `value_prefix` stands before the user's keys in the engine. The bytes counted are those of keys and
    values. The first pair is given whatever its size, so a page always makes progress.
    """
    pairs_left = max(1, min(max_pairs, SCAN_PAIRS_MAX))
    bytes_left = min(max_bytes, SCAN_BYTES_MAX)
    start = value_prefix + prefix
    if after_key is not None:
        start = max(start, value_prefix + after_key + b"\x00")
    end = prefix_end(value_prefix + prefix)
    page: list[list[Any]] = []
    if start >= end:
        return page, False
    for row_key, row in engine.scan(start, end):
        key = row_key[len(value_prefix) :]
        value, version = unpack_value(row)
        bytes_left -= len(key) + len(value)
        if page and (pairs_left == 0 or bytes_left < 0):
            return page, True
        page.append([key, value, version])
        pairs_left -= 1
    return page, False
