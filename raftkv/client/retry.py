"""What may be done after a failed attempt: the definiteness rule, deadlines, back-off.

A refusal is definite only for its own attempt (design §6): once an attempt of a write has an unknown
fate, no later refusal means "not done", except one that was logged as the request's reply. This module
must never do I/O: it decides, `calls` acts.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable
from typing import Literal, NamedTuple, TypeVar

from raftkv.protocol.errors import (
    Busy,
    ConnectFailed,
    Locked,
    NoAnswer,
    NotLeader,
    OutcomeUnknown,
    RaftKVError,
    Timeout,
    TlsRefused,
    show,
)
from raftkv.protocol.limits import LOCK_WAIT_S_MAX

BACKOFF_S_MIN = 0.02
BACKOFF_S_MAX = 0.25
"""Short enough that a new leader (elected within a second) is found at once."""

READ_ATTEMPT_S = 1.0
WRITE_ATTEMPT_S = 2.0
"""How long one server may stay silent before another one is asked. Doubled once it has happened, so that a
slow cluster isn't flooded; no more, so that the end of a partition is noticed soon."""

ATTEMPT_S_MIN = 0.02
"""With less time than this left there is no further attempt."""
LOCKED_ATTEMPT_S = LOCK_WAIT_S_MAX + 0.1
"""What an attempt that meets a lock needs, to hear who holds it."""

TRIED_TEXT_MAX = 80

T = TypeVar("T")

Step = Literal["raise", "same", "redirect", "refresh"]


class Verdict(NamedTuple):
    """What follows from an error. `error` is what to raise, for the step 'raise' only."""

    step: Step
    error: RaftKVError | None
    unknown: bool
    """Whether some attempt so far may have applied, or may still."""


def judge(error: RaftKVError, *, is_write: bool, unknown: bool, what: str) -> Verdict:
    """The next step after an attempt ended with `error`, when `unknown` says how earlier ones ended."""
    if error.final:
        return Verdict("raise", error, False)
    unknown = is_write and (unknown or not error.definite)
    if error.retry != "never":
        return Verdict(error.retry, None, unknown)
    if unknown:
        return Verdict("raise", OutcomeUnknown(f"{what} (the last answer: {error})"), True)
    return Verdict("raise", error, False)


