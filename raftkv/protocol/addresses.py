"""Addresses as people write them: HOST:PORT, and [IPV6]:PORT.

Must never resolve a name: that is the loop's.
"""

from __future__ import annotations

from collections.abc import Iterable

from raftkv.protocol.errors import BadRequest


def parse_address(text: str) -> tuple[str, int]:
    """(host, port) of `text`; raise BadRequest if it isn't HOST:PORT with a port of 1 … 65535."""
    host, colon, port_text = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise BadRequest(f"address {text!r}: write an IPv6 host in brackets, as in [::1]:7000")
    if not colon or not host or any(character.isspace() for character in host):
        raise BadRequest(f"address {text!r} is not HOST:PORT")
    if not (port_text.isascii() and port_text.isdigit() and 0 < int(port_text[:6]) < 65_536):
        raise BadRequest(f"address {text!r}: the port must be a number from 1 to 65535")
    return host, int(port_text)


def format_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_addresses(texts: Iterable[str]) -> tuple[str, ...]:
    """Check every address, drop repetitions, keep the order; raise BadRequest for a bad one."""
    addresses = tuple(dict.fromkeys(text.strip() for text in texts))
    for address in addresses:
        parse_address(address)
    return addresses
