"""Import and Export on a client in memory: order, what ends them, and how they go on."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import pytest

from raftkv.cli import bulk
from raftkv.cli.command_table import parse
from raftkv.cli.exit_codes import ExitCode
from raftkv.cli.lines import LINE_BYTES_MAX
from raftkv.cli.oneshot import run_one
from raftkv.cli.words import Word
from raftkv.protocol.errors import Busy, OutcomeUnknown, Timeout
from tests.cli.fakes import FakeValue, Shell
from tests.cli.test_script import run as run_script


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files have short names, as messages show them."""
    monkeypatch.chdir(tmp_path)


def run(shell: Shell, *words: str | Path) -> ExitCode:
    """Run one command as `raftkv-kv WORDS…` does."""
    return asyncio.run(one(shell, *words))


async def one(shell: Shell, *words: str | Path) -> ExitCode:
    parsed = parse(shell.table, [Word(os.fsencode(word)) for word in words], environment={})
    return await run_one(shell.session, shell.printer, parsed.call())


def file_of(tmp_path: Path, data: bytes) -> Path:
    (tmp_path / "pairs").write_bytes(data)
    return Path("pairs")


def stored(shell: Shell) -> dict[bytes, bytes]:
    return {key: found.value for key, found in shell.fakes.kv_client.data.items()}


def filled(pairs: dict[bytes, bytes], output: str = "plain") -> Shell:
    shell = Shell(output=output)
    shell.fakes.kv_client.data = {key: FakeValue(value, 1) for key, value in pairs.items()}
    return shell


PAIRS = {b"a": b"1", b"b\t\n\\": b"\x00\xff", "ä".encode(): b"", b"c": b"x" * 1000}


@pytest.mark.parametrize("form", ["tsv", "jsonl"])
def test_what_is_exported_is_imported(form: str, tmp_path: Path) -> None:
    source, target = filled(PAIRS), Shell()
    assert run(source, "export", "--format", form) is ExitCode.DONE
    assert run(target, "import", file_of(tmp_path, source.out.getvalue())) is ExitCode.DONE
    assert stored(target) == PAIRS
    assert target.out.getvalue() == b"OK\n"


@pytest.mark.parametrize(
    ("data", "pairs"),
    [
        (b"", {}),
        (b"\n \n\r\n", {}),
        (b"a\t1\n\nb\t2\n  \n", {b"a": b"1", b"b": b"2"}),
        (b"a\t1\r\nb\t2\r\n", {b"a": b"1", b"b": b"2"}),
        (b"a\t1\nb\t2", {b"a": b"1", b"b": b"2"}),
        (b"\xef\xbb\xbfa\t1\n", {b"a": b"1"}),
        (b'\xef\xbb\xbf{"key": "a", "value": "1"}\r\n', {b"a": b"1"}),
        (b"a\t1\na\t2\na\t3\n", {b"a": b"3"}),
        (b'{"key": "a", "value": "1"}\n\n{"key": "b", "value": "2"}', {b"a": b"1", b"b": b"2"}),
    ],
)
def test_files_as_others_write_them(data: bytes, pairs: dict[bytes, bytes], tmp_path: Path) -> None:
    shell = Shell()
    assert run(shell, "import", file_of(tmp_path, data)) is ExitCode.DONE
    assert stored(shell) == pairs


def test_json_says_how_many(tmp_path: Path) -> None:
    shell = Shell(output="json")
    assert run(shell, "import", file_of(tmp_path, b"a\t1\n\nb\t2\n")) is ExitCode.DONE
    assert json.loads(shell.out.getvalue()) == {"ok": True, "pairs": 2, "lines": 3}


