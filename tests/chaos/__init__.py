"""Chaos on real processes: daemons behind a TCP fault proxy, killed, paused, cut off and filled up, under checked load.

`proxy` is the network, `cluster` the processes, `faults` what can go wrong, `nemesis` when it does, `workload` what
clients did and saw, `checks` what must hold, `run` all of it: `python -m tests.chaos --minutes N --seed S`.
"""
