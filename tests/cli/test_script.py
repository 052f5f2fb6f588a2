"""Scripts: one line after the other, in order, to the first error; and several in flight."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raftkv.cli.exit_codes import ExitCode
from raftkv.cli.lines import LINE_BYTES_MAX
from raftkv.cli.printers import OutputClosed, Printer
from raftkv.cli.script import Script
from raftkv.protocol.errors import Busy, OutcomeUnknown, Timeout
from tests.cli.fakes import Shell


def make_script(shell: Shell, *, keep_going: bool = False, window: int = 1) -> Script:
    return Script(shell.session, shell.printer, shell.table, environment={}, keep_going=keep_going, window=window)


def run(
    shell: Shell, text: bytes, tmp_path: Path, *, keep_going: bool = False, window: int = 1
) -> tuple[ExitCode, bytes]:
    """Run a script from a file."""
    path = tmp_path / "script"
    path.write_bytes(text)
    with path.open("rb") as file:
        code = asyncio.run(make_script(shell, keep_going=keep_going, window=window).run(file.fileno()))
    return code, shell.out.getvalue()


@pytest.mark.parametrize("window", [1, 16])
def test_commands_run_in_order(tmp_path: Path, window: int) -> None:
    text = (
        b'# a comment\n\nput a 1\nPUT "b c" "x\\n"\n  append a 2\nget a\ndelete a\nscan\ncas "b c" "x\\n" y\nget "b c"'
    )
    assert run(Shell(), text, tmp_path, window=window) == (
        ExitCode.DONE,
        b"OK\nOK\nOK\n12\nOK\nb c\tx\\x0a\nOK\ny\n",
    )


@pytest.mark.parametrize("window", [1, 16])
def test_the_first_missing_key_stops_it(tmp_path: Path, window: int, capsys: pytest.CaptureFixture[str]) -> None:
    shell = Shell()
    code, out = run(shell, b"put a 1\nget nope\nscan\nput b 2\n", tmp_path, window=window)
    assert (code, out) == (ExitCode.NOT_FOUND, b"OK\n")
    assert capsys.readouterr().err == "raftkv-kv: line 2: Get nope: key not found\n"
    assert b"b" not in shell.fakes.kv_client.data
    assert shell.fakes.kv_client.closed


@pytest.mark.parametrize(
    ("line", "code", "complaint"),
    [
        (b"frobnicate", ExitCode.USAGE, "line 2: unknown command frobnicate; `help` lists the commands"),
        (b"put a", ExitCode.USAGE, "line 2: Put needs more words: usage: Put KEY VALUE [--if-version N]"),
        (b'put a "', ExitCode.USAGE, "line 2: column 7: this quote is never closed"),
        (b"-o json", ExitCode.USAGE, "line 2: no command on the line: \"-o json\""),
        (b"put a @/no/such", ExitCode.USAGE, "line 2: can't read the value's file /no/such: "
         "No such file or directory; @@ is a literal @"),
        (b"get bad", ExitCode.REFUSED, "line 2: Get bad: the server is busy: queue; try again later"),
        (b"put late 1", ExitCode.UNAVAILABLE, "line 2: Put late: no leader (controllers c:1); "
         "look at `raftkv-ctl Status`, or allow more time with --timeout"),
        (b"put lost 1", ExitCode.OUTCOME_UNKNOWN, "line 2: Put lost: outcome unknown: put may have applied or "
         "may still; read before you try again"),
        (b"cas x 1 2", ExitCode.REFUSED, "line 2: Cas x: compare failed: the key does not exist; nothing was "
         "written; read the key and decide again"),
    ],
)  # fmt: skip
def test_errors_stop_it_with_their_exit_code(
    tmp_path: Path, line: bytes, code: ExitCode, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shell = Shell()
    shell.fakes.kv_client.errors = {
        b"bad": Busy("queue"),
        b"late": Timeout("no leader"),
        b"lost": OutcomeUnknown("put"),
    }
    assert run(shell, b"put a 1\n" + line + b"\nput b 2\n", tmp_path) == (code, b"OK\n")
    assert capsys.readouterr().err == f"raftkv-kv: {complaint}\n"
    assert set(shell.fakes.kv_client.data) == {b"a"}


@pytest.mark.parametrize("window", [1, 16])
def test_keep_going_ends_with_the_first_failure(
    tmp_path: Path, window: int, capsys: pytest.CaptureFixture[str]
) -> None:
    shell = Shell()
    text = b"get nope\nfrobnicate\nput a 1\nget a\n"
    assert run(shell, text, tmp_path, keep_going=True, window=window) == (ExitCode.NOT_FOUND, b"OK\n1\n")
    assert [line.split(":")[1] for line in capsys.readouterr().err.splitlines()] == [" line 1", " line 2"]


def test_a_byte_order_mark_before_the_text_is_skipped(tmp_path: Path) -> None:
    assert run(Shell(), b"\xef\xbb\xbfput a 1\nget a\n", tmp_path) == (ExitCode.DONE, b"OK\n1\n")


def test_exit_ends_it(tmp_path: Path) -> None:
    assert run(Shell(), b"put a 1\nexit\nput b 2\n", tmp_path) == (ExitCode.DONE, b"OK\n")


def test_a_missing_key_shows_in_json(tmp_path: Path) -> None:
    code, out = run(Shell(output="json"), b"put a 1\nget nope\n", tmp_path)
    assert (code, out) == (ExitCode.NOT_FOUND, b'{"ok": true, "version": 1}\n{"key": "nope", "value": null}\n')


def test_a_line_may_choose_its_output_and_timeout(tmp_path: Path) -> None:
    shell = Shell()
    code, out = run(shell, b"put a 1 --timeout 3\nget a -o json\nget a\n", tmp_path)
    assert (code, out) == (ExitCode.DONE, b'OK\n{"key": "a", "value": "1", "version": 1}\n1\n')
    assert shell.fakes.timeouts_s == [3.0, 10.0]


def test_a_dash_in_quotes_is_a_value_and_at_signs_have_their_meaning(tmp_path: Path) -> None:
    (tmp_path / "value").write_bytes(b"\x00from a file\n")
    shell = Shell()
    name = os.fsencode(tmp_path / "value")
    code, _ = run(shell, b'put a "-"\nput b @' + name + b"\nput c @@x\nput @d 1\n", tmp_path)
    assert code is ExitCode.DONE
    values = {key: found.value for key, found in shell.fakes.kv_client.data.items()}
    assert values == {b"a": b"-", b"b": b"\x00from a file\n", b"c": b"@x", b"@d": b"1"}


def test_a_line_that_never_ends_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _ = run(Shell(), b"put a " + b"x" * (LINE_BYTES_MAX + 100_000), tmp_path)
    assert code is ExitCode.USAGE
    assert capsys.readouterr().err == f"raftkv-kv: line 1: a line is longer than {LINE_BYTES_MAX} bytes\n"


def test_several_are_in_flight_and_output_stays_in_order(tmp_path: Path) -> None:
    shell = Shell()
    client = shell.fakes.kv_client
    client.delays_s = {b"k0": 0.05}
    text = b"".join(b"put k%d v%d\nget k%d\n" % (n, n, n) for n in range(20))
    code, out = run(shell, text, tmp_path, window=8)
    assert (code, out) == (ExitCode.DONE, b"".join(b"OK\nv%d\n" % n for n in range(20)))
    assert 2 < client.in_flight_max <= 8
    assert client.order.index(("get", b"k0")) > client.order.index(("put", b"k0"))
    assert client.order.index(("put", b"k1")) < client.order.index(("put", b"k0"))


def test_the_window_bounds_what_is_in_flight(tmp_path: Path) -> None:
    shell = Shell()
    shell.fakes.kv_client.delays_s = {b"k%d" % n: 0.001 for n in range(50)}
    run(shell, b"".join(b"put k%d v\n" % n for n in range(50)), tmp_path, window=1)
    assert shell.fakes.kv_client.in_flight_max == 1


def test_commands_on_one_key_keep_their_order(tmp_path: Path) -> None:
    shell = Shell()
    code, _ = run(shell, b"".join(b"append log %d,\n" % n for n in range(100)), tmp_path, window=32)
    assert code is ExitCode.DONE
    assert shell.fakes.kv_client.data[b"log"].value == b"".join(b"%d," % n for n in range(100))


def test_a_scan_waits_for_what_was_before_it(tmp_path: Path) -> None:
    shell = Shell()
    shell.fakes.kv_client.delays_s = {b"a": 0.02}
    code, out = run(shell, b"put a 1\nput b 2\nscan\nput c 3\nscan c\n", tmp_path, window=8)
    assert (code, out) == (ExitCode.DONE, b"OK\nOK\na\t1\nb\t2\nOK\nc\t3\n")


def test_after_an_error_it_says_what_was_in_flight(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shell = Shell()
    client = shell.fakes.kv_client
    client.delays_s = {b"bad": 0.02, b"slow": 0.04}
    client.errors = {b"bad": Busy("queue")}
    text = b"put a 1\nput bad 1\nput slow 1\nput bad 2\nget a\n" + b"put late 1\n" * 3
    code, out = run(shell, text, tmp_path, window=4)
    assert (code, out) == (ExitCode.REFUSED, b"OK\n")
    assert set(client.data) == {b"a", b"slow"}
    assert client.order.count(("put", b"bad")) == 1  # the second one was never sent
    assert capsys.readouterr().err.splitlines() == [
        "raftkv-kv: line 2: Put bad: the server is busy: queue; try again later",
        "raftkv-kv: of the lines after it, 1 writes (lines 3 to 3) were in flight already; 1 of them applied",
    ]


COMMANDS = st.one_of(
    st.builds(b"put k%d v%d\n".__mod__, st.tuples(st.integers(0, 3), st.integers(0, 9))),
    st.builds(b"append k%d .%d\n".__mod__, st.tuples(st.integers(0, 3), st.integers(0, 9))),
    st.builds(b"get k%d\n".__mod__, st.integers(0, 3)),
    st.builds(b"delete k%d\n".__mod__, st.integers(0, 3)),
    st.builds(b"cas k%d v%d x\n".__mod__, st.tuples(st.integers(0, 3), st.integers(0, 9))),
    st.sampled_from([b"scan\n", b"# nothing\n", b"frobnicate\n", b"\n"]),
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(COMMANDS, max_size=25),
    delays_ms=st.lists(st.integers(0, 3), min_size=4, max_size=4),
    window=st.integers(2, 9),
    keep_going=st.booleans(),
)
def test_a_window_changes_nothing_but_the_time(
    tmp_path: Path, lines: list[bytes], delays_ms: list[int], window: int, keep_going: bool
) -> None:
    def outcome(window: int) -> tuple[ExitCode, bytes, dict[bytes, bytes]]:
        shell = Shell()
        if window > 1:
            shell.fakes.kv_client.delays_s = {b"k%d" % n: ms / 1000 for n, ms in enumerate(delays_ms)}
        code, out = run(shell, b"".join(lines), tmp_path, keep_going=keep_going, window=window)
        return code, out, {key: found.value for key, found in shell.fakes.kv_client.data.items()}

    one_by_one, in_a_window = outcome(1), outcome(window)
    assert in_a_window[:2] == one_by_one[:2]
    if keep_going or one_by_one[0] is ExitCode.DONE:  # else some after the first failure may have applied
        assert in_a_window[2] == one_by_one[2]


def test_nothing_is_printed_after_the_line_that_stopped_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shell = Shell()
    shell.fakes.kv_client.delays_s = {b"nope": 0.02}
    code, out = run(shell, b"put a 1\nget nope\nput b 1\nput c 1\nget a\n", tmp_path, window=8)
    assert (code, out) == (ExitCode.NOT_FOUND, b"OK\n")
    assert capsys.readouterr().err.splitlines() == [
        "raftkv-kv: line 2: Get nope: key not found",
        "raftkv-kv: of the lines after it, 2 writes (lines 3 to 4) were in flight already; 2 of them applied",
    ]


def drive(
    shell: Shell, dialogue: Callable[[int, Callable[[], Awaitable[bytes]]], Awaitable[None]], window: int
) -> ExitCode:
    """Run a script on a pipe, with `dialogue(write_end, next_output)` at the other end."""

    async def both() -> ExitCode:
        read_end, write_end = os.pipe()
        shown = 0

        async def next_output() -> bytes:
            nonlocal shown
            async with asyncio.timeout(5):
                while len(shell.out.getvalue()) == shown:
                    await asyncio.sleep(0.001)
            new = shell.out.getvalue()[shown:]
            shown += len(new)
            return new

        running = asyncio.get_running_loop().create_task(make_script(shell, window=window).run(read_end))
        try:
            await dialogue(write_end, next_output)
        finally:
            os.close(write_end)
        try:
            return await running
        finally:
            os.close(read_end)

    return asyncio.run(both())


@pytest.mark.parametrize("window", [1, 16])
def test_another_program_can_drive_it_line_by_line(window: int) -> None:
    async def dialogue(write_end: int, next_output: Callable[[], Awaitable[bytes]]) -> None:
        for number in range(20):
            os.write(write_end, b"put k %d\n" % number)
            assert await next_output() == b"OK\n"
            os.write(write_end, b"get ")
            await asyncio.sleep(0)
            os.write(write_end, b"k\n")
            assert await next_output() == b"%d\n" % number
        os.write(write_end, b"get k")  # the last line may lack its end

    assert drive(Shell(), dialogue, window) is ExitCode.DONE


def test_ctrl_c_says_what_may_still_apply(capsys: pytest.CaptureFixture[str]) -> None:
    shell = Shell()

    async def interrupted() -> None:
        shell.fakes.kv_client.gates = {b"stuck": asyncio.Event()}
        read_end, write_end = os.pipe()
        os.write(write_end, b"put a 1\nput stuck 1\n")
        running = asyncio.get_running_loop().create_task(make_script(shell).run(read_end))
        while shell.fakes.kv_client.in_flight == 0 or b"a" not in shell.fakes.kv_client.data:
            await asyncio.sleep(0.001)
        shell.session.interrupt(running)
        with pytest.raises(asyncio.CancelledError):
            await running
        os.close(read_end)
        os.close(write_end)

    asyncio.run(interrupted())
    assert shell.out.getvalue() == b"OK\n"
    assert capsys.readouterr().err == (
        "raftkv-kv: line 2: Put stuck: interrupted; it was sent and may have applied, or may still: "
        "read before you try again\n"
    )
    assert shell.fakes.kv_client.closed


def test_it_ends_when_nobody_reads_its_output(tmp_path: Path) -> None:
    class ClosedPipe(BytesIO):
        def flush(self) -> None:
            raise BrokenPipeError

    shell = Shell()
    shell.printer = Printer("plain", ClosedPipe())
    with pytest.raises(OutputClosed):
        run(shell, b"put a 1\nput b 1\n", tmp_path)
    assert set(shell.fakes.kv_client.data) == {b"a"}