def test_many_are_in_flight_and_those_of_one_key_in_order(tmp_path: Path) -> None:
    shell = Shell()
    client = shell.fakes.kv_client
    client.delays_s = {b"slow": 0.01}
    lines = [b"%s\t%d\n" % (b"slow" if n % 10 == 0 else b"k%d" % n, n) for n in range(1000)]
    assert run(shell, "import", file_of(tmp_path, b"".join(lines))) is ExitCode.DONE
    assert 10 < client.in_flight_max <= bulk.IN_FLIGHT
    assert stored(shell)[b"slow"] == b"990"
    assert len(client.data) == 901
    slow = [n for n, (_, key) in enumerate(client.order) if key == b"slow"]
    assert client.order.index(("put", b"k11")) < slow[1]  # others don't wait for the slow one


def test_long_lines_are_in_flight_by_their_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "IN_FLIGHT_BYTES", 1000)
    shell = Shell()
    shell.fakes.kv_client.delays_s = {b"k%d" % n: 0.001 for n in range(30)}
    lines = [b"k%d\t%s\n" % (n, b"x" * 300) for n in range(30)]
    assert run(shell, "import", file_of(tmp_path, b"".join(lines))) is ExitCode.DONE
    assert shell.fakes.kv_client.in_flight_max == 4


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (b"no tab", "there is no tab between key and value"),
        (b"a\tb\tc", "there is more than one tab"),
        (b"k\t\\q", 'unknown escape at byte 1 of "\\\\q"; a backslash is \\\\'),
        (b"k\t" + b"x" * (LINE_BYTES_MAX + 100_000), f"a line is longer than {LINE_BYTES_MAX} bytes"),
    ],
)
def test_a_line_that_is_no_pair_ends_it_after_those_before(
    bad: bytes, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shell = Shell()
    shell.fakes.kv_client.delays_s = {b"k1": 0.02}
    path = file_of(tmp_path, b"k0\t0\nk1\t1\n\n" + bad + b"\nk4\t4\n")
    assert run(shell, "import", path) is ExitCode.USAGE
    assert stored(shell) == {b"k0": b"0", b"k1": b"1"}
    assert capsys.readouterr().err == (
        f"raftkv-kv: Import pairs: line 4: {why}; the lines up to 2 are in, others may be: "
        "the same command with --from-line 3 goes on\n"
    )


@pytest.mark.parametrize(
    ("first", "why"),
    [
        (b"just text", "there is no tab between key and value"),
        (b'{"key": "a"', "it is not JSON: Expecting ',' delimiter: line 1 column 12 (char 11)"),
    ],
)
def test_the_form_is_that_of_the_first_line(
    first: bytes, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = file_of(tmp_path, first + b"\n")
    assert run(Shell(), "import", path) is ExitCode.USAGE
    expected = f"raftkv-kv: Import pairs: line 1: {why}; no line is known to be in: start again\n"
    assert capsys.readouterr().err == expected


def test_the_form_that_is_given_wins(tmp_path: Path) -> None:
    shell = Shell()
    path = file_of(tmp_path, b'{"key":\t"a", "value": "1"}\n')
    assert run(shell, "import", path, "--format", "jsonl") is ExitCode.DONE
    assert stored(shell) == {b"a": b"1"}


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Timeout("no leader"), ExitCode.UNAVAILABLE),
        (OutcomeUnknown("put"), ExitCode.OUTCOME_UNKNOWN),
        (Busy("queue"), ExitCode.REFUSED),
    ],
)
def test_a_write_that_fails_ends_it_and_it_goes_on_there(
    error: Timeout | OutcomeUnknown | Busy, code: ExitCode, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shell = Shell()
    client = shell.fakes.kv_client
    client.errors = {b"k500": error}
    path = file_of(tmp_path, b"".join(b"k%d\t%d\n" % (n, n) for n in range(1000)))
    assert run(shell, "import", path) is code
    said = capsys.readouterr().err
    assert f"line 501: {error}" in said
    assert said.endswith("the lines up to 500 are in, others may be: the same command with --from-line 501 goes on\n")
    assert all(b"k%d" % n in client.data for n in range(500))
    assert b"k999" not in client.data
    del client.errors[b"k500"]
    client.order.clear()
    assert run(shell, "import", path, "--from-line", "501") is ExitCode.DONE
    assert stored(shell) == {b"k%d" % n: b"%d" % n for n in range(1000)}
    assert len(client.order) == 500


def test_a_write_after_a_failed_one_of_the_same_key_is_not_sent(tmp_path: Path) -> None:
    shell = Shell()
    shell.fakes.kv_client.errors = {b"k": Busy("queue")}
    shell.fakes.kv_client.delays_s = {b"k": 0.01}
    assert run(shell, "import", file_of(tmp_path, b"k\t1\nk\t2\n")) is ExitCode.REFUSED
    assert shell.fakes.kv_client.order == [("put", b"k")]


def test_ctrl_c_says_where_it_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shell = Shell()
    client = shell.fakes.kv_client
    path = file_of(tmp_path, b"".join(b"k%d\t%d\n" % (n, n) for n in range(1000)))

    async def interrupted() -> None:
        client.gates = {b"k700": asyncio.Event()}
        running = asyncio.get_running_loop().create_task(one(shell, "import", path))
        while (b"k699" not in client.data) or client.in_flight > 1:
            await asyncio.sleep(0.001)
        shell.session.interrupt(running)
        with pytest.raises(asyncio.CancelledError):
            await running

    asyncio.run(interrupted())
    said = capsys.readouterr().err
    assert "interrupted; the lines up to 700 are in, others may be: the same command with --from-line 701" in said
    client.gates = {}
    assert run(shell, "import", path, "--from-line", "701") is ExitCode.DONE
    assert stored(shell) == {b"k%d" % n: b"%d" % n for n in range(1000)}


def test_ctrl_c_is_heard_while_lines_are_skipped(tmp_path: Path) -> None:
    shell = Shell()
    path = file_of(tmp_path, b"k\t1\n" * 200_000)

    async def interrupted() -> None:
        running = asyncio.get_running_loop().create_task(one(shell, "import", path, "--from-line", "200000"))
        await asyncio.sleep(0)
        shell.session.interrupt(running)
        with pytest.raises(asyncio.CancelledError):
            await running

    asyncio.run(interrupted())
    assert stored(shell) == {}


def test_from_line_may_be_one_after_the_last_but_not_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shell = Shell()
    path = file_of(tmp_path, b"a\t1\nb\t2\n")
    assert run(shell, "import", path, "--from-line", "3") is ExitCode.DONE
    assert run(shell, "import", path, "--from-line", "4") is ExitCode.USAGE
    assert capsys.readouterr().err == "raftkv-kv: Import pairs: --from-line 4: the file has 2 lines only\n"
    assert stored(shell) == {}


def test_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    shell = Shell()
    with file_of(tmp_path, b"a\t1\nb\t2").open("rb") as file:
        monkeypatch.setattr(bulk, "STDIN", file.fileno())
        assert run(shell, "import", "-") is ExitCode.DONE
        os.fstat(file.fileno())  # not closed: it isn't its own
    assert stored(shell) == {b"a": b"1", b"b": b"2"}
    assert run_script(Shell(), b"import -\n", tmp_path)[0] is ExitCode.USAGE
    assert "line 1: Import: - is standard input, where this line came from: give a file" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", None)
    assert run(Shell(), "import", "-") is ExitCode.USAGE
    assert capsys.readouterr().err == "raftkv-kv: Import: standard input is closed: give a file\n"


def test_a_pipe_is_read_as_it_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shell = Shell()
    read_end, write_end = os.pipe()
    monkeypatch.setattr(bulk, "STDIN", read_end)

    async def dialogue() -> ExitCode:
        running = asyncio.get_running_loop().create_task(one(shell, "import", "-"))
        os.write(write_end, b"a\t1\nb")
        while b"a" not in shell.fakes.kv_client.data:
            await asyncio.sleep(0.001)
        os.write(write_end, b"\t2\nc\t3")
        os.close(write_end)
        return await running

    assert asyncio.run(dialogue()) is ExitCode.DONE
    os.close(read_end)
    assert stored(shell) == {b"a": b"1", b"b": b"2", b"c": b"3"}


def test_a_write_that_fails_ends_it_though_the_pipe_is_silent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shell = Shell()
    shell.fakes.kv_client.errors = {b"b": Busy("queue")}
    shell.fakes.kv_client.delays_s = {b"b": 0.02}
    read_end, write_end = os.pipe()
    monkeypatch.setattr(bulk, "STDIN", read_end)
    os.write(write_end, b"a\t1\nb\t2\n")
    assert run(shell, "import", "-") is ExitCode.REFUSED
    assert "line 2: the server is busy: queue; try again later; the lines up to 1 are in" in capsys.readouterr().err
    os.close(write_end)
    os.close(read_end)


def test_files_that_can_not_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(Shell(), "import", tmp_path) is ExitCode.USAGE
    assert "is a directory: give a file, or - for standard input" in capsys.readouterr().err
    assert run(Shell(), "import", Path("n" * 80)) is ExitCode.USAGE
    expected = f"raftkv-kv: Import: can't read {'n' * 80}: No such file or directory; - is standard input\n"
    assert capsys.readouterr().err == expected


def test_not_inside_a_transaction(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file_of(tmp_path, b"a\t1\n")
    for line in (b"import pairs", b"export"):
        code, _ = run_script(Shell(), b"begin\n" + line + b"\n", tmp_path)
        assert code is ExitCode.USAGE
        assert "is not allowed inside a transaction" in capsys.readouterr().err


def test_exports_in_json_are_jsonl_and_those_of_a_table_tsv() -> None:
    for output, out in (("json", b'{"key": "a", "value": "1"}\n'), ("table", b"a\t1\n"), ("plain", b"a\t1\n")):
        shell = filled({b"a": b"1"}, output)
        assert run(shell, "export") is ExitCode.DONE
        assert shell.out.getvalue() == out


def test_an_export_ends_at_an_error_and_goes_on_after_it(capsys: pytest.CaptureFixture[str]) -> None:
    pairs = {b"it's %02d\n" % n: b"%d" % n for n in range(20)}
    whole = filled(pairs)
    run(whole, "export")
    shell = filled(pairs)
    client = shell.fakes.kv_client
    client.errors = {b"it's 11\n": Timeout("no leader")}
    assert run(shell, "export", "it") is ExitCode.UNAVAILABLE
    said = capsys.readouterr().err
    assert "goes on" in said and r"the same command with --after 'it\x27s 10\n', its output appended" in said
    del client.errors[b"it's 11\n"]
    assert run(shell, "export", "it", "--after", r"it\x27s 10\n") is ExitCode.DONE
    assert shell.out.getvalue() == whole.out.getvalue()
    client.errors = {b"it's 00\n": Timeout("no leader")}
    assert run(shell, "export") is ExitCode.UNAVAILABLE
    assert "no pair was read: start again" in capsys.readouterr().err


def test_an_interrupted_export_says_how_it_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    shell = filled({b"k%d" % n: b"v" for n in range(5)})

    async def interrupted() -> None:
        shell.fakes.kv_client.gates = {b"k3": asyncio.Event()}
        running = asyncio.get_running_loop().create_task(one(shell, "export"))
        while shell.out.getvalue().count(b"\n") < 3:
            await asyncio.sleep(0.001)
        shell.session.interrupt(running)
        with pytest.raises(asyncio.CancelledError):
            await running

    asyncio.run(interrupted())
    assert shell.out.getvalue() == b"k0\tv\nk1\tv\nk2\tv\n"
    expected = "raftkv-kv: Export: interrupted; the same command with --after k2, its output appended (>>), goes on\n"
    assert capsys.readouterr().err == expected
