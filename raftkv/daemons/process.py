"""A daemon as an operating-system process: event loop, signals, exit status.

SIGTERM and SIGINT hand leadership over, finish what is in flight and exit 0; a second one ends the
process at once. A failure of the disk ends it at once with status 1 and one line on stderr.

When all is closed the process ends without the interpreter's way out, which would wait for each name that is still
being looked up, by a thread that nobody can stop: 10 s and more where no name server answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NoReturn

from raftkv.daemons.daemon import Daemon
from raftkv.daemons.failpoints import from_environment
from raftkv.daemons.logs import configure_logging, say_last
from raftkv.daemons.options import DaemonOptions
from raftkv.daemons.service import Session
from raftkv.storage.disk import OsDisk
from raftkv.storage.errors import StorageError
from raftkv.storage.rocks import RocksEngine

if TYPE_CHECKING:
    from raftkv.daemons.meters import Meters
    from raftkv.daemons.metrics import MetricsServer

log = logging.getLogger(__name__)

GC_YOUNG_MAX = 50_000
"""Allocations between collections of the youngest generation: what a request makes dies by reference count."""


def run_daemon(options: DaemonOptions, on_ready: Callable[[str], None]) -> int:
    """Run until a signal ends it; return the exit status. `on_ready` gets the line that says so."""
    who = {"role": options.role, "gid": options.gid, "replica": options.replica}
    configure_logging(options.log_level, options.log_format, who)
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
    meters: Meters | None = None
    if options.metrics_listen is not None:
        from raftkv.daemons.meters import Meters

        meters = Meters(time.perf_counter)
    disk = OsDisk() if meters is None else meters.disk
    daemon = Daemon(
        options,
        disk,
        partial(RocksEngine if meters is None else meters.engine.engine, cache_bytes=options.cache_bytes),
        lambda text: _end(text, 1),
        os.getpid(),
        failpoints,
        Session if meters is None else meters.requests.session,
    )
    metrics: MetricsServer | None = None
    if meters is not None and options.metrics_listen is not None:
        from raftkv.daemons.metrics import MetricsServer

        metrics = MetricsServer(daemon, meters)
        try:
            await metrics.listen(options.metrics_listen)
        except OSError as error:
            return _cant_listen(options.name, f"{options.metrics_listen} for metrics", error)
    try:
        await daemon.start()
    except StorageError as error:
        return _complain(f"{options.name}: {error}")
    except OSError as error:
        is_redis = error.filename is not None and error.filename == options.redis_listen
        where = f"{options.redis_listen} for Redis clients" if is_redis else options.listen
        return _cant_listen(options.name, where, error)
    gc.collect()
    gc.freeze()
    on_ready(f"raftkv {options.name} is ready on {options.listen}")
    await stopping.wait()
    await daemon.stop()
    if metrics is not None:
        metrics.close()
    log.info("%s: stopped", options.name)
    disk.close()
    _leave()


def _leave() -> NoReturn:
    """Everything is closed, and what was printed goes out."""
    for output in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            output.flush()
    os._exit(0)


def _cant_listen(name: str, where: str, error: OSError) -> int:
    return _complain(f"{name}: can't listen on {where}: {error.strerror or error}")


def _complain(text: str) -> int:
    say_last(text)
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
    say_last(text)
    sys.stderr.flush()
    os._exit(status)
