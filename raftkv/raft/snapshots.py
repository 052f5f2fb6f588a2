"""Snapshots in chunks, both sides (Raft §7; design: one byte stream per checkpoint, resumable by offset).

The leader streams to a follower that needs entries no longer in the log; a window of chunks is under way, and the
follower's `next_offset` is the only truth about how far it got: lost, repeated and reordered chunks, and a receiver
that starts over, all come down to going back to it. The follower hands chunks to its shell in order of offset, and
lets its log alone until the shell has installed the whole. A snapshot that isn't ahead of the commit index, or whose
last entry is in the log already, changes nothing: the tail is never thrown away for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from zlib import crc32

from raftkv.raft.actions import (
    Send,
    SnapshotChunkReceived,
    SnapshotChunkWanted,
    SnapshotComplete,
    SnapshotReleased,
    SnapshotWanted,
)
from raftkv.raft.following import Following
from raftkv.raft.membership import Membership
from raftkv.raft.messages import InstallSnapshot, SnapshotReply
from raftkv.raft.progress import Progress
from raftkv.raft.state import FOLLOWER, LEADER, LEARNER, NEVER_MS, Node

IDLE_TIMEOUTS_MAX = 10
"""Longest election timeouts without any progress after which the checkpoint of a stream is released."""


@dataclass(slots=True)
class Stream:
    """Leader: one follower's snapshot. Without an id, the shell was asked for one."""

    to: int
    progress_ms: int
    retry_ms: int = NEVER_MS
    snapshot_id: bytes | None = None
    index: int = 0
    index_term: int = 0
    membership: Membership | None = None
    total_bytes: int = 0
    acked: int = 0
    asked: int = 0
    """The shell was asked for everything below this offset."""
    rewound_at: int = -1
    """The acknowledged offset to which the stream last went back before its time."""


@dataclass(slots=True)
class Reception:
    """Follower: the snapshot that is arriving. Between `received` and `stored` the shell is writing."""

    head: InstallSnapshot
    received: int = 0
    stored: int = 0
    storing: int = 0
    """Chunks handed to the shell and not yet answered."""


