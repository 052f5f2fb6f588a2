"""What a connection carries: hellos, requests and their replies, Raft messages; as arrays of one frame.

    [1, version, cluster_id, role, gid, replica, store_id, purpose, formed, stores, peers]   Hello
    [2, … the same fields, of the acceptor]                                                  HelloReply
    [3, error code, fields]                   Refused: instead of a HelloReply, or before closing
    [10, request id, verb, … body]            Request
    [11, request id, 0, body]                 Reply; [11, request id, error code, fields] when refused
    [20 … 28, term, source, …]                Raft messages: `raft_codec`

Bodies by verb (each decoder here gives exactly these, or raises Malformed):

    WRITE     [config_num, command]                                → the command's result array
    READ      [config_num, flags, GET, shard, key]                 → [value or nil, version]
    READ      [config_num, flags, SCAN, shard, prefix, after_key or nil, max_pairs, max_bytes]
                                                                   → [[[key, value, version] …], more]
    READ      [config_num, flags, OUTCOME, shard, txid]            → [state, revision] or nil: how it ended there
    READ      [config_num, flags, CHECK, shard, keys]              → [version …]
    CONFIG    [num (-1: latest), wait_after (-1: don't wait), wait_ms]
                                               → [encoded map, map_time_ms, drains_over, [[gid, [address …]] …]]
    STATUS    []                                                   → a map
    CONTROL   [command]                                            → the command's result array
    TRANSFER  [target or -1]                                       → []
    SHARD     between groups: `migration`
    DRAIN     [drain, config_num]                                  → [0, drain]
    TXN, COORDINATE    transactions: `transactions`

The groups at the end of the answer to CONFIG are those of coordinators; an earlier release says nothing of them.
A state in the answer to an OUTCOME is one of `transactions.State`: COMMITTED, ABORTED, BEGUN while it holds locks
there, or EXPIRED. READ is `Locked` where a prepared transaction decides what would have to be answered.

`command` is bin: a msgpack array [op, shard, client_id, seq, first_unacked, first_sent_map_time_ms,
*args], encoded once, by the client. This module must never do I/O, nor know what a command means.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

from raftkv.protocol.errors import BadVersion, Malformed, RaftKVError, from_wire, show_value
from raftkv.protocol.frames import encode_frame
from raftkv.protocol.limits import (
    CONFIG_WAIT_MS_MAX,
    GID_MAX,
    ID_BYTES,
    KEY_BYTES_MAX,
    MEMBERS_MAX,
    NUMBER_MAX,
    PROTOCOL_VERSION,
    REPLICA_MAX,
    SCAN_BYTES_MAX,
    SCAN_PAIRS_MAX,
    SHARDS_MAX,
    TXN_KEYS_MAX,
)
from raftkv.protocol.raft_codec import RAFT_KINDS, decode_raft, encode_raft

__all__ = [
    "FOLLOWER_OK",
    "KIND_HELLO",
    "KIND_HELLO_REPLY",
    "KIND_REFUSED",
    "KIND_REPLY",
    "KIND_REQUEST",
    "PROTOCOL_VERSION",
    "RAFT_KINDS",
    "CheckBody",
    "ConfigReply",
    "GetBody",
    "Hello",
    "OutcomeBody",
    "ReadOp",
    "ScanBody",
    "Verb",
    "decode_config_body",
    "decode_config_reply",
    "decode_control_body",
    "decode_drain_body",
    "decode_hello",
    "decode_raft",
    "decode_read_body",
    "decode_refused",
    "decode_reply",
    "decode_request",
    "decode_transfer_body",
    "decode_write_body",
    "encode_error_reply",
    "encode_hello",
    "encode_hello_reply",
    "encode_raft",
    "encode_refused",
    "encode_reply",
    "encode_request",
]

KIND_HELLO = 1
KIND_HELLO_REPLY = 2
KIND_REFUSED = 3
KIND_REQUEST = 10
KIND_REPLY = 11

ROLES = ("client", "controller", "shardkv", "coordinator")
PURPOSES = ("client", "peer")

FOLLOWER_OK = 1
"""Flag of a READ: a follower may answer it, by the leader's read index."""


