"""Mutual TLS: the same over it, and who is refused hears why, on both ends and at once."""

from __future__ import annotations

import asyncio
import random
import socket
import ssl
import time
from pathlib import Path
from typing import Any

import pytest

from raftkv.protocol.channel import Channel
from raftkv.protocol.connection import Connection, Server
from raftkv.protocol.errors import ConnectFailed, RaftKVError, TlsRefused
from raftkv.protocol.messages import Hello, decode_request, encode_hello_reply, encode_reply
from raftkv.protocol.peer_link import PeerLink
from raftkv.protocol.tls import BadTls, Tls, client_context
from raftkv.protocol.tls_layer import TlsLayer
from tests.protocol.certificates import Authority, Files, needs_openssl, openssl
from tests.protocol.loops import both_loops, run, until

pytestmark = needs_openssl


class World:
    """Certificates of all kinds."""

    def __init__(self, folder: Path) -> None:
        authority = Authority(folder / "ours")
        self.node = authority.issue("node")
        self.elsewhere = authority.issue("elsewhere", "DNS:elsewhere")
        self.expired = authority.issue("expired", days=-1)
        self.server_only = authority.issue("server-only", extension="extendedKeyUsage=serverAuth")
        self.foreign = Authority(folder / "theirs").issue("foreign")
        self.stranger = self.foreign._replace(ca=self.node.ca)
        """Trusts us, and we don't trust it."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("tls"))


class Listening:
    """A server that says hello and echoes; `lost` is why connections ended."""

    def __init__(self) -> None:
        self.lost: list[Exception | None] = []
        self.address = ""

    async def start(self, files: Files | None) -> Server:
        context = Tls.load(*files).server if files is not None else None
        self.server = await Server.listen("127.0.0.1", 0, self._on_connection, ssl=context)
        self.address = f"127.0.0.1:{self.server.port}"
        return self.server

    async def stop(self) -> None:
        self.server.abort()
        await until(lambda: not self.server.connections)

    def _on_connection(self, connection: Connection) -> None:
        connection.on_frame = self._on_frame
        connection.on_lost = lambda connection, error: self.lost.append(error)

    def _on_frame(self, connection: Connection, frame: list[Any]) -> None:
        if frame[0] == 1:
            connection.send(encode_hello_reply(Hello(role="controller", replica=1)))
        else:
            request_id, _, body = decode_request(frame)
            connection.send(encode_reply(request_id, body))


@both_loops
def test_requests_and_links(loop: str, world: World) -> None:
    async def main() -> None:
        listening = Listening()
        await listening.start(world.node)
        context = client_context(*world.node)
        channel = await Channel.open(listening.address, Hello.of_client(), ssl=context)
        bodies = [[b"x" * size] for size in (0, 1, 16_384, 100_000, 5_000_000)]
        assert await asyncio.gather(*(channel.request(1, b, timeout_s=10) for b in bodies)) == bodies
        channel.close()
        await channel.wait_closed()
        by_name = await Channel.open(f"localhost:{listening.server.port}", Hello.of_client(), ssl=context)
        by_name.close()
        await by_name.wait_closed()
        up: list[Hello] = []
        link = PeerLink(
            listening.address,
            lambda: Hello(role="controller", replica=2, purpose="peer"),
            rng=random.Random(1),
            on_up=up.append,
            on_down=lambda: None,
            on_refused=lambda error: None,
            ssl=context,
        )
        link.start()
        await until(lambda: up)
        link.close()
        await until(lambda: len(listening.lost) == 3)
        assert listening.lost == [None] * 3
        await listening.stop()

    run(loop, main)


@both_loops
@pytest.mark.parametrize(
    ("server", "client", "client_hears", "server_hears"),
    [
        ("node", None, "ADDRESS speaks TLS; give --tls-cert, --tls-key and --tls-ca", "does not speak TLS; it needs"),
        (None, "node", "ADDRESS does not speak TLS; leave the --tls- options out", "TLS, which this end doesn't speak"),
        ("foreign", "node", "ADDRESS has a certificate that is not signed by the CA in --tls-ca", "not signed by"),
        ("node", "stranger", "ADDRESS does not accept our certificate: not signed by the CA", "that is not signed by"),
        ("expired", "node", "ADDRESS has a certificate that has expired", "does not accept our certificate: expired"),
        ("node", "expired", "ADDRESS does not accept our certificate: expired", "has a certificate that has expired"),
        ("elsewhere", "node", "ADDRESS has a certificate that is not for 127.0.0.1", "our certificate: its subjectAlt"),
        ("node", "server_only", "our certificate: extendedKeyUsage must name", "whose extendedKeyUsage must name"),
        ("node", "nothing", "ADDRESS wants a certificate of ours; give --tls-cert", "came without a certificate"),
    ],
)
def test_who_is_refused_hears_why(
    loop: str, server: str | None, client: str | None, client_hears: str, server_hears: str, world: World
) -> None:
    if client == "nothing":
        context = ssl.create_default_context(cafile=world.node.ca)
    else:
        context = client_context(*getattr(world, client)) if client else None  # type: ignore[assignment]

    async def main() -> None:
        listening = Listening()
        await listening.start(getattr(world, server) if server else None)
        began_s = time.monotonic()
        with pytest.raises(RaftKVError) as refusal:
            await Channel.open(listening.address, Hello.of_client(), ssl=context, timeout_s=5)
        assert type(refusal.value) is TlsRefused
        assert client_hears.replace("ADDRESS", listening.address) in str(refusal.value)
        refused: list[RaftKVError] = []
        link = PeerLink(
            listening.address,
            Hello.of_client,
            rng=random.Random(1),
            on_up=lambda hello: None,
            on_down=lambda: None,
            on_refused=refused.append,
            ssl=context,
        )
        link.start()
        await until(lambda: refused)
        assert client_hears.replace("ADDRESS", "it") in str(refused[0])
        assert time.monotonic() - began_s < 2
        await until(lambda: len(listening.lost) == 2)
        for error in listening.lost:
            assert server_hears in str(error)
            assert isinstance(error, RaftKVError)
        link.close()
        await listening.stop()

    run(loop, main)


def test_two_authorities_while_one_takes_over_from_the_other(world: World, tmp_path: Path) -> None:
    both = tmp_path / "both.crt"
    both.write_bytes(b"".join(Path(ca).read_bytes() for ca in (world.node.ca, world.foreign.ca)))

    async def main() -> None:
        listening = Listening()
        await listening.start(world.node._replace(ca=str(both)))
        for files in (world.node, world.foreign._replace(ca=str(both))):
            channel = await Channel.open(listening.address, Hello.of_client(), ssl=client_context(*files))
            channel.close()
            await channel.wait_closed()
        await listening.stop()

    run("uvloop", main)


@both_loops
def test_a_stranger_who_ends_in_the_handshake_costs_nothing(loop: str, world: World) -> None:
    hello = client_hello(world.node)

    async def main() -> None:
        listening = Listening()
        await listening.start(world.node)
        for data in (b"", hello[:1], hello[:100], hello):
            _, writer = await asyncio.open_connection("127.0.0.1", listening.server.port)
            writer.write(data)
            await writer.drain()
            writer.close()
        for data in (b"\0", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 70_000, hello[:5] + b"\0" * 600):
            reader, writer = await asyncio.open_connection("127.0.0.1", listening.server.port)
            writer.write(data)
            try:
                await reader.read()
            except ConnectionResetError:
                pass
            writer.close()
        await until(lambda: len(listening.lost) == 8)
        channel = await Channel.open(listening.address, Hello.of_client(), ssl=client_context(*world.node))
        assert await channel.request(1, [b"well"], timeout_s=5) == [b"well"]
        channel.close()
        await channel.wait_closed()
        await listening.stop()

    run(loop, main)


@both_loops
def test_a_server_that_ends_in_the_handshake_is_tried_again(loop: str, world: World) -> None:
    async def main() -> None:
        server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
        address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        with pytest.raises(ConnectFailed, match=r"handshake|reset"):
            await Channel.open(address, Hello.of_client(), ssl=client_context(*world.node))
        server.close()
        await asyncio.sleep(0.05)

    run(loop, main)


@both_loops
def test_a_server_that_is_silent_is_given_up(loop: str, world: World) -> None:
    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            address = f"127.0.0.1:{silent.getsockname()[1]}"
            with pytest.raises(ConnectFailed, match=r"no answer to hello within 0.2 s"):
                await Channel.open(address, Hello.of_client(), ssl=client_context(*world.node), timeout_s=0.2)

    run(loop, main)


# The layer alone --------------------------------------------------------------------------------------


class Wire(asyncio.Transport):
    """What one end writes, for the other to read."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = bytearray()
        self.closed = False
        self.reading = True

    def write(self, data: Any) -> None:
        assert not self.closed
        self.sent += data

    def get_write_buffer_size(self) -> int:
        return len(self.sent)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = True


