"""Commands on keys whose shards this replica serves: it leads their group, so they need no other hop.

The same path as that of native clients, below the frames: `Replica.submit` and `Replica.read`, with callbacks; each
ends with `deliver(token, result)`. A write is sent to the log once, never again, so it acknowledges everything before
it: the session row that this daemon keeps in a shard never holds more than one reply. What was *certainly* not done is
delivered as an error that is `definite`, and somebody else may do it; anything else is not known, and the client is
told so.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import msgpack

from raftkv.daemons.redis.replies import Refusal
from raftkv.daemons.redis.strings import Loaded, View
from raftkv.machines.kv import DELETE, PUT
from raftkv.machines.results import CONFLICT, OK, VERSION_MISMATCH
from raftkv.machines.slots import shard_of
from raftkv.machines.txn_commands import TXN_COMMIT, make_txid, refuse_txn_shape
from raftkv.protocol.errors import Conflict, NotLeader, RaftKVError, from_result
from raftkv.protocol.limits import ID_BYTES, KEY_BYTES_MAX

if TYPE_CHECKING:
    from raftkv.daemons.replica import Deliver, Replica
    from raftkv.daemons.shardkv import ShardKvRole
    from raftkv.storage.store import Store

TRIES_MAX = 8
"""Of a command that reads and writes: so often may others be faster."""
PAUSE_S = 0.002
"""Before the third try, up to so long; twice as long before each further one."""

Run = Callable[[View], Any]
"""A command, or several: reads and writes the view, returns the reply."""


class Direct:
    """This replica, as far as it leads. `rng` makes the id under which its writes are known."""

    def __init__(self, role: ShardKvRole, store: Store, rng: random.Random) -> None:
        self._role = role
        self._store = store
        self._rng = rng
        self._machine = role.machine
        self._pack = msgpack.Packer(autoreset=True).pack
        self._client_id = rng.getrandbits(8 * ID_BYTES).to_bytes(ID_BYTES, "big")
        self._seq = 0

    # ---- where things are

    @property
    def leads(self) -> bool:
        replica = self._role.replica
        return replica is not None and replica.is_leader

    def shard_here(self, key: bytes) -> int:
        """The key's shard if it is served here, else -1; as for a key that is too long to be anywhere."""
        shards = self._machine.shard_count
        if not shards or len(key) > KEY_BYTES_MAX:
            return -1
        shard = shard_of(key, shards)
        return shard if self._machine.serves(shard) else -1

    def all_here(self, keys: Sequence[bytes]) -> bool:
        """Whether this replica leads, and serves the shards of all these keys."""
        return self.leads and all(self.shard_here(key) >= 0 for key in keys)

    def is_queued_for(self, shard: int, key: bytes) -> bool:
        """Whether others wait to write the key, until a transaction lets go of it."""
        return self._role.is_waited_for(shard, key)

    # ---- reads

    def when_readable(self, deliver: Deliver, token: Any, *, follower_ok: bool = False) -> None:
        """`deliver(token, None)` when `value` and `load` may be used for linearizable reads, else an error."""
        replica = self._role.replica
        if replica is None:
            deliver(token, NotLeader(None))
        else:
            replica.read(deliver, token, follower_ok=follower_ok)

    def check_readable(self) -> Replica:
        """Raise where the state isn't whole, or isn't there."""
        replica = self._role.replica
        if replica is None:
            raise NotLeader(None)
        replica.check_readable()
        return replica

    def value(self, key: bytes) -> bytes | None:
        """Of the state applied by now. Raise WrongGroup, Locked."""
        machine = self._machine
        return machine.get(self._store.engine, shard_of(key, machine.shard_count or 1), key)[0]

    def load(self, keys: Sequence[bytes]) -> dict[bytes, Loaded]:
        """All of them of the state applied by now. Raise WrongGroup, Locked."""
        machine, engine = self._machine, self._store.engine
        shards = machine.shard_count or 1
        return {key: machine.get(engine, shard_of(key, shards), key) for key in keys}

    # ---- writes

    def put(self, shard: int, key: bytes, value: bytes, if_version: int | None, deliver: Deliver, token: Any) -> None:
        """`deliver` gets the command's result array, or an error; maybe before this returns."""
        self._seq = seq = self._seq + 1
        command = [PUT, shard, self._client_id, seq, seq, self._role.map_time_ms, key, value, if_version]
        self._submit(command, deliver, token)

    def delete(self, shard: int, key: bytes, deliver: Deliver, token: Any) -> None:
        self._seq = seq = self._seq + 1
        self._submit([DELETE, shard, self._client_id, seq, seq, self._role.map_time_ms, key], deliver, token)

    def commit(
        self, loaded: Mapping[bytes, Loaded], changes: Mapping[bytes, bytes | None], deliver: Deliver, token: Any
    ) -> None:
        """Write `changes` at one instant, if all of `loaded` is as it was."""
        shards = self._machine.shard_count or 1
        parts: dict[int, list[Any]] = {}
        for position, pairs in (
            (1, ((key, version) for key, (_, version) in loaded.items())),
            (2, changes.items()),
        ):
            for key, item in pairs:
                shard = shard_of(key, shards)
                parts.setdefault(shard, [shard, [], []])[position].append([key, item])
        txid = make_txid(self._role.map_time_ms, self._rng.getrandbits(64).to_bytes(8))
        command = [TXN_COMMIT, txid, [parts[shard] for shard in sorted(parts)]]
        refusal = refuse_txn_shape(command, self._machine.shard_count)
        if refusal is not None:
            deliver(token, from_result(refusal))
            return
        self._submit(command, partial(self._committed, deliver), token)

    def _committed(self, deliver: Deliver, token: Any, result: Any) -> None:
        self._role.count_commit(result)
        deliver(token, result)

    def _submit(self, command: list[Any], deliver: Deliver, token: Any) -> None:
        replica = self._role.replica
        if replica is None:
            deliver(token, NotLeader(None))
        else:
            replica.submit(self._pack(command), command, deliver, token)

    # ---- reads and writes

    def transact(self, keys: Sequence[bytes], run: Run, deliver: Deliver, token: Any) -> None:
        """Carry out `run` on the keys at one instant; `deliver` gets its reply, or a RaftKVError."""
        _Attempt(self, keys, run, deliver, token).begin()

    def pause_s(self, tries: int) -> float:
        return PAUSE_S * (0.5 + self._rng.random() / 2) * (1 << (tries - 2))


