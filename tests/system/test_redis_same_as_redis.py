"""The gateway answers what Redis answers: the same commands to both, and the same bytes come back."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from typing import Any

import hiredis
import pytest

from tests.system.cluster import Cluster, running
from tests.system.resp import Resp, packed, redis_server

pytestmark = pytest.mark.skipif(
    shutil.which("redis-server") is None, reason="there is no redis-server: apt-get install redis-server"
)

Ports = tuple[int, list[int]]


@pytest.fixture(scope="module")
def ports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ports]:
    """Of a real Redis; and of a leader, a follower, and a replica of another group."""
    folder = tmp_path_factory.mktemp("same")
    cluster = Cluster(folder / "cluster", groups=2, controllers=1, coordinators=1, redis="plain")
    with redis_server(folder) as real, running(cluster):
        nodes = [cluster.leader(1), cluster.follower(1), cluster.follower(2)]
        yield real, [node.redis_port for node in nodes]


COMMANDS = """
get a
set a 1
get a
GET a
set a 2 nx
set a 2 xx
set a 3 get
set none 3 get
del none
set none 3 xx get
set none 3 nx get
set none 4 nx get
set a
set a b c
set a b nx xx
set a b keepttl
set a b keepttl nx
set a b ex
set a b ex 0x
set a b px nope
set a b keepttl ex 10
set a b get
getset a new
getset fresh v
getset a
setnx a v
setnx b v
incr n
incr n
incrby n 40
incrby n x
incrby n 1.5
incrby n 007
decrby n -5
decr n
get n
incr a
incrby n 9223372036854775807
decrby n -9223372036854775808
set low -9223372036854775808
decr low
decrby low 1
set big 9223372036854775807
incr big
set odd " 1"
incr odd
set odd +1
incr odd
set odd 01
incr odd
set odd ""
incr odd
append s abc
append s ""
append empty ""
exists empty
append s def
strlen s
strlen nothing
getdel s
getdel s
get s
exists a b nothing a
exists
del a b nothing a
del
unlink n low big
unlink nothing
touch odd nothing
type odd
type nothing
ttl odd
pttl nothing
expiretime odd
pexpiretime nothing
persist odd
persist nothing
getex odd
getex odd persist
getex odd foo
mset k1 v1 k2 v2 k1 v3
mset k1
mset k1 v1 k2
mget k1 k2 k3 k1
mget
msetnx k1 x k9 y
get k9
msetnx m1 x m2 y
msetnx m1
dbsize
keys m*
keys
foo
foo bar
FOO bar baz
echo hello
echo
echo a b
ping
ping hello
ping hello you
PING
select 0
select 16
select x
auth secret
auth default secret
auth somebody secret
auth a b c
hello 4
hello x
hello 2 foo
hello 2 setname
client getname
client setname ok
client getname
client setname "not ok"
client setname
client foo
client
client reply on
config get save
config foo
config get
cluster info
cluster foo
readonly
readwrite
command foo
command getkeys get a
command getkeys mset a 1 b 2
command getkeys ping
command getkeys nothing
multi
multi
watch a
set a 1
incr a
foo
exec
multi
set a 1
incr a
incr k1
get a
exec
multi
get
exec
exec
multi
set a 5
discard
discard
get a
multi
exec
watch a b
multi
incr a
exec
watch
unwatch
watch a
set a 100
multi
incr a
exec
watch a
set a 102
multi
unwatch
incr a
exec
watch a
set a 101
unwatch
multi
incr a
exec
multi
ping
echo x
mset x1 1 x2 2
mget x1 x2 x3
del x1
exists x1 x2
getset x2 3
append x2 4
exec
scan 0 count 1000 match x*
scan x
scan 0 count 0
scan 0 count
scan 0 foo 1
scan
reset
quit now
"""


def words_of(line: str) -> list[bytes]:
    words = line.split(" ")
    joined = line.split('"')
    if len(joined) == 3:  # one word in quotes, at the end
        return [word.encode() for word in joined[0].split()] + [joined[1].encode()]
    return [word.encode() for word in words]


def shown(reply: Any) -> Any:
    """For a comparison: errors by their text, what has no order sorted."""
    if isinstance(reply, hiredis.ReplyError):
        return f"error: {reply}"
    if isinstance(reply, list):
        return [shown(item) for item in reply]
    return reply


def same(words: list[bytes], ours: Any, theirs: Any) -> bool:
    if words[0].lower() == b"keys" and isinstance(ours, list):
        return sorted(ours) == sorted(theirs)
    return bool(ours == theirs)


@pytest.mark.parametrize("node", [0, 1, 2], ids=["leader", "follower", "other-group"])
@pytest.mark.parametrize("protocol", [2, 3])
def test_the_same_replies(ports: Ports, node: int, protocol: int) -> None:
    real_port, nodes = ports
    differences = []
    with Resp(real_port) as real, Resp(nodes[node]) as ours:
        real.ask("flushall")
        for key in ours.ask("keys", "*"):
            ours.ask("del", key)
        if protocol == 3:
            real.ask("hello", 3)
            ours.ask("hello", 3)
        for line in COMMANDS.strip().splitlines():
            words = words_of(line)
            theirs, mine = shown(real.ask(*words)), shown(ours.ask(*words))
            if not same(words, mine, theirs):
                differences.append((line, mine, theirs))
            if line == "reset" and protocol == 3:
                real.ask("hello", 3)
                ours.ask("hello", 3)
    assert not differences, "\n".join(map(repr, differences))


def test_a_pipeline_is_answered_in_order(ports: Ports) -> None:
    """The same, sent at once, by bytes as they come."""
    real_port, nodes = ports
    lines = [line for line in COMMANDS.strip().splitlines() if not line.startswith(("keys", "reset", "quit"))]
    sent = b"".join(packed(*words_of(line)) for line in lines)
    for port in nodes:
        with Resp(real_port) as real, Resp(port) as ours:
            real.ask("flushall")
            for key in ours.ask("keys", "*"):
                ours.ask("del", key)
            real.send(sent)
            ours.send(sent)
            both = [(line, shown(ours.reply()), shown(real.reply())) for line in lines]
            assert [triple for triple in both if triple[1] != triple[2]] == []


@pytest.mark.parametrize(
    "data",
    [
        b"PING\r\n",
        b"PING\n",
        b"  PING   hello \r\n",
        b'SET q "a b\\x41\\n"\r\nGET q\r\n',
        b"GET 'a b\\'c'\r\n",
        b'GET "a\r\n',
        b"GET 'a'b\r\n",
        b"\r\n\r\nPING\r\n",
        b"*1\r\n$4\r\nPING\r\nPING\r\n*1\r\n$4\r\nPING\r\n",
        b"*0\r\n*-1\r\n*1\r\n$4\r\nPING\r\n",
        b"*a\r\n",
        b"*9999999999999999999999\r\n",
        b"*1\r\nPING\r\n",
        b"*1\r\n:5\r\n",
        b"*1\r\n*1\r\n$4\r\nPING\r\n",
        b"*1\r\n+PING\r\n",
        b"*1\r\n$-1\r\n",
        b"*1\r\n$a\r\n",
        b"*1\r\n$99999999999\r\n",
        b"*1\r\n$04\r\nPING\r\n",
        b"*01\r\n$4\r\nPING\r\n",
        b"%1\r\n$4\r\nPING\r\n$1\r\na\r\n",
        b"*3\r\n$3\r\nSET\r\n$1\r\nz\r\n$0\r\n\r\n*2\r\n$3\r\nGET\r\n$1\r\nz\r\n",
        b"*1\r\n$4\r\nPINGxx*1\r\n$4\r\nPING\r\n",
        b"A" * (64 * 1024 + 2),
        b"*1\r\n$" + b"1" * (64 * 1024),
    ],
    ids=lambda data: repr(data[:40]),
)
def test_the_same_protocol_errors(ports: Ports, data: bytes) -> None:
    """Whole, and byte by byte where that isn't much; all that comes back until the other end closes."""
    real_port, nodes = ports
    with Resp(nodes[0]) as resp:
        resp.ask("del", "q", "z")
    theirs, ours = answer_to(real_port, data, len(data)), answer_to(nodes[0], data, len(data))
    assert ours == theirs
    if len(data) < 100:
        assert answer_to(nodes[0], data, 1) == theirs


def answer_to(port: int, data: bytes, piece: int) -> bytes:
    with Resp(port) as resp:
        resp.ask("del", "q", "z")
        try:
            for at in range(0, len(data), piece):
                resp.send(data[at : at + piece])
            resp.socket.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it has said what is wrong, and gone
        return resp.rest()
