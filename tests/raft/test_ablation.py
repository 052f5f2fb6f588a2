"""Each safety rule, switched off, must be caught: proof that the invariants and the schedules can fail.

One rule at a time is replaced in a subclass here. Random schedules must then violate the named invariant within a
bounded number of seeds; for rules that chance seldom puts to the test, a scenario made for it must.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from raftkv.raft.actions import Action, HardState, Persist, Send
from raftkv.raft.changes import Changes
from raftkv.raft.core import Raft
from raftkv.raft.election import Election
from raftkv.raft.entry import Entry
from raftkv.raft.following import Following
from raftkv.raft.invariants import InvariantViolation
from raftkv.raft.log import Log
from raftkv.raft.messages import AppendEntries, AppendReply, RequestVote
from raftkv.raft.reads import Reads
from raftkv.raft.replication import Replication
from tests.raft.scenarios import figure_8, overwritten_twice, stale_ack, two_memberships, vote_and_reboot
from tests.raft.schedules import Schedule


class CommitsOldTerms(Replication):
    """§5.4.2 off: entries of earlier terms are committed by counting."""

    def may_commit(self, index: int) -> bool:
        return True


class NoBarrier(Changes):
    """The own-term barrier of membership changes off."""

    def may_change(self) -> bool:
        return True


class CountsAnyAck(Replication):
    """Acks count for reads whichever round they answer."""

    def on_reply(self, message: AppendReply) -> None:
        super().on_reply(replace(message, round=self.node.round))


class ReadsBeforeNoop(Reads):
    """Reads are not held until the leader has committed in its term."""

    def flush(self) -> None:
        if self.queued is not None and self.node.role == "leader":
            self.node.replication.begin_round()
        else:
            super().flush()

    def round_began(self, round_number: int) -> None:
        term_start = self.node.replication.term_start
        self.node.replication.term_start = 0
        super().round_began(round_number)
        self.node.replication.term_start = term_start


class VotesForAnybody(Election):
    """§5.4.1 off: a vote is granted whatever the candidate's log."""

    def on_request(self, message: RequestVote) -> None:
        message = RequestVote(message.term, message.source, 1 << 40, 1 << 40, message.pre, message.transfer)
        super().on_request(message)


class CountsItselfAtOnce(Log):
    """The leader counts itself before its own fsync."""

    def queue(self, seq: int) -> tuple[Entry, ...]:
        entries = super().queue(seq)
        self.stable_index = self.last_index
        return entries


class ForgetsOverwrites(Log):
    """The ABA rule off: an old fsync vouches for entries that have replaced those it wrote."""

    def truncate(self, index: int) -> None:
        before = [list(completion) for completion in self.pending]
        super().truncate(index)
        for completion, (_, last) in zip(self.pending, before, strict=True):
            completion[1] = last


class CommitsUnmatched(Following):
    """Row 6: the commit index follows the leader's beyond what is known to match."""

    def on_append(self, message: AppendEntries) -> None:
        super().on_append(message)
        node = self.node
        commit = min(message.commit, node.log.last_index)
        if commit > node.commit_index and node.leader == message.source and not node.installing:
            node.replication.commit_to(commit)


class CutsAlways(Following):
    """Row 5: every append cuts the log behind its entries, conflict or not."""

    def on_append(self, message: AppendEntries) -> None:
        self.follow(message.source)
        node = self.node
        end = message.prev_index + len(message.entries)
        known = node.log.term_at(message.prev_index) == message.prev_term
        if known and node.commit_index <= end < node.log.last_index and not node.installing:
            node.log.truncate(end + 1)
            node.changes.truncated(end + 1)
        super().on_append(message)


def part(name: str, kind: type) -> Callable[..., Raft]:
    """A Raft with one part replaced."""

    def make(*args: Any, **state: Any) -> Raft:
        raft = Raft(*args, **state)
        node = raft.node
        if name == "changes":
            node.changes = kind(node, state["start_membership"])
        elif name == "log":
            node.log = kind(state["start_index"], state["start_term"], state["stamp_ms"], state["entries"])
        elif name == "following":
            raft._following = kind(node)
            raft._handlers[AppendEntries] = raft._following.on_append
            node.snapshots.following = raft._following
        else:
            setattr(node, name, kind(node))
        return raft

    return make


class ForgetsVotes(Raft):
    """The vote is not written to disk."""

    def take_actions(self) -> list[Action]:
        actions = super().take_actions()
        for action in actions:
            if isinstance(action, Persist) and action.hard_state is not None:
                action.hard_state = HardState(action.hard_state.term, None)
        return actions


class AcksBeforeSync(Raft):
    """A follower acknowledges entries that are not on its disk yet."""

    def take_actions(self) -> list[Action]:
        actions = super().take_actions()
        for action in actions:
            if isinstance(action, Send) and isinstance(action.message, AppendReply):
                action.after = 0
        return actions


RANDOM: dict[str, tuple[Callable[..., Raft], set[str]]] = {
    "up-to-date check": (part("election", VotesForAnybody), {"LeaderCompleteness", "SafetyViolation"}),
    "self-count after fsync": (part("log", CountsItselfAtOnce), {"CommittedOnQuorum"}),
    "ack after fsync": (AcksBeforeSync, {"CommittedOnQuorum"}),
    "no-op before reads": (part("reads", ReadsBeforeNoop), {"LinearizableRead"}),
    "commit only what matches": (part("following", CommitsUnmatched), {"StateMachineSafety", "SafetyViolation"}),
    "cut only conflicts": (part("following", CutsAlways), {"CommittedOnQuorum", "LeaderCompleteness"}),
}

DIRECTED: dict[str, tuple[Callable[..., Raft], Callable[..., object], set[str]]] = {
    "own-term commit": (part("replication", CommitsOldTerms), figure_8, {"LeaderCompleteness"}),
    "vote persistence": (ForgetsVotes, vote_and_reboot, {"ElectionSafety"}),
    "own-term barrier": (part("changes", NoBarrier), two_memberships, {"LeaderCompleteness"}),
    "ABA rule": (part("log", ForgetsOverwrites), overwritten_twice, {"AckedBeforeDurable"}),
    "fresh round for reads": (part("replication", CountsAnyAck), stale_ack, {"LinearizableRead"}),
}


def first_violation(raft_class: Callable[..., Raft], seeds: range) -> tuple[int, str] | None:
    for seed in seeds:
        try:
            Schedule(seed, raft_class).harm()
        except InvariantViolation as violation:
            return seed, violation.name
        except Exception as error:
            if type(error).__name__ == "SafetyViolation":
                return seed, "SafetyViolation"
            raise
    return None


@pytest.mark.parametrize("rule", RANDOM)
def test_random_schedules_notice_without(rule: str) -> None:
    raft_class, expected = RANDOM[rule]
    found = first_violation(raft_class, range(300))
    assert found is not None, f"300 schedules without {rule}, and nothing was noticed"
    assert found[1] in expected, found


@pytest.mark.parametrize("rule", DIRECTED)
def test_a_scenario_notices_without(rule: str) -> None:
    raft_class, scenario, expected = DIRECTED[rule]
    scenario(Raft)  # with the rule nothing is violated
    with pytest.raises(InvariantViolation) as caught:
        scenario(raft_class)
    assert caught.value.name in expected, caught.value
