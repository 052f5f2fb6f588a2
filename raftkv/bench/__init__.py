"""Load on a running cluster, and what it measured: `raftkv bench`."""
