"""Pairs as lines of a file, in two forms that are exact for any bytes: what Export writes, Import reads.

* tsv: `KEY<TAB>VALUE` in printable ASCII; `\\\\ \\n \\r \\t \\0 \\xHH` stand for other bytes. On the way in, bytes
  outside ASCII stand for themselves, so that what other programs write as UTF-8 can be read.
* jsonl: `{"key": …, "value": …}`; text as a string, what isn't UTF-8 as `{"b64": "…"}`. Other members are ignored.

Pure functions over lines without their ends.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable
from typing import Any

from raftkv.cli.printers import json_bytes
from raftkv.cli.words import WordError, escape_exactly, unescape

FORMS = ("tsv", "jsonl")


class BadLine(Exception):
    """A line is no pair; str() says why."""


def encode_tsv(key: bytes, value: bytes) -> bytes:
    """One line of the form `tsv`."""
    return escape_exactly(key) + b"\t" + escape_exactly(value)


def decode_tsv(line: bytes) -> tuple[bytes, bytes]:
    """Key and value. A carriage return at the end belongs to the line's end. Raises BadLine."""
    fields = line.removesuffix(b"\r").split(b"\t")
    if len(fields) != 2:
        raise BadLine("there is no tab between key and value" if len(fields) == 1 else "there is more than one tab")
    try:
        return unescape(fields[0]), unescape(fields[1])
    except WordError as error:
        raise BadLine(str(error)) from None


def encode_jsonl(key: bytes, value: bytes) -> bytes:
    """One line of the form `jsonl`."""
    return json.dumps({"key": json_bytes(key), "value": json_bytes(value)}, ensure_ascii=False).encode()


def decode_jsonl(line: bytes) -> tuple[bytes, bytes]:
    """Key and value. Raises BadLine."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadLine(f"it is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise BadLine("it is not a JSON object")
    return _member(found, "key"), _member(found, "value")


def _member(found: dict[str, Any], name: str) -> bytes:
    """The bytes of a member. Raises BadLine."""
    member = found.get(name)
    try:
        if isinstance(member, str):
            return member.encode()
        if isinstance(member, dict) and isinstance(member.get("b64"), str):
            return base64.b64decode(member["b64"], validate=True)
    except (UnicodeEncodeError, binascii.Error, ValueError):
        pass
    raise BadLine(f'"{name}" is neither a string nor {{"b64": "…"}}')


def form_of(line: bytes) -> str:
    """The form of a file by its first line: each line of a tsv has a tab, and no line of an exported jsonl has one."""
    return "jsonl" if b"\t" not in line and line.lstrip().startswith(b"{") else "tsv"


ENCODERS: dict[str, Callable[[bytes, bytes], bytes]] = {"tsv": encode_tsv, "jsonl": encode_jsonl}
DECODERS: dict[str, Callable[[bytes], tuple[bytes, bytes]]] = {"tsv": decode_tsv, "jsonl": decode_jsonl}
