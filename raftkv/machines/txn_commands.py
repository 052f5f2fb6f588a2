"""What a transaction asks of a group: numbers and shapes. What the commands do is in `participants`.

    TXN_COMMIT   txid, parts                        all of it at once, at one group; no coordinator
    TXN_PREPARE  txid, coordinator, term, parts     a vote
    TXN_DECIDE   txid, commit, shards               its end, at these shards; with commit false also a fence
    TXN_RESOLVE  coordinator, term                  what earlier terms have prepared; they never will again
    TXN_LOCK     txid, age, shard, keys             explicit locks
    TXN_BEAT     txid, shards                       the client that holds them is alive

A txid is 16 bytes: the map time at which its client made it, in ms, and 8 random ones. `age` is of the same form: when
it, or the first attempt that locked, first asked for a lock. A part is [shard, reads, writes], reads [key, version] and
writes [key, value or nil: delete], each key once. `coordinator` is the gid of the coordinators' group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

from raftkv.machines.results import TOO_LARGE, Result, bad_request
from raftkv.machines.slots import shard_of
from raftkv.protocol.limits import (
    GID_MAX,
    ID_BYTES,
    KEY_BYTES_MAX,
    NUMBER_MAX,
    SHARDS_MAX,
    TXN_BYTES_MAX,
    TXN_KEYS_MAX,
    VALUE_BYTES_MAX,
)

TXN_COMMIT: Final = 48
TXN_PREPARE: Final = 49
TXN_DECIDE: Final = 50
TXN_RESOLVE: Final = 51
TXN_LOCK: Final = 52
TXN_BEAT: Final = 53

TXN_OPS: Final = frozenset((TXN_COMMIT, TXN_PREPARE, TXN_DECIDE, TXN_RESOLVE, TXN_LOCK, TXN_BEAT))


def txid_ms(txid: bytes) -> int:
    """The map time at which it was made."""
    return int.from_bytes(txid[:8])


def make_txid(map_time_ms: int, entropy: bytes) -> bytes:
    """`entropy`: 8 random bytes."""
    return map_time_ms.to_bytes(8) + entropy


def refuse_txn_shape(command: list[Any], shards: int) -> Result | None:
    """What is wrong with a command that is one of TXN_OPS; `shards` is how many the cluster has, 0 if unknown."""
    op = command[0]
    if len(command) != _ITEMS[op]:
        return bad_request("wrong number of items in the command")
    if op == TXN_RESOLVE:
        return None if _are_gid_and_term(command[1], command[2]) else bad_request("no coordinator and term")
    if not is_txid(command[1]):
        return bad_request("the transaction id is not 16 bytes that begin with a time")
    if op == TXN_COMMIT:
        return refuse_parts(command[2], shards)
    if op == TXN_PREPARE:
        if not _are_gid_and_term(command[2], command[3]):
            return bad_request("no coordinator and term")
        return refuse_parts(command[4], shards)
    if op == TXN_LOCK:
        if not is_txid(command[2]):
            return bad_request("the age is not a transaction id")
        return _refuse_lock(command[3], command[4], shards)
    if op == TXN_DECIDE and type(command[2]) is not bool:
        return bad_request("the outcome is neither true nor false")
    return None if are_shards(command[-1]) else bad_request("the shards are not an array of shards, each once")


def refuse_parts(parts: Any, shards: int) -> Result | None:
    """What is wrong with the parts of a transaction, or None."""
    if type(parts) is not list or not parts or not all(type(part) is list and len(part) == 3 for part in parts):
        return bad_request("the parts are not an array of [shard, reads, writes]")
    if not are_shards([shard for shard, _, _ in parts]):
        return bad_request("the shards are not an array of shards, each once")
    keys_left, bytes_left = TXN_KEYS_MAX, TXN_BYTES_MAX
    for shard, reads, writes in parts:
        if not _are_pairs(reads, lambda version: type(version) is int and 0 <= version <= NUMBER_MAX):
            return bad_request("the reads are not an array of [key, version], each key once")
        if not _are_pairs(writes, lambda value: value is None or type(value) is bytes):
            return bad_request("the writes are not an array of [key, value or nil], each key once")
        for key, value in writes:
            if value is not None and len(value) > VALUE_BYTES_MAX:
                return [TOO_LARGE, "the value", VALUE_BYTES_MAX]
            bytes_left -= len(key) + len(value or b"")
        refusal = _refuse_keys([key for key, _ in (*reads, *writes)], shard, shards)
        if refusal is not None:
            return refusal
        keys_left -= len(reads) + len(writes)
        bytes_left -= sum(len(key) for key, _ in reads)
    if keys_left < 0:
        return [TOO_LARGE, "the number of the transaction's keys", TXN_KEYS_MAX]
    if bytes_left < 0:
        return [TOO_LARGE, "the transaction", TXN_BYTES_MAX]
    return None


def are_shards(value: Any) -> bool:
    """Whether it is an array of shards' numbers, each once."""
    if type(value) is not list or not value or len(value) > SHARDS_MAX:
        return False
    return all(type(n) is int and 0 <= n < SHARDS_MAX for n in value) and len(set(value)) == len(value)


def _refuse_lock(shard: Any, keys: Any, shards: int) -> Result | None:
    if not are_shards([shard]):
        return bad_request("the shard is not a number")
    if type(keys) is not list or not keys or not all(type(key) is bytes for key in keys) or len(set(keys)) < len(keys):
        return bad_request("the keys are not an array of keys, each once")
    if len(keys) > TXN_KEYS_MAX:
        return [TOO_LARGE, "the number of the transaction's keys", TXN_KEYS_MAX]
    return _refuse_keys(keys, shard, shards)


def _refuse_keys(keys: Iterable[bytes], shard: int, shards: int) -> Result | None:
    for key in keys:
        if len(key) > KEY_BYTES_MAX:
            return [TOO_LARGE, "the key", KEY_BYTES_MAX]
        if shards and shard_of(key, shards) != shard:
            return bad_request("a key is not of its shard")
    return None


def is_txid(value: Any) -> bool:
    """Whether it is 16 bytes that begin with a time."""
    return type(value) is bytes and len(value) == ID_BYTES and txid_ms(value) <= NUMBER_MAX


def _are_gid_and_term(gid: Any, term: Any) -> bool:
    return type(gid) is int and 0 < gid <= GID_MAX and type(term) is int and 0 < term <= NUMBER_MAX


def _are_pairs(pairs: Any, is_good: Callable[[Any], bool]) -> bool:
    if type(pairs) is not list or not all(type(pair) is list and len(pair) == 2 for pair in pairs):
        return False
    keys = [key for key, _ in pairs]
    good = all(type(key) is bytes for key in keys) and all(is_good(value) for _, value in pairs)
    return good and len(set(keys)) == len(keys)


_ITEMS: Final = {TXN_COMMIT: 3, TXN_PREPARE: 5, TXN_DECIDE: 4, TXN_RESOLVE: 3, TXN_LOCK: 5, TXN_BEAT: 3}
