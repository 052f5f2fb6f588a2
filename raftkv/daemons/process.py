"""A daemon as an operating-system process: event loop, signals, exit status.

SIGTERM and SIGINT hand leadership over, finish what is in flight and exit 0; a second one ends the
process at once. A failure of the disk ends it at once with status 1 and one line on stderr.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable
from functools import partial

from raftkv.daemons.daemon import Daemon
from raftkv.daemons.failpoints import from_environment
from raftkv.daemons.logs import configure_logging
from raftkv.daemons.options import DaemonOptions
from raftkv.storage.disk import OsDisk
from raftkv.storage.errors import StorageError
from raftkv.storage.rocks import RocksEngine

log = logging.getLogger(__name__)

GC_YOUNG_MAX = 50_000
"""Allocations between collections of the youngest generation: what a request makes dies by reference count."""


def run_daemon(options: DaemonOptions, on_ready: Callable[[str], None]) -> int:
    """Run until a signal ends it; return the exit status. `on_ready` gets the line that says so."""
    configure_logging(options.log_level, options.log_format)
    gc.set_threshold(GC_YOUNG_MAX, 20, 100)
    return _runner(_main(options, on_ready))


def _runner(main: object) -> int:
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)  # type: ignore[arg-type]
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)  # type: ignore[arg-type]


async def _main(options: DaemonOptions, on_ready: Callable[[str], None]) -> int:
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()

    def on_signal(name: str) -> None:
        if stopping.is_set():
            _end(f"{options.name}: second signal: ends at once", 1)
        log.info("%s: %s: hands over and stops", options.name, name)
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number.name)
    loop.set_exception_handler(partial(_unexpected, options.name))

    try:
        failpoints = from_environment(lambda text: _end(f"{options.name}: {text}", 1))
    except ValueError as error:
        return _complain(str(error))
    disk = OsDisk()
    daemon = Daemon(
        options,
        disk,
        lambda directory: RocksEngine(directory, cache_bytes=options.cache_bytes),
        lambda text: _end(text, 1),
        os.getpid(),
        failpoints,
    )
    try:
        await daemon.start()
    except StorageError as error:
        return _complain(f"{options.name}: {error}")
    except OSError as error:
        return _complain(f"{options.name}: can't listen on {options.listen}: {error.strerror or error}")
    gc.collect()
    gc.freeze()
    on_ready(f"raftkv {options.name} is ready on {options.listen}")
    await stopping.wait()
    await daemon.stop()
    log.info("%s: stopped", options.name)
    disk.close()
    return 0


def _complain(text: str) -> int:
    sys.stderr.write(f"raftkv: {text}\n")
    return 1


def _unexpected(name: str, loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
    """An exception in a callback: state may be half changed, so nothing may go on from it."""
    error = context.get("exception")
    if isinstance(error, StorageError):
        _end(f"{name}: {error}", 1)
    if isinstance(error, BaseException):
        log.error("%s: %s", name, context.get("message"), exc_info=error)
    if isinstance(error, Exception) and not isinstance(error, OSError):
        _end(f"{name}: failed with {error!r}; this is a bug in raftkv", 1)


def _end(text: str, status: int) -> None:
    """Leave without cleaning up, as a crash would."""
    sys.stderr.write(f"raftkv: {text}\n")
    sys.stderr.flush()
    os._exit(status)