class App(asyncio.Protocol):
    """Keeps what it gets."""

    def __init__(self) -> None:
        self.got = b""
        self.pieces = 0
        self.ends: list[Exception | None] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.got += data
        self.pieces += 1

    def connection_lost(self, error: Exception | None) -> None:
        self.ends.append(error)


class Pair:
    """Two layers; `step` bytes go over the wire at a time."""

    def __init__(self, world: World, step: int) -> None:
        tls = Tls.load(*world.node)
        self.step = step
        self.apps = App(), App()
        self.layers = TlsLayer(self.apps[0], tls.client, "127.0.0.1"), TlsLayer(self.apps[1], tls.server)
        self.wires = Wire(), Wire()
        self.layers[1].connection_made(self.wires[1])
        self.layers[0].connection_made(self.wires[0])

    def exchange(self) -> None:
        while any(wire.sent for wire in self.wires):
            for mine, other in ((0, 1), (1, 0)):
                sent = self.wires[mine].sent
                while sent:
                    piece = bytes(sent[: self.step])
                    del sent[: self.step]
                    self.layers[other].data_received(piece)


def client_hello(files: Files) -> bytes:
    layer, wire = TlsLayer(App(), client_context(*files), "127.0.0.1"), Wire()
    layer.connection_made(wire)
    return bytes(wire.sent)


