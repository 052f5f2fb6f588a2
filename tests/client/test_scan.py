"""The merge of pages: key order, limits, bounded pages, errors."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raftkv.client.scan import HELD_BYTES_MAX, PAGE_PAIRS_MAX, Page, Pair, merged
from raftkv.protocol.errors import Unavailable
from tests.client.fakes import run_async


class Pages:
    """Shards of sorted pairs, served in pages of at most `page_pairs`."""

    def __init__(self, shards: list[list[bytes]], page_pairs: int = 3) -> None:
        self.shards = [sorted(keys) for keys in shards]
        self.page_pairs = page_pairs
        self.fetched: list[tuple[int, bytes | None, int, int]] = []

    async def fetch(self, shard: int, after: bytes | None, pairs_max: int, bytes_max: int) -> Page:
        self.fetched.append((shard, after, pairs_max, bytes_max))
        await asyncio.sleep(0)
        keys = [key for key in self.shards[shard] if after is None or key > after]
        page = keys[: min(self.page_pairs, pairs_max)]
        return Page([(key, b"v" + key, shard) for key in page], len(keys) > len(page))


def all_of(pages: Pages, limit: int | None = None) -> list[Pair]:
    got: list[Pair] = []

    async def run() -> None:
        async for pair in merged(pages.fetch, range(len(pages.shards)), limit):
            got.append(pair)

    run_async(run())
    return got


@settings(deadline=None)
@given(
    st.dictionaries(st.binary(max_size=3), st.integers(0, 4), max_size=40),
    st.integers(1, 5),
    st.one_of(st.none(), st.integers(0, 45)),
)
def test_key_order_over_all_shards(keys: dict[bytes, int], page_pairs: int, limit: int | None) -> None:
    pages = Pages([[key for key, at in keys.items() if at == shard] for shard in range(5)], page_pairs)
    got = all_of(pages, limit)
    assert [key for key, _, _ in got] == sorted(keys)[:limit]
    assert all(keys[key] == shard and value == b"v" + key for key, value, shard in got)


def test_only_what_is_needed_is_fetched() -> None:
    pages = Pages([[b"%02d" % n for n in range(0, 60, 2)], [b"%02d" % n for n in range(1, 60, 2)]])
    assert len(all_of(pages, 4)) == 4
    assert len(pages.fetched) == 2
    assert all(pairs_max == 4 for _, _, pairs_max, _ in pages.fetched)
    pages.fetched.clear()
    assert all_of(pages, 0) == []
    assert pages.fetched == []


def test_pages_share_a_bound() -> None:
    pages = Pages([[b"%04d" % shard] for shard in range(200)])
    assert len(all_of(pages)) == 200
    assert len(pages.fetched) == 200
    assert sum(bytes_max for _, _, _, bytes_max in pages.fetched) <= HELD_BYTES_MAX
    assert all(pairs_max == PAGE_PAIRS_MAX for _, _, pairs_max, _ in pages.fetched)


def test_a_page_that_fails_ends_the_scan_and_nothing_runs_on() -> None:
    class Failing(Pages):
        async def fetch(self, shard: int, after: bytes | None, pairs_max: int, bytes_max: int) -> Page:
            if shard == 1 and after is not None:
                raise Unavailable("gone")
            return await super().fetch(shard, after, pairs_max, bytes_max)

    pages = Failing([[b"a", b"c", b"e", b"g"], [b"b", b"d", b"f", b"h"]], 2)
    got: list[bytes] = []

    async def run() -> None:
        async for key, _, _ in merged(pages.fetch, range(2)):
            got.append(key)

    with pytest.raises(Unavailable):
        run_async(run())
    assert got == [b"a", b"b", b"c", b"d"]


def test_a_consumer_may_stop_at_any_pair() -> None:
    async def run() -> None:
        for stop_after in range(6):
            pairs = merged(Pages([[b"a", b"b"], [b"c", b"d"], [b"e"]], 1).fetch, range(3))
            for _ in range(stop_after):
                await anext(pairs, None)
            await pairs.aclose()  # type: ignore[attr-defined]
        assert len(asyncio.all_tasks()) == 1

    run_async(run())
