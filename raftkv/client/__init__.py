"""The SDK: `kv.RaftKV` and `controllers.Controllers`, asynchronous; `sync` has both without await.

It imports nothing heavy: a one-shot command must start fast.
"""
