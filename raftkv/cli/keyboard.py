"""Single keys from a terminal inside the loop; the terminal is as it was, however the context ends."""

from __future__ import annotations

import asyncio
import os
import termios
import tty
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

_NAMES = {
    "\x1b[A": "up",
    "\x1b[B": "down",
    "\x1bOA": "up",
    "\x1bOB": "down",
    "\x1b[5~": "pageup",
    "\x1b[6~": "pagedown",
}


class Keyboard(AbstractContextManager["Keyboard"]):
    """Calls `pressed` with each key: a character, or a name of _NAMES. Ctrl-C and Ctrl-Z go on making signals."""

    def __init__(self, descriptor: int, pressed: Callable[[str], None]) -> None:
        self._descriptor = descriptor
        self._pressed = pressed
        self._before: list[Any] | None = None

    def __enter__(self) -> Keyboard:
        self.take()
        asyncio.get_running_loop().add_reader(self._descriptor, self._read)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.get_running_loop().remove_reader(self._descriptor)
        self.give_back()

    def take(self) -> None:
        """From now on a key is there without Enter, and isn't shown."""
        self._before = termios.tcgetattr(self._descriptor)
        tty.setcbreak(self._descriptor)

    def give_back(self) -> None:
        """The terminal as it was."""
        if self._before is not None:
            termios.tcsetattr(self._descriptor, termios.TCSADRAIN, self._before)
            self._before = None

    def _read(self) -> None:
        try:
            data = os.read(self._descriptor, 1024)
        except OSError:
            data = b""
        if not data:  # the terminal is gone
            asyncio.get_running_loop().remove_reader(self._descriptor)
            return
        for key in keys_of(data.decode("utf-8", "replace")):
            self._pressed(key)


def keys_of(text: str) -> list[str]:
    """The keys that a terminal has sent as `text`; unknown sequences are none."""
    keys: list[str] = []
    position = 0
    while position < len(text):
        if text[position] != "\x1b":
            keys.append(text[position])
            position += 1
            continue
        end = position + 1
        if text[end : end + 1] in ("[", "O"):
            end += 1
            while end < len(text) and not "@" <= text[end] <= "~":
                end += 1
            end += 1
        name = _NAMES.get(text[position:end])
        keys += [name] if name else []
        position = end
    return keys
