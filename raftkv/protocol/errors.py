"""The error tree: everything that can be refused or go wrong between a client and a server.

    RaftKVError
    ├── NotLeader                  1   redirect   ask that replica, or the next one
    ├── WrongGroup                 2   refresh    this group doesn't serve the shard (now)
    ├── Locked                     3   same       a transaction holds the key
    ├── Conflict                   4   never      final: a transaction lost against another one
    ├── Aborted                    5   never      final: logged as the transaction's outcome
    │   └── TooOld                 –   never      client side: it began too long ago, nothing was done
    ├── Busy                       6   same       a queue is full
    ├── TooLarge                   7   never
    ├── BadRequest                 8   never
    │   ├── BadShard              20   never
    │   ├── NoSuchGroup           18   never
    │   ├── GroupExists           19   never
    │   ├── NoSuchConfig          22   never
    │   └── LastGroup             26   never
    ├── Expired                    9   never      first sent too long ago to know whether it applied
    ├── Unavailable               10   redirect   not done: no leader, no quorum, no answer
    │   ├── ShuttingDown          23   redirect
    │   ├── Timeout                –   never      client side: the deadline passed, nothing was done
    │   └── ConnectFailed          –   redirect   client side: no connection, nothing was sent
    ├── OutcomeUnknown            11   redirect   it may have applied, or may still
    │   ├── Interrupted            –   never      client side: stopped by Ctrl-C
    │   └── CommitUnknown          –   never      client side: nobody could say how the transaction ended
    ├── MigrationRefused           –   never      a group asked another one for a shard
    │   ├── Superseded            27   never      a later configuration gave it to someone else
    │   ├── ListLost              28   never      begin a new attempt
    │   └── NotHolder             29   never      ask an earlier owner
    ├── DrainOver                 30   never      the map was changed while the last group was to leave
    ├── CasMismatch               12   never      final: logged as this request's reply
    ├── VersionMismatch           13   never      final: logged as this request's reply
    ├── HandshakeRefused           –   never      the two sides don't belong together
    │   ├── WrongCluster          14
    │   ├── WrongPeer             15
    │   ├── ReplicaMustBeReplaced 16
    │   ├── BadVersion            17
    │   └── TlsRefused            31
    ├── Malformed                 24   never      bytes that aren't our protocol
    ├── ConnectionLost             –   redirect   client side: it broke after the request was sent
    │   └── NoAnswer               –   redirect   client side: sent, but no reply came in time
    └── ServerError               25   never      anything else that a server says

The number is the class's code on the wire: stable for ever, never reused (21 was a refusal that isn't there any
more). A class without one never
travels. `retry` is the advice of the class:

    same      ask the same server again, after a back-off
    redirect  ask another replica (NotLeader may say which)
    refresh   fetch the shard map, then ask the group that it names
    never     the answer won't change by asking again

`definite`: *this attempt* did certainly not apply and never will. It says nothing of earlier attempts
of the same request (design §6); that rule is the client's. A server whose proposal is in its log must
therefore answer `OutcomeUnknown`, never NotLeader or Unavailable, when it gives up waiting for it.
`final`: the refusal was logged as the request's reply, so it holds for every attempt.

`str()` of an error is one line for people: what, where, what to do next.
"""

from __future__ import annotations

from types import NoneType
from typing import Any, ClassVar, Literal

Retry = Literal["same", "redirect", "refresh", "never"]
Shape = tuple[tuple[type, ...], ...]

_STR: tuple[type, ...] = (str,)
_INT: tuple[type, ...] = (int,)
_BYTES: tuple[type, ...] = (bytes,)
_MAYBE_STR: tuple[type, ...] = (str, NoneType)
_MAYBE_BYTES: tuple[type, ...] = (bytes, NoneType)

SHOWN_BYTES_MAX = 64


def show(data: bytes) -> str:
    """Bytes for people: quoted, escaped, cut at 64 bytes, on one line."""
    if len(data) > SHOWN_BYTES_MAX:
        return f"{data[:SHOWN_BYTES_MAX]!r}… ({len(data)} bytes)"[1:]
    return repr(data)[1:]