class Verb(IntEnum):
    WRITE = 1
    READ = 2
    CONFIG = 3
    STATUS = 4
    CONTROL = 5
    TRANSFER = 6
    SHARD = 7
    DRAIN = 8
    TXN = 9
    COORDINATE = 10


class ReadOp(IntEnum):
    GET = 1
    SCAN = 2
    OUTCOME = 3
    CHECK = 4


# Hello ---------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Hello:
    """How one end of a connection introduces itself.

    `cluster_id` is 16 bytes, or empty while unknown; `store_id` 16 bytes, empty for clients; `gid` 0
    where there is none; `replica` -1 for clients. `formed`: the group's membership exists, and
    `stores` are the (replica, store id) pairs of it; `peers` the replica ids that the node was started with.
    """

    version: int = PROTOCOL_VERSION
    cluster_id: bytes = b""
    role: str = "client"
    gid: int = 0
    replica: int = -1
    store_id: bytes = b""
    purpose: str = "client"
    formed: bool = False
    stores: list[tuple[int, bytes]] | tuple[tuple[int, bytes], ...] = ()
    peers: list[int] | tuple[int, ...] = ()

    @classmethod
    def of_client(cls, cluster_id: bytes = b"") -> Hello:
        return cls(cluster_id=cluster_id)

    def __str__(self) -> str:
        group = f" of group {self.gid}" if self.gid else ""
        return f"{self.role} {self.replica}{group}" if self.role != "client" else "client"


def encode_hello(hello: Hello) -> bytes:
    return encode_frame(_hello_array(KIND_HELLO, hello))


def encode_hello_reply(hello: Hello) -> bytes:
    return encode_frame(_hello_array(KIND_HELLO_REPLY, hello))


def _hello_array(kind: int, hello: Hello) -> list[Any]:
    return [
        kind, hello.version, hello.cluster_id, hello.role, hello.gid, hello.replica, hello.store_id,
        hello.purpose, hello.formed, [list(store) for store in hello.stores], list(hello.peers),
    ]  # fmt: skip


def decode_hello(array: list[Any]) -> Hello:
    """A Hello or a HelloReply.

    Raise BadVersion for another protocol version (whose other fields may be anything), Malformed for
    anything else that is not a hello. Later releases of one version may append fields.
    """
    if array[0] not in (KIND_HELLO, KIND_HELLO_REPLY) or len(array) < 2:
        raise Malformed(f"a connection must begin with a hello, not with kind {show_value(array[0])}")
    version = array[1]
    if type(version) is not int or not 0 <= version <= NUMBER_MAX:
        raise Malformed(f"hello: bad protocol version {show_value(version)}")
    if version != PROTOCOL_VERSION:
        raise BadVersion(PROTOCOL_VERSION, version)
    if len(array) < 11:
        raise Malformed(f"hello with {len(array)} items instead of 11")
    cluster_id, role, gid, replica, store_id, purpose, formed, stores, peers = array[2:11]
    _require(_is_id(cluster_id), "hello: bad cluster id", cluster_id)
    _require(type(role) is str and role in ROLES, "hello: bad role", role)
    _require(_in_range(gid, 0, GID_MAX), "hello: bad group id", gid)
    _require(_in_range(replica, -1, REPLICA_MAX), "hello: bad replica id", replica)
    _require(_is_id(store_id), "hello: bad store id", store_id)
    _require(type(purpose) is str and purpose in PURPOSES, "hello: bad purpose", purpose)
    _require(type(formed) is bool, "hello: bad flag", formed)
    _require(type(stores) is list and len(stores) <= MEMBERS_MAX, "hello: bad stores", stores)
    for store in stores:
        good = type(store) is list and len(store) == 2 and _in_range(store[0], 0, REPLICA_MAX)
        _require(good and _is_id(store[1]), "hello: bad store", store)
    _require(type(peers) is list and len(peers) <= MEMBERS_MAX, "hello: bad peers", peers)
    _require(all(_in_range(peer, 0, REPLICA_MAX) for peer in peers), "hello: bad peers", peers)
    return Hello(
        version, cluster_id, role, gid, replica, store_id, purpose, formed,
        [(member, store) for member, store in stores], peers,
    )  # fmt: skip


