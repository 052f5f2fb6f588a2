"""Every bound of the wire protocol, in one place, each with its reason.

Exceeding one is a typed error, never memory growth. This module must never import anything.
"""

from __future__ import annotations

PROTOCOL_VERSION = 1
"""Sent in every hello; a peer of another version is refused with `BadVersion`."""

KEY_BYTES_MAX = 8 * 1024
VALUE_BYTES_MAX = 1024 * 1024

TXN_BYTES_MAX = 8 * 1024 * 1024
"""Keys and values of one transaction: it travels in one frame, and lies in one log entry of each group."""

TXN_KEYS_MAX = 10_000

FRAME_BYTES_MAX = 16 * 1024 * 1024
"""Body of one frame. Holds the largest AppendEntries (1 MiB and an entry more) many times over."""

HELLO_BYTES_MAX = 64 * 1024
"""Body of a connection's first frame: a stranger can't make us hold more than this."""

ARRAY_LEN_MAX = 65_536
"""Items of one array: more than the smallest entries (26 bytes) that fit in an append of 1 MiB."""

MAP_LEN_MAX = 4_096
"""Items of one map; only status replies carry maps."""

NUMBER_MAX = 2**62
"""Terms, indices, byte counts, times. Leaves room to add to one and still encode it in 64 bits."""

REPLICA_MAX = 2**16 - 1
GID_MAX = 2**31 - 1
SHARDS_MAX = 16_384
"""There are 16,384 slots; a shard is at least one."""

MEMBERS_MAX = 256
"""Replicas that a hello may list."""

ID_BYTES = 16
"""Cluster, store and client ids."""

SNAPSHOT_ID_BYTES_MAX = 64

SCAN_PAIRS_MAX = 10_000
SCAN_BYTES_MAX = 4 * 1024 * 1024
"""One page of a scan. A single pair always fits, so a page may exceed the bytes asked for by one pair."""

LOCK_WAIT_S_MAX = 0.4
"""How long a group keeps a request that waits for a lock, whatever it meets meanwhile, before it says who holds it. A
client's attempts are longer than that, so it always hears it; then it asks again."""

CONFIG_WAIT_MS_MAX = 60_000
"""How long one long poll for a configuration may be held."""

WRITE_HIGH_WATER_BYTES = 1024 * 1024
WRITE_LOW_WATER_BYTES = 256 * 1024
"""A connection with more than the high mark unsent is congested until it is below the low one."""

PEER_QUEUE_BYTES_MAX = 32 * 1024 * 1024
"""Unsent bytes of one link between Raft peers; beyond it messages are dropped (Raft sends again).
Above the core's window per follower (8 MiB) and some snapshot chunks."""

CONNECTIONS_MAX = 10_000
"""Accepted connections of one server."""

CONNECT_TIMEOUT_S = 1.0
DIAL_PATIENCE_S = 0.25
"""How long a request waits for a connection to one replica while there are others to ask; dialling goes on. Whoever
dials an address that has just vanished, as a stopped container's does, hears nothing at all."""
HELLO_TIMEOUT_S = 3.0
"""A stranger who doesn't say hello in this time is cut off."""

CLOSE_TIMEOUT_S = 2.0
"""What a closing connection has to send may take this long; then it is cut."""

PEER_UNACKED_TIMEOUT_MS = 3_000
"""TCP_USER_TIMEOUT of peer links: after a partition, TCP's own back-off may wait for minutes."""