class RaftKVError(Exception):
    """Root of the tree."""

    code: ClassVar[int | None] = None
    retry: ClassVar[Retry] = "never"
    definite: ClassVar[bool] = True
    final: ClassVar[bool] = False
    shape: ClassVar[Shape] = (_STR,)
    """The types that each wire field may have, in the order of the constructor's arguments."""

    def __init__(self, *fields: Any) -> None:
        super().__init__(*fields)

    @property
    def fields(self) -> list[Any]:
        """What travels, in the order of the constructor's arguments."""
        return list(self.args)

    def to_wire(self) -> tuple[int, list[Any]]:
        """(code, fields). An error that never travels becomes a ServerError with its text."""
        if self.code is None:
            return ServerError.code, [ServerError.code, str(self)]
        return self.code, self.fields

    def to_result(self) -> list[Any]:
        """[code, *fields]: the form in which state machines keep a failure as a command's result."""
        code, fields = self.to_wire()
        return [code, *fields]

    def __str__(self) -> str:
        return " ".join(str(field) for field in self.args) or type(self).__name__


class NotLeader(RaftKVError):
    """Another replica leads the group, at `leader_address` if that is known."""

    code: ClassVar[int] = 1
    retry = "redirect"
    shape = (_MAYBE_STR,)

    def __init__(self, leader_address: str | None = None) -> None:
        super().__init__(leader_address)
        self.leader_address = leader_address

    def __str__(self) -> str:
        if self.leader_address is None:
            return "this replica is not the leader and knows of none; try another replica"
        return f"this replica is not the leader; ask {self.leader_address}"


class WrongGroup(RaftKVError):
    """The group doesn't serve the shard as of `config_num`; `holder_gid` (or -1) may."""

    code: ClassVar[int] = 2
    retry = "refresh"
    shape = (_INT, _INT)

    def __init__(self, config_num: int, holder_gid: int = -1) -> None:
        super().__init__(config_num, holder_gid)
        self.config_num = config_num
        self.holder_gid = holder_gid

    def __str__(self) -> str:
        holder = f"; group {self.holder_gid} holds it" if self.holder_gid >= 0 else ""
        return f"the group does not serve this shard in configuration {self.config_num}{holder}"


class Locked(RaftKVError):
    """Transaction `txn` holds the key."""

    code: ClassVar[int] = 3
    retry = "same"
    shape = (_BYTES,)

    def __init__(self, txn: bytes) -> None:
        super().__init__(txn)
        self.txn = txn

    def __str__(self) -> str:
        return f"the key is locked by transaction {self.txn.hex()}; try again when it has ended"


class Conflict(RaftKVError):
    """Another transaction changed or holds `keys`; nothing was written."""

    code: ClassVar[int] = 4
    final = True
    shape = ((list, tuple),)

    def __init__(self, keys: list[bytes]) -> None:
        super().__init__(list(keys))
        self.keys = list(keys)

    def __str__(self) -> str:
        shown = ", ".join(show(key) if isinstance(key, bytes) else repr(key) for key in self.keys[:3])
        more = f" and {len(self.keys) - 3} more" if len(self.keys) > 3 else ""
        return (
            f"conflict: somebody else was first with {shown}{more}, and has changed or holds it; nothing was written; "
            "run the transaction again"
        )


class Aborted(RaftKVError):
    """The transaction was aborted; nothing was written."""

    code: ClassVar[int | None] = 5
    final = True

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"the transaction was aborted: {self.reason}; nothing was written; run it again"


class TooOld(Aborted):
    """Nobody has heard of the transaction, and it is too old to begin: the client's map time should be renewed."""

    code = None


class Busy(RaftKVError):
    """A limit is reached: `what` is full."""

    code: ClassVar[int] = 6
    retry = "same"

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what

    def __str__(self) -> str:
        return f"the server is busy: {self.what}; try again later"


class TooLarge(RaftKVError):
    code: ClassVar[int] = 7
    shape = (_STR, _INT)

    def __init__(self, what: str, limit_bytes: int) -> None:
        super().__init__(what, limit_bytes)
        self.what = what
        self.limit_bytes = limit_bytes

    def __str__(self) -> str:
        unit = "" if self.what.startswith("the number of") else " bytes"
        return f"{self.what} is larger than the limit of {self.limit_bytes}{unit}"