def encode_refused(error: RaftKVError) -> bytes:
    code, fields = error.to_wire()
    return encode_frame([KIND_REFUSED, code, fields])


def decode_refused(array: list[Any]) -> RaftKVError:
    if len(array) < 3:
        raise Malformed(f"a refusal with {len(array)} items instead of 3")
    return from_wire(array[1], array[2])


# Requests and replies --------------------------------------------------------------------------------


def encode_request(request_id: int, verb: int, body: list[Any] | tuple[Any, ...]) -> bytes:
    return encode_frame([KIND_REQUEST, request_id, verb, *body])


def decode_request(array: list[Any]) -> tuple[int, int, list[Any]]:
    """(request id, verb, body); raise Malformed. The verb may be one that nobody knows."""
    if len(array) < 3 or array[0] != KIND_REQUEST:
        raise Malformed(f"not a request: kind {show_value(array[0])}, {len(array)} items")
    request_id, verb = array[1], array[2]
    if type(request_id) is not int or not 0 <= request_id <= NUMBER_MAX or type(verb) is not int:
        raise Malformed(f"request with id {show_value(request_id)}, verb {show_value(verb)}")
    return request_id, verb, array[3:]


def encode_reply(request_id: int, body: Any) -> bytes:
    return encode_frame([KIND_REPLY, request_id, 0, body])


def encode_error_reply(request_id: int, code: int, fields: list[Any]) -> bytes:
    return encode_frame([KIND_REPLY, request_id, code, fields])


def decode_reply(array: list[Any]) -> tuple[int, RaftKVError | None, Any]:
    """(request id, error or None, body); raise Malformed."""
    if len(array) != 4 or array[0] != KIND_REPLY:
        raise Malformed(f"not a reply: kind {show_value(array[0])}, {len(array)} items")
    _, request_id, code, body = array
    if type(request_id) is not int or not 0 <= request_id <= NUMBER_MAX:
        raise Malformed(f"reply with id {show_value(request_id)}")
    if code == 0 and type(code) is int:
        return request_id, None, body
    return request_id, from_wire(code, body), None


# Bodies ----------------------------------------------------------------------------------------------


class GetBody(NamedTuple):
    config_num: int
    flags: int
    shard: int
    key: bytes


class ScanBody(NamedTuple):
    """`max_pairs` and `max_bytes` are within the limits; keys begin with `prefix`, after `after_key`."""

    config_num: int
    flags: int
    shard: int
    prefix: bytes
    after_key: bytes | None
    max_pairs: int
    max_bytes: int


class OutcomeBody(NamedTuple):
    config_num: int
    flags: int
    shard: int
    txid: bytes


class CheckBody(NamedTuple):
    config_num: int
    flags: int
    shard: int
    keys: list[bytes]


ReadBody = GetBody | ScanBody | OutcomeBody | CheckBody


class ConfigReply(NamedTuple):
    """The answer to a CONFIG; `encoded_map` is what `ShardMap.decode` takes, `coordinators` addresses by gid."""

    encoded_map: bytes
    map_time_ms: int
    drains_over: int
    coordinators: dict[int, tuple[str, ...]]


def decode_write_body(body: list[Any]) -> tuple[int, bytes]:
    """(config_num, command)."""
    if len(body) != 2 or not _in_range(body[0], -1, NUMBER_MAX) or type(body[1]) is not bytes:
        raise Malformed("the body of a WRITE is [config_num, command]")
    return body[0], body[1]