class Snapshots:
    __slots__ = ("following", "node", "reception", "streams")

    def __init__(self, node: Node, following: Following) -> None:
        self.node = node
        self.following = following
        self.streams: dict[int, Stream] = {}
        self.reception: Reception | None = None

    # ---- leader

    def reign_begins(self) -> None:
        """Its own log is the one that counts now: what was arriving is of no use."""
        assert not self.node.installing and not self.streams
        self.reception = None

    def want(self, p: Progress) -> None:
        """What `p` needs next is not in the log."""
        node = self.node
        p.become_snapshot()
        if p.replica not in self.streams:
            self.streams[p.replica] = Stream(p.replica, node.now_ms)
            node.out.append(SnapshotWanted(p.replica))

    def offered(
        self, to: int, snapshot_id: bytes, index: int, index_term: int, membership: Membership, total_bytes: int
    ) -> None:
        node = self.node
        stream = self.streams.get(to)
        if stream is None or stream.snapshot_id is not None:
            node.out.append(SnapshotReleased(to, snapshot_id))
            return
        if index < node.log.start_index:
            node.out.append(SnapshotReleased(to, snapshot_id))
            self.unavailable(to)
            return
        stream.snapshot_id = snapshot_id
        stream.index, stream.index_term, stream.membership = index, index_term, membership
        stream.total_bytes = total_bytes
        self._pump(stream)

    def unavailable(self, to: int, snapshot_id: bytes | None = None) -> None:
        stream = self.streams.get(to)
        if stream is None or (snapshot_id is not None and stream.snapshot_id != snapshot_id):
            return
        if stream.snapshot_id is None:
            stream.retry_ms = self.node.now_ms + self.node.config.election_timeout_ms_min
        else:
            self._start_over(stream)

    def _pump(self, stream: Stream) -> None:
        """Ask for as many chunks as the window allows."""
        node = self.node
        assert stream.snapshot_id is not None
        chunk_bytes = node.config.snapshot_chunk_bytes
        window_end = stream.acked + node.config.snapshot_inflight_chunks * chunk_bytes
        while stream.asked < min(stream.total_bytes, window_end):
            length = min(chunk_bytes, stream.total_bytes - stream.asked)
            node.out.append(SnapshotChunkWanted(stream.to, stream.snapshot_id, stream.asked, length))
            stream.asked += length
        if stream.total_bytes == 0:
            self.chunk(stream.to, stream.snapshot_id, 0, b"")
        stream.retry_ms = node.now_ms + node.config.election_timeout_ms_min

    def chunk(self, to: int, snapshot_id: bytes, offset: int, chunk: bytes) -> None:
        node = self.node
        stream = self.streams.get(to)
        if stream is None or stream.snapshot_id != snapshot_id or node.role != LEADER:
            return
        assert stream.membership is not None
        message = InstallSnapshot(
            node.term,
            node.replica,
            snapshot_id,
            stream.index,
            stream.index_term,
            stream.membership,
            stream.total_bytes,
            offset,
            chunk,
            crc32(chunk),
        )
        node.send(to, message)

    def on_reply(self, message: SnapshotReply) -> None:
        node = self.node
        if node.role != LEADER:
            return
        p = node.progress.get(message.source)
        if p is None:
            return
        p.last_heard_ms = node.now_ms
        stream = self.streams.get(message.source)
        if stream is None or stream.snapshot_id != message.snapshot_id:
            return
        if message.done:
            self.release(stream.to)
            p.acked(message.match_index, node.round)
            p.become_probe(message.match_index + 1)
            node.replication.dirty = True
            if p.match > node.commit_index:
                node.replication.maybe_commit()
        elif message.failed:
            self._start_over(stream)
        else:
            self._resume(stream, message.next_offset)

    def _resume(self, stream: Stream, offset: int) -> None:
        if offset > stream.total_bytes:
            return
        if offset > stream.acked:
            stream.acked = offset
            stream.asked = max(stream.asked, offset)
            stream.progress_ms = self.node.now_ms
            stream.rewound_at = -1
        elif stream.rewound_at == offset:
            return
        else:
            stream.rewound_at = offset
            stream.acked = stream.asked = offset
        self._pump(stream)

    def _start_over(self, stream: Stream) -> None:
        """The follower can't use this checkpoint: a new one, after a pause."""
        node = self.node
        assert stream.snapshot_id is not None
        node.out.append(SnapshotReleased(stream.to, stream.snapshot_id))
        retry_ms = node.now_ms + node.config.election_timeout_ms_min
        self.streams[stream.to] = Stream(stream.to, node.now_ms, retry_ms)

    def retry(self, to: int) -> None:
        """The connection is back: send again from where the follower was last known to be."""
        stream = self.streams.get(to)
        if stream is not None and stream.snapshot_id is not None:
            self._resend(stream)

    def _resend(self, stream: Stream) -> None:
        assert stream.snapshot_id is not None
        stream.asked = stream.acked
        stream.rewound_at = -1
        if stream.acked == stream.total_bytes:
            # All is stored there: an empty chunk asks how the installation went.
            self.chunk(stream.to, stream.snapshot_id, stream.total_bytes, b"")
        self._pump(stream)

    def tick(self) -> None:
        node = self.node
        for stream in list(self.streams.values()):
            if node.now_ms < stream.retry_ms:
                continue
            if stream.snapshot_id is None:
                stream.retry_ms = NEVER_MS
                stream.progress_ms = node.now_ms
                node.out.append(SnapshotWanted(stream.to))
            elif (
                node.now_ms - max(stream.progress_ms, node.progress[stream.to].last_heard_ms)
                >= IDLE_TIMEOUTS_MAX * node.config.election_timeout_ms_max
            ):
                self.release(stream.to)
                p = node.progress[stream.to]
                p.become_probe(node.log.last_index + 1)
                p.paused = True
            else:
                self._resend(stream)

    def next_deadline_ms(self) -> int:
        return min([stream.retry_ms for stream in self.streams.values()], default=NEVER_MS)

    def release(self, to: int) -> None:
        """The follower needs no snapshot any more."""
        stream = self.streams.pop(to, None)
        if stream is not None and stream.snapshot_id is not None:
            self.node.out.append(SnapshotReleased(to, stream.snapshot_id))

    def release_all(self) -> None:
        for to in list(self.streams):
            self.release(to)

    # ---- follower

    def on_chunk(self, message: InstallSnapshot) -> None:
        node = self.node
        self.following.follow(message.source)
        if node.installing:
            return
        if self._is_known(message):
            self.reception = None
            self._reply(message, 0, done=True)
            return
        reception = self.reception
        if reception is None or reception.head.snapshot_id != message.snapshot_id:
            if message.offset != 0:
                self._reply(message, 0)
                return
            reception = self.reception = Reception(message)
        elif message.term > reception.head.term:
            reception.head = message
        if (
            message.offset != reception.received
            or message.offset + len(message.chunk) > message.total_bytes
            or crc32(message.chunk) != message.crc
        ):
            # Out of order, or damaged on the way. While the shell is writing, its answer will tell.
            if not reception.storing:
                self._reply(message, reception.stored)
            return
        if not message.chunk and message.total_bytes > 0:
            self._reply(message, reception.stored)
            return
        reception.received += len(message.chunk)
        reception.storing += 1
        node.out.append(SnapshotChunkReceived(message))

    def _is_known(self, message: InstallSnapshot) -> bool:
        """Whether log and state hold all that the snapshot does; then only the commit index may move."""
        node = self.node
        if message.index <= node.commit_index:
            return True
        if node.log.term_at(message.index) != message.index_term:
            return False
        node.replication.commit_to(message.index)
        return True

    def _reply(self, message: InstallSnapshot, next_offset: int, *, done: bool = False, failed: bool = False) -> None:
        """To whoever leads now. `done` vouches for the commit index, which any leader's log contains."""
        node = self.node
        if node.leader is None:
            return
        match = node.commit_index if done else 0
        after = node.after()
        if match > node.log.stable_index:
            queued = node.log.queued_index == node.log.last_index
            after = max(after, node.next_seq - 1 if queued else node.next_seq)
        reply = SnapshotReply(node.term, node.replica, message.snapshot_id, next_offset, done, failed, match)
        node.out.append(Send(node.leader, reply, after))

    def stored(self, snapshot_id: bytes, next_offset: int) -> None:
        """The shell has stored everything below `next_offset`."""
        reception = self.reception
        if reception is None or reception.head.snapshot_id != snapshot_id or self.node.installing:
            return
        reception.stored = next_offset
        reception.storing -= 1
        if not reception.storing:
            reception.received = next_offset
        if self._is_known(reception.head):
            self.reception = None
            self._reply(reception.head, next_offset, done=True)
        elif next_offset < reception.head.total_bytes:
            self._reply(reception.head, next_offset)

    def drop_if_needless(self) -> None:
        """What the last chunk was stored for may have come by appends since: in the same turn, or while this one
        campaigned. Installing would then throw away a tail that may have been acknowledged."""
        reception = self.reception
        if reception is None or self.node.installing or reception.stored < reception.head.total_bytes:
            return
        if self._is_known(reception.head):
            self.reception = None
            self._reply(reception.head, reception.stored, done=True)

    def flush(self) -> None:
        """All stored: install. Last in a turn, so that every entry taken before has been handed to the WAL."""
        reception = self.reception
        node = self.node
        if reception is None or node.installing or reception.storing:
            return
        if node.role not in (FOLLOWER, LEARNER):
            return  # a campaign may end in leading: only one that follows gives its log away
        head = reception.head
        if reception.stored == head.total_bytes:
            node.installing = True
            node.out.append(SnapshotComplete(head.snapshot_id, head.index, head.index_term, head.membership))

    def installed(self, snapshot_id: bytes, stamp_ms: int) -> None:
        """The state is the snapshot's, and the WAL restarted behind it: so does the log."""
        node = self.node
        reception = self.reception
        assert node.installing and reception is not None and reception.head.snapshot_id == snapshot_id
        head = reception.head
        assert head.index > node.commit_index, (head.index, node.commit_index)
        node.installing = False
        self.reception = None
        node.log.reset(head.index, head.index_term, max(stamp_ms, node.log.last_stamp_ms))
        node.commit_index = node.applied_index = node.emitted_index = head.index
        node.changes.reset(head.index, head.membership)
        node.reads.applied()
        node.election.restart_timer()  # the shell may have been deaf for as long as it took
        self._reply(head, head.total_bytes, done=True)

    def failed(self, snapshot_id: bytes) -> None:
        """The shell can't take or use this snapshot; log and state are as before."""
        node = self.node
        reception = self.reception
        if reception is None or reception.head.snapshot_id != snapshot_id:
            return
        node.installing = False
        self.reception = None
        node.election.restart_timer()
        self._reply(reception.head, 0, failed=True)
