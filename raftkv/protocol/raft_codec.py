"""Raft messages as arrays: [kind, term, source, …], one kind for each class of `raft.messages`.

`decode_raft` trusts nothing: whatever the array, it gives a message that satisfies everything the
core asserts about one message alone, or raises Malformed. Entries travel as their own encoding, made
once by the leader (`Entry.encoded`). It must never know who the peers are: that is the hello's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from raftkv.protocol.errors import Malformed, show_value
from raftkv.protocol.frames import encode_frame
from raftkv.protocol.limits import FRAME_BYTES_MAX, NUMBER_MAX, REPLICA_MAX, SNAPSHOT_ID_BYTES_MAX
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

REQUEST_VOTE = 20
VOTE_REPLY = 21
APPEND_ENTRIES = 22
APPEND_REPLY = 23
INSTALL_SNAPSHOT = 24
SNAPSHOT_REPLY = 25
TIMEOUT_NOW = 26
READ_INDEX_REQUEST = 27
READ_INDEX_REPLY = 28

RAFT_KINDS = range(REQUEST_VOTE, READ_INDEX_REPLY + 1)


def encode_raft(message: Message) -> bytes:
    """The message's frame. That of an AppendEntries is kept in `.frame` for its other addressees."""
    if type(message) is AppendEntries:
        if message.frame is None:
            message.frame = encode_frame(_append_entries_array(message))
        return message.frame
    return encode_frame(_TO_ARRAY[type(message)](message))


def decode_raft(array: list[Any]) -> Message:
    """Raise Malformed on anything that `encode_raft` doesn't produce."""
    kind = array[0] if array else None
    decode = _FROM_ARRAY.get(kind) if type(kind) is int else None
    if decode is None:
        raise Malformed(f"not a Raft message: kind {show_value(kind)}")
    return decode(array)


# Encoding ------------------------------------------------------------------------------------------


def _append_entries_array(m: AppendEntries) -> list[Any]:
    entries = [entry.encoded for entry in m.entries]
    return [APPEND_ENTRIES, m.term, m.source, m.prev_index, m.prev_term, m.commit, m.round, entries]


def _append_reply_array(m: AppendReply) -> list[Any]:
    return [
        APPEND_REPLY, m.term, m.source, m.ok, m.match_index, m.hint_index, m.hint_term,
        m.last_index, m.commit, m.round,
    ]  # fmt: skip


def _install_snapshot_array(m: InstallSnapshot) -> list[Any]:
    return [
        INSTALL_SNAPSHOT, m.term, m.source, m.snapshot_id, m.index, m.index_term,
        m.membership.encode(), m.total_bytes, m.offset, m.chunk, m.crc,
    ]  # fmt: skip


def _snapshot_reply_array(m: SnapshotReply) -> list[Any]:
    return [
        SNAPSHOT_REPLY, m.term, m.source, m.snapshot_id, m.next_offset, m.done, m.failed, m.match_index,
    ]  # fmt: skip


_TO_ARRAY: dict[type, Callable[[Any], list[Any]]] = {
    RequestVote: lambda m: [
        REQUEST_VOTE, m.term, m.source, m.last_index, m.last_term, m.pre, m.transfer,
    ],
    VoteReply: lambda m: [VOTE_REPLY, m.term, m.source, m.granted, m.pre],
    AppendReply: _append_reply_array,
    InstallSnapshot: _install_snapshot_array,
    SnapshotReply: _snapshot_reply_array,
    TimeoutNow: lambda m: [TIMEOUT_NOW, m.term, m.source],
    ReadIndexRequest: lambda m: [READ_INDEX_REQUEST, m.term, m.source, m.context],
    ReadIndexReply: lambda m: [READ_INDEX_REPLY, m.term, m.source, m.context, m.index],
}  # fmt: skip


# Decoding ------------------------------------------------------------------------------------------


def _header(array: list[Any], length: int) -> None:
    """Check the length, the term and the source."""
    if len(array) != length:
        raise Malformed(f"Raft message of kind {array[0]} with {len(array)} items instead of {length}")
    _numbers(array, 1, 3)
    if array[2] > REPLICA_MAX:
        raise Malformed(f"replica id {array[2]} in a Raft message")


def _numbers(array: list[Any], start: int, end: int) -> None:
    for value in array[start:end]:
        if type(value) is not int or not 0 <= value <= NUMBER_MAX:
            raise Malformed(f"Raft message of kind {array[0]}: bad number {show_value(value)}")


def _flags(array: list[Any], start: int, end: int) -> None:
    for value in array[start:end]:
        if type(value) is not bool:
            raise Malformed(f"Raft message of kind {array[0]}: bad flag {show_value(value)}")


def _snapshot_id(value: Any) -> None:
    if type(value) is not bytes or not 0 < len(value) <= SNAPSHOT_ID_BYTES_MAX:
        raise Malformed(f"bad snapshot id {show_value(value)}")


