"""The daemons: asyncio shells around the Raft core and the state machines."""