def decode_read_body(body: list[Any]) -> ReadBody:
    if len(body) < 4 or not (_in_range(body[0], -1, NUMBER_MAX) and _in_range(body[1], 0, NUMBER_MAX)):
        raise Malformed("the body of a READ begins with [config_num, flags, op, shard]")
    config_num, flags, op, shard, *rest = body
    _require(_in_range(shard, 0, SHARDS_MAX - 1), "READ: bad shard", shard)
    if op == ReadOp.GET:
        _require(len(rest) == 1 and _is_key(rest[0]), "READ GET: bad key", rest)
        return GetBody(config_num, flags, shard, rest[0])
    if op == ReadOp.SCAN:
        _require(len(rest) == 4, "READ SCAN: bad arguments", rest)
        prefix, after_key, max_pairs, max_bytes = rest
        _require(_is_key(prefix), "READ SCAN: bad prefix", prefix)
        _require(after_key is None or _is_key(after_key), "READ SCAN: bad key", after_key)
        _require(_in_range(max_pairs, 1, NUMBER_MAX), "READ SCAN: bad limit", max_pairs)
        _require(_in_range(max_bytes, 1, NUMBER_MAX), "READ SCAN: bad limit", max_bytes)
        return ScanBody(
            config_num, flags, shard, prefix, after_key,
            min(max_pairs, SCAN_PAIRS_MAX), min(max_bytes, SCAN_BYTES_MAX),
        )  # fmt: skip
    if op == ReadOp.OUTCOME:
        _require(len(rest) == 1 and type(rest[0]) is bytes and len(rest[0]) == ID_BYTES, "READ OUTCOME: bad id", rest)
        return OutcomeBody(config_num, flags, shard, rest[0])
    if op == ReadOp.CHECK:
        keys = rest[0] if len(rest) == 1 else None
        good = type(keys) is list and 0 < len(keys) <= TXN_KEYS_MAX and all(map(_is_key, keys))
        _require(good, "READ CHECK: bad keys", rest)
        return CheckBody(config_num, flags, shard, rest[0])
    raise Malformed(f"READ: unknown operation {show_value(op)}")


def decode_config_body(body: list[Any]) -> tuple[int, int, int]:
    """(num, wait_after, wait_ms), the last within its limit."""
    good = len(body) == 3 and _in_range(body[0], -1, NUMBER_MAX) and _in_range(body[1], -1, NUMBER_MAX)
    if not good or not _in_range(body[2], 0, NUMBER_MAX):
        raise Malformed("the body of a CONFIG is [num, wait_after, wait_ms]")
    return body[0], body[1], min(body[2], CONFIG_WAIT_MS_MAX)


def decode_config_reply(body: Any) -> ConfigReply:
    """Raise Malformed. What an earlier release leaves out is empty; what a later one appends is ignored."""
    if type(body) is not list or len(body) < 2 or type(body[0]) is not bytes:
        raise Malformed("not the answer to a CONFIG")
    left_out: list[Any] = [0, []]
    encoded_map, map_time_ms, drains_over, groups, *_ = [*body, *left_out[len(body) - 2 :]]
    good = _in_range(map_time_ms, 0, NUMBER_MAX) and _in_range(drains_over, 0, NUMBER_MAX) and type(groups) is list
    coordinators: dict[int, tuple[str, ...]] = {}
    for group in groups if good else ():
        good = type(group) is list and len(group) == 2 and _in_range(group[0], 1, GID_MAX) and type(group[1]) is list
        if not good or not all(type(address) is str for address in group[1]):
            raise Malformed("the answer to a CONFIG has coordinators of another form")
        coordinators[group[0]] = tuple(group[1])
    _require(good, "the answer to a CONFIG is of another form:", body)
    return ConfigReply(encoded_map, map_time_ms, drains_over, coordinators)


def decode_drain_body(body: list[Any]) -> tuple[int, int]:
    """(drain, config_num)."""
    if len(body) != 2 or not all(_in_range(number, 1, NUMBER_MAX) for number in body):
        raise Malformed("the body of a DRAIN is [drain, config_num]")
    return body[0], body[1]


def decode_control_body(body: list[Any]) -> bytes:
    if len(body) != 1 or type(body[0]) is not bytes:
        raise Malformed("the body of a CONTROL is [command]")
    return body[0]


def decode_transfer_body(body: list[Any]) -> int:
    """The target's replica id, or -1 for any."""
    if len(body) != 1 or not _in_range(body[0], -1, REPLICA_MAX):
        raise Malformed("the body of a TRANSFER is [target]")
    target: int = body[0]
    return target


def _in_range(value: Any, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _is_id(value: Any) -> bool:
    return type(value) is bytes and len(value) in (0, ID_BYTES)


def _is_key(value: Any) -> bool:
    return type(value) is bytes and len(value) <= KEY_BYTES_MAX


def _require(good: bool, what: str, value: Any) -> None:
    if not good:
        raise Malformed(f"{what} {show_value(value)}")