def _membership(value: Any) -> Membership:
    """A membership with a voter, whose ids are in range and whose store ids are for its members."""
    if type(value) is not bytes:
        raise Malformed(f"bad membership {show_value(value)}")
    try:
        membership = Membership.decode(value)
    except (ValueError, OverflowError) as error:
        raise Malformed(f"bad membership: {error}") from None
    members = membership.members
    stores = [replica for replica, _ in membership.stores]
    if not membership.voters or not all(0 <= replica <= REPLICA_MAX for replica in members):
        raise Malformed("bad membership: no voter, or a replica id out of range")
    if len(set(stores)) != len(stores) or not set(stores) <= set(members):
        raise Malformed("bad membership: store ids don't match the members")
    return membership


def _entry(encoded: Any) -> Entry:
    if type(encoded) is not bytes:
        raise Malformed(f"a log entry must be bytes, not {show_value(encoded)}")
    try:
        entry = Entry.decode(encoded)
    except ValueError as error:
        raise Malformed(str(error)) from None
    if entry.kind == EntryKind.MEMBERSHIP:
        _membership(entry.data)  # a bad one must not reach the log
    return entry


def _request_vote(a: list[Any]) -> Message:
    _header(a, 7)
    _numbers(a, 3, 5)
    _flags(a, 5, 7)
    return RequestVote(a[1], a[2], a[3], a[4], a[5], a[6])


def _vote_reply(a: list[Any]) -> Message:
    _header(a, 5)
    _flags(a, 3, 5)
    return VoteReply(a[1], a[2], a[3], a[4])


def _append_entries(a: list[Any]) -> Message:
    _header(a, 8)
    _numbers(a, 3, 7)
    if type(a[7]) is not list:
        raise Malformed(f"entries must be an array, not {show_value(a[7])}")
    term, index, last_term = a[1], a[3], a[4]
    entries = tuple([_entry(encoded) for encoded in a[7]])
    for entry in entries:
        index += 1
        # A leader's log has no gap, its terms never fall, and none is above the leader's own.
        if entry.index != index or not last_term <= entry.term <= term or entry.stamp_ms > NUMBER_MAX:
            raise Malformed(f"entry ({entry.index}, term {entry.term}) where {index} was expected")
        last_term = entry.term
    return AppendEntries(term, a[2], a[3], a[4], entries, a[5], a[6])


def _append_reply(a: list[Any]) -> Message:
    _header(a, 10)
    _flags(a, 3, 4)
    _numbers(a, 4, 10)
    return AppendReply(a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9])


def _install_snapshot(a: list[Any]) -> Message:
    _header(a, 11)
    _snapshot_id(a[3])
    _numbers(a, 4, 6)
    membership = _membership(a[6])
    _numbers(a, 7, 9)
    chunk, crc = a[9], a[10]
    if type(chunk) is not bytes or len(chunk) > FRAME_BYTES_MAX or a[8] + len(chunk) > a[7]:
        raise Malformed(f"a snapshot chunk outside of its {a[7]} bytes")
    if type(crc) is not int or not 0 <= crc < 2**32:
        raise Malformed(f"bad checksum {show_value(crc)}")
    return InstallSnapshot(a[1], a[2], a[3], a[4], a[5], membership, a[7], a[8], chunk, crc)


def _snapshot_reply(a: list[Any]) -> Message:
    _header(a, 8)
    _snapshot_id(a[3])
    _numbers(a, 4, 5)
    _flags(a, 5, 7)
    _numbers(a, 7, 8)
    return SnapshotReply(a[1], a[2], a[3], a[4], a[5], a[6], a[7])


def _timeout_now(a: list[Any]) -> Message:
    _header(a, 3)
    return TimeoutNow(a[1], a[2])


def _read_index_request(a: list[Any]) -> Message:
    _header(a, 4)
    _numbers(a, 3, 4)
    return ReadIndexRequest(a[1], a[2], a[3])


def _read_index_reply(a: list[Any]) -> Message:
    _header(a, 5)
    _numbers(a, 3, 4)
    index = a[4]
    if type(index) is not int or not -1 <= index <= NUMBER_MAX:
        raise Malformed(f"bad read index {show_value(index)}")
    return ReadIndexReply(a[1], a[2], a[3], index)


_FROM_ARRAY: dict[int, Callable[[list[Any]], Message]] = {
    REQUEST_VOTE: _request_vote,
    VOTE_REPLY: _vote_reply,
    APPEND_ENTRIES: _append_entries,
    APPEND_REPLY: _append_reply,
    INSTALL_SNAPSHOT: _install_snapshot,
    SNAPSHOT_REPLY: _snapshot_reply,
    TIMEOUT_NOW: _timeout_now,
    READ_INDEX_REQUEST: _read_index_request,
    READ_INDEX_REPLY: _read_index_reply,
}
