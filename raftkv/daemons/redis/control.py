"""The commands that aren't about keys: who is there, what can be asked, how the connection is set up.

Each is a function of the connection and the words; it returns the reply, or raises a Refusal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from raftkv import __version__
from raftkv.daemons.redis.parser import BULK_BYTES_MAX, Request, parse_int
from raftkv.daemons.redis.replies import OK, PONG, Refusal, Status
from raftkv.daemons.redis.scanning import Glob
from raftkv.daemons.redis.strings import NOT_AN_INT, SYNTAX
from raftkv.daemons.redis.table import SPECS, find
from raftkv.machines.slots import slot_of

if TYPE_CHECKING:
    from raftkv.daemons.redis.connection import RedisConnection

LIKE_REDIS: Final = "7.0.15"
"""Whose commands and texts these are: clients look at it."""
NAME_BYTES_MAX = 128

NO_PASSWORD = (
    "ERR AUTH <password> called without any password configured for the default user. "
    "Are you sure your configuration is correct?"
)
WRONG_PASSWORD = "WRONGPASS invalid username-password pair or user is disabled."
NO_CLUSTER = "ERR This instance has cluster support disabled"


def now(connection: RedisConnection, name: str, args: Request) -> Any:
    """What the command answers. Raise Refusal."""
    return _COMMANDS[name](connection, args)


def _ping(connection: RedisConnection, args: Request) -> Any:
    if len(args) > 2:
        raise Refusal("ERR wrong number of arguments for 'ping' command")
    return args[1] if len(args) == 2 else PONG


def _echo(connection: RedisConnection, args: Request) -> Any:
    return args[1]


def _select(connection: RedisConnection, args: Request) -> Any:
    number = parse_int(args[1])
    if number is None:
        raise Refusal(NOT_AN_INT)
    if number != 0:
        if connection.listener.is_cluster:
            raise Refusal("ERR SELECT is not allowed in cluster mode")
        raise Refusal("ERR DB index is out of range")
    return OK


def _hello(connection: RedisConnection, args: Request) -> Any:
    resp3 = connection.resp3
    if len(args) > 1:
        version = parse_int(args[1])
        if version is None:
            raise Refusal("ERR Protocol version is not an integer or out of range")
        if version not in (2, 3):
            raise Refusal("NOPROTO unsupported protocol version")
        resp3 = version == 3
    name = connection.name
    at = 2
    while at < len(args):
        option = args[at].upper()
        if option == b"AUTH" and at + 2 < len(args):
            _check_user(args[at + 1])
            at += 3
        elif option == b"SETNAME" and at + 1 < len(args):
            name = _checked_name(args[at + 1], "Client names")
            at += 2
        else:
            raise Refusal(f"ERR Syntax error in HELLO option '{args[at].decode('utf-8', 'replace')}'")
    connection.resp3, connection.name = resp3, name
    return {
        b"server": b"redis",
        b"version": LIKE_REDIS.encode(),
        b"proto": 3 if resp3 else 2,
        b"id": connection.id,
        b"mode": b"cluster" if connection.listener.is_cluster else b"standalone",
        b"role": b"master" if connection.listener.acts_as_master else b"replica",
        b"modules": [],
    }


def _auth(connection: RedisConnection, args: Request) -> Any:
    if len(args) > 3:
        raise Refusal(SYNTAX)
    if len(args) == 2:
        raise Refusal(NO_PASSWORD)
    _check_user(args[1])
    return OK


def _check_user(name: bytes) -> None:
    """There is the default user only, and it has no password: any will do."""
    if name != b"default":
        raise Refusal(WRONG_PASSWORD)


def _quit(connection: RedisConnection, args: Request) -> Any:
    connection.close_after_reply = True
    return OK


def _reset(connection: RedisConnection, args: Request) -> Any:
    connection.reset()
    return Status(b"RESET")


def _readonly(connection: RedisConnection, args: Request) -> Any:
    if not connection.listener.is_cluster:
        raise Refusal(NO_CLUSTER)
    connection.is_readonly = True
    return OK


def _readwrite(connection: RedisConnection, args: Request) -> Any:
    if not connection.listener.is_cluster:
        raise Refusal(NO_CLUSTER)
    connection.is_readonly = False
    return OK


# ---- CLIENT


def _client(connection: RedisConnection, args: Request) -> Any:
    words = [arg.upper() for arg in args[1:3]]
    match words[0], len(args):
        case b"ID", 2:
            return connection.id
        case b"GETNAME", 2:
            return connection.name or None
        case b"SETNAME", 3:
            connection.name = _checked_name(args[2], "Client names")
            return OK
        case b"SETINFO", 4:
            if words[1] not in (b"LIB-NAME", b"LIB-VER"):
                raise Refusal(f"ERR Unrecognized option '{args[2].decode('utf-8', 'replace')}'")
            connection.library[words[1]] = _checked_name(args[3], args[2].decode("latin-1").lower())
            return OK
        case b"INFO", 2:
            return connection.described() + b"\n"
        case b"LIST", 2:
            return b"".join(other.described() + b"\n" for other in connection.listener.connections)
        case ((b"NO-EVICT" | b"NO-TOUCH"), 3) if words[1] in (b"ON", b"OFF"):
            return OK
        case b"REPLY", 3 if words[1] == b"ON":
            return OK
        case b"UNBLOCK", 3:
            return 0
    raise _unknown_subcommand(args)


def _checked_name(name: bytes, what: str) -> bytes:
    if len(name) > NAME_BYTES_MAX or any(not 33 <= byte <= 126 for byte in name):
        raise Refusal(f"ERR {what} cannot contain spaces, newlines or special characters.")
    return name


def _unknown_subcommand(args: Request) -> Refusal:
    command = args[0].decode("latin-1").upper()
    shown = args[1][:NAME_BYTES_MAX].decode("utf-8", "replace")
    known = _SUBCOMMANDS.get(command.lower(), ())
    if args[1].decode("latin-1").lower() in known:
        return Refusal(f"ERR wrong number of arguments for '{command.lower()}|{shown.lower()}' command")
    return Refusal(f"ERR unknown subcommand '{shown}'. Try {command} HELP.")


_SUBCOMMANDS: Final = {
    "client": ("id", "getname", "setname", "setinfo", "info", "list", "no-evict", "no-touch", "reply", "unblock"),
    "command": ("count", "list", "info", "docs", "getkeys"),
    "config": ("get",),
    "cluster": ("slots", "shards", "nodes", "info", "myid", "keyslot"),
}


# ---- COMMAND


def _command(connection: RedisConnection, args: Request) -> Any:
    if len(args) == 1:
        return [spec.described() for spec in SPECS]
    match args[1].upper(), len(args):
        case b"COUNT", 2:
            return len(SPECS)
        case b"LIST", 2:
            return [spec.name.encode() for spec in SPECS]
        case b"DOCS", _:
            return {}
        case b"INFO", _:
            wanted = [find(name) for name in args[2:]] if len(args) > 2 else list(SPECS)
            return [None if spec is None else spec.described() for spec in wanted]
        case b"GETKEYS", count if count > 3:
            spec = find(args[2])
            if spec is None:
                raise Refusal("ERR Invalid command specified")
            spec.check_arity(args[2:])
            if not spec.first:
                raise Refusal("ERR The command has no key arguments")
            return spec.keys(args[2:])
    raise _unknown_subcommand(args)


# ---- CONFIG, INFO


def _config(connection: RedisConnection, args: Request) -> Any:
    if args[1].upper() != b"GET" or len(args) < 3:
        raise _unknown_subcommand(args)
    settings = {
        b"save": b"",
        b"appendonly": b"yes",
        b"appendfsync": b"always",
        b"databases": b"1",
        b"maxclients": b"%d" % connection.listener.connections_max,
        b"maxmemory": b"0",
        b"maxmemory-policy": b"noeviction",
        b"timeout": b"0",
        b"proto-max-bulk-len": b"%d" % BULK_BYTES_MAX,
        b"cluster-enabled": b"yes" if connection.listener.is_cluster else b"no",
    }
    wanted = [Glob(pattern.lower()) for pattern in args[2:]]
    return {name: value for name, value in settings.items() if any(glob.matches(name) for glob in wanted)}


def _info(connection: RedisConnection, args: Request) -> Any:
    listener = connection.listener
    sections: dict[str, dict[str, Any]] = {
        "Server": {
            "redis_version": LIKE_REDIS,
            "redis_mode": "cluster" if listener.is_cluster else "standalone",
            "raftkv_version": __version__,
            "process_id": listener.pid,
            "tcp_port": listener.port,
            "uptime_in_seconds": int(listener.uptime_s),
        },
        "Clients": {"connected_clients": len(listener.connections), "maxclients": listener.connections_max},
        "Persistence": {"loading": 0, "aof_enabled": 1, "aof_last_write_status": "ok"},
        "Stats": {
            "total_connections_received": listener.connections_received,
            "total_commands_processed": listener.commands_processed,
            "rejected_connections": listener.connections_rejected,
        },
        "Replication": {"role": "master" if listener.acts_as_master else "slave", "raftkv_state": listener.state},
        "Cluster": {"cluster_enabled": int(listener.is_cluster)},
        "Keyspace": {},
    }
    wanted = {arg.decode("latin-1").lower() for arg in args[1:]} - {"default", "all", "everything"}
    return "\r\n".join(
        f"# {title}\r\n" + "".join(f"{name}:{value}\r\n" for name, value in values.items())
        for title, values in sections.items()
        if not wanted or title.lower() in wanted
    ).encode()


# ---- CLUSTER


def _cluster(connection: RedisConnection, args: Request) -> Any:
    nodes = connection.listener.nodes
    if nodes is None:
        known = args[1].decode("latin-1").lower() in _SUBCOMMANDS["cluster"]
        raise Refusal(NO_CLUSTER) if known else _unknown_subcommand(args)
    match args[1].upper(), len(args):
        case b"SLOTS", 2:
            return nodes.slots()
        case b"SHARDS", 2:
            return nodes.shards()
        case b"NODES", 2:
            return nodes.lines()
        case b"INFO", 2:
            return nodes.info()
        case b"MYID", 2:
            return nodes.me().id.encode()
        case b"KEYSLOT", 3:
            return slot_of(args[2])
    raise _unknown_subcommand(args)


_COMMANDS: Final[dict[str, Callable[[Any, Request], Any]]] = {
    "ping": _ping,
    "echo": _echo,
    "select": _select,
    "hello": _hello,
    "auth": _auth,
    "quit": _quit,
    "reset": _reset,
    "readonly": _readonly,
    "readwrite": _readwrite,
    "client": _client,
    "command": _command,
    "config": _config,
    "info": _info,
    "cluster": _cluster,
}
