"""RaftKV: a sharded, replicated, linearizable key-value store on Raft."""

__version__ = "0.1.0"
