"""`raftkv local up | status | down`: the click commands over local_cluster."""

from __future__ import annotations

import json
from pathlib import Path

import click

from raftkv.cli import interrupts, local_cluster
from raftkv.cli.daemons import Seconds, option
from raftkv.cli.local_ready import STATUS_TIMEOUT_S
from raftkv.cli.local_state import COORDINATORS, COORDINATORS_MAX, default_data_dir
from raftkv.cli.printers import note, table

UP_TIMEOUT_S = "60"


_data_dir = option(
    "--data-dir",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where the cluster lives, and how it is found again.  [default: $XDG_DATA_HOME/raftkv/local]",
)


def _directory(given: Path | None) -> Path:
    """The directory with one spelling: processes are recognised by it."""
    return (given or default_data_dir()).expanduser().resolve()


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def local() -> None:
    """A whole cluster on this machine: controllers, some groups, coordinators; one process each.

    \b
      raftkv local up                         2 groups of 3 replicas; says how to connect
      raftkv local status
      raftkv local down --wipe                stop it, and remove its data
    """
    interrupts.raise_once()


@local.command()
@option("--groups", type=click.IntRange(1, 20), help="Groups that serve shards.  [default: 2]")
@option("--replicas", type=click.IntRange(1, 9), help="Replicas of each group.  [default: 3]")
@option("--shards", type=click.IntRange(1, 16384), help="Shards of a new cluster.  [default: 10]")
@option(
    "--coordinators",
    type=click.IntRange(0, COORDINATORS_MAX),
    help=f"Replicas of those that decide transactions over several groups.  [default: {COORDINATORS}]",
)
@_data_dir
@option("--metrics", is_flag=True, help="Serve /metrics, /livez and /readyz of each process: see `local status`.")
@option("--redis", is_flag=True, help="Listen to Redis clients at each replica of a group: see `local status`.")
@option("--base-port", type=click.IntRange(1024, 65336), help="First of 200 ports.  [default: a free block]")
@option(
    "--timeout",
    "timeout_s",
    variable="RAFTKV_UP_TIMEOUT",  # RAFTKV_TIMEOUT is for single operations: too short for this
    type=Seconds(),
    default=UP_TIMEOUT_S,
    help="How long it may take.",
)
def up(
    groups: int | None,
    replicas: int | None,
    shards: int | None,
    coordinators: int | None,
    data_dir: Path | None,
    metrics: bool,
    redis: bool,
    base_port: int | None,
    timeout_s: float,
) -> None:
    """Start a cluster, or what is dead of it, and return when it serves.

    \b
      raftkv local up
      raftkv local up --groups 3 --replicas 5 --data-dir /tmp/five --metrics
      raftkv local up --base-port 20000 --timeout 120

    Prints the line to connect with. The processes go on until `down`.
    """
    directory = _directory(data_dir)
    state = local_cluster.up(
        directory,
        groups=groups,
        replicas=replicas,
        shards=shards,
        coordinators=coordinators,
        metrics=metrics,
        redis=redis,
        base_port=base_port,
        timeout_s=timeout_s,
        say=note,
    )
    click.echo(f"raftkv-kv --controllers {','.join(state.controllers)}")


@local.command()
@_data_dir
@option(
    "-o",
    "--output",
    type=click.Choice(["plain", "json", "table"], case_sensitive=False),
    default="plain",
    help="json is one object; the others are a table.",
)
@option(
    "--timeout",
    "timeout_s",
    type=Seconds(),
    default=f"{STATUS_TIMEOUT_S:g}",
    help="How long a process may take to say whether it leads.",
)
def status(data_dir: Path | None, output: str, timeout_s: float) -> None:
    """Show the cluster's processes.

    \b
      raftkv local status
      raftkv local status -o json | jq -r '.processes[] | select(.state == "leader") | .pid'
    """
    shown = local_cluster.status(_directory(data_dir), timeout_s)
    if output == "json":
        click.echo(json.dumps(shown))
        return
    processes = shown["processes"]
    optional = [name for name in ("redis", "metrics") if any(process[name] for process in processes)]
    columns = ("role", "gid", "id", "addr", *optional, "pid", "state")
    rows = [[str("-" if process[name] is None else process[name]) for name in columns] for process in processes]
    click.echo("\n".join(table([name.upper() for name in columns], rows)))


@local.command()
@_data_dir
@click.option("--wipe", is_flag=True, help="Remove the data too.")  # never by a variable
@option(
    "--timeout",
    "timeout_s",
    variable="RAFTKV_DOWN_TIMEOUT",  # as for `up`
    type=Seconds(),
    default=f"{local_cluster.STOP_TIMEOUT_S:g}",
    help="How long it may take them to end; then they are killed.",
)
def down(data_dir: Path | None, wipe: bool, timeout_s: float) -> None:
    """Stop the cluster: SIGTERM, and SIGKILL to what doesn't end.

    \b
      raftkv local down
      raftkv local down --data-dir /tmp/five --wipe
    """
    local_cluster.down(_directory(data_dir), wipe=wipe, timeout_s=timeout_s, say=note)