@pytest.mark.parametrize("step", [1, 7, 100_000_000])
def test_however_the_bytes_come(step: int, world: World) -> None:
    pair = Pair(world, step)
    early, late = random.Random(1).randbytes(20_000), random.Random(2).randbytes(30_000)
    pair.layers[0].write(early)  # before the handshake
    assert pair.layers[0].get_write_buffer_size() >= len(early)
    assert early[:50] not in pair.wires[0].sent
    pair.exchange()
    assert pair.apps[1].got == early
    pair.layers[1].write(late)
    pair.layers[1].writelines([b"a", b"b"])
    pair.exchange()
    assert pair.apps[0].got == late + b"ab"
    pair.layers[0].close()
    assert pair.wires[0].closed
    pair.exchange()
    assert pair.wires[1].closed, "a farewell is answered by closing"
    pair.layers[1].write(b"too late")
    assert not pair.wires[1].sent
    for layer in pair.layers:
        layer.connection_lost(None)
    assert [app.ends for app in pair.apps] == [[None], [None]]


def test_what_comes_at_once_is_given_at_once(world: World) -> None:
    pair = Pair(world, 100_000_000)
    pair.exchange()
    pair.layers[0].write(b"x" * 200_000)
    pair.exchange()
    assert (len(pair.apps[1].got), pair.apps[1].pieces) == (200_000, 1)


def test_a_changed_byte_ends_the_connection(world: World) -> None:
    pair = Pair(world, 100_000_000)
    pair.exchange()
    pair.layers[0].write(b"good")
    good = bytes(pair.wires[0].sent)
    pair.wires[0].sent.clear()
    pair.layers[0].write(b"bad")
    bad = bytearray(pair.wires[0].sent)
    bad[-1] ^= 1
    pair.layers[1].data_received(good + bytes(bad))
    assert pair.apps[1].got == b"good"
    assert pair.wires[1].closed
    pair.layers[1].connection_lost(None)
    (end,) = pair.apps[1].ends
    assert isinstance(end, TlsRefused) and "can't be understood over TLS" in str(end)


# The files --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def odd(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Paths by name: good files, and others."""
    folder = tmp_path_factory.mktemp("odd")
    (folder / "empty").write_bytes(b"")
    (folder / "junk").write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    openssl("ec", "-in", world.node.key, "-aes256", "-passout", "pass:secret", "-out", folder / "locked")
    openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=x", "-keyout", folder / "rsa", "-out",
            folder / "rsa.crt")  # fmt: skip
    names = ("empty", "junk", "locked", "rsa", "missing")
    good = {"cert": world.node.cert, "key": world.node.key, "ca": world.node.ca, "other": world.foreign.key}
    return good | {name: str(folder / name) for name in names} | {"folder": str(folder)}


@pytest.mark.parametrize(
    ("cert", "key", "ca", "text"),
    [
        ("missing", "key", "ca", "--tls-cert {cert}: No such file or directory"),
        ("cert", "missing", "ca", "--tls-key {key}: No such file or directory"),
        ("cert", "key", "missing", "--tls-ca {ca}: No such file or directory"),
        ("cert", "folder", "ca", "--tls-key {key}: Is a directory"),
        ("key", "key", "ca", "--tls-cert {cert}: there is no certificate in it (PEM)"),
        ("junk", "key", "ca", "--tls-cert {cert}: there is no certificate in it (PEM)"),
        ("empty", "key", "ca", "--tls-cert {cert}: there is no certificate in it (PEM)"),
        ("cert", "other", "ca", "--tls-key {key}: not the key of the certificate in --tls-cert {cert}"),
        ("cert", "rsa", "ca", "--tls-key {key}: not the key of the certificate in --tls-cert {cert}"),
        ("cert", "locked", "ca", "--tls-key {key}: it is encrypted; a daemon can't ask for a passphrase"),
        ("cert", "cert", "ca", "--tls-key {key}: there is no private key in it (PEM)"),
        ("cert", "empty", "ca", "--tls-key {key}: there is no private key in it (PEM)"),
        ("cert", "key", "key", "--tls-ca {ca}: there is no certificate in it (PEM)"),
        ("cert", "key", "junk", "--tls-ca {ca}: there is no certificate in it (PEM)"),
        ("cert", "key", "empty", "--tls-ca {ca}: there is no certificate in it (PEM)"),
    ],
)
def test_files_that_can_not_be_used(cert: str, key: str, ca: str, text: str, odd: dict[str, str]) -> None:
    paths = {"cert": odd[cert], "key": odd[key], "ca": odd[ca]}
    with pytest.raises(BadTls) as refusal:
        Tls.load(**paths)
    assert str(refusal.value) == text.format(**paths)


def test_the_system_s_authorities_are_not_trusted(world: World) -> None:
    tls = Tls.load(*world.node)
    for context in (tls.server, tls.client):
        assert len(context.get_ca_certs()) == 1
        assert context.verify_mode == ssl.CERT_REQUIRED
    assert tls.client.check_hostname and tls.client.minimum_version == ssl.TLSVersion.TLSv1_3
