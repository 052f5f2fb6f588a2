"""Deterministic simulation: the production daemons and clients on virtual time, one seed one history.

    scheduler   virtual time, the order of events, the hash of the trace
    loop        asyncio's event loop for one incarnation of one process; clocks, pauses, slow CPUs
    network     TCP between hosts: latency, cuts, resets, half-open connections, back-pressure
    disk        what survives a kill and a power loss; slow, stalled, failing, full and damaged disks
    process     daemons and clients as processes that crash and come back
    cluster     controllers, groups, clients; what must be well at the end
    workload    users of the store who write a history of what they did and saw
    nemesis     the faults, by name
    invariants  what must hold after every turn of every daemon
    probes      whether the rare states were reached
    scenario    all of that as data (scenarios/*.toml)
    run, main   a seed, and the command
    check/      what histories must satisfy

A fault, an ablation or a bug is reproduced by its scenario and its seed, on the code that had it.
"""
