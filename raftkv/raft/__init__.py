"""The Raft consensus core: pure, no I/O, no clock, no global randomness.

`core.Raft` is the door: events go in as method calls with the time, and `take_actions()` gives back what the shell
is to do (`actions.py`), each message with the write it has to wait for. Nothing here knows sockets, files or
asyncio, so one seed replays one history.

How a write goes through: `propose` (replication.py) appends it to the log (log.py). `take_actions` sends it to
every follower whose window is open (progress.py) and hands it out in a Persist. Followers check and take it
(following.py) and acknowledge it when it is on their disks. With a quorum of disks (quorum.py), the leader's own
among them once `persisted` says so, the commit index moves, and the next `take_actions` has the Commit.

    core.py         the public class; the order in which results are drained
    state.py        what the parts share; no message of a term before that term is on disk
    election.py     timeouts, pre-votes, votes, stickiness, check-quorum
    replication.py  the leader's half: proposals, appends, acknowledgements, commit
    following.py    the follower's half: checking, cutting, acknowledging
    reads.py        ReadIndex rounds, leases, reads forwarded by followers
    changes.py      membership: one server at a time, learners, the own-term barrier
    snapshots.py    snapshots in chunks, both sides
    transfer.py     handing leadership over
    log.py · progress.py · quorum.py · config.py · errors.py · entry.py · membership.py · messages.py   leaves
    invariants.py   what must hold after every step; for tests and the simulator

Where this differs from the paper and the thesis, and why: docs/divergence.md.
"""
