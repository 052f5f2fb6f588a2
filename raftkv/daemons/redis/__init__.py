"""The Redis front door of a shardkv: `--redis-listen`.

    listener      accepts connections; owns what they share
    connection    one connection: its commands in order, its replies, back-pressure
    parser        requests out of bytes
    replies       replies and errors into bytes
    table         every command: arity, flags, where its keys are, what kind it is
    strings       what the commands on keys do, as functions of a view of those keys
    control       the commands that aren't about keys
    direct        carries commands out on this replica, where it leads the group
    forward       carries them out through the SDK, wherever the keys are
    lanes         read-modify-write commands on one key: all that wait make one write
    scanning      SCAN, KEYS, DBSIZE
    nodes         where the other nodes' Redis listeners are: CLUSTER and MOVED

Imported only where a Redis listener is asked for.
"""
