"""Frames: a 4-byte big-endian length, then one msgpack array of that many bytes.

Pure: bytes in, arrays out, no I/O. Whatever the bytes are, the only error is `Malformed`, and no
frame can make us hold more than its own limit. This is on the hot path: many small frames arrive in
one piece, so they are cut out as slices, without a streaming decoder in between.
"""

from __future__ import annotations

import struct
from typing import Any

import msgpack

from raftkv.protocol.errors import Malformed, TooLarge
from raftkv.protocol.limits import ARRAY_LEN_MAX, FRAME_BYTES_MAX, MAP_LEN_MAX

LENGTH = struct.Struct(">I")
LENGTH_BYTES = LENGTH.size

TLS_RECORDS = (0x1503, 0x1603)
"""The first two bytes of an alert and of a hello (RFC 8446, 5.1): lengths far beyond any limit."""

_pack_length = LENGTH.pack
_unpack_length = LENGTH.unpack_from
_unpack = msgpack.unpackb
_pack = msgpack.Packer().pack  # one encoder with its buffer kept: half the cost of msgpack.packb


def encode_body(array: list[Any] | tuple[Any, ...]) -> bytes:
    """The msgpack bytes alone, as commands and other parts are embedded. For our own values only."""
    body: bytes = _pack(array)
    return body


def encode_frame(array: list[Any] | tuple[Any, ...]) -> bytes:
    """One frame. Raise TooLarge if the body exceeds FRAME_BYTES_MAX."""
    body: bytes = _pack(array)
    if len(body) > FRAME_BYTES_MAX:
        raise TooLarge("a message", FRAME_BYTES_MAX)
    return _pack_length(len(body)) + body


def decode_body(body: bytes | memoryview) -> list[Any]:
    """The array in `body`; raise Malformed for anything else. bin gives bytes, str gives str."""
    try:
        array = _unpack(body, max_array_len=ARRAY_LEN_MAX, max_map_len=MAP_LEN_MAX, max_ext_len=0)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        # ValueError is the root of all that msgpack raises: incomplete, extra data, bad format, too
        # deep, over a limit, and str that is not UTF-8.
        raise Malformed(f"not msgpack: {str(error) or type(error).__name__}") from None
    if type(array) is not list or not array:
        raise Malformed(f"a message must be a non-empty array, not {type(array).__name__}")
    return array


class FrameParser:
    """Cuts a byte stream into decoded frames.

    The frames that come before a bad one are always returned, however the stream was cut into
    pieces; from then on `error` is set and feeding again raises it: the stream can't be resumed.
    The first frame has a limit of its own (bytes of the body): a stranger's hello must be small.
    """

    __slots__ = ("_bytes_max", "_bytes_max_later", "_rest", "_wanted_bytes", "error")

    def __init__(self, frame_bytes_max: int = FRAME_BYTES_MAX, first_bytes_max: int | None = None) -> None:
        self.error: Malformed | None = None
        self._bytes_max = frame_bytes_max if first_bytes_max is None else first_bytes_max
        self._bytes_max_later = frame_bytes_max
        self._rest = bytearray()
        self._wanted_bytes = LENGTH_BYTES

    @property
    def held_bytes(self) -> int:
        """Bytes of a frame that is not complete yet."""
        return len(self._rest)

    def feed(self, data: bytes) -> list[list[Any]]:
        """The frames that `data` completes, in order; see `error`. Raise Malformed if fed after that."""
        if self.error is not None:
            raise self.error
        if self._rest:
            self._rest += data
            if len(self._rest) < self._wanted_bytes:
                return []
            data = bytes(self._rest)
            self._rest = bytearray()
        frames: list[list[Any]] = []
        position = 0
        size = len(data)
        self._wanted_bytes = LENGTH_BYTES
        try:
            while size - position >= LENGTH_BYTES:
                start = position + LENGTH_BYTES
                length = _unpack_length(data, position)[0]
                if length > self._bytes_max:
                    if length >> 16 in TLS_RECORDS:
                        raise Malformed("TLS, which this end doesn't speak (--tls-cert, --tls-key, --tls-ca)")
                    raise Malformed(f"a frame of {length} bytes exceeds the limit of {self._bytes_max}")
                if start + length > size:
                    self._wanted_bytes = LENGTH_BYTES + length
                    break
                position = start + length
                frames.append(decode_body(data[start:position]))
                self._bytes_max = self._bytes_max_later
        except Malformed as error:
            self.error = error
            return frames
        if position < size:
            self._rest += data[position:] if position else data
        return frames
