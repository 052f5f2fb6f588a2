"""The definiteness rule as a table, deadlines, back-off, and what people are told."""

from __future__ import annotations

import random

import pytest

from raftkv.client.retry import BACKOFF_S_MAX, BACKOFF_S_MIN, Call, brief, judge
from raftkv.protocol import errors
from raftkv.protocol.errors import OutcomeUnknown, RaftKVError, Timeout
from raftkv.protocol.limits import LOCK_WAIT_S_MAX

AGAIN = "asked again, and nothing is unknown"
AGAIN_UNKNOWN = "asked again, its fate unknown"
SAID = "the refusal itself"
UNKNOWN = "OutcomeUnknown"

# error → for a write whose earlier attempts are known to have failed | for one with an unknown attempt
RULES: list[tuple[RaftKVError, str, str]] = [
    (errors.NotLeader("h:1"), AGAIN, AGAIN_UNKNOWN),
    (errors.WrongGroup(1), AGAIN, AGAIN_UNKNOWN),
    (errors.Locked(b"t"), AGAIN, AGAIN_UNKNOWN),
    (errors.Busy("full"), AGAIN, AGAIN_UNKNOWN),
    (errors.Unavailable("no quorum"), AGAIN, AGAIN_UNKNOWN),
    (errors.ShuttingDown(), AGAIN, AGAIN_UNKNOWN),
    (errors.ConnectFailed("h:1", "refused"), AGAIN, AGAIN_UNKNOWN),
    (errors.OutcomeUnknown("in the log"), AGAIN_UNKNOWN, AGAIN_UNKNOWN),
    (errors.ConnectionLost("reset"), AGAIN_UNKNOWN, AGAIN_UNKNOWN),
    (errors.NoAnswer("silence"), AGAIN_UNKNOWN, AGAIN_UNKNOWN),
    (errors.CasMismatch(b"x", 1), SAID, SAID),  # logged: they hold for every attempt
    (errors.VersionMismatch(1), SAID, SAID),
    (errors.Conflict([b"k"]), SAID, SAID),
    (errors.Aborted("no"), SAID, SAID),
    (errors.TooLarge("the value", 1), SAID, UNKNOWN),
    (errors.BadRequest("bad"), SAID, UNKNOWN),
    (errors.Expired("old"), SAID, UNKNOWN),
    (errors.NoSuchGroup(1), SAID, UNKNOWN),
    (errors.GroupExists(1), SAID, UNKNOWN),
    (errors.BadShard(9, 4), SAID, UNKNOWN),
    (errors.LastGroup(1), SAID, UNKNOWN),
    (errors.NoSuchConfig(9), SAID, UNKNOWN),
    (errors.Malformed("bad"), SAID, UNKNOWN),
    (errors.WrongCluster(b"", b""), SAID, UNKNOWN),
    (errors.ServerError(25, "boom"), UNKNOWN, UNKNOWN),
    (errors.ServerError(999, "of a later release"), UNKNOWN, UNKNOWN),
]
IDS = [type(error).__name__ for error, _, _ in RULES]


def outcome(error: RaftKVError, *, unknown: bool) -> str:
    verdict = judge(error, is_write=True, unknown=unknown, what="put 'k'")
    if verdict.step != "raise":
        assert verdict.step == error.retry
        assert verdict.error is None
        return AGAIN_UNKNOWN if verdict.unknown else AGAIN
    if verdict.error is error:
        return SAID
    assert type(verdict.error) is OutcomeUnknown
    assert str(error) in str(verdict.error)
    return UNKNOWN


@pytest.mark.parametrize(("error", "at_first", "after_unknown"), RULES, ids=IDS)
def test_the_rule_for_writes(error: RaftKVError, at_first: str, after_unknown: str) -> None:
    assert outcome(error, unknown=False) == at_first
    assert outcome(error, unknown=True) == after_unknown


@pytest.mark.parametrize("error", [error for error, _, _ in RULES], ids=IDS)
def test_a_read_has_no_unknown_outcome(error: RaftKVError) -> None:
    verdict = judge(error, is_write=False, unknown=False, what="get 'k'")
    assert not verdict.unknown
    if error.retry == "never":
        assert verdict.error is error
    elif verdict.step != "raise":
        assert verdict.step == error.retry


def make_call(*, is_write: bool = True, timeout_s: float = 10.0) -> Call:
    return Call("put", b"k", is_write=is_write, now=100.0, timeout_s=timeout_s, rng=random.Random(1))


def test_every_history_of_attempts_ends_as_the_rule_says() -> None:
    """Once an attempt is unknown, only a logged refusal can make the whole request definite again."""
    retried = [error for error, first, _ in RULES if first in (AGAIN, AGAIN_UNKNOWN)]
    for first in retried:
        for second in retried:
            call = make_call()
            for error in (first, second):
                call.in_flight = True
                call.judge(error, "h:1")
            unknown = not (first.definite and second.definite)
            given_up = call.given_up("no leader of group 1 answered")
            assert isinstance(given_up, OutcomeUnknown) == unknown
            assert call.may_have_applied == unknown
            with pytest.raises(errors.CasMismatch):
                call.judge(errors.CasMismatch(b"x", 1), "h:1")


