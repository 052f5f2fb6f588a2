"""One daemon: store, peers, replica and role put together; the same for every role.

Life: open the store, listen, wait until the group is formed (a group with data is), take part, and at the
end hand leadership over, finish what is in flight, close. It takes its sockets and time from the running loop
and its files from the `Disk`; so a simulator runs it as it is.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from raftkv import __version__
from raftkv.daemons.controller import ControllerRole
from raftkv.daemons.coordinator import CoordinatorRole
from raftkv.daemons.failpoints import Failpoints
from raftkv.daemons.map_follower import RETRY_S, open_controller
from raftkv.daemons.options import DaemonOptions
from raftkv.daemons.peers import Peers
from raftkv.daemons.readiness import Check, readiness
from raftkv.daemons.replica import Replica
from raftkv.daemons.service import Service, Session
from raftkv.daemons.shardkv import ShardKvRole
from raftkv.daemons.tasks import Tasks
from raftkv.protocol.addresses import parse_address
from raftkv.protocol.connection import Connection, Server
from raftkv.protocol.errors import Malformed, RaftKVError, TlsRefused, Unavailable
from raftkv.protocol.messages import Verb, decode_transfer_body
from raftkv.raft.actions import HardState
from raftkv.raft.config import RaftConfig
from raftkv.raft.core import Raft
from raftkv.raft.membership import Membership
from raftkv.storage.disk import Disk
from raftkv.storage.engine import EngineFactory
from raftkv.storage.errors import StorageError
from raftkv.storage.identity import Identity
from raftkv.storage.store import Store

if TYPE_CHECKING:
    from raftkv.daemons.redis.listener import RedisListener

log = logging.getLogger(__name__)

PINNED_LOGS = 4
"""How many times the usual bound the log may grow while a follower still needs it."""
HANDOVER_TIMEOUT_S = 2.0
DRAIN_TIMEOUT_S = 3.0
POLL_S = 0.005
WAITING_NOTICE_S = 5.0

Role = ControllerRole | ShardKvRole | CoordinatorRole


class Daemon:
    """One replica of one role. `fatal(text)` must not return."""

    def __init__(
        self,
        options: DaemonOptions,
        disk: Disk,
        engine_factory: EngineFactory,
        fatal: Callable[[str], None],
        pid: int = 0,
        failpoints: Failpoints | None = None,
        make_session: Callable[[Connection], Session] = Session,
    ) -> None:
        self._make_session = make_session
        self.options = options
        self._pid = pid
        self._disk = disk
        self._engine_factory = engine_factory
        self._fatal = fatal
        self._failpoints = failpoints or Failpoints()
        self._loop = asyncio.get_running_loop()
        self._rng = random.Random(disk.entropy(16))
        self._tasks = Tasks(self._task_crashed)
        self._started_s = self._loop.time()
        self._formed: asyncio.Future[None] = self._loop.create_future()
        self._store: Store | None = None
        self._role: Role
        self._server: Server | None = None
        self._redis: RedisListener | None = None
        self._stopping = False
        self.replica: Replica | None = None

    # ---- start

    async def start(self) -> None:
        """Listen and take part. Raise StorageError or OSError if the data or the address can't be used; the address for
        Redis clients is then the error's `filename`."""
        options = self.options
        store = Store.open(
            self._disk,
            options.data_dir,
            self._engine_factory,
            Identity(options.role, options.gid, options.replica, tuple(sorted(options.peers))),
            wal_segment_bytes=options.wal_segment_bytes,
        )
        self._store = store
        store.wal.on_failure = self._wal_failed
        if options.role == "controller":
            self._role = ControllerRole(store, options.shards, self._disk.entropy)
        elif options.role == "coordinator":
            self._role = CoordinatorRole(options, store, self._tasks, self._rng, self._failpoints)
        else:
            self._role = ShardKvRole(options, store, self._tasks, self._rng, self._failpoints)
        self._peers = Peers(
            options,
            self._identity,
            self._rng,
            formed=not store.is_fresh,
            on_formed=self._group_formed,
            fatal=self._fatal,
        )
        verbs = {**self._role.verbs, Verb.STATUS: self._status, Verb.TRANSFER: self._transfer}
        self._service = Service(self._peers, verbs, options.name, self._make_session)
        host, port = parse_address(options.listen)
        try:
            ssl = options.tls.server if options.tls is not None else None
            self._server = await Server.listen(host, port, self._service.accept, ssl=ssl, label=options.name)
            if options.redis_listen is not None:
                await self._listen_to_redis(store)
        except OSError:
            if self._server is not None:
                self._server.close()
            store.close()
            raise
        if not store.is_fresh:
            self._begin()
        self._peers.start()
        if options.role != "controller" and not store.identity.cluster_id:
            self._tasks.start(self._learn_cluster(), "learn-cluster")
        if store.is_fresh:
            self._tasks.start(self._complain_until_formed(), "formation-notice")

    async def _listen_to_redis(self, store: Store) -> None:
        from raftkv.daemons.redis.listener import RedisListener

        assert isinstance(self._role, ShardKvRole)
        rng = random.Random(self._disk.entropy(16))
        self._redis = RedisListener(self.options, self._role, store, self._tasks, rng, self._pid)
        try:
            await self._redis.listen()
        except OSError as error:
            raise OSError(error.errno, error.strerror or str(error), self.options.redis_listen) from None

    def _identity(self) -> Identity:
        assert self._store is not None
        return self._store.identity

    def _group_formed(self, membership: Membership) -> None:
        """A fresh replica has its first membership: record it durably, then begin."""
        store = self._store
        assert store is not None

        def durable() -> None:
            log.info("%s: the group is formed, voters %s", self.options.name, list(membership.voters))
            self._begin()
            self._peers.identity_changed()

        store.form(membership, HardState(), durable)

    def _begin(self) -> None:
        store = self._store
        options = self.options
        assert store is not None and store.membership is not None
        raft = Raft(
            RaftConfig(
                replica=options.replica,
                lease_reads=options.reads == "lease",
                pin_log_bytes_max=PINNED_LOGS * options.snapshot_bytes,
            ),
            random.Random(self._rng.getrandbits(64)),
            int(self._loop.time() * 1000),
            hard_state=store.hard_state,
            start_index=store.start_index,
            start_term=store.start_term,
            start_membership=store.membership,
            entries=store.entries,
            applied_index=store.applied.index,
            stamp_ms=store.applied.stamp_ms,
        )
        store.entries = []
        replica = Replica(
            name=options.name,
            raft=raft,
            store=store,
            machine=self._role.machine,
            send=self._peers.send,
            address_of=self._peers.address_of,
            tasks=self._tasks,
            fatal=self._fatal,
            snapshot_bytes=options.snapshot_bytes,
            snapshot_entries=options.snapshot_entries,
            lease_reads=options.reads == "lease",
        )
        replica.on_role = self._role.role_changed
        replica.on_applied = self._role.applied
        replica.on_regressed = self._peers.regressed
        self.replica = replica
        self._peers.replica = replica
        self._role.attach(replica)
        replica.start()
        if not self._formed.done():
            self._formed.set_result(None)

    async def _learn_cluster(self) -> None:
        """Ask the controllers which cluster this is, until one of them knows."""
        store = self._store
        assert store is not None
        turn = 0
        complaints: set[str] = set()
        while not store.identity.cluster_id:
            address = self.options.controllers[turn % len(self.options.controllers)]
            turn += 1
            try:
                channel = await open_controller(address, b"", self.options.client_ssl)
            except TlsRefused as error:
                if str(error) not in complaints:
                    complaints.add(str(error))
                    log.warning("%s: controller %s", self.options.name, error)
            except (RaftKVError, OSError) as error:
                log.debug("%s: controller %s: %s", self.options.name, address, error)
            else:
                cluster_id = channel.server_hello.cluster_id
                channel.close()
                if cluster_id:
                    store.set_cluster_id(cluster_id)
                    log.info("%s: joined cluster %s", self.options.name, cluster_id.hex())
                    self._peers.identity_changed()
                    return
            await asyncio.sleep(RETRY_S * (0.5 + self._rng.random()))

    async def _complain_until_formed(self) -> None:
        while not self._formed.done():
            await asyncio.sleep(WAITING_NOTICE_S)
            if self._formed.done():
                return
            if not self._peers.may_form:
                where = ", ".join(self.options.controllers)
                log.warning("%s: waiting for a controller at %s", self.options.name, where)
            else:
                where = ", ".join(f"{peer} at {self.options.peers[peer]}" for peer in self._peers.missing())
                log.warning("%s: a new group starts with all its replicas; waiting for %s", self.options.name, where)

    # ---- end

    async def stop(self) -> None:
        """Hand leadership over, finish what is in flight, close everything. Bounded in time."""
        self._stopping = True
        if self._server is not None:
            self._server.stop_listening()
        if self._redis is not None:
            self._redis.stop_listening()
        replica = self.replica
        if replica is not None:
            await self._hand_over(replica)
            replica.begin_close()
            await self._until(lambda: replica.idle, DRAIN_TIMEOUT_S)
        await self.abandon()

    async def abandon(self) -> None:
        """Close at once; the log makes up for what was not flushed."""
        self._stopping = True
        replica = self.replica
        if self._server is not None:
            self._role.stop()
            self._service.close()
            self._peers.close()
            if self._redis is not None:
                await self._redis.close()
            await self._tasks.cancel_all()
            if replica is not None:
                replica.stop()
                replica.snapshots.close()
            self._server.close()
            await asyncio.sleep(0)  # let the farewells leave
        if self._store is not None:
            self._store.close()

    async def _hand_over(self, replica: Replica) -> None:
        if not replica.is_leader or len(self.options.peers) == 1:
            return
        try:
            replica.transfer(None)
        except RaftKVError as error:
            log.warning("%s: leadership not handed over: %s", self.options.name, error)
            return
        await self._until(lambda: not replica.is_leader, HANDOVER_TIMEOUT_S)

    async def _until(self, condition: Callable[[], bool], timeout_s: float) -> None:
        deadline_s = self._loop.time() + timeout_s
        while not condition() and self._loop.time() < deadline_s:  # noqa: ASYNC110 - rare, and short
            await asyncio.sleep(POLL_S)

    # ---- verbs that every role has

    def _status(self, session: Session, request_id: int, body: list[Any]) -> None:
        if body:
            raise Malformed("a STATUS has no arguments")
        session.reply(request_id, self.status())

    def status(self) -> dict[str, Any]:
        """What `STATUS` answers; see protocol/messages.py for who asks."""
        options = self.options
        identity = self._identity()
        report: dict[str, Any] = {
            "role": options.role,
            "gid": options.gid,
            "replica": options.replica,
            "address": options.address,
            "redis": options.redis_address,
            "version": __version__,
            "pid": self._pid,
            "uptime_s": self._loop.time() - self._started_s,
            "cluster_id": identity.cluster_id.hex(),
            "store_id": identity.store_id.hex(),
            "members": {str(peer): self._peers.address_of(peer) for peer in sorted(options.peers)},
            "not_ready": [[name, problem] for name, problem in self.readiness() if problem is not None],
            **self._role.status(),
        }
        if self.replica is None:
            return {
                **report,
                "state": "unformed",
                "term": 0,
                "leader": None,
                "waits_for": list(self._peers.missing()),
            }
        raft = self.replica.raft
        now_ms = self.replica.now_ms()
        peers: dict[str, Any] = {}
        if raft.role == "leader":
            for peer, (match, _, state, last_heard_ms) in raft.peer_progress().items():
                peers[str(peer)] = {
                    "match": match,
                    "state": state,
                    "last_heard_ms_ago": max(0, now_ms - last_heard_ms),
                    "addr": self._peers.address_of(peer),
                }
        return {
            **report,
            "state": raft.role,
            "term": raft.term,
            "leader": raft.leader,
            "commit_index": raft.commit_index,
            "applied_index": self.replica.applied_index,
            "last_index": raft.last_index,
            "first_index": raft.first_index,
            "log_bytes": raft.log_bytes,
            "voters": list(raft.membership.voters),
            "snapshots_installed": self.replica.snapshots.installed,
            "peers": peers,
        }

    def readiness(self) -> list[Check]:
        """Whether this replica can do its part: every check, and what is wrong."""
        if not self.serving:
            return [Check("started", "it is stopping" if self._stopping else "the data directory is being opened")]
        role = self._role
        config_num = role.machine.config_num if isinstance(role, ShardKvRole) else None
        waits_for = ", ".join(f"{peer} at {self.options.peers[peer]}" for peer in self._peers.missing())
        return readiness(self.replica, waits_for, self._loop.time(), config_num)

    @property
    def serving(self) -> bool:
        """Between a start that succeeded and the beginning of the end; then `store` and `role` are there."""
        return self._server is not None and not self._stopping

    @property
    def store(self) -> Store:
        assert self._store is not None
        return self._store

    @property
    def role(self) -> Role:
        return self._role

    @property
    def connections(self) -> int:
        """Those accepted and open, of clients and of other replicas."""
        return 0 if self._server is None else len(self._server.connections)

    def _transfer(self, session: Session, request_id: int, body: list[Any]) -> None:
        target = decode_transfer_body(body)
        if self.replica is None:
            raise Unavailable("the group is not formed yet")
        self.replica.transfer(None if target < 0 else target)
        session.reply(request_id, [])

    # ---- what must never happen

    def _wal_failed(self, error: OSError) -> None:
        self._fatal(
            f"{self.options.name}: the log in {self.options.data_dir} can't be written: {error.strerror or error}; "
            "nothing acknowledged is lost. Make room or replace the disk, then start again"
        )

    def _task_crashed(self, name: str, error: BaseException) -> None:
        if isinstance(error, StorageError):
            self._fatal(f"{self.options.name}: {error}")
        log.error("%s: task %s failed", self.options.name, name, exc_info=error)
        self._fatal(f"{self.options.name}: task {name} failed: {error!r}; this is a bug in raftkv")