class BadRequest(RaftKVError):
    """The request can't be carried out, by anyone, ever: `reason` says what is wrong with it."""

    code: ClassVar[int] = 8

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Expired(RaftKVError):
    """First sent so long ago that the session may be gone: whether it applied is not known."""

    code: ClassVar[int] = 9

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"expired: {self.reason}; an earlier attempt may have applied: read before you try again"


class Unavailable(RaftKVError):
    """Nobody could do it (no leader, no quorum, no answer), and it was not done."""

    code: ClassVar[int | None] = 10
    retry: ClassVar[Retry] = "redirect"

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class ShuttingDown(Unavailable):
    """The server is going away and takes no new work."""

    code: ClassVar[int | None] = 23

    def __init__(self, reason: str = "the server is shutting down; another replica takes over") -> None:
        super().__init__(reason)


class Timeout(Unavailable):
    """The deadline passed, and the request was certainly not carried out."""

    code = None
    retry = "never"


class ConnectFailed(Unavailable):
    """No connection could be made; nothing was sent."""

    code = None

    def __init__(self, address: str, reason: str) -> None:
        super().__init__(f"{address}: {reason}")
        self.address = address


class OutcomeUnknown(RaftKVError):
    """The write `request` (text for people) may have applied, or may still."""

    code: ClassVar[int | None] = 11
    retry: ClassVar[Retry] = "redirect"
    definite = False

    def __init__(self, request: str) -> None:
        super().__init__(request)
        self.request = request

    def __str__(self) -> str:
        return f"outcome unknown: {self.request} may have applied or may still; read before you try again"


class Interrupted(OutcomeUnknown):
    """Stopped by Ctrl-C after the write was sent."""

    code = None
    retry = "never"

    def __str__(self) -> str:
        return f"interrupted: {self.request} may have applied or may still; read before you try again"


class CommitUnknown(OutcomeUnknown):
    """The transaction `txid` may be committed, or may still be; `problem` is why nobody could say."""

    code = None
    retry = "never"

    def __init__(self, txid: bytes, problem: str) -> None:
        super().__init__(f"the commit of transaction {txid.hex()}")
        self.txid = txid
        self.problem = problem

    def __str__(self) -> str:
        txid = self.txid.hex()
        return (
            f"outcome unknown: transaction {txid} may be committed, or may still be ({self.problem}); "
            f"`Txn resolve {txid}` settles it, do not run it again before"
        )


class MigrationRefused(RaftKVError):
    """What one group answers another one that asks it for a shard. No client ever gets it."""


class Superseded(MigrationRefused):
    """Configuration `config_num`, a later one, gave the shard to someone else; nothing was or will be frozen."""

    code: ClassVar[int] = 27
    shape = (_INT,)

    def __init__(self, config_num: int) -> None:
        super().__init__(config_num)
        self.config_num = config_num

    def __str__(self) -> str:
        return f"configuration {self.config_num} gave the shard to another group"


class ListLost(MigrationRefused):
    """The list of touched keys is gone, so the copy can't be completed; nothing was or will be frozen for it.

    A new attempt must be numbered higher than `attempt`.
    """

    code: ClassVar[int] = 28
    shape = (_INT,)

    def __init__(self, attempt: int) -> None:
        super().__init__(attempt)
        self.attempt = attempt

    def __str__(self) -> str:
        return f"the list of changes of attempt {self.attempt} is gone; the copy begins again"


class NotHolder(MigrationRefused):
    """The group doesn't have the shard; `holder_gid` (or -1) may."""

    code: ClassVar[int] = 29
    shape = (_INT,)

    def __init__(self, holder_gid: int = -1) -> None:
        super().__init__(holder_gid)
        self.holder_gid = holder_gid

    def __str__(self) -> str:
        holder = f"; group {self.holder_gid} may" if self.holder_gid >= 0 else ""
        return f"the group does not hold the shard{holder}"


class DrainOver(RaftKVError):
    """The leave of the last group was overtaken, by a change of the map or by whoever gave it up: begin again."""

    code: ClassVar[int] = 30
    shape = ()

    def __str__(self) -> str:
        return "another change of the map came between; try again"


