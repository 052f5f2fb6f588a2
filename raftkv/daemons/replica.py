"""The replica runtime that every role shares: one Raft core, its store, its state machine, its peers.

It turns what happens (a command, a read, a peer's message, a timer, a finished fsync) into events of the
core and carries out the actions that come back, keeping the durability contract of raft/actions.py.
Everything runs in callbacks of one loop; whatever came in during a turn of the loop is handled together at its
end: one entry for all commands, one quorum round for all reads, one write per connection.

It must never answer a command before its entry is applied, nor a read before the core released it, and
never let an action overtake the fsync that it waits for.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from raftkv.daemons.compaction import Compaction
from raftkv.daemons.snapshots import SnapshotTransfers
from raftkv.daemons.tasks import Tasks
from raftkv.machines.machine import Machine
from raftkv.protocol.errors import (
    Busy,
    NotLeader,
    OutcomeUnknown,
    RaftKVError,
    ShuttingDown,
)
from raftkv.protocol.messages import encode_raft
from raftkv.raft import actions as act
from raftkv.raft import errors as refusal
from raftkv.raft.core import Raft
from raftkv.raft.entry import Entry, EntryKind
from raftkv.raft.membership import Membership
from raftkv.raft.messages import AppendEntries, Message
from raftkv.storage.engine import Overlay
from raftkv.storage.errors import WriteStall
from raftkv.storage.store import Store

log = logging.getLogger(__name__)

BATCH_COMMANDS_MAX = 1024
"""Commands in one entry: bounds what one apply does without a look at the clock."""
BATCH_BYTES_MAX = 1024 * 1024
PENDING_COMMANDS_MAX = 65_536
"""Commands waiting for a place in the log; beyond it `Busy`."""
PENDING_BYTES_MAX = 64 * 1024 * 1024
ENTRIES_IN_FLIGHT_MAX = 4
"""Own entries proposed and not yet applied, before further commands wait to share the next entry."""
READ_ROUNDS_MAX = 2
"""Quorum rounds for reads under way, before further reads wait to share the next."""
PENDING_READS_MAX = 65_536
APPLY_SLICE_S = 0.005
"""How long applying may hold the loop before other events get a turn."""
STALL_RETRY_S = 0.01

Deliver = Callable[[Any, Any], None]
"""Called as deliver(token, result): a result array or an error for a command; None or an error for a read."""
Waiter = tuple[Deliver, Any]


def array_header(count: int) -> bytes:
    """The msgpack header of an array of `count` elements."""
    if count < 16:
        return bytes((0x90 | count,))
    return b"\xdc" + count.to_bytes(2, "big")


class Replica:
    """One member of a Raft group, driven by the running loop.

    `send(peer, frame)` gives a frame to the transport, which may drop it. `fatal(text)` ends the process.
    `on_role(role, term, leader)` and `on_applied()` tell the role what changed.
    """

    def __init__(
        self,
        *,
        name: str,
        raft: Raft,
        store: Store,
        machine: Machine,
        send: Callable[[int, bytes], None],
        address_of: Callable[[int], str | None],
        tasks: Tasks,
        fatal: Callable[[str], None],
        snapshot_bytes: int,
        snapshot_entries: int,
        lease_reads: bool = False,
    ) -> None:
        self.name = name
        self.raft = raft
        self.store = store
        self.machine = machine
        self.on_role: Callable[[str, int, int | None], None] = lambda role, term, leader: None
        self.on_applied: Callable[[], None] = lambda: None
        self.on_regressed: Callable[[int, str], None] = lambda peer, reason: None
        self._loop = asyncio.get_running_loop()
        self._leases = lease_reads
        self._send = send
        self._address_of = address_of
        self._tasks = tasks
        self.fatal = fatal

        self._raw: list[bytes] = []
        self._commands: list[list[Any]] = []
        self._submitters: list[Waiter] = []
        self._pending_bytes = 0
        self._waiters: dict[int, tuple[int, list[Waiter]]] = {}

        self._reads: list[Waiter] = []
        self._forwarded_reads: list[Waiter] = []
        self._read_waiters: dict[int, list[Waiter]] = {}

        self._durable_seq = 0
        self._held_sends: deque[act.Send] = deque()
        self._apply_queue: deque[Entry] = deque()
        self._applied_index = store.applied.index
        self._stalled: tuple[Entry, Overlay, list[list[Any]]] | None = None

        self._turn_scheduled = False
        self._in_turn = False
        self._apply_scheduled = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_deadline_ms = 0
        self._stopped = False
        self._closing = False

        self.behind_since_s: float | None = None
        """Since when something committed waits to be applied, in loop time; None if nothing does."""
        self.leader_changes = 0
        self.failed = 0
        """Commands that were not logged, or whose fate is unknown here."""
        self._known_leader: int | None = None

        self.compaction = Compaction(self, tasks, snapshot_bytes, snapshot_entries)
        self.snapshots = SnapshotTransfers(self, tasks)
        self._handlers: dict[type[Any], Callable[[Any], None]] = {
            act.Persist: self._persist,
            act.Send: self._send_when_durable,
            act.Commit: self._commit,
            act.ReadReady: self._read_ready,
            act.ReadFailed: self._read_failed,
            act.RoleChanged: self._role_changed,
            act.MembershipChanged: self._membership_changed,
            act.SnapshotWanted: self.snapshots.wanted,
            act.SnapshotChunkWanted: self.snapshots.chunk_wanted,
            act.SnapshotChunkReceived: self.snapshots.chunk_received,
            act.SnapshotComplete: self.snapshots.complete,
            act.SnapshotReleased: self.snapshots.released,
            act.PeerRegressed: self._peer_regressed,
            act.TransferEnded: self._transfer_ended,
        }
        machine.load(store.engine)

    # ---- life

    def start(self) -> None:
        """Begin to take part: timers run, peers' messages count."""
        self.compaction.deleted(self.machine.dead_ranges())
        self._wake()

    def begin_close(self) -> None:
        """Take no new commands or reads; what is in flight goes on."""
        self._closing = True

    @property
    def idle(self) -> bool:
        """No client waits for anything."""
        return not (self._raw or self._waiters or self._reads or self._forwarded_reads or self._read_waiters)

    def stop(self) -> None:
        """Do nothing any more. Whoever still waits is told that the fate of the request is unknown."""
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._end_waiters(ShuttingDown(), below_term=None)

    # ---- what clients want

    @property
    def is_leader(self) -> bool:
        return self.raft.role == "leader"

    def not_leader(self) -> NotLeader:
        leader = self.raft.leader
        return NotLeader(None if leader is None or leader == self.raft.replica else self._address_of(leader))

    def submit(self, raw: bytes, command: list[Any], deliver: Deliver, token: Any) -> None:
        """Queue a valid command, `raw` its encoding, for the log; `deliver` gets its result array, or an error."""
        if self.raft.role != "leader":
            self._fail([(deliver, token)], self.not_leader())
        elif self._closing or self._stopped:
            self._fail([(deliver, token)], ShuttingDown())
        elif len(self._raw) >= PENDING_COMMANDS_MAX or self._pending_bytes >= PENDING_BYTES_MAX:
            self._fail([(deliver, token)], Busy("too many commands wait for the log"))
        elif self._stalled is not None:
            self._fail([(deliver, token)], Busy("the storage engine is stalled"))
        else:
            self._raw.append(raw)
            self._commands.append(command)
            self._submitters.append((deliver, token))
            self._pending_bytes += len(raw)
            if not self._turn_scheduled:
                self._wake()

    def read(self, deliver: Deliver, token: Any, *, follower_ok: bool = False) -> None:
        """`deliver(token, None)` once the applied state is fresh enough for a linearizable read (§8)."""
        if self._closing or self._stopped:
            deliver(token, ShuttingDown())
        elif len(self._reads) + len(self._forwarded_reads) >= PENDING_READS_MAX:
            deliver(token, Busy("too many reads wait"))
        elif self.raft.role == "leader":
            self._reads.append((deliver, token))
            if not self._turn_scheduled:
                self._wake()
        elif follower_ok and self.raft.leader is not None and not self.snapshots.installing:
            self._forwarded_reads.append((deliver, token))
            self._wake()
        else:
            deliver(token, self.not_leader())

    def check_readable(self) -> None:
        """Raise where the machine's caches and the engine's rows are not of one state: a read must wait."""
        if self.snapshots.installing:
            raise self.not_leader()
        if self._stalled is not None:
            raise Busy("the storage engine is stalled")

    def transfer(self, target: int | None) -> None:
        """Hand leadership over; raise NotLeader or Busy where that can't be."""
        try:
            self.raft.transfer(target, self.now_ms())
        except refusal.NotLeader:
            raise self.not_leader() from None
        except refusal.RaftRefusal as error:
            raise Busy(str(error)) from None
        self._wake()

    def propose_tick(self) -> None:
        """Log nothing but the present replicated time, if this replica leads."""
        try:
            self.raft.propose(b"", self.now_ms(), kind=EntryKind.TICK, reserved=True)
        except refusal.RaftRefusal:
            return
        self._wake()

    # ---- what peers and timers bring

    def step(self, message: Message) -> None:
        """A message of an admitted peer."""
        if self._stopped:
            return
        self.raft.step(message, self.now_ms())
        if not self._turn_scheduled:
            self._wake()

    def peer_up(self, peer: int) -> None:
        if not self._stopped:
            self.raft.peer_reachable(peer)
            self._wake()

    def peer_down(self, peer: int) -> None:
        if not self._stopped:
            self.raft.peer_unreachable(peer)
            self._wake()

    def now_ms(self) -> int:
        return int(self._loop.time() * 1000)

    def wake(self) -> None:
        """Something changed in the core: carry out its actions in this turn of the loop."""
        if not self._turn_scheduled:
            self._wake()

    def _wake(self) -> None:
        self._turn_scheduled = True
        self._loop.call_soon(self._scheduled_turn)

    def _scheduled_turn(self) -> None:
        self._turn_scheduled = False
        self._turn(later=True)

    def _on_timer(self) -> None:
        self._timer = None
        if self._stopped:
            return
        self.raft.tick(self.now_ms())
        self._turn()

    def _turn(self, *, later: bool = False) -> None:
        """Feed the core what has gathered, then do all that it asks for.

        `later`: this turn of the loop began after all that has gathered came in. Some loops read the clock only
        once a turn, so only then does the time vouch that a lease still held when a read arrived.
        """
        if self._stopped or self._in_turn:
            return
        self._in_turn = True
        try:
            if self._raw and len(self._waiters) < ENTRIES_IN_FLIGHT_MAX:
                self._propose()
            if self._reads and len(self._read_waiters) < READ_ROUNDS_MAX and (later or not self._leases):
                self._reads = self._register_reads(self._reads, forward=False)
            if self._forwarded_reads and len(self._read_waiters) < READ_ROUNDS_MAX:
                self._forwarded_reads = self._register_reads(self._forwarded_reads, forward=True)
            handlers = self._handlers
            while todo := self.raft.take_actions():
                for action in todo:
                    handlers[type(action)](action)
        finally:
            self._in_turn = False
        self._rearm()

    def _rearm(self) -> None:
        deadline_ms = self.raft.next_deadline_ms
        if self._timer is not None:
            if deadline_ms >= self._timer_deadline_ms:
                return  # it fires too early at worst, and is set again then
            self._timer.cancel()
        self._timer_deadline_ms = deadline_ms
        delay_s = max(0.001, deadline_ms / 1000 - self._loop.time())
        self._timer = self._loop.call_later(delay_s, self._on_timer)

    # ---- commands

    def _propose(self) -> None:
        while self._raw and len(self._waiters) < ENTRIES_IN_FLIGHT_MAX:
            count = len(self._raw)
            if count > BATCH_COMMANDS_MAX or self._pending_bytes > BATCH_BYTES_MAX:
                count = self._fitting()
            raw, self._raw = self._raw[:count], self._raw[count:]
            commands, self._commands = self._commands[:count], self._commands[count:]
            waiters, self._submitters = self._submitters[:count], self._submitters[count:]
            body = b"".join(raw)
            self._pending_bytes -= len(body)
            error: RaftKVError
            try:
                entry = self.raft.propose(array_header(count) + body, self.now_ms(), memo=commands)
            except refusal.Busy as busy:
                error = Busy(str(busy))
            except refusal.RaftRefusal:
                error = self.not_leader()
            else:
                self._waiters[entry.index] = (entry.term, waiters)
                continue
            self._fail(waiters, error)

    def _fail(self, submitters: list[Waiter], error: RaftKVError) -> None:
        """Tell those who submitted commands what has become of them."""
        self.failed += len(submitters)
        for deliver, token in submitters:
            deliver(token, error)

    @property
    def pending(self) -> int:
        """Commands that wait for a place in the log, or to be committed and applied."""
        return len(self._raw) + sum(len(waiters) for _, waiters in self._waiters.values())

    def _fitting(self) -> int:
        """How many of the pending commands fit into one entry; at least one."""
        total_bytes = 0
        for count, raw in enumerate(self._raw[:BATCH_COMMANDS_MAX]):
            total_bytes += len(raw)
            if total_bytes > BATCH_BYTES_MAX and count:
                return count
        return min(len(self._raw), BATCH_COMMANDS_MAX)

    def _end_waiters(self, pending_error: RaftKVError, below_term: int | None) -> None:
        """End all that wait for a log or a quorum that this replica no longer leads."""
        raw, waiters = self._raw, self._submitters
        self._raw, self._commands, self._submitters, self._pending_bytes = [], [], [], 0
        reads, self._reads = self._reads + self._forwarded_reads, []
        self._forwarded_reads = []
        self._fail(waiters[: len(raw)], pending_error)
        for deliver, token in reads:
            deliver(token, pending_error)
        unknown = OutcomeUnknown("the leader changed before this write was known to be committed")
        for index, (term, waiting) in list(self._waiters.items()):
            if below_term is None or term < below_term:
                del self._waiters[index]
                self._fail(waiting, unknown)
        if below_term is None:
            registered, self._read_waiters = self._read_waiters, {}
            for waiting in registered.values():
                for deliver, token in waiting:
                    deliver(token, pending_error)

    # ---- reads

    def _register_reads(self, reads: list[Waiter], *, forward: bool) -> list[Waiter]:
        try:
            read_id = self.raft.read(self.now_ms(), forward=forward)
        except refusal.RaftRefusal:
            error = self.not_leader()
            for deliver, token in reads:
                deliver(token, error)
        else:
            self._read_waiters[read_id] = reads
        return []

    def _read_ready(self, action: act.ReadReady) -> None:
        for read_id in range(action.first_id, action.last_id + 1):
            for deliver, token in self._read_waiters.pop(read_id, ()):
                deliver(token, None)
        if self._reads or self._forwarded_reads:
            self.wake()

    def _read_failed(self, action: act.ReadFailed) -> None:
        error = self.not_leader()
        for read_id in range(action.first_id, action.last_id + 1):
            for deliver, token in self._read_waiters.pop(read_id, ()):
                deliver(token, error)
        if self._reads or self._forwarded_reads:
            self.wake()

    # ---- durability and messages

    def _persist(self, action: act.Persist) -> None:
        self.store.wal.append(action.hard_state, action.entries, partial(self._persisted, action.seq))

    def _persisted(self, seq: int) -> None:
        if self._stopped:
            return
        self._durable_seq = seq
        self.raft.persisted(seq)
        held = self._held_sends
        while held and held[0].after <= seq:
            self._send_now(held.popleft())
        self._turn()

    def _send_when_durable(self, action: act.Send) -> None:
        if action.after <= self._durable_seq:
            self._send_now(action)
        elif self._held_sends and self._held_sends[-1].after > action.after:
            # Rare: keep the queue ordered by what each waits for.
            self._held_sends = deque(sorted([*self._held_sends, action], key=lambda send: send.after))
        else:
            self._held_sends.append(action)

    def _send_now(self, action: act.Send) -> None:
        message = action.message
        if type(message) is AppendEntries:
            frame = message.frame
            if frame is None:
                frame = message.frame = encode_raft(message)
        else:
            frame = encode_raft(message)
        self._send(action.to, frame)

    # ---- applying

    def _commit(self, action: act.Commit) -> None:
        self._apply_queue.extend(action.entries)
        if not self._apply_scheduled and self._stalled is None:
            self._apply_some()

    def _apply_later(self) -> None:
        self._apply_scheduled = False
        if self._stopped or self.snapshots.installing:
            return
        self._apply_some()
        self._turn()

    def _apply_some(self) -> None:
        """Apply from the queue until it is empty or the slice is used up."""
        queue = self._apply_queue
        slice_end_s = self._loop.time() + APPLY_SLICE_S
        if self._stalled is not None and not self._write(*self._stalled):
            return
        while queue:
            if not self._apply(queue.popleft()):
                break
            if queue and self._loop.time() > slice_end_s:
                self._apply_scheduled = True
                self._loop.call_soon(self._apply_later)
                break
        if not queue and self._stalled is None:
            self.behind_since_s = None
        elif self.behind_since_s is None:
            self.behind_since_s = slice_end_s
        self.raft.applied(self._applied_index)
        self.compaction.consider()
        self.on_applied()
        if self._raw:
            self.wake()

    def _apply(self, entry: Entry) -> bool:
        """Compute the entry's effects and write them; False when the engine has stalled."""
        if entry.index <= self._applied_index:
            return True  # a snapshot that was installed meanwhile holds it
        assert entry.index == self._applied_index + 1, (entry.index, self._applied_index)
        view = Overlay(self.store.engine)
        commands: Any = ()
        membership = None
        if entry.kind == EntryKind.COMMANDS:
            memo = entry.memo
            commands = self.machine.decode(entry.data) if memo is None else memo
        elif entry.kind == EntryKind.MEMBERSHIP:
            membership = Membership.decode(entry.data)
        results = self.machine.apply(view, entry, commands)
        self.store.meta_changes(view.changes, entry.index, entry.term, entry.stamp_ms, membership)
        return self._write(entry, view, results)

    def _write(self, entry: Entry, view: Overlay, results: list[list[Any]]) -> bool:
        try:
            self.store.engine.write(view.changes, view.range_deletes)
        except WriteStall as stall:
            # The caches already hold this entry's effects: nothing else is read or applied until they are written.
            if self._stalled is None:
                log.warning("%s: the storage engine is stalled (%s); writes wait", self.name, stall)
            self._stalled = (entry, view, results)
            self._apply_scheduled = True
            self._loop.call_later(STALL_RETRY_S, self._apply_later)
            return False
        self._stalled = None
        self._applied_index = entry.index
        if view.range_deletes:
            self.compaction.deleted(view.range_deletes)
        waiting = self._waiters.pop(entry.index, None)
        if waiting is not None:
            term, waiters = waiting
            if term == entry.term:
                for (deliver, token), result in zip(waiters, results, strict=True):
                    deliver(token, result)
            else:
                self._fail(waiters, OutcomeUnknown("another leader's entry took this write's place"))
        return True

    @property
    def applied_index(self) -> int:
        return self._applied_index

    def resume_applying(self) -> None:
        """Go on with what was committed before or while a snapshot was being installed."""
        if self._apply_queue and not self._apply_scheduled:
            self._apply_scheduled = True
            self._loop.call_soon(self._apply_later)

    # ---- changes of the group

    def _role_changed(self, action: act.RoleChanged) -> None:
        if action.leader is not None and action.leader != self._known_leader:
            self._known_leader = action.leader
            self.leader_changes += 1
        leader = None if action.leader is None else self._address_of(action.leader)
        log.info("%s: %s in term %d, leader %s", self.name, action.role, action.term, leader or "unknown")
        if action.role == "leader":
            self._end_waiters(self.not_leader(), below_term=action.term)
        else:
            self._end_waiters(self.not_leader(), below_term=None)
        self.on_role(action.role, action.term, action.leader)

    def _membership_changed(self, action: act.MembershipChanged) -> None:
        voters = ", ".join(str(voter) for voter in action.membership.voters)
        log.info("%s: membership as of index %d has voters %s", self.name, action.index, voters)

    def _peer_regressed(self, action: act.PeerRegressed) -> None:
        reason = (
            f"its log ends at {action.last_index}, but it had acknowledged {action.acked_index}: "
            "an old data directory was brought back, or its disk lost fsynced data; when its own is back, restart the "
            "leader too, which goes on refusing it until then"
        )
        log.error("%s: replica %d must be replaced: %s", self.name, action.peer, reason)
        self.on_regressed(action.peer, reason)

    def _transfer_ended(self, action: act.TransferEnded) -> None:
        log.warning("%s: the leadership transfer to %d timed out", self.name, action.target)

    # ---- snapshots

    def state_replaced(self, index: int) -> None:
        """A snapshot through `index` is in place of the engine's state: start again from it."""
        self._apply_queue.clear()
        self._stalled = None
        self.behind_since_s = None
        self._applied_index = index
        self.machine.load(self.store.engine)
        self.compaction.deleted(self.machine.dead_ranges())
        self.on_applied()
