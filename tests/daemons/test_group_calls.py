"""What is said of a group that can't be asked."""

from __future__ import annotations

import asyncio

import pytest

from raftkv.daemons.group_calls import GroupCalls
from raftkv.protocol.connection import Connection, Server
from raftkv.protocol.errors import TlsRefused, Unavailable
from raftkv.protocol.messages import Hello, Verb


def test_tls_that_only_one_end_speaks_is_named() -> None:
    async def main() -> None:
        def refuse(connection: Connection) -> None:
            connection.on_lost = lambda connection, error: None
            connection.refuse(TlsRefused("speaks TLS; give some"))

        server = await Server.listen("127.0.0.1", 0, refuse)
        address = f"127.0.0.1:{server.port}"
        addresses = ["127.0.0.1:9", address]
        calls = GroupCalls(Hello.of_client)
        with pytest.raises(Unavailable) as refusal:
            await calls.ask(2, addresses, Verb.STATUS, [])
        assert str(refusal.value) == f"group 2 can't be asked: {address} speaks TLS; give some"
        server.abort()

    asyncio.run(main())