def test_at_the_deadline_busy_and_locked_speak_for_themselves_if_nothing_is_unknown() -> None:
    for error in (errors.Busy("full"), errors.Locked(b"t")):
        call = make_call()
        call.judge(error, "h:1")
        assert call.given_up("no leader of group 1 answered") is error
        call.judge(errors.ConnectionLost("reset"), "h:1")
        call.judge(error, "h:1")
        assert isinstance(call.given_up("no leader of group 1 answered"), OutcomeUnknown)


def test_after_the_answer_that_a_key_is_locked_no_attempt_is_made_that_may_not_be_answered() -> None:
    call = Call("put", b"k", is_write=True, now=10.0, timeout_s=1.0, rng=random.Random(1))
    assert call.has_time(10.9)
    call.judge(errors.Locked(b"t" * 16), "a")
    assert call.has_time(10.4)
    assert not call.has_time(10.6)
    assert isinstance(call.given_up("nobody answered"), errors.Locked)
    call.judge(errors.NoAnswer("silence"), "a")
    call.judge(errors.Locked(b"t" * 16), "a")
    assert call.has_time(10.9)  # the outcome is unknown anyway
    assert not call.has_time(11.0)


def test_every_attempt_is_long_enough_to_hear_of_a_lock() -> None:
    for timeout_s in (0.6, 1.0, 3.0, 10.0):
        call = Call("put", b"k", is_write=True, now=0.0, timeout_s=timeout_s, rng=random.Random(1))
        assert call.attempt_s(0.0) > LOCK_WAIT_S_MAX


def test_an_attempt_that_is_out_may_have_applied() -> None:
    assert not make_call().may_have_applied
    call = make_call()
    call.in_flight = True
    assert call.may_have_applied
    assert isinstance(call.given_up("no leader of group 1 answered"), OutcomeUnknown)
    reading = make_call(is_write=False)
    reading.in_flight = True
    assert not reading.may_have_applied


def test_what_people_read() -> None:
    call = make_call()
    call.judge(errors.ConnectFailed("a:1", "connection refused"), "a:1")
    call.judge(errors.NotLeader("c:3"), "b:2")
    call.judge(errors.Unavailable("x" * 200), "c:3")
    error = call.given_up("no leader of group 2 answered")
    assert type(error) is Timeout
    assert str(error) == (
        "put 'k': no leader of group 2 answered within 10 s; tried a:1 (connection refused), "
        "b:2 (not the leader), c:3 (" + "x" * 79 + "…)"
    )
    call.judge(errors.NoAnswer("c:3: no answer within 2 s"), "c:3")
    assert str(call.given_up("no leader of group 2 answered")) == (
        "outcome unknown: put 'k' (no leader of group 2 answered within 10 s; tried a:1 (connection refused), "
        "b:2 (not the leader), c:3 (no answer)) may have applied or may still; read before you try again"
    )
    assert brief(errors.Busy("full")) == "the server is busy: full; try again later"


def test_a_silent_group_is_named_until_it_answers() -> None:
    call = make_call(is_write=False)
    call.silent_gid, call.asked_gid = 2, 1
    call.judge(errors.WrongGroup(5, 2), "a:1")
    assert str(call.given_up("no leader of the controllers answered")) == (
        "put 'k': no replica of group 2 answered within 10 s: start a majority of them again; tried a:1 "
        f"({brief(errors.WrongGroup(5, 2))})"
    )
    call.asked_gid = 2
    call.judge(errors.ConnectFailed("b:1", "connection refused"), "b:1")
    assert "no replica of group 2 answered" in str(call.given_up("no leader of group 2 answered"))
    call.judge(errors.NotLeader(None), "b:2")
    assert "no leader of group 2 answered within 10 s; tried" in str(call.given_up("no leader of group 2 answered"))


def test_silent_servers_get_more_patience_but_never_the_deadline() -> None:
    call = make_call()
    assert call.attempt_s(100.0) == 2.0
    call.judge(errors.NoAnswer("silence"), "a:1")
    assert call.attempt_s(102.0) == 4.0
    call.judge(errors.NoAnswer("silence"), "b:2")
    assert call.attempt_s(102.0) == 4.0
    assert call.attempt_s(109.0) == 1.0
    assert make_call(is_write=False).attempt_s(100.0) == 1.0
    assert make_call(timeout_s=4.0, is_write=False).attempt_s(100.0) == 1.0
    assert make_call(timeout_s=4.0).attempt_s(100.0) == 1.0


def test_back_off_doubles_with_jitter_up_to_its_limit() -> None:
    call = make_call()
    pauses = [call.next_backoff_s() for _ in range(10)]
    for step, pause in enumerate(pauses):
        full = min(BACKOFF_S_MIN * 2**step, BACKOFF_S_MAX)
        assert full / 2 <= pause <= full
    assert len({round(pause, 6) for pause in pauses[5:]}) > 1


def test_an_errand_has_the_same_deadline_and_nothing_unknown() -> None:
    call = make_call()
    call.unknown = True
    errand = call.errand("the shard map")
    assert errand.deadline == call.deadline
    assert not errand.is_write
    assert type(call.judge_final(errors.WrongPeer("x"))) is OutcomeUnknown
