"""Merging the shards' pages into one stream in key order.

Holds one page per shard, and fetches the next one of a shard when the last is used up: memory is bounded by
the number of shards, not of keys. Knows nothing of servers: pages come from a function.
"""

from __future__ import annotations

import heapq
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import NamedTuple

from raftkv.client.tasks import gather_ordered

Pair = tuple[bytes, bytes, int]
"""Key, value, version."""

PAGE_PAIRS_MAX = 512
PAGE_BYTES_MIN = 16 * 1024
PAGE_BYTES_MAX = 1024 * 1024
HELD_BYTES_MAX = 8 * 1024 * 1024
"""What the pages of all shards may hold together (a page of one large pair may exceed its share)."""

FIRST_PAGES_AT_ONCE = 16


class Page(NamedTuple):
    """A shard's pairs, keys ascending, and whether there are more after them."""

    pairs: list[Pair]
    more: bool


FetchPage = Callable[[int, bytes | None, int, int], Awaitable[Page]]
"""fetch(shard, after_key or None, pairs_max, bytes_max)"""


class _Cursor:
    """Where the merge is in one shard."""

    __slots__ = ("more", "pairs", "position", "shard")

    def __init__(self, shard: int, page: Page) -> None:
        self.shard = shard
        self.pairs, self.more = page
        self.position = 0


async def merged(
    fetch: FetchPage, shards: Sequence[int], limit: int | None = None, after: bytes | None = None
) -> AsyncIterator[Pair]:
    """The shards' pairs in key order, at most `limit` of those after `after`. Keys are distinct over all shards."""
    if limit == 0 or not shards:
        return
    pairs_max = PAGE_PAIRS_MAX if limit is None else min(PAGE_PAIRS_MAX, limit)
    bytes_max = max(PAGE_BYTES_MIN, min(PAGE_BYTES_MAX, HELD_BYTES_MAX // len(shards)))

    async def first(shard: int) -> _Cursor:
        return _Cursor(shard, await fetch(shard, after, pairs_max, bytes_max))

    cursors = await gather_ordered([first(shard) for shard in shards], FIRST_PAGES_AT_ONCE)
    heap = [(cursor.pairs[0][0], cursor.shard, cursor) for cursor in cursors if cursor.pairs]
    del cursors
    heapq.heapify(heap)
    left = limit if limit is not None else -1
    while heap:
        _, shard, cursor = heap[0]
        pair = cursor.pairs[cursor.position]
        yield pair
        left -= 1
        if left == 0:
            return
        cursor.position += 1
        if cursor.position == len(cursor.pairs) and cursor.more:
            cursor.pairs, cursor.more = await fetch(shard, pair[0], pairs_max, bytes_max)
            cursor.position = 0
        if cursor.position < len(cursor.pairs):
            heapq.heapreplace(heap, (cursor.pairs[cursor.position][0], shard, cursor))
        else:
            heapq.heappop(heap)
