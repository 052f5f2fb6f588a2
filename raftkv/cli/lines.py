"""Lines of standard input as they come, inside the loop and without a thread.

A pipe or terminal is waited for by the loop; a regular file (which a selector can't watch) never
makes a reader wait long. Never changes the file's flags: a descriptor is shared with the parent.
"""

from __future__ import annotations

import asyncio
import os

CHUNK_BYTES = 64 * 1024
LINE_BYTES_MAX = 8 * 1024 * 1024
"""Above any command: a value of 1 MiB and a key of 8 KiB, every byte written as \\xHH."""


class LineTooLong(Exception):
    """A line exceeds LINE_BYTES_MAX."""


class LineReader:
    """Reads lines of a file descriptor."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._buffer = bytearray()
        self._searched = 0  # no line end before this position of the buffer
        self._ended = False
        self._can_wait = True

    def buffered(self) -> bytes | None:
        """The next line, with its end, if it has arrived. Raises LineTooLong."""
        end = self._buffer.find(b"\n", self._searched) + 1
        if end == 0:
            self._searched = len(self._buffer)
            if self._searched > LINE_BYTES_MAX:
                raise LineTooLong(f"a line is longer than {LINE_BYTES_MAX} bytes")
            if not self._ended or not self._buffer:
                return None
            end = len(self._buffer)  # the last line may lack its end
        line = bytes(self._buffer[:end])
        del self._buffer[:end]
        self._searched = 0
        return line

    async def more(self) -> bool:
        """Wait for more input; False at its end. Raises OSError."""
        if self._ended:
            return False
        await self._readable()
        chunk = os.read(self._descriptor, CHUNK_BYTES)
        self._buffer += chunk
        self._ended = not chunk
        return not self._ended

    async def _readable(self) -> None:
        if not self._can_wait:
            return
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()
        try:
            loop.add_reader(self._descriptor, _set, ready)
        except (PermissionError, ValueError, NotImplementedError):
            self._can_wait = False  # a regular file, or /dev/null
            return
        try:
            await ready
        finally:
            loop.remove_reader(self._descriptor)


def _set(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)
