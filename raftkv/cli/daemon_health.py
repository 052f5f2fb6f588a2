"""`raftkv health`: is the daemon at one address well? What containers and supervisors ask, again and again.

It judges by the daemon's own checks, those of /readyz (daemons/readiness.py).
Asks that daemon only, so one that is down elsewhere makes nobody else unhealthy; `raftkv-ctl Status` sees the whole.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import click

from raftkv.cli.daemons import Seconds, option, tls_options
from raftkv.cli.exit_codes import ExitCode, LocalFailure, UsageError, exit_code_of
from raftkv.cli.tls_files import client_ssl
from raftkv.daemons.readiness import CONFIGURATION
from raftkv.protocol.addresses import format_address, parse_address
from raftkv.protocol.errors import BadRequest, RaftKVError

if TYPE_CHECKING:
    import ssl

ANSWER_TIMEOUT_S = 5.0
LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Where a daemon that listens on all addresses is found: no certificate is for those."""


@click.command()
@option("--listen", metavar="HOST:PORT", required=True, help="Where the daemon accepts connections.")
@option(
    "--timeout", "timeout_s", type=Seconds(), default=f"{ANSWER_TIMEOUT_S:g}", help="How long it may take to answer."
)
@tls_options
def health(listen: str, timeout_s: float, tls_cert: str | None, tls_key: str | None, tls_ca: str | None) -> None:
    """Ask one daemon whether it is well.

    \b
      raftkv health --listen 10.0.0.1:7100
      docker exec kv1 raftkv health                    RAFTKV_LISTEN is the daemon's own
      raftkv health --listen 10.0.0.1:7100 --timeout 1 || systemctl restart raftkv

    Says what the daemon there is, and exits with 0 if it answers, knows a leader of its group and keeps up with it.
    Exits with 3 if it doesn't answer, and with 5 if it can't do its part. A group that was never joined is well.
    Where the daemon listens on all addresses, it is asked on the loopback.
    """
    try:
        host, port = parse_address(listen)
    except BadRequest as error:
        raise UsageError(f"--listen: {error}") from None
    address = format_address(LOOPBACK.get(host, host), port)
    try:
        answer = asyncio.run(_ask(address, timeout_s, client_ssl(tls_cert, tls_key, tls_ca)))
    except RaftKVError as error:
        code = exit_code_of(error)
        advice = "; is it running, and is that where it listens?" if code is ExitCode.UNAVAILABLE else ""
        raise LocalFailure(f"health: no good answer from {error}{advice}", code) from None
    group = f"group {answer['gid']}" if answer["role"] == "shardkv" else f"the {answer['role']}s"
    line = f"replica {answer['replica']} of {group}, {answer['state']}"
    if answer["leader"] is None:
        raise LocalFailure(f"{line}: knows no leader; look at the other replicas of its group", ExitCode.UNHEALTHY)
    problems = {str(name): str(problem) for name, problem in answer.get("not_ready", ())}  # older daemons don't say
    unjoined = problems.pop(CONFIGURATION, None)
    if problems:
        raise LocalFailure(f"{line}: {'; '.join(problems.values())}", ExitCode.UNHEALTHY)
    click.echo(f"{line}; {unjoined}" if unjoined else line)


async def _ask(address: str, timeout_s: float, ssl: ssl.SSLContext | None) -> dict[str, Any]:
    from raftkv.client.controllers import Controllers

    async with Controllers([address], timeout_s=timeout_s, ssl=ssl) as client:
        return await client.status_of(address)
