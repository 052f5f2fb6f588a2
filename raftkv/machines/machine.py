"""What the replica runtime knows of a state machine, and what both machines share.

A machine is a function of the log. It never raises on what a client wrote, however malformed: a command
that reached the log gets an answer, the same on every replica. It never reads a clock and never keeps
anything in memory that can't be rebuilt from the engine by `load`.

Commands are msgpack arrays: `[op, shard, client_id, seq, first_unacked, first_sent_map_time_ms, *args]`
from clients (16-byte client id; seq counted per client and shard from 1), `[op, *args]` from the system.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import msgpack

from raftkv.machines.results import FINAL_CODES, Result, raise_if_refused
from raftkv.machines.sessions import SESSION_CACHE_WEIGHT, SESSION_LIFETIME_MS, SessionTable
from raftkv.protocol import errors
from raftkv.protocol.limits import ID_BYTES, NUMBER_MAX
from raftkv.raft.entry import Entry, EntryKind

if TYPE_CHECKING:
    from raftkv.storage.engine import Overlay, StorageEngine

Command = list[Any]


_CORRUPT = (ValueError, TypeError, msgpack.UnpackException)


class Machine(Protocol):
    """A replicated state machine, as the runtime uses it."""

    def load(self, engine: StorageEngine) -> None:
        """Forget everything, and take the state that the engine holds: at boot, after a snapshot install."""

    def decode(self, data: bytes) -> list[Command]:
        """The commands of a COMMANDS entry; none if the data is no array (it has no effect then)."""

    def apply(self, view: Overlay, entry: Entry, commands: Sequence[Command] | None = None) -> list[Result]:
        """Apply one entry of any kind; one result per command; every effect goes into `view`.

        `commands` is the decoded data if the caller has it. Having returned, the machine counts on the
        view's changes being written before anything else is applied or read: a caller whose write
        stalls repeats the write, never the apply, and one that gives up calls `load`.
        """

    def dead_ranges(self) -> list[tuple[bytes, bytes]]:
        """Where nothing is, as [start, end) each, and much may have been: what the engine still holds of it can go."""


def decode_command(encoded: bytes) -> Command:
    """One client's command, from the bytes it sent. Raise BadRequest.

    To be called before the bytes are joined into an entry: what passes here and `validate` can't spoil
    the decoding of its neighbours.
    """
    try:
        command = msgpack.unpackb(encoded)
    except _CORRUPT:
        raise errors.BadRequest("the command is not msgpack") from None
    if type(command) is not list:
        raise errors.BadRequest("the command is not an array")
    return command


def join_commands(encoded: Sequence[bytes]) -> bytes:
    """An entry's data: the clients' own bytes, behind one array header."""
    header: bytes = msgpack.Packer().pack_array_header(len(encoded))
    return header + b"".join(encoded)


def decode_commands(data: bytes) -> list[Command]:
    """The commands in an entry's data; an empty list if it isn't a msgpack array."""
    try:
        commands = msgpack.unpackb(data)
    except _CORRUPT:
        return []
    return commands if type(commands) is list else []


def header_problem(command: Command, items: int) -> str | None:
    """What is wrong with a client command's length or header, or None."""
    if len(command) != items:
        return "wrong number of items in the command"
    _, shard, client_id, seq, first_unacked, stamp_ms, *_ = command
    if type(client_id) is not bytes or len(client_id) != ID_BYTES:
        return "the client id is not 16 bytes"
    if type(shard) is not int or type(seq) is not int or type(first_unacked) is not int:
        return "a number in the command's header is not an integer"
    if not 0 < first_unacked <= seq <= NUMBER_MAX:
        return "the first unacknowledged seq is not in 1 … seq"
    if type(stamp_ms) is not int or not 0 <= stamp_ms <= NUMBER_MAX:
        return "the command has no map time of its first sending"
    return None


