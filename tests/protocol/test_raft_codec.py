"""Raft messages on the wire: golden bytes for each class, round trips, and full distrust when decoding."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raftkv.protocol.errors import Malformed
from raftkv.protocol.frames import decode_body
from raftkv.protocol.limits import NUMBER_MAX
from raftkv.protocol.messages import RAFT_KINDS, decode_raft, encode_raft
from raftkv.raft.entry import Entry, EntryKind
from raftkv.raft.membership import Membership
from raftkv.raft.messages import (
    AppendEntries,
    AppendReply,
    InstallSnapshot,
    Message,
    ReadIndexReply,
    ReadIndexRequest,
    RequestVote,
    SnapshotReply,
    TimeoutNow,
    VoteReply,
)
from tests.protocol.test_frames import arrays, values

MEMBERSHIP = Membership((0, 1, 2), (3,), ((0, b"a" * 16),))
ENTRIES = (
    Entry.make(4, 9, EntryKind.NOOP, 1000, b""),
    Entry.make(5, 10, EntryKind.COMMANDS, 1001, b"\x91\x01"),
)

GOLDEN: list[tuple[Message, str]] = [
    (RequestVote(5, 1, 10, 4, True, False), "00000008 97 14 05 01 0a 04 c3 c2"),
    (VoteReply(5, 2, True, False), "00000006 95 15 05 02 c3 c2"),
    (AppendEntries(5, 1, 8, 4, (), 7, 33), "00000009 98 16 05 01 08 04 07 21 90"),
    (
        AppendEntries(5, 1, 8, 4, ENTRIES, 7, 33),
        "00000041 98 16 05 01 08 04 07 21 92"
        "c419 0000000000000004 0000000000000009 01 00000000000003e8"
        "c41b 0000000000000005 000000000000000a 00 00000000000003e9 9101",
    ),
    (AppendReply(5, 2, True, 10, 0, 0, 10, 7, 33), "0000000b 9a 17 05 02 c3 0a 00 00 0a 07 21"),
    (
        InstallSnapshot(5, 1, b"id", 100, 4, MEMBERSHIP, 1000, 10, b"chunk", 0xDEADBEEF),
        "00000038 9b 18 05 01 c4026964 64 04 c41c 93930001029103919200c41061616161616161616161616161616161"
        "cd03e8 0a c4056368756e6b cedeadbeef",
    ),
    (SnapshotReply(5, 2, b"id", 15, False, True, 0), "0000000c 98 19 05 02 c4026964 0f c2 c3 00"),
    (TimeoutNow(5, 1), "00000004 93 1a 05 01"),
    (ReadIndexRequest(5, 2, 77), "00000005 94 1b 05 02 4d"),
    (ReadIndexReply(5, 1, 77, -1), "00000006 95 1c 05 01 4d ff"),
]
IDS = [type(message).__name__ for message, _ in GOLDEN]


def array_of(message: Message) -> list[Any]:
    return decode_body(encode_raft(message)[4:])


@pytest.mark.parametrize(("message", "golden"), GOLDEN, ids=IDS)
def test_golden_bytes_and_back(message: Message, golden: str) -> None:
    assert encode_raft(message).hex() == golden.replace(" ", "")
    assert decode_raft(decode_body(bytes.fromhex(golden.replace(" ", ""))[4:])) == message


def test_every_message_class_has_golden_bytes_and_a_kind() -> None:
    classes = set(get_args(Message))
    assert {type(message) for message, _ in GOLDEN} == classes
    assert {array_of(message)[0] for message, _ in GOLDEN} == set(RAFT_KINDS)
    assert len(RAFT_KINDS) == len(classes)


def test_an_append_is_encoded_once() -> None:
    message = AppendEntries(5, 1, 8, 4, ENTRIES, 7, 33)
    frame = encode_raft(message)
    assert message.frame is frame
    assert encode_raft(message) is frame
    decoded = decode_raft(decode_body(frame[4:]))
    assert isinstance(decoded, AppendEntries)
    assert [entry.encoded for entry in decoded.entries] == [entry.encoded for entry in ENTRIES]


@pytest.mark.parametrize("message", [message for message, _ in GOLDEN], ids=IDS)
def test_missing_and_further_items(message: Message) -> None:
    array = array_of(message)
    for length in range(len(array)):
        with pytest.raises(Malformed):
            decode_raft(array[:length])
    with pytest.raises(Malformed):
        decode_raft([*array, 0])


@pytest.mark.parametrize("message", [message for message, _ in GOLDEN], ids=IDS)
@pytest.mark.parametrize("bad", [None, -2, 2**64 - 1, 1.5, "x", [], {}, [b"x"], [[]]])
def test_a_wrong_value_in_any_place(message: Message, bad: Any) -> None:
    array = array_of(message)
    for position in range(len(array)):
        if type(array[position]) is list and bad == []:
            continue  # no entries: that is a heartbeat
        with pytest.raises(Malformed):
            decode_raft([*array[:position], bad, *array[position + 1 :]])


def test_flags_are_not_numbers_nor_numbers_flags() -> None:
    with pytest.raises(Malformed):
        decode_raft([20, 5, 1, 10, 4, 1, 0])
    with pytest.raises(Malformed):
        decode_raft([20, True, 1, 10, 4, True, False])
    with pytest.raises(Malformed):
        decode_raft([True, 5, 1])


def append_with(*entries: Entry, prev_term: int = 4, term: int = 5) -> list[Any]:
    return [22, term, 1, 8, prev_term, 7, 33, [entry.encoded for entry in entries]]


@pytest.mark.parametrize(
    "array",
    [
        append_with(Entry.make(4, 10, 0, 0, b"")),  # a gap after prev_index
        append_with(Entry.make(4, 8, 0, 0, b"")),
        append_with(Entry.make(4, 9, 0, 0, b""), Entry.make(4, 11, 0, 0, b"")),
        append_with(Entry.make(5, 9, 0, 0, b""), Entry.make(4, 10, 0, 0, b"")),  # terms fall
        append_with(Entry.make(3, 9, 0, 0, b"")),  # below the previous entry's
        append_with(Entry.make(6, 9, 0, 0, b"")),  # above the leader's
        append_with(Entry.make(4, 9, 0, 2**63, b"")),  # a stamp out of range
        append_with(Entry.make(4, 9, EntryKind.MEMBERSHIP, 0, b"junk")),
        append_with(Entry.make(4, 9, EntryKind.MEMBERSHIP, 0, Membership(()).encode())),
        append_with(Entry.make(4, 9, EntryKind.MEMBERSHIP, 0, Membership((-1, 2)).encode())),
        append_with(Entry.make(4, 9, EntryKind.MEMBERSHIP, 0, Membership((1,), (), ((2, b"s"),)).encode())),
        [22, 5, 1, 8, 4, 7, 33, [b"short"]],
        [22, 5, 1, 8, 4, 7, 33, [Entry.make(4, 9, 9, 0, b"").encoded]],  # unknown kind
        [22, 5, 1, 8, 4, 7, 33, ["text"]],
    ],
)
def test_entries_that_no_leader_sends(array: list[Any]) -> None:
    with pytest.raises(Malformed):
        decode_raft(array)


def test_a_membership_entry_passes() -> None:
    entry = Entry.make(4, 9, EntryKind.MEMBERSHIP, 0, MEMBERSHIP.encode())
    assert decode_raft(append_with(entry)) == AppendEntries(5, 1, 8, 4, (entry,), 7, 33)


@pytest.mark.parametrize(
    "changed",
    [
        {"offset": 996},  # past the end
        {"total_bytes": 14},
        {"snapshot_id": b""},
        {"snapshot_id": b"x" * 65},
        {"crc": 2**32},
        {"crc": -1},
        {"source": 70_000},
        {"term": NUMBER_MAX + 1},
    ],
)
def test_chunks_that_no_leader_sends(changed: dict[str, Any]) -> None:
    chunk = InstallSnapshot(5, 1, b"id", 100, 4, MEMBERSHIP, 1000, 10, b"chunk", 1)
    with pytest.raises(Malformed):
        decode_raft(array_of(replace(chunk, **changed)))


numbers = st.integers(0, NUMBER_MAX)
replicas = st.integers(0, 65_535)


@st.composite
def messages(draw: st.DrawFn) -> Message:
    """Any valid message."""
    kind = draw(st.sampled_from(get_args(Message)))
    if kind is AppendEntries:
        term = draw(st.integers(1, NUMBER_MAX))
        prev_index = draw(st.integers(0, NUMBER_MAX - 10))
        prev_term = entry_term = draw(st.integers(0, term))
        entries = []
        for index in range(prev_index + 1, prev_index + 1 + draw(st.integers(0, 3))):
            entry_term = draw(st.integers(entry_term, term))
            entries.append(Entry.make(entry_term, index, 0, draw(numbers), draw(st.binary(max_size=20))))
        return AppendEntries(term, draw(replicas), prev_index, prev_term, tuple(entries), draw(numbers), draw(numbers))
    if kind is InstallSnapshot:
        chunk = draw(st.binary(max_size=20))
        offset = draw(st.integers(0, 100))
        total = offset + len(chunk) + draw(st.integers(0, 9))
        snapshot_id, crc = draw(st.binary(min_size=1, max_size=64)), draw(st.integers(0, 2**32 - 1))
        return InstallSnapshot(
            draw(numbers), draw(replicas), snapshot_id, draw(numbers), draw(numbers), MEMBERSHIP, total,
            offset, chunk, crc,
        )  # fmt: skip
    by_type = {"int": numbers, "bool": st.booleans(), "bytes": st.binary(min_size=1, max_size=64)}
    made = {f.name: draw(by_type[str(f.type)]) for f in fields(kind)}
    made["source"] = draw(replicas)
    message: Message = kind(**made)
    return message


@given(messages())
def test_any_message_and_back(message: Message) -> None:
    assert decode_raft(array_of(message)) == message


@given(messages(), st.data(), values)
def test_one_item_replaced_gives_a_message_or_malformed(message: Message, data: st.DataObject, value: Any) -> None:
    array = array_of(message)
    array[data.draw(st.integers(0, len(array) - 1))] = value
    try:
        decoded = decode_raft(array)
    except Malformed:
        return
    assert decode_raft(array_of(decoded)) == decoded


@given(st.one_of(arrays, st.builds(lambda kind, rest: [kind, *rest], st.sampled_from(RAFT_KINDS), arrays)))
def test_any_array_gives_a_message_or_malformed(array: list[Any]) -> None:
    try:
        decode_raft(array)
    except Malformed:
        return


@given(st.binary(max_size=120))
def test_any_bytes_as_an_entry(encoded: bytes) -> None:
    for kind in range(4):
        head = encoded[:16] + bytes([kind]) + encoded[17:]
        try:
            decode_raft([22, NUMBER_MAX, 1, 0, 0, 0, 0, [head]])
        except Malformed:
            continue