class _Attempt:
    """Reads what is applied, decides, and writes under the condition that it was the latest; again while it wasn't.

    A decision to write nothing is made once more, on a state that is fresh enough for a linearizable read.
    """

    __slots__ = ("_deliver", "_direct", "_keys", "_reply", "_run", "_token", "_tries")

    def __init__(self, direct: Direct, keys: Sequence[bytes], run: Run, deliver: Deliver, token: Any) -> None:
        self._direct = direct
        self._keys = keys
        self._run = run
        self._deliver = deliver
        self._token = token
        self._tries = 0
        self._reply: Any = None

    def begin(self, is_fresh: bool = False) -> None:
        direct = self._direct
        try:
            replica = direct.check_readable()
            if not replica.is_leader:
                raise replica.not_leader()
            loaded = direct.load(self._keys)
            view = View(loaded)
            try:
                self._reply = self._run(view)
            except Refusal as refusal:
                self._reply, changes = refusal, {}
            else:
                changes = view.changes
            if changes:
                self._write(loaded, changes)
            elif is_fresh:
                self._deliver(self._token, self._reply)
            else:
                replica.read(self._readable, None)
        except RaftKVError as error:
            self._deliver(self._token, error)

    def _readable(self, _: None, error: RaftKVError | None) -> None:
        if error is not None:
            self._deliver(self._token, error)
        else:
            self.begin(True)

    def _write(self, loaded: dict[bytes, Loaded], changes: dict[bytes, bytes | None]) -> None:
        if len(loaded) == 1:
            ((key, value),) = changes.items()
            if value is not None:
                before, version = loaded[key]
                shard = self._direct.shard_here(key)
                self._direct.put(shard, key, value, 0 if before is None else version, self._written, None)
                return
        self._direct.commit(loaded, changes, self._written, None)

    def _written(self, _: None, result: Any) -> None:
        if isinstance(result, RaftKVError):
            self._deliver(self._token, result)
        elif result[0] == OK:
            self._deliver(self._token, self._reply)
        elif result[0] not in (VERSION_MISMATCH, CONFLICT):
            self._deliver(self._token, from_result(result))
        else:
            self._tries += 1
            if self._tries == TRIES_MAX:
                self._deliver(self._token, Conflict(list(self._keys)))
            elif self._tries == 1:
                self.begin()
            else:
                asyncio.get_running_loop().call_later(self._direct.pause_s(self._tries), self.begin)