class SessionedMachine(ABC):
    """Dispatch shared by the machines: shape first, then placement, session, execution, record."""

    def __init__(self, session_lifetime_ms: int = SESSION_LIFETIME_MS, cache_weight: int = SESSION_CACHE_WEIGHT):
        """The lifetime must be the same on every replica; the cache's size need not."""
        self._system_ops: frozenset[int] = frozenset()
        """Commands without a header: the system's own, never a client's."""
        self._handlers: dict[int, Callable[[Overlay, Any, Command], Result]] = {}
        """How a client's command is carried out, once; the second argument is what `_answer_once` got."""
        self._session_lifetime_ms = session_lifetime_ms
        self._sessions = SessionTable(cache_weight)
        self._map_time_ms = 0
        self._horizon_ms = 0

    @property
    def sweep_pending(self) -> bool:
        """The last sweep of old sessions stopped at its bound: more map time commands (ticks for the
        controllers) would go on with it, even if they don't advance the time."""
        return self._sessions.sweep_pending

    @property
    def sessions_in_memory(self) -> int:
        """How many rows of sessions are cached: of the clients that wrote lately, one for each shard."""
        return self._sessions.cached_rows

    @property
    def map_time_ms(self) -> int:
        """A lower bound of the controllers' replicated time, in ms."""
        return self._map_time_ms

    def decode(self, data: bytes) -> list[Command]:
        return decode_commands(data)

    def dead_ranges(self) -> list[tuple[bytes, bytes]]:
        return []

    def apply(self, view: Overlay, entry: Entry, commands: Sequence[Command] | None = None) -> list[Result]:
        self._begin_entry(view, entry)
        results: list[Result] = []
        if entry.kind == EntryKind.COMMANDS:
            if commands is None:
                commands = decode_commands(entry.data)
            run = self._run
            results = [run(view, command) for command in commands]
        self._flush(view)
        return results

    def validate(self, command: Command) -> None:
        """A client's command, before the log. Raise BadRequest or TooLarge.

        Looks at the command and at what never changes, so it may be called on any replica at any time.
        """
        refusal = self._refuse_shape(command)
        raise_if_refused(refusal)
        if command[0] in self._system_ops:
            raise errors.BadRequest("clients may not send this command")

    def _set_map_time(self, map_time_ms: int) -> None:
        self._map_time_ms = map_time_ms
        self._horizon_ms = map_time_ms - self._session_lifetime_ms

    def _run(self, view: Overlay, command: Command) -> Result:
        refusal = self._refuse_shape(command)
        if refusal is not None:
            return refusal
        if command[0] in self._system_ops:
            self._flush(view)
            return self._execute_system(view, command)
        return self._execute_once(view, command)

    def _answer_once(
        self, view: Overlay, session_key: bytes, stamp_floor_ms: int, command: Command, place: Any = None
    ) -> Result:
        """What the session knows, or else what the command's handler answers; a final reply is recorded."""
        op, _, _, seq, first_unacked, stamp_ms, *_ = command
        session = self._sessions.find(view, session_key)
        known = session.recall(seq, first_unacked, stamp_ms, max(self._horizon_ms, stamp_floor_ms))
        if known is not None:
            return known
        result = self._handlers[op](view, place, command)
        if result[0] in FINAL_CODES:
            session.record(seq, first_unacked, stamp_ms, result)
            self._sessions.changed(session_key, session)
        return result

    @abstractmethod
    def load(self, engine: StorageEngine) -> None:
        """As in `Machine`."""

    @abstractmethod
    def _begin_entry(self, view: Overlay, entry: Entry) -> None:
        """Before the entry's commands; also for entries without any."""

    @abstractmethod
    def _refuse_shape(self, command: Command) -> Result | None:
        """The refusal of a command that is wrong in itself, whatever the state; it may be anything that
        msgpack decodes to."""

    @abstractmethod
    def _execute_system(self, view: Overlay, command: Command) -> Result:
        """With every effect so far in `view`, those that are kept back until the entry's end too."""

    @abstractmethod
    def _execute_once(self, view: Overlay, command: Command) -> Result:
        """Place a client's command, and answer it through `_answer_once`."""

    @abstractmethod
    def _flush(self, view: Overlay) -> None:
        """Put into `view` what was kept back: rows that several commands of an entry change."""
