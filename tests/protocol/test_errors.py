"""The error tree: codes that never change, a wire form for each class, one line of text."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raftkv.protocol import errors
from raftkv.protocol.errors import BY_CODE, Malformed, RaftKVError, from_result, from_wire
from raftkv.protocol.frames import decode_body, encode_body
from tests.protocol.test_frames import values

EXAMPLES: list[tuple[int, RaftKVError]] = [
    (1, errors.NotLeader("h:1")),
    (1, errors.NotLeader(None)),
    (2, errors.WrongGroup(7, 3)),
    (2, errors.WrongGroup(7)),
    (3, errors.Locked(b"\x01\xff")),
    (4, errors.Conflict([b"a", b"\xff\n"])),
    (5, errors.Aborted("no")),
    (6, errors.Busy("the queue is full")),
    (7, errors.TooLarge("the key", 8192)),
    (8, errors.BadRequest("bad")),
    (9, errors.Expired("old")),
    (10, errors.Unavailable("none")),
    (11, errors.OutcomeUnknown("put 'k'")),
    (12, errors.CasMismatch(b"x" * 200, 4)),
    (12, errors.CasMismatch(None, 0)),
    (12, errors.CasMismatch(None, 9)),
    (13, errors.VersionMismatch(0)),
    (13, errors.VersionMismatch(8)),
    (14, errors.WrongCluster(b"a" * 16, b"")),
    (15, errors.WrongPeer("other")),
    (16, errors.ReplicaMustBeReplaced("wiped")),
    (17, errors.BadVersion(1, 2)),
    (18, errors.NoSuchGroup(3)),
    (19, errors.GroupExists(3)),
    (20, errors.BadShard(99, 10)),
    (22, errors.NoSuchConfig(5)),
    (23, errors.ShuttingDown()),
    (24, errors.Malformed("bytes")),
    (25, errors.ServerError(25, "boom")),
    (26, errors.LastGroup(3)),
    (27, errors.Superseded(9)),
    (28, errors.ListLost(2)),
    (29, errors.NotHolder(4)),
    (29, errors.NotHolder()),
    (30, errors.DrainOver()),
    (31, errors.TlsRefused("speaks TLS")),
]


def test_every_class_with_a_code_has_an_example() -> None:
    assert {code for code, _ in EXAMPLES} == set(BY_CODE) == set(range(1, 32)) - {21}


@pytest.mark.parametrize(("code", "error"), EXAMPLES, ids=[type(e).__name__ for _, e in EXAMPLES])
def test_over_the_wire_and_back(code: int, error: RaftKVError) -> None:
    sent_code, fields = error.to_wire()
    assert sent_code == code
    got = from_wire(code, decode_body(encode_body([fields]))[0])
    assert type(got) is type(error)
    assert got.fields == error.fields
    assert vars(got) == vars(error)
    assert str(got) == str(error)
    assert from_result(error.to_result()).fields == error.fields


@pytest.mark.parametrize(("code", "error"), EXAMPLES, ids=[type(e).__name__ for _, e in EXAMPLES])
def test_the_text_is_one_short_line(code: int, error: RaftKVError) -> None:
    text = str(error)
    assert text
    assert text.isprintable()
    assert len(text) < 250


def tree(root: type[RaftKVError]) -> list[type[RaftKVError]]:
    return [root, *(found for child in root.__subclasses__() for found in tree(child))]


def test_the_docstring_draws_the_tree() -> None:
    assert errors.__doc__ is not None
    drawn = [line for line in errors.__doc__.splitlines() if "──" in line]
    classes = tree(RaftKVError)[1:]
    assert len(drawn) == len(classes)
    for error in classes:
        line = next(line for line in drawn if line.split("── ")[1].split()[0] == error.__name__)
        if error.code is not None:
            assert f" {error.code} " in f"{line} "
        if not issubclass(error, errors.HandshakeRefused):
            assert error.retry in line


def test_only_logged_refusals_are_final_and_only_unknown_fates_indefinite() -> None:
    logged = {errors.CasMismatch, errors.VersionMismatch, errors.Conflict, errors.Aborted, errors.TooOld}
    assert {e for e in tree(RaftKVError) if e.final} == logged
    assert {e for e in tree(RaftKVError) if not e.definite} == {
        errors.OutcomeUnknown,
        errors.Interrupted,
        errors.CommitUnknown,
        errors.ConnectionLost,
        errors.NoAnswer,
        errors.ServerError,
    }


def test_an_unknown_code_is_a_server_error() -> None:
    error = from_wire(999, ["quota", 5, b"\xff"])
    assert isinstance(error, errors.ServerError)
    assert error.error_code == 999
    assert "quota" in str(error)
    assert not error.definite
    assert from_wire(999, []).fields == [999, "no more is known"]


def test_later_releases_may_add_fields() -> None:
    assert from_wire(1, ["h:1", "more"]).fields == ["h:1"]


@pytest.mark.parametrize(
    ("code", "fields"),
    [
        (1, []),
        (1, [5]),
        (1, "h:1"),
        (2, [True, 1]),
        (2, [1, None]),
        (4, [[b"a", "b"]]),
        (7, ["x", "y"]),
        (12, ["x", 1]),
        (True, ["x"]),
        ("1", []),
        (None, []),
        (1, None),
    ],
)
def test_bad_fields_are_malformed(code: Any, fields: Any) -> None:
    with pytest.raises(Malformed):
        from_wire(code, fields)


@given(st.one_of(st.integers(-3, 30), values), st.one_of(st.lists(values, max_size=4), values))
def test_anything_gives_an_error_or_malformed(code: Any, fields: Any) -> None:
    try:
        error = from_wire(code, fields)
    except Malformed:
        return
    assert str(error)
    from_wire(*error.to_wire())


def test_local_errors_travel_as_server_errors() -> None:
    code, fields = errors.ConnectFailed("h:1", "refused").to_wire()
    assert code == 25
    assert str(from_wire(code, fields)) == "the server failed: h:1: refused"


def test_long_values_are_cut() -> None:
    assert errors.show(b"a\x00") == r"'a\x00'"
    assert errors.show(b"x" * 100).endswith("… (100 bytes)")
    assert len(errors.show_value("y" * 1000)) < 100
    assert errors.show_value([1, 2]) == "list of 2"