class CasMismatch(RaftKVError):
    """The key held `current` at `version`, not what was expected.

    It was absent if `version` is 0; otherwise a `current` of None stands for a value too long to show.
    """

    code: ClassVar[int] = 12
    final = True
    shape = (_MAYBE_BYTES, _INT)

    def __init__(self, current: bytes | None, version: int) -> None:
        super().__init__(current, version)
        self.current = current
        self.version = version

    def __str__(self) -> str:
        if self.version == 0:
            return "compare failed: the key does not exist; nothing was written"
        value = "another one" if self.current is None else show(self.current)
        held = f"{value} (version {self.version})"
        return f"compare failed: the value is {held}; nothing was written"


class VersionMismatch(RaftKVError):
    """The key is at `version` (0: absent), not at the one that the write asked for."""

    code: ClassVar[int] = 13
    final = True
    shape = (_INT,)

    def __init__(self, version: int) -> None:
        super().__init__(version)
        self.version = version

    def __str__(self) -> str:
        if self.version == 0:
            return "version mismatch: the key does not exist; nothing was written"
        return f"version mismatch: the key is at version {self.version}; nothing was written"


class HandshakeRefused(RaftKVError):
    """The two ends of a connection don't belong together."""


class WrongCluster(HandshakeRefused):
    """`mine` is the id of the side that refuses, `yours` of the one that is refused."""

    code: ClassVar[int] = 14
    shape = (_BYTES, _BYTES)

    def __init__(self, mine: bytes, yours: bytes) -> None:
        super().__init__(mine, yours)
        self.mine = mine
        self.yours = yours

    def __str__(self) -> str:
        return (
            f"wrong cluster: the server belongs to cluster {self.mine.hex() or '(none)'}, the request is for "
            f"{self.yours.hex() or '(none)'}; check the addresses"
        )


class WrongPeer(HandshakeRefused):
    """The node at this address is not the one that was meant (role, gid, replica, peers)."""

    code: ClassVar[int] = 15

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"wrong peer: {self.reason}"


class ReplicaMustBeReplaced(HandshakeRefused):
    """The replica lost its data directory, or an old one was brought back: it is no member any more."""

    code: ClassVar[int] = 16

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class BadVersion(HandshakeRefused):
    """Protocol versions; `mine` is that of the side that refuses."""

    code: ClassVar[int] = 17
    shape = (_INT, _INT)

    def __init__(self, mine: int, yours: int) -> None:
        super().__init__(mine, yours)
        self.mine = mine
        self.yours = yours

    def __str__(self) -> str:
        return (
            f"protocol version {self.yours} was offered, {self.mine} is spoken here; "
            "use the same release of raftkv on both sides"
        )


class TlsRefused(HandshakeRefused):
    """Only one end speaks TLS, or one doesn't accept the other's certificate.

    `reason` is what is to be said of the other end, as in "does not speak TLS"; `subject` is what it is called.
    """

    code: ClassVar[int] = 31

    def __init__(self, reason: str, subject: str = "it") -> None:
        super().__init__(reason)
        self.reason = reason
        self.subject = subject

    def __str__(self) -> str:
        return f"{self.subject} {self.reason}"


class NoSuchGroup(BadRequest):
    code: ClassVar[int] = 18
    shape = (_INT,)

    def __init__(self, gid: int) -> None:
        RaftKVError.__init__(self, gid)
        self.gid = gid
        self.reason = f"there is no group {gid}"

    def __str__(self) -> str:
        return f"there is no group {self.gid}; Query shows the groups"


class GroupExists(BadRequest):
    code: ClassVar[int] = 19
    shape = (_INT,)

    def __init__(self, gid: int) -> None:
        RaftKVError.__init__(self, gid)
        self.gid = gid
        self.reason = f"group {gid} has joined already"

    def __str__(self) -> str:
        return f"group {self.gid} has joined already; nothing was changed"


