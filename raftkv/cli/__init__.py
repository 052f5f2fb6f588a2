"""The command line: click commands, one-shot, script and REPL modes, printers, the local cluster."""
