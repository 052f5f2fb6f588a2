"""`raftkv controller`, `shardkv` and `coordinator`: options in, one replica runs until it is told to stop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from raftkv.cli.command_table import parse_controllers, parse_seconds
from raftkv.cli.exit_codes import UsageError
from raftkv.cli.printers import settle_stdout
from raftkv.cli.tls_files import TLS_OPTIONS, daemon_tls
from raftkv.daemons.options import (
    CACHE_BYTES_DEFAULT,
    MOVE_BYTES_PER_S_DEFAULT,
    SNAPSHOT_BYTES_DEFAULT,
    SNAPSHOT_ENTRIES_DEFAULT,
    BadOptions,
    DaemonOptions,
)

F = TypeVar("F", bound=Callable[..., Any])


CONTROLLERS_HELP = "Where the controllers are.  [default: the cluster of `raftkv local up`]"
"""For what is a client."""


class PeersType(click.ParamType[dict[int, str]]):
    """`0=HOST:PORT,1=HOST:PORT,…` as a dict from replica id to address."""

    name = "0=HOST:PORT,1=…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[int, str]:
        """Parse; every id once."""
        if isinstance(value, dict):
            return value
        peers: dict[int, str] = {}
        for part in str(value).split(","):
            replica, equals, address = part.strip().partition("=")
            if not equals or not replica.isascii() or not replica.isdigit() or len(replica) > 9:
                self.fail(f"{part!r} is not ID=HOST:PORT", param, ctx)
            if int(replica) in peers:
                self.fail(f"replica {replica} stands there twice", param, ctx)
            peers[int(replica)] = address
        return peers


class AddressesType(click.ParamType[tuple[str, ...]]):
    """`HOST:PORT,HOST:PORT,…` as a tuple."""

    name = "HOST:PORT,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """Parse."""
        if isinstance(value, tuple):
            return value
        try:
            return parse_controllers(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Seconds(click.ParamType[float]):
    """A time such as 10, 0.5 or 500ms."""

    name = "SECONDS"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Parse."""
        try:
            return value if isinstance(value, float) else parse_seconds(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


def option(*names: str, variable: str = "", **details: Any) -> Callable[[F], F]:
    """A click option with its environment variable and default shown; it is for what configures."""
    longest = next(name for name in names if name.startswith("--"))
    variable = variable or "RAFTKV_" + longest[2:].upper().replace("-", "_")
    return click.option(*names, envvar=variable, show_envvar=True, show_default=True, **details)


def _replica_options(function: F) -> F:
    """The options of every daemon, in the order in which help shows them."""
    decorators: list[Callable[[F], F]] = [
        option("--id", "replica", type=int, required=True, help="This replica's id among the peers."),
        option("--listen", metavar="HOST:PORT", required=True, help="Where to accept connections."),
        option("--peers", type=PeersType(), required=True, help="All replicas of the group, this one too."),
        option("--data-dir", metavar="DIR", required=True, help="This replica's own directory."),
        option("--advertise", metavar="HOST:PORT", help="Its address for others, if not as in --peers."),
        option("--metrics-listen", metavar="HOST:PORT", help="Where to serve /metrics, /livez and /readyz."),
        option("--snapshot-entries", type=int, default=SNAPSHOT_ENTRIES_DEFAULT, help="Entries kept in the log."),
        option("--snapshot-bytes", type=int, default=SNAPSHOT_BYTES_DEFAULT, help="Bytes kept in the log."),
        option("--cache-bytes", type=int, default=CACHE_BYTES_DEFAULT, help="Block cache of the engine."),
        option(
            "--reads",
            type=click.Choice(["readindex", "lease"]),
            default="readindex",
            help="lease trusts that clocks run at nearly the same rate.",
        ),
        option(
            "--log-level",
            type=click.Choice(["debug", "info", "warning", "error"], case_sensitive=False),
            default="info",
            help="What goes to standard error.",
        ),
        option("--log-format", type=click.Choice(["text", "json"]), default="text", help="Its form."),
    ]
    function = tls_options(function)
    for decorate in reversed(decorators):
        function = decorate(function)
    return function


def tls_options(function: F) -> F:
    """`--tls-cert`, `--tls-key` and `--tls-ca`, as the arguments tls_cert, tls_key and tls_ca."""
    for name, text in reversed(TLS_OPTIONS.items()):
        function = option(name, metavar="FILE", help=text)(function)
    return function


@click.command()
@_replica_options
@option("--shards", type=int, default=10, help="Number of shards; fixed when the cluster is created.")
def controller(**options: Any) -> int:
    """Run one replica of the controllers, which own the shard map.

    \b
    raftkv controller --id 0 --listen 127.0.0.1:7000 --data-dir c0 \\
        --peers 0=127.0.0.1:7000,1=127.0.0.1:7001,2=127.0.0.1:7002
    """
    return _run(role="controller", **options)


@click.command()
@option("--gid", type=int, required=True, help="The group's id, from 1.")
@_replica_options
@option("--controllers", type=AddressesType(), required=True, help="Where the controllers are.")
@option("--move-bytes-per-s", type=int, default=MOVE_BYTES_PER_S_DEFAULT, help="Intake of shards that move here.")
@option("--redis-listen", metavar="HOST:PORT", help="Where to accept Redis clients.")
@option(
    "--redis-mode",
    type=click.Choice(["plain", "cluster"]),
    default="plain",
    help="plain serves any key; cluster sends clients on, as Redis Cluster does.",
)
def shardkv(**options: Any) -> int:
    """Run one replica of a group; the shards that the map gives the group are served by it.

    \b
    raftkv shardkv --gid 1 --id 0 --listen 127.0.0.1:7100 --data-dir g1r0 \\
        --peers 0=127.0.0.1:7100,1=127.0.0.1:7101,2=127.0.0.1:7102 \\
        --controllers 127.0.0.1:7000,127.0.0.1:7001,127.0.0.1:7002
    """
    return _run(role="shardkv", **options)


@click.command()
@option("--gid", type=int, default=1, help="The id of this group of coordinators, from 1.")
@_replica_options
@option("--controllers", type=AddressesType(), required=True, help="Where the controllers are.")
def coordinator(**options: Any) -> int:
    """Run one replica of the coordinators, which decide transactions over several groups.

    \b
    raftkv coordinator --id 0 --listen 127.0.0.1:7010 --data-dir t0 \\
        --peers 0=127.0.0.1:7010,1=127.0.0.1:7011,2=127.0.0.1:7012 \\
        --controllers 127.0.0.1:7000,127.0.0.1:7001,127.0.0.1:7002
    """
    return _run(role="coordinator", **options)


def _run(*, tls_cert: str | None, tls_key: str | None, tls_ca: str | None, **options: Any) -> int:
    """Run the daemon to its end; its exit status."""
    try:
        checked = DaemonOptions(**options, tls=daemon_tls(tls_cert, tls_key, tls_ca))
    except (BadOptions, UsageError) as error:
        raise UsageError(f"{options['role']}: {error}") from None
    from raftkv.daemons.process import run_daemon

    return int(run_daemon(checked, on_ready=_say))


def _say(line: str) -> None:
    """The one line that says a daemon accepts connections; a closed standard output doesn't stop it."""
    try:
        print(line, flush=True)
    except (OSError, ValueError):
        settle_stdout()
