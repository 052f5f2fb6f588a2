"""Requests out of bytes: RESP arrays of bulk strings, and inline commands, as Redis reads them.

What is whole, small and plain goes through hiredis, which is several times as fast. It was made for replies: it would
take requests that Redis refuses, and set aside memory for as many items as a stranger announces. So whatever looks odd,
or is cut off, goes through `_strict` instead, which is the authority; both give the same commands.
"""

from __future__ import annotations

import re

import hiredis

BULK_BYTES_MAX = 16 * 1024 * 1024
"""One argument: far more than a value may have, so that too large a value is a command's error, not the protocol's."""
REQUEST_BYTES_MAX = 32 * 1024 * 1024
"""One request, with what Python needs to hold its arguments."""
ARGUMENTS_MAX = 1024 * 1024
INLINE_BYTES_MAX = 64 * 1024
HEADER_BYTES_MAX = 64 * 1024
ARGUMENT_COST_BYTES = 48

CHUNK_BYTES_MAX = 16 * 1024
"""Up to here a chunk is tried whole; a longer one is likely to be cut off somewhere."""

_ODD = re.compile(rb"\n(?:[^$*a-zA-Z0-9]|\*(?:[^0-9]|[0-9]{4})|\$-)")
"""What hiredis might understand where Redis doesn't, or set aside memory for; and some values that begin like that."""
_BOUNDARY = b"+boundary\r\n"
_AT_BOUNDARY = b"boundary"

_BLANK = b" \t\n\r\x0b\x0c\x00"
_ESCAPES = {ord("n"): 10, ord("r"): 13, ord("t"): 9, ord("b"): 8, ord("a"): 7}
_HEX = b"0123456789abcdefABCDEF"

Request = list[bytes]


class ProtocolError(Exception):
    """The text is what Redis says, after `ERR Protocol error: `."""


class Parser:
    """The requests of one connection. After `error` is set nothing more comes out."""

    __slots__ = ("_arguments", "_budget", "_held", "_missing", "_pieces", "_reader", "_wanted", "error")

    def __init__(self) -> None:
        self._reader = hiredis.Reader()
        self._pieces: list[bytes] = []
        self._held = 0
        self._wanted = 0
        """So many bytes there must be before looking at them again makes sense."""
        self._arguments: Request = []
        self._missing = 0
        """Arguments of the request under way that have to come; 0 between two requests."""
        self._budget = 0
        self.error: ProtocolError | None = None

    @property
    def held_bytes(self) -> int:
        """Of a request that hasn't come in whole."""
        return self._held + (REQUEST_BYTES_MAX - self._budget if self._missing else 0)

    def feed(self, data: bytes) -> list[Request]:
        """The requests that are whole with `data`; without empty ones, which Redis passes over."""
        if self.error is not None:
            return []
        if self._pieces:
            self._pieces.append(data)
            self._held += len(data)
            if self._held < self._wanted:
                return []
            data = b"".join(self._pieces)
            self._pieces.clear()
            self._held = 0
        requests: list[Request] = []
        if not self._missing:
            end = len(data) if len(data) <= CHUNK_BYTES_MAX else data.rfind(b"\r\n*") + 2
            if end > 2 and data[0] == 42 and data.find(b"\r", 1, 5) > 0 and _ODD.search(data, 0, end) is None:
                whole = data if end == len(data) else data[:end]
                found = self._quick(whole)
                if found is not None:
                    if whole is data:
                        return found
                    requests, data = found, data[end:]
        try:
            position = self._strict(data, requests)
        except ProtocolError as error:
            self.error = error
            return requests
        if position < len(data):
            rest = data[position:] if position else data
            self._pieces.append(rest)
            self._held = len(rest)
        return requests

    def _quick(self, data: bytes) -> list[Request] | None:
        """The requests if `data` is some whole ones, one after the other; None if that isn't certain."""
        reader = self._reader
        requests: list[Request] = []
        try:
            reader.feed(data)
            reader.feed(_BOUNDARY)
            while type(request := reader.gets()) is list:
                if request:
                    b"".join(request)  # anything but bytes in it is a TypeError
                    requests.append(request)
            if request == _AT_BOUNDARY and not reader.has_data():
                return requests
        except (hiredis.ProtocolError, TypeError):
            pass
        self._reader = hiredis.Reader()
        return None

    def _strict(self, data: bytes, requests: list[Request]) -> int:
        """Append the requests in `data`; return where that begins which isn't whole. Raise ProtocolError."""
        position, size = 0, len(data)
        self._wanted = 0
        while position < size:
            if self._missing:
                end = self._bulk(data, position)
            elif data[position] == 42:
                count, end = _header(data, position, "mbulk count", "invalid multibulk length", ARGUMENTS_MAX)
                if end > 0:
                    self._missing, self._arguments, self._budget = max(count, 0), [], REQUEST_BYTES_MAX
            else:
                end = self._inline(data, position)
            if end < 0:
                return position
            position = end
            if not self._missing and self._arguments:
                requests.append(self._arguments)
                self._arguments = []
        return position

    def _inline(self, data: bytes, start: int) -> int:
        newline = data.find(b"\n", start, start + INLINE_BYTES_MAX + 1)
        if newline < 0:
            if len(data) - start > INLINE_BYTES_MAX:
                raise ProtocolError("too big inline request")
            return -1
        words = split_words(data[start:newline])
        if words is None:
            raise ProtocolError("unbalanced quotes in request")
        self._arguments = words
        return newline + 1

    def _bulk(self, data: bytes, at: int) -> int:
        if data[at] != 36:
            raise ProtocolError(f"expected '$', got '{_printable(data[at])}'")
        length, body = _header(data, at, "bulk count", "invalid bulk length", BULK_BYTES_MAX)
        if body < 0:
            return -1
        if length < 0:
            raise ProtocolError("invalid bulk length")
        if self._budget < length + ARGUMENT_COST_BYTES:
            raise ProtocolError(f"the request has more than {REQUEST_BYTES_MAX} bytes")
        end = body + length + 2
        if end > len(data):
            self._wanted = end - at
            return -1
        self._budget -= length + ARGUMENT_COST_BYTES
        self._arguments.append(data[body : body + length])
        self._missing -= 1
        return end


