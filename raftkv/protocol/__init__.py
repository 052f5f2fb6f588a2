"""The wire protocol: frames, messages, the error tree, connections. It knows nothing of state machines."""
