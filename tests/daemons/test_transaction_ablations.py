"""Rules of whoever drives transactions, switched off one at a time: each is noticed by the clients' history.

That DECIDE at a group which doesn't serve the shard is no acknowledgement isn't among them: switched off, nothing goes
wrong for good, since the group that gets the shard asks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from raftkv.daemons.transactions import Transactions, Verdict, Work
from raftkv.machines.coordinator import TxnState
from raftkv.machines.participants import NO
from tests.daemons.test_transactions_random import run

Patch = Callable[[pytest.MonkeyPatch], None]
SEEDS = 12
LATER_S = 0.2


def answer_before_the_decision_is_logged(patch: pytest.MonkeyPatch) -> None:
    async def log_end(self: Transactions, command: int, txid: bytes, commit: bool) -> TxnState:
        async def later() -> None:
            await asyncio.sleep(LATER_S)
            await self._propose_surely([command, txid, commit])

        self._start(later(), "decision")
        return TxnState.COMMITTED if commit else TxnState.ABORTED

    patch.setattr(Transactions, "_log_end", log_end)


def one_vote_is_enough(patch: pytest.MonkeyPatch) -> None:
    ask_all = Transactions._ask_for_votes

    def ask_one(self: Transactions, work: Work) -> Verdict:
        parts, work.parts = work.parts, work.parts[:1]
        verdict = ask_all(self, work)
        work.parts = parts
        return verdict

    patch.setattr(Transactions, "_ask_for_votes", ask_one)


def nothing_is_taken_over(patch: pytest.MonkeyPatch) -> None:
    async def take_over(self: Transactions) -> None:
        self._has_taken_over = True
        await self._log_ends()

    patch.setattr(Transactions, "_take_over", take_over)


def a_fence_is_settled_by_the_first_that_answers(patch: pytest.MonkeyPatch) -> None:
    tell = Transactions._tell

    async def tell_one(self: Transactions, work: Work, commit: bool) -> dict[int, int]:
        if work.state != TxnState.BEGUN or work.digest:
            return await tell(self, work, commit)
        await asyncio.sleep(0)
        return dict.fromkeys(work.shards, NO)

    patch.setattr(Transactions, "_tell", tell_one)


ABLATIONS: dict[str, Patch] = {
    "answer before the decision is logged": answer_before_the_decision_is_logged,
    "one vote is enough": one_vote_is_enough,
    "nothing is taken over": nothing_is_taken_over,
    "a fence is settled by the first that answers": a_fence_is_settled_by_the_first_that_answers,
}


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("rule", ABLATIONS)
def test_is_noticed_when_switched_off(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ABLATIONS[rule](monkeypatch)
    with pytest.raises(AssertionError) as noticed:
        for seed in range(2_000, 2_000 + SEEDS):
            run(seed)
    print(noticed.value)