class BadShard(BadRequest):
    code: ClassVar[int] = 20
    shape = (_INT, _INT)

    def __init__(self, shard: int, shards: int) -> None:
        RaftKVError.__init__(self, shard, shards)
        self.shard = shard
        self.shards = shards
        self.reason = f"there is no shard {shard}"

    def __str__(self) -> str:
        return f"there is no shard {self.shard}; shards are 0 to {self.shards - 1}"


class LastGroup(BadRequest):
    """Group `gid` holds data, as far as is known, and there would be no group to take it."""

    code: ClassVar[int] = 26
    shape = (_INT,)

    def __init__(self, gid: int) -> None:
        RaftKVError.__init__(self, gid)
        self.gid = gid
        self.reason = f"group {gid} would be the last one to leave"

    def __str__(self) -> str:
        return (
            f"group {self.gid} is the last one, and holds data, or does not say that it doesn't; join another group "
            "before it leaves (if it is lost for ever, --force gives the data up)"
        )


class NoSuchConfig(BadRequest):
    code: ClassVar[int] = 22
    shape = (_INT,)

    def __init__(self, num: int) -> None:
        RaftKVError.__init__(self, num)
        self.num = num
        self.reason = f"there is no configuration {num}"

    def __str__(self) -> str:
        return f"there is no configuration {self.num}; Query without a number shows the latest"


class Malformed(RaftKVError):
    """Bytes that are not our protocol, or a message that breaks its rules."""

    code: ClassVar[int] = 24

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"malformed message: {self.reason}"


class ConnectionLost(RaftKVError):
    """The connection broke when the request was already sent: its fate is unknown."""

    retry = "redirect"
    definite = False

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class NoAnswer(ConnectionLost):
    """No reply came in time; the request may have arrived, or may still."""


class ServerError(RaftKVError):
    """Anything else that a server says; `error_code` may be one that this release doesn't know."""

    code: ClassVar[int] = 25
    definite = False
    shape = (_INT, _STR)

    def __init__(self, error_code: int, text: str) -> None:
        super().__init__(error_code, text)
        self.error_code = error_code
        self.text = text

    def __str__(self) -> str:
        if self.error_code == self.code:
            return f"the server failed: {self.text}"
        return f"the server said error {self.error_code}: {self.text}"


def _tree(root: type[RaftKVError]) -> list[type[RaftKVError]]:
    return [root, *(found for child in root.__subclasses__() for found in _tree(child))]


BY_CODE: dict[int, type[RaftKVError]] = {error.code: error for error in _tree(RaftKVError) if error.code is not None}


def from_wire(code: Any, fields: Any) -> RaftKVError:
    """The error that (code, fields) stand for; an unknown code gives a ServerError.

    Further fields, of a newer release, are ignored. Raise Malformed if the known ones are not right.
    """
    if type(code) is not int or not isinstance(fields, (list, tuple)):
        raise Malformed(f"not an error's number and fields: {show_value(code)}, {show_value(fields)}")
    error = BY_CODE.get(code)
    if error is None:
        return ServerError(code, " ".join(show_value(field) for field in fields[:8]) or "no more is known")
    shape = error.shape
    if len(fields) < len(shape):
        raise Malformed(f"{error.__name__} has {len(shape)} fields, {len(fields)} came")
    for value, types in zip(fields, shape, strict=False):
        if type(value) not in types:
            raise Malformed(f"{error.__name__} with a field of {show_value(value)}")
    if error is Conflict and not all(type(key) is bytes for key in fields[0]):
        raise Malformed("Conflict with a key that is not bytes")
    return error(*fields[: len(shape)])


def from_result(result: Any) -> RaftKVError:
    """The error in a command's result [code, *fields] (code not 0); raise Malformed as `from_wire`."""
    if not isinstance(result, (list, tuple)) or not result:
        raise Malformed(f"a result must be an array, not {show_value(result)}")
    return from_wire(result[0], list(result[1:]))


def show_value(value: Any) -> str:
    """Any decoded value for an error text: short, on one line, and safe for hostile nesting."""
    if isinstance(value, (list, tuple, dict)):
        return f"{type(value).__name__} of {len(value)}"
    if isinstance(value, bytes):
        return show(value)
    text = repr(value)
    return text if len(text) <= SHOWN_BYTES_MAX else text[:SHOWN_BYTES_MAX] + "…"
