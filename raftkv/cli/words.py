"""The words of a command line: splitting a line of a script or the REPL, quoting and escaping bytes.

Pure functions over bytes. Never guesses: an unknown escape or an open quote is an error, because a
value that silently becomes another value is worse than a script that stops.

    Put key value
    Put "a key" 'back\\slash, as it stands'
    Put "\\x00\\xff" "two\\nlines"

A word is quoted when its *first* byte is a quote; quotes inside a bare word are ordinary bytes, so that
`{"json":1}` needs no quoting. In double quotes `\\\\ \\" \\n \\r \\t \\0 \\xHH` are escapes, in single
quotes nothing is.
"""

from __future__ import annotations

import re
from typing import NamedTuple

SPACES = b" \t\r\n\v\f"


class WordError(ValueError):
    """The line can't be split into words; str() is one human line with the column (from 1)."""


class UnfinishedQuote(WordError):
    """A quote is open at the end of the line: more of it may follow on the next."""


class Word(NamedTuple):
    """One word. A quoted one is never taken for an option."""

    data: bytes
    quoted: bool = False


_SPACE = re.compile(rb"[ \t\r\n\v\f]*")
_BARE = re.compile(rb"[^ \t\r\n\v\f]+")
_IN_DOUBLE_QUOTES = re.compile(rb'(?:[^"\\]++|\\(?:[\\"nrt0]|x[0-9A-Fa-f]{2}))*+')


def split_words(line: bytes) -> list[Word]:
    """The words of one line (without regard to comments). Raises WordError."""
    words: list[Word] = []
    position, end = _after(_SPACE, line, 0), len(line)
    while position < end:
        if line[position] in b"\"'":
            data, position = _quoted(line, position)
            if position < end and line[position] not in SPACES:
                raise WordError(f"column {position + 1}: a space must follow the closing quote")
            words.append(Word(data, quoted=True))
        else:
            start, position = position, _after(_BARE, line, position)
            words.append(Word(line[start:position]))
        position = _after(_SPACE, line, position)
    return words


def _after(pattern: re.Pattern[bytes], line: bytes, position: int) -> int:
    """The position after what the pattern matches there, which may be nothing."""
    match = pattern.match(line, position)
    return match.end() if match else position


def _quoted(line: bytes, start: int) -> tuple[bytes, int]:
    """The content of the quoted word that opens at `start`, and the position after its closing quote."""
    if line[start] == ord("'"):
        close = line.find(b"'", start + 1)
        if close < 0:
            raise UnfinishedQuote(f"column {start + 1}: this quote is never closed")
        return line[start + 1 : close], close + 1
    close = _after(_IN_DOUBLE_QUOTES, line, start + 1)
    if line[close : close + 1] == b'"':
        return _unescape(line[start + 1 : close]), close + 1
    if close == len(line):
        raise UnfinishedQuote(f"column {start + 1}: this quote is never closed")
    kind = line[close + 1 : close + 2]  # after a backslash that begins no escape
    if kind == b"x":
        raise WordError(f"column {close + 1}: \\x needs two hexadecimal digits")
    shown = kind.decode("ascii", "backslashreplace")
    known = '\\\\ \\" \\n \\r \\t \\0 \\xHH'
    raise WordError(f"column {close + 1}: unknown escape \\{shown}; there are {known}")


def _unescape(data: bytes) -> bytes:
    """The bytes that the content of double quotes stands for; its escapes are known to be good.

    They are Python's too, which decodes them at the speed of C; but there digits may follow a \\0.
    """
    if b"\\" not in data:
        return data
    if b"\\0" in data:  # between pairs of backslashes, which stand for one, every other begins an escape
        data = b"\\\\".join(part.replace(b"\\0", b"\\x00") for part in data.split(b"\\\\"))
    return data.decode("unicode_escape").encode("latin-1")


def is_comment_or_blank(line: bytes) -> bool:
    """Whether a line of a script holds no command: blank, or its first character is `#`."""
    stripped = line.strip(SPACES)
    return not stripped or stripped.startswith(b"#")


_BARE_BYTES = frozenset(range(0x21, 0x7F)) - frozenset(b"\"'#-@\\")
_NAMED = {0x5C: b"\\\\", 0x22: b'\\"', 0x0A: b"\\n", 0x0D: b"\\r", 0x09: b"\\t", 0x00: b"\\0"}


def quote_word(data: bytes) -> bytes:
    """`data` as a word that `split_words` reads back, in printable ASCII; bare where that is safe."""
    if data and all(byte in _BARE_BYTES for byte in data):
        return data
    parts = [_NAMED.get(byte) or (bytes((byte,)) if 0x20 <= byte < 0x7F else b"\\x%02x" % byte) for byte in data]
    return b'"' + b"".join(parts) + b'"'


_ESCAPED = [bytes((byte,)) if 0x20 <= byte < 0x7F else b"\\x%02x" % byte for byte in range(256)]
_PRINTABLE = bytes(range(0x20, 0x7F))


def escape_bytes(data: bytes) -> bytes:
    """`data` with every byte outside printable ASCII as `\\xHH`: the plain form of Scan.

    A backslash is printable and stays, so the form is exact but not reversible; `-o json` is.
    """
    if not data.translate(None, _PRINTABLE):
        return data
    return b"".join([_ESCAPED[byte] for byte in data])


_EXACT = [_NAMED.get(byte, shown) if byte != 0x22 else shown for byte, shown in enumerate(_ESCAPED)]
_UNCHANGED = bytes(byte for byte in range(256) if _EXACT[byte] == bytes((byte,)))


def escape_exactly(data: bytes) -> bytes:
    """`data` in printable ASCII, backslashes escaped too, so that `unescape` gives it back: a field of an export."""
    if not data.translate(None, _UNCHANGED):
        return data
    return b"".join([_EXACT[byte] for byte in data])


_FIELD = re.compile(rb"(?:[^\\]++|\\(?:[\\\"nrt0]|x[0-9A-Fa-f]{2}))*+")


def unescape(field: bytes) -> bytes:
    """What `escape_exactly` was given; the escapes are those of double quotes, other bytes stand for themselves.

    Raises WordError.
    """
    good = _after(_FIELD, field, 0)
    if good < len(field):
        raise WordError(f"unknown escape at byte {good + 1} of {show_word(field)}; a backslash is \\\\")
    return _unescape(field)


def show_word(data: bytes, longest: int = 60) -> str:
    """`data` as text for a message: quoted where needed, cut when long. For people, not for machines."""
    if len(data) > longest:
        return quote_word(data[:longest]).decode("ascii") + f"… ({len(data)} bytes)"
    return quote_word(data).decode("ascii")
