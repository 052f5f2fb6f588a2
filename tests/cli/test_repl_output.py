"""Output larger than the screen goes through a pager, and nothing is collected on the way; the rest goes straight."""

from __future__ import annotations

import asyncio
import io
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from raftkv.cli.printers import OutputClosed, Printer
from raftkv.cli.repl_output import Paged, ShellPipe, Sink, find_pager, paced
from raftkv.cli.results import Lines, Pairs, Result, Text

COLUMNS, ROWS = 40, 12  # ten rows are left for output


class Reader:
    """A pager that keeps what it gets in a file, and leaves after some lines if told so."""

    def __init__(self, folder: Path, leave_after: int = 0) -> None:
        self.file = folder / "paged"
        take = f"head -n {leave_after}" if leave_after else "cat"
        self.command = ["sh", "-c", f"{take} > {self.file}"]

    def got(self) -> str:
        return self.file.read_text() if self.file.exists() else ""


def show(result: Result, pager: list[str]) -> tuple[str, int]:
    """What reaches the screen, and how many parts the result was asked for."""
    screen = io.BytesIO()
    seen: list[bytes] = []

    async def run() -> None:
        sink = Paged(screen, pager, lambda: os.terminal_size((COLUMNS, ROWS)))
        try:
            await Printer("plain", sink.as_stream).show(paced(result, sink, seen.extend))
        except (BrokenPipeError, OutputClosed):
            pass
        finally:
            await sink.finish()

    asyncio.run(run())
    return screen.getvalue().decode(), len(seen)


async def pairs(number: int) -> AsyncIterator[tuple[bytes, bytes]]:
    for n in range(number):
        yield b"k%d" % n, b"v"


def lines_of(number: int) -> str:
    return "".join(f"k{n}\tv\n" for n in range(number))


def test_what_fits_goes_to_the_screen(tmp_path: Path) -> None:
    reader = Reader(tmp_path)
    assert show(Pairs(pairs(10)), reader.command) == (lines_of(10), 10)
    assert show(Text("x" * COLUMNS), reader.command)[0] == "x" * COLUMNS + "\n"
    assert show(Text(f"\x1b[31m{'x' * COLUMNS}\x1b[0m"), reader.command)[0] == f"\x1b[31m{'x' * COLUMNS}\x1b[0m\n"
    assert show(Text("one\n" * 9), reader.command)[0] == "one\n" * 9 + "\n"
    assert not reader.file.exists()


@pytest.mark.parametrize("text", ["one\n" * 10, "x" * (COLUMNS + 1), "ü" * (COLUMNS + 1), "宽" * (COLUMNS // 2 + 1)])
def test_what_is_taller_or_wider_goes_through_the_pager(tmp_path: Path, text: str) -> None:
    reader = Reader(tmp_path)
    assert show(Text(text), reader.command) == ("", 0)
    assert reader.got() == text + "\n"


def test_a_large_scan_is_streamed(tmp_path: Path) -> None:
    reader = Reader(tmp_path)
    assert show(Pairs(pairs(20_000)), reader.command) == ("", 20_000)
    assert reader.got() == lines_of(20_000)


def test_a_pager_that_is_left_ends_the_scan(tmp_path: Path) -> None:
    reader = Reader(tmp_path, leave_after=20)
    screen, asked = show(Pairs(pairs(10_000_000)), reader.command)
    assert screen == ""
    assert reader.got() == lines_of(20)
    assert asked < 1_000_000  # what the pipe and the buffer before it hold


def test_no_more_is_fetched_than_the_reader_takes() -> None:
    """A reader that waits (for its user's keys) makes the scan wait."""

    async def run() -> None:
        fetched = 0

        async def endless() -> AsyncIterator[bytes]:
            nonlocal fetched
            while True:
                fetched += 1
                yield b"x" * 1000

        sink = ShellPipe(io.BytesIO(), "exec sleep 1000")
        await sink.start()
        printing = asyncio.get_running_loop().create_task(
            Printer("plain", sink.as_stream).show(paced(Lines(endless()), sink, lambda keys: None))
        )
        before = -1
        while before != fetched:
            before = fetched
            await asyncio.sleep(0.2)
        assert 0 < fetched < 2_000
        printing.cancel()
        assert sink.process is not None
        sink.process.kill()
        await asyncio.gather(printing, return_exceptions=True)
        await sink.finish()

    asyncio.run(run())


def test_a_pager_that_is_not_there(tmp_path: Path) -> None:
    assert show(Pairs(pairs(50)), ["/no/such/pager"]) == (lines_of(50), 50)


def test_which_pager(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert find_pager({"PAGER": "less -S"}) == ["less", "-S"]
    assert find_pager({"PAGER": "cat"}) is None
    assert find_pager({"PAGER": ""}) is None
    assert find_pager({"PAGER": "'"}) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_pager({}) is None
    for name in ("more", "less"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
        assert find_pager({}) == [name]


def test_the_pager_knows_how_to_behave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "less"
    monkeypatch.delenv("LESS", raising=False)
    show(Text("x" * 99), ["sh", "-c", f"cat; echo $LESS > {file}"])
    assert file.read_text() == "FRX\n"
    monkeypatch.setenv("LESS", "S")
    show(Text("x" * 99), ["sh", "-c", f"cat; echo $LESS > {file}"])
    assert file.read_text() == "S\n"


def test_a_plain_sink_is_the_stream() -> None:
    stream = io.BytesIO()
    sink = Sink(stream)

    async def run() -> None:
        await Printer("plain", sink.as_stream).show(Text("x"))
        await sink.drain()
        await sink.finish()

    asyncio.run(run())
    assert stream.getvalue() == b"x\n"