class Call:
    """One request of the application, over all its attempts.

    `name` and `key` describe it to people. `deadline` is in the loop's time. `unknown`: an earlier attempt
    of this write may have applied; `in_flight`: an attempt is out, and nothing is known of it yet.
    `visited`: asked since the last pause; `refused`: said that they are not whom we mean; `unreached`: gave no sign of
    life when they were asked last. `mute_s`: when a connection was last given up because nothing came back on it, for
    nobody. `asked_gid`: whom the last attempt went to. `silent_gid`: the group of which no replica could be reached;
    whatever else is asked then, that is what the call fails for. Both are 0 for none.
    """

    __slots__ = (
        "_rng",
        "asked_gid",
        "backoff_s",
        "deadline",
        "in_flight",
        "is_write",
        "key",
        "last_error",
        "mute_s",
        "name",
        "refused",
        "silences",
        "silent_gid",
        "timeout_s",
        "tried",
        "unknown",
        "unreached",
        "visited",
    )

    def __init__(
        self,
        name: str,
        key: bytes | None,
        *,
        is_write: bool,
        now: float,
        timeout_s: float,
        rng: random.Random,
    ) -> None:
        self.name = name
        self.key = key
        self.is_write = is_write
        self.timeout_s = timeout_s
        self.deadline = now + timeout_s
        self.unknown = False
        self.in_flight = False
        self.last_error: RaftKVError | None = None
        self.tried: dict[str, str] = {}
        self.visited: set[str] = set()
        self.refused: set[str] = set()
        self.unreached: set[str] = set()
        self.silences = 0
        self.mute_s = float("-inf")
        self.asked_gid = 0
        self.silent_gid = 0
        self.backoff_s = BACKOFF_S_MIN
        self._rng = rng

    @property
    def what(self) -> str:
        return f"{self.name} {show(self.key)}" if self.key is not None else self.name

    @property
    def may_have_applied(self) -> bool:
        """Whether it would be wrong to say "not done" if the call were stopped now."""
        return self.is_write and (self.unknown or self.in_flight)

    def attempt_s(self, now: float) -> float:
        """How long the next attempt may wait for its answer."""
        patience_s = WRITE_ATTEMPT_S if self.is_write else READ_ATTEMPT_S
        # A short deadline is shared out too: one silent server must not eat it.
        share_s = max(self.timeout_s / 4, LOCKED_ATTEMPT_S)
        patience_s = min(patience_s, share_s) * (2.0 if self.silences else 1.0)
        return min(patience_s, self.deadline - now)

    def has_time(self, now: float) -> bool:
        """Whether another attempt makes sense. One that may not be answered in time would only make a known outcome
        unknown: and after the answer that a key is locked the next one may take as long as waiting for a lock does."""
        if self.last_error is None or self.unknown:
            return now < self.deadline
        needed_s = LOCKED_ATTEMPT_S if type(self.last_error) is Locked else ATTEMPT_S_MIN
        return now + needed_s < self.deadline

    def judge(self, error: RaftKVError, address: str) -> Step:
        """Take note of a failed attempt; return what to do, or raise what the application gets."""
        self.last_error = error
        self.tried[address] = brief(error)
        if type(error) is NoAnswer:
            self.silences += 1
        if isinstance(error, (ConnectFailed, NoAnswer)):
            self.unreached.add(address)
        else:
            self.unreached.discard(address)
            if self.asked_gid == self.silent_gid:
                self.silent_gid = 0
        verdict = judge(error, is_write=self.is_write, unknown=self.unknown, what=self.what)
        self.unknown = verdict.unknown
        self.in_flight = False
        if verdict.error is not None:
            raise verdict.error
        return verdict.step

    def judge_final(self, error: RaftKVError) -> RaftKVError:
        """What the application gets for `error`, after which no attempt is worth while."""
        if self.unknown:
            return OutcomeUnknown(f"{self.what} (the last answer: {error})")
        return error

    def errand(self, name: str) -> Call:
        """A request of ours that this one needs; it has the same deadline."""
        now = self.deadline - self.timeout_s
        return Call(name, None, is_write=False, now=now, timeout_s=self.timeout_s, rng=self._rng)

    def next_backoff_s(self) -> float:
        """The next pause: doubling, with jitter down to a half, so that clients don't move in step."""
        pause_s = self.backoff_s * (0.5 + self._rng.random() / 2)
        self.backoff_s = min(2 * self.backoff_s, BACKOFF_S_MAX)
        return pause_s

    async def before_deadline(self, awaited: Awaitable[T], problem: str) -> T:
        """The result of `awaited`, or `given_up(problem)` when the deadline passes first."""
        try:
            async with asyncio.timeout_at(self.deadline):
                return await awaited
        except TimeoutError:
            raise self.given_up(problem) from None

    def given_up(self, problem: str) -> RaftKVError:
        """The error for a passed deadline; `problem` is, for instance, 'no leader of group 2 answered'.

        A group that is silent is named instead: its shard was looked for elsewhere too, with no better result.
        """
        within = f"within {self.timeout_s:g} s"
        tried = ", ".join(f"{address} ({text})" for address, text in self.tried.items())
        tried = f"; tried {tried}" if tried else ""
        if self.silent_gid:
            problem = f"no replica of group {self.silent_gid} answered"
            tried = f": start a majority of them again{tried}"
        if self.may_have_applied:
            return OutcomeUnknown(f"{self.what} ({problem} {within}{tried})")
        if isinstance(self.last_error, (Busy, Locked)):
            return self.last_error
        return Timeout(f"{self.what}: {problem} {within}{tried}")


def brief(error: RaftKVError) -> str:
    """What came of asking one address, in a few words."""
    if isinstance(error, NotLeader):
        return "not the leader"
    if isinstance(error, NoAnswer):
        return "no answer"
    text = error.reason if isinstance(error, (ConnectFailed, TlsRefused)) else str(error)
    if isinstance(error, ConnectFailed):
        text = text.removeprefix(f"{error.address}: ")
    return text if len(text) <= TRIED_TEXT_MAX else text[: TRIED_TEXT_MAX - 1] + "…"
