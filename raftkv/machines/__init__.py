"""Deterministic state machines: the shard map, and the key-value shards.

Everything here is a pure function of the log: no I/O, clock, randomness or logging, and nothing that
depends on hash order or on the process it runs in.
"""
