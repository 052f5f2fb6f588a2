"""`$XDG_CONFIG_HOME/raftkv/config.toml`: settings that neither the command line nor the environment gives.

    controllers = ["10.0.0.1:7000", "10.0.0.2:7000", "10.0.0.3:7000"]
    timeout = 5                      # seconds, or "500ms"
    output = "json"
    tls_cert = "client.crt"          # a relative path begins at this file's directory
    tls_key = "client.key"
    tls_ca = "ca.crt"

    [daemon]                         # for `raftkv controller`, `shardkv` and `coordinator`
    log_format = "json"

RAFTKV_CONFIG names another file, which must be there; if it is empty, none is read. What can't be understood is an
error that names file and key: a setting that is silently not in force is worse than a program that stops. The parser
is imported only if there is a file: it costs what a command's start can't spare.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raftkv.cli.command_table import parse_controllers, parse_seconds
from raftkv.cli.exit_codes import UsageError
from raftkv.cli.printers import OUTPUTS

VARIABLE = "RAFTKV_CONFIG"
DAEMON = "daemon"
DAEMONS = ("controller", "shardkv", "coordinator")


@dataclass(frozen=True, slots=True)
class Config:
    """What the file says, by the options' keys; `path` is where it is, or would be."""

    path: Path | None
    client: Mapping[str, Any] = field(default_factory=dict)
    daemon: Mapping[str, Any] = field(default_factory=dict)

    def click_defaults(self) -> dict[str, Any]:
        """The `default_map` of `raftkv`: what click takes where neither the command line nor the environment speaks."""
        client = dict(self.client)
        if "timeout" in client:
            client["timeout_s"] = client.pop("timeout")
        output = {"output": client["output"]} if "output" in client else {}
        return {
            **{name: dict(client) for name in ("bench", "health", "top")},
            **{name: dict(self.daemon) for name in DAEMONS},
            "local": {"status": output},
        }


def path_of(environment: Mapping[str, str]) -> Path | None:
    """Where the file is; None: none is to be read. Raises RuntimeError where nobody knows the home directory."""
    given = environment.get(VARIABLE)
    if given is not None:
        return Path(given) if given else None
    config_home = environment.get("XDG_CONFIG_HOME") or ""
    base = Path(config_home) if Path(config_home).is_absolute() else Path.home() / ".config"
    return base / "raftkv" / "config.toml"


def load(environment: Mapping[str, str]) -> Config:
    """The file's settings; none if there is no file. Raises UsageError."""
    try:
        path = path_of(environment)
    except RuntimeError:
        path = None
    if path is None:
        return Config(path)
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        if environment.get(VARIABLE):
            raise UsageError(f"{path}: there is no such file; {VARIABLE} names it") from None
        return Config(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(f"can't read the configuration file {path}: {reason}") from None
    import tomllib

    try:
        settings = tomllib.loads(data.decode())
    except ValueError as error:  # UnicodeDecodeError too
        raise UsageError(f"{path} is not TOML: {error}") from None
    daemon = settings.pop(DAEMON, {})
    if not isinstance(daemon, dict):
        raise UsageError(f"{path}: {DAEMON} must be a table: [{DAEMON}]")
    return Config(path, _parsed(path, "", _CLIENT_KEYS, settings), _parsed(path, f"{DAEMON}.", _DAEMON_KEYS, daemon))


def where(config: Config, daemon: bool, key: str) -> str:
    """How a message names a key."""
    return f"{config.path}: {DAEMON + '.' if daemon else ''}{key}"


def _parsed(
    path: Path, prefix: str, known: Mapping[str, Callable[[Any], Any]], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The values by key. Raises UsageError."""
    parsed: dict[str, Any] = {}
    for key, value in settings.items():
        if key not in known:
            raise UsageError(f"{path}: unknown key {prefix}{key}; there are {', '.join(known)}")
        try:
            parsed[key] = known[key](value)
        except ValueError as error:
            raise UsageError(f"{path}: {prefix}{key}: {error}") from None
        if key.startswith("tls_"):
            parsed[key] = str(path.parent / Path(parsed[key]).expanduser())
    return parsed


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{value!r} is not a text in quotes")
    return value


def _addresses(value: Any) -> tuple[str, ...]:
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f'{value!r} is no list of texts, such as ["10.0.0.1:7000", "10.0.0.2:7000"]')
    return parse_controllers(",".join(texts))


def _seconds(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f'{value!r} is not a time; write seconds, such as 10 or 0.5, or "500ms"')
    return parse_seconds(str(value))


def _output(value: Any) -> str:
    if not isinstance(value, str) or value.lower() not in OUTPUTS:
        raise ValueError(f"{value!r} is not one of {', '.join(OUTPUTS)}")
    return value.lower()


def _number(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{value!r} is not a whole number")
    return value


_TLS_KEYS: dict[str, Callable[[Any], Any]] = dict.fromkeys(("tls_cert", "tls_key", "tls_ca"), _text)
_CLIENT_KEYS = {"controllers": _addresses, "timeout": _seconds, "output": _output, **_TLS_KEYS}
_DAEMON_KEYS = {
    "controllers": _addresses,
    **dict.fromkeys(("snapshot_entries", "snapshot_bytes", "cache_bytes", "move_bytes_per_s"), _number),
    **dict.fromkeys(("reads", "log_level", "log_format"), _text),
    **_TLS_KEYS,
}
