"""Seqs: each shard's own, a bounded window, first come first served, nothing lost by cancellation."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raftkv.client.sessions import WINDOW, Sessions, ShardSession
from tests.client.fakes import run_async


def take(session: ShardSession) -> int:
    seq = session.try_begin()
    assert seq is not None
    return seq


def test_client_ids_are_128_random_bits() -> None:
    ids = {Sessions(random.SystemRandom()).client_id for _ in range(100)}
    assert len(ids) == 100
    assert all(len(client_id) == 16 for client_id in ids)
    assert Sessions(random.Random(1)).client_id == Sessions(random.Random(1)).client_id


def test_seqs_are_counted_per_shard() -> None:
    sessions = Sessions(random.Random(1))
    assert [take(sessions.of_shard(0)), take(sessions.of_shard(1)), take(sessions.of_shard(0))] == [1, 1, 2]


@given(st.lists(st.one_of(st.none(), st.integers(0, WINDOW))))
def test_the_first_unacked_is_the_lowest_out(steps: list[int | None]) -> None:
    """None begins a write; a number ends one of those in flight."""
    session = ShardSession()
    out: list[int] = []
    begun = 0
    for step in steps:
        if step is None:
            seq = session.try_begin()
            if begun + 1 - min(out, default=begun + 1) >= WINDOW:
                assert seq is None
            else:
                assert seq == begun + 1
                begun += 1
                out.append(begun)
        elif out:
            session.end(out.pop(step % len(out)))
        assert session.first_unacked == min(out, default=begun + 1)
        assert session.in_flight == len(out)


def test_the_window_counts_from_the_oldest_not_the_number_in_flight() -> None:
    session = ShardSession()
    seqs = [take(session) for _ in range(WINDOW)]
    for seq in seqs[1:]:
        session.end(seq)
    assert session.in_flight == 1
    assert session.try_begin() is None  # the server still keeps the replies after the first
    session.end(seqs[0])
    assert take(session) == WINDOW + 1


def test_waiters_are_served_in_order_and_cancelled_ones_pass_it_on() -> None:
    async def run() -> None:
        session = ShardSession()
        seqs = [take(session) for _ in range(WINDOW)]
        waiting = [asyncio.ensure_future(session.begin()) for _ in range(5)]
        await asyncio.sleep(0)
        waiting[1].cancel()
        await asyncio.sleep(0)
        session.end(seqs[0])
        waiting[0].cancel()  # it has its seq already
        await asyncio.sleep(0)
        for n in (0, 1):
            with pytest.raises(asyncio.CancelledError):
                await waiting[n]
        assert session.in_flight == WINDOW - 1
        for seq in seqs[1:]:
            session.end(seq)
        got = await asyncio.gather(*waiting[2:])
        assert got == sorted(got)
        assert len(set(got)) == 3
        for seq in got:
            session.end(seq)
        assert session.in_flight == 0
        assert session.first_unacked == max(got) + 1

    run_async(run())


def test_nobody_overtakes_a_waiter() -> None:
    async def run() -> None:
        session = ShardSession()
        seqs = [take(session) for _ in range(WINDOW)]
        waiting = asyncio.ensure_future(session.begin())
        await asyncio.sleep(0)
        session.end(seqs[0])
        assert session.try_begin() is None
        assert await waiting == WINDOW + 1

    run_async(run())


def test_one_cancelled_in_the_turn_in_which_its_turn_comes_is_only_cancelled() -> None:
    async def run() -> None:
        session = ShardSession()
        seqs = [take(session) for _ in range(WINDOW)]
        waiting = asyncio.create_task(session.begin())
        await asyncio.sleep(0)
        waiting.cancel()
        session.end(seqs[0])
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert session.in_flight == WINDOW - 1
        assert take(session) == WINDOW + 1

    run_async(run())