def _header(data: bytes, start: int, what: str, invalid: str, most: int) -> tuple[int, int]:
    """(the number in the line at `start`, where the next one begins); that is -1 if the line isn't whole."""
    end = data.find(b"\r", start, start + HEADER_BYTES_MAX)
    if end < 0 or end + 1 >= len(data):
        if len(data) - start > HEADER_BYTES_MAX:
            raise ProtocolError(f"too big {what} string")
        return 0, -1
    number = parse_int(data[start + 1 : end])
    if number is None or number > most:
        raise ProtocolError(invalid)
    return number, end + 2


_INT = re.compile(rb"-?[1-9][0-9]{0,18}|0")


def parse_int(text: bytes) -> int | None:
    """A signed 64-bit number as Redis writes it: no plus, no leading zeros, no blanks. None if it isn't one."""
    if _INT.fullmatch(text) is None:
        return None
    number = int(text)
    return number if -(1 << 63) <= number < 1 << 63 else None


def _printable(byte: int) -> str:
    return chr(byte) if 32 <= byte < 127 else f"\\x{byte:02x}"


def split_words(line: bytes) -> Request | None:
    """The words of an inline command, with its quotes and escapes; None if they aren't balanced."""
    words: Request = []
    at, size = 0, len(line)
    while True:
        while at < size and line[at] in _BLANK:
            at += 1
        if at == size:
            return words
        word = bytearray()
        while at < size and line[at] not in _BLANK:
            byte = line[at]
            if byte not in b"\"'":
                word.append(byte)
                at += 1
                continue
            after = _quoted(line, at + 1, byte, word)
            if after is None or (after < size and line[after] not in _BLANK):
                return None
            at = after
        words.append(bytes(word))


def _quoted(line: bytes, at: int, quote: int, word: bytearray) -> int | None:
    """Append what stands before the closing quote; where it goes on after that, None if there is none."""
    size = len(line)
    while at < size:
        byte = line[at]
        if byte == quote:
            return at + 1
        if byte != ord("\\") or at + 1 >= size:
            word.append(byte)
            at += 1
        elif quote == ord("'"):
            escaped = line[at + 1] == quote
            word.append(quote if escaped else byte)
            at += 2 if escaped else 1
        elif line[at + 1] == ord("x") and at + 3 < size and line[at + 2] in _HEX and line[at + 3] in _HEX:
            word.append(int(line[at + 2 : at + 4], 16))
            at += 4
        else:
            word.append(_ESCAPES.get(line[at + 1], line[at + 1]))
            at += 2
    return None
