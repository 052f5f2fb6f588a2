"""Everything in one data directory: the write-ahead log, the engine, checkpoints, the identity.

Nothing here knows what the state means; nothing here decides what may be acknowledged.
"""
