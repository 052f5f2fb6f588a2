"""50,000 pairs through the real programs: in and out again byte for byte, ended by Ctrl-C and gone on, with its bar."""

from __future__ import annotations

import random
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from raftkv.cli.pair_lines import ENCODERS
from tests.cli.clusters import BIN, LocalCluster, clean_environment
from tests.cli.screen import Screen

PAIRS = 50_000


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """Two groups of one replica: what is tested is the client."""
    shape = ("--groups", "2", "--replicas", "1", "--coordinators", "0")
    cluster = LocalCluster(tmp_path_factory.mktemp("cluster"), shape)
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down("--wipe")


def pairs(rng: random.Random) -> Iterator[tuple[bytes, bytes]]:
    """In key order, as an export has them; every tenth value is any bytes."""
    for number in range(PAIRS):
        value = rng.randbytes(40) if number % 10 == 0 else b"the value of pair %d" % number
        yield b"pair:%06d" % number, value


def test_pairs_go_in_and_out_and_an_interrupted_import_goes_on(cluster: LocalCluster, tmp_path: Path) -> None:
    source = tmp_path / "pairs.tsv"
    source.write_bytes(b"".join(ENCODERS["tsv"](*pair) + b"\n" for pair in pairs(random.Random(1))))

    screen = Screen(
        "raftkv-kv", "import", "pairs.tsv", columns=200, cwd=tmp_path, RAFTKV_CONTROLLERS=cluster.controllers
    )
    screen.wait_for(lambda lines: lines and re.match(r"Import pairs.tsv [━╺╸ ]+ +[1-9]\d?% [\d,]+ pairs", lines[-1]))
    screen.child.sendintr()
    assert screen.wait_for_end() == 130
    said = screen.text.strip()
    found = re.fullmatch(
        r"raftkv-kv: Import pairs.tsv: interrupted; the lines up to (\d+) are in, others may be: "
        r"the same command with --from-line (\d+) goes on",
        said,
    )
    assert found is not None, said
    assert 0 < int(found[1]) < PAIRS
    assert int(found[2]) == int(found[1]) + 1
    assert not screen.cursor_hidden

    so_far = cluster.kv("export", "--format", "jsonl")
    assert (so_far.code, so_far.err) == (0, "")
    assert int(found[1]) <= so_far.out.count(b"\n") < PAIRS
    ran = cluster.kv("import", str(source), "--from-line", found[2], "-o", "json")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out == b'{"ok": true, "pairs": %d, "lines": %d}\n' % (PAIRS - int(found[1]), PAIRS)
    assert cluster.kv("export").out == source.read_bytes()


def test_an_export_to_a_file_has_a_bar_and_one_to_a_pipe_has_none(cluster: LocalCluster, tmp_path: Path) -> None:
    assert cluster.kv("put", "pair:last", "x").code == 0
    shell = f"export RAFTKV_CONTROLLERS={cluster.controllers}; cd {tmp_path}; {BIN}/raftkv-kv export "
    screen = Screen("/bin/sh", "-c", shell + "pair: > all.tsv")
    assert screen.wait_for_end(60) == 0
    assert "Export pair:" in screen.written
    assert screen.lines == []
    whole = (tmp_path / "all.tsv").read_bytes()
    screen = Screen("/bin/sh", "-c", shell + "pair: | cat > piped.tsv")
    assert screen.wait_for_end(60) == 0
    assert screen.written == ""
    assert (tmp_path / "piped.tsv").read_bytes() == whole


def test_the_last_pair_of_an_export_goes_on_after_it(cluster: LocalCluster) -> None:
    assert cluster.kv(stdin=b"put z:1 a\nput z:2 b\nput z:3 c\n").code == 0
    assert cluster.kv("export", "z:", "--after", "z:1").out == b"z:2\tb\nz:3\tc\n"


def test_a_reader_that_has_enough_ends_an_export(cluster: LocalCluster) -> None:
    assert cluster.kv(stdin=b"".join(b"put long:%d %s\n" % (n, b"x" * 5000) for n in range(100))).code == 0
    with subprocess.Popen(
        [str(BIN / "raftkv-kv"), "export", "long:"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=clean_environment(RAFTKV_CONTROLLERS=cluster.controllers),
    ) as program:
        assert program.stdout is not None and program.stderr is not None
        assert program.stdout.readline().startswith(b"long:0\tx")
        program.stdout.close()
        assert program.stderr.read() == b""
        assert program.wait(30) == 1
