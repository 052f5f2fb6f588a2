"""The `ssl` parameter: the same over TLS, and no way in without it."""

from __future__ import annotations

import asyncio
import random
import shutil
import ssl
import subprocess
from pathlib import Path
from typing import Any

import pytest

from raftkv.protocol.channel import Channel
from raftkv.protocol.connection import Connection, Server
from raftkv.protocol.errors import ConnectFailed
from raftkv.protocol.messages import Hello, decode_request, encode_hello_reply, encode_reply
from raftkv.protocol.peer_link import PeerLink
from tests.protocol.loops import both_loops, run, until

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate")


@pytest.fixture(scope="module")
def contexts(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """(server's, client's), by a certificate for 127.0.0.1."""
    directory = tmp_path_factory.mktemp("tls")
    certificate, key = directory / "cert.pem", directory / "key.pem"
    make_certificate(certificate, key)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate, key)
    return server, ssl.create_default_context(cafile=str(certificate))


def make_certificate(certificate: Path, key: Path) -> None:
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-keyout", str(key), "-out", str(certificate), "-days", "2", "-subj", "/CN=raftkv-test",
         "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip


async def listen(context: ssl.SSLContext) -> Server:
    def on_frame(connection: Connection, frame: list[Any]) -> None:
        if frame[0] == 1:
            connection.send(encode_hello_reply(Hello(role="controller", replica=1)))
        else:
            request_id, _, body = decode_request(frame)
            connection.send(encode_reply(request_id, body))

    def on_connection(connection: Connection) -> None:
        connection.on_frame = on_frame
        connection.on_lost = lambda connection, error: None

    return await Server.listen("127.0.0.1", 0, on_connection, ssl=context)


@both_loops
def test_requests_and_links(loop: str, contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    async def main() -> None:
        server = await listen(contexts[0])
        address = f"127.0.0.1:{server.port}"
        channel = await Channel.open(address, Hello.of_client(), ssl=contexts[1])
        bodies = [[b"x" * size] for size in (0, 1, 100_000, 1_000_000)]
        assert await asyncio.gather(*(channel.request(1, b, timeout_s=10) for b in bodies)) == bodies
        channel.close()
        await channel.wait_closed()
        up: list[Hello] = []
        link = PeerLink(
            address,
            lambda: Hello(role="controller", replica=2, purpose="peer"),
            rng=random.Random(1),
            on_up=up.append,
            on_down=lambda: None,
            on_refused=lambda error: None,
            ssl=contexts[1],
        )
        link.start()
        await until(lambda: up)
        link.close()
        server.abort()
        await until(lambda: not server.connections)

    run(loop, main)


@both_loops
def test_without_tls_nobody_gets_in(loop: str, contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    async def main() -> None:
        server = await listen(contexts[0])
        address = f"127.0.0.1:{server.port}"
        with pytest.raises(ConnectFailed):
            await Channel.open(address, Hello.of_client(), timeout_s=1)
        with pytest.raises(ConnectFailed, match="certificate"):
            await Channel.open(address, Hello.of_client(), ssl=ssl.create_default_context(), timeout_s=5)
        server.abort()
        await until(lambda: not server.connections)
        await asyncio.sleep(0.05)  # asyncio has a task of its own for each TLS accept

    run(loop, main)
