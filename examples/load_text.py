#!/usr/bin/env python3
"""Load every line of real texts through `raftkv-kv`, read all back with Scan, compare byte for byte.

    examples/load_text.py                        the licence texts that Debian ships
    examples/load_text.py /usr/share/dict/words  any files
    examples/load_text.py --verify-only          only read back and compare, after a crash for instance

The cluster is that of --controllers, RAFTKV_CONTROLLERS or `raftkv local up`. Exit status 0: all is equal.
A pair is one line: key `PREFIX FILE:NUMBER`, value the line's bytes without its end. It uses nothing but the
command line, in script mode with several writes in flight, as any program in any language could.
"""

from __future__ import annotations

import argparse
import base64
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

LICENCES = Path("/usr/share/common-licenses")
PROGRESS_EVERY = 500

Pairs = dict[bytes, bytes]


def main() -> int:
    """Load, read back, compare; the exit status."""
    options = parse_options()
    pairs = read_pairs(options.files, options.prefix, options.copies)
    if len(pairs) < options.at_least:
        fail(f"only {len(pairs)} lines in these files; give more of them, or --at-least {len(pairs)}")
    command = [find_raftkv_kv(), "--timeout", str(options.timeout)]
    if options.controllers:
        command += ["--controllers", options.controllers]
    if not options.verify_only:
        load(command, pairs, options.pipeline)
    found = read_back(command, options.prefix)
    problems = differences(pairs, found)
    for problem in problems[:10]:
        print(problem, file=sys.stderr)
    if problems:
        fail(f"{len(problems)} differences in {len(pairs)} pairs")
    print(f"equal: {len(pairs)} pairs, {sum(map(len, pairs.values()))} bytes of values")
    return 0


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Load texts through raftkv-kv and compare what comes back.")
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help=f"default: all files in {LICENCES}")
    parser.add_argument("--controllers", metavar="HOST:PORT,…", help="default: raftkv-kv's own")
    parser.add_argument("--prefix", default="text", help="what the keys begin with; text")
    parser.add_argument("--pipeline", type=int, default=64, metavar="N", help="writes in flight; 64")
    parser.add_argument("--timeout", type=float, default=60, metavar="SECONDS", help="for each operation; 60")
    parser.add_argument("--copies", type=int, default=1, metavar="N", help="load everything N times; 1")
    parser.add_argument("--at-least", type=int, default=5000, metavar="N", help="refuse fewer pairs; 5000")
    parser.add_argument("--verify-only", action="store_true", help="load nothing, only read back and compare")
    return parser.parse_args()


def read_pairs(files: list[Path], prefix: str, copies: int) -> Pairs:
    """Key and value of every line."""
    if not files:
        if not LICENCES.is_dir():
            fail(f"{LICENCES} is not there (it comes with Debian and Ubuntu); give text files as arguments")
        files = sorted(path for path in LICENCES.iterdir() if path.is_file())
    pairs: Pairs = {}
    for copy in range(copies):
        for path in files:
            try:
                lines = path.read_bytes().removesuffix(b"\n").split(b"\n")
            except OSError as error:
                fail(f"can't read {path}: {error.strerror}")
            name = f"{prefix} {path.name}" if copies == 1 else f"{prefix} {copy} {path.name}"
            for number, line in enumerate(lines, 1):
                pairs[f"{name}:{number:06}".encode()] = line
    return pairs


def find_raftkv_kv() -> str:
    """The program: on the path, beside this interpreter, or in the project's virtual environment."""
    project = Path(__file__).resolve().parent.parent / ".venv" / "bin"
    for directory in (Path(sys.executable).parent, project):
        if (directory / "raftkv-kv").exists():
            return str(directory / "raftkv-kv")
    return shutil.which("raftkv-kv") or fail("raftkv-kv was not found; `make run` installs it into .venv")


def quoted(data: bytes) -> bytes:
    """A word of a script that stands for any bytes."""
    plain = (0x20 <= byte < 0x7F and byte not in b'"\\' for byte in data)
    return b'"' + b"".join(bytes((b,)) if ok else b"\\x%02x" % b for b, ok in zip(data, plain, strict=True)) + b'"'


def put_line(key: bytes, value: bytes) -> bytes:
    """The script's line for one pair; a value that begins with @ would be a file's name."""
    return b"Put " + quoted(key) + b" " + quoted(b"@" + value if value.startswith(b"@") else value) + b"\n"


def load(command: list[str], pairs: Pairs, pipeline: int) -> None:
    """Write all pairs with one script; says how far it is."""
    began = time.monotonic()
    with tempfile.TemporaryFile() as script:
        script.writelines(put_line(key, value) for key, value in pairs.items())
        script.seek(0)
        with subprocess.Popen([*command, "--pipeline", str(pipeline)], stdin=script, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            done = count_ok(process.stdout, len(pairs))
    if process.returncode != 0 or done != len(pairs):
        fail(f"loading ended with status {process.returncode} after {done} of {len(pairs)} pairs")
    took_s = time.monotonic() - began
    print(f"loaded {done} pairs in {took_s:.1f} s, {done / took_s:.0f} a second", flush=True)


def count_ok(answers: Iterable[bytes], total: int) -> int:
    """The number of pairs that were acknowledged."""
    done = 0
    for answer in answers:
        if answer != b"OK\n":
            fail(f"raftkv-kv answered {answer!r} instead of OK")
        done += 1
        if done % PROGRESS_EVERY == 0:
            print(f"{done} of {total}", flush=True)
    return done


def read_back(command: list[str], prefix: str) -> list[tuple[bytes, bytes]]:
    """All pairs with the prefix, as Scan gives them."""
    scan = subprocess.run([*command, "-o", "json", "Scan", f"{prefix} "], stdout=subprocess.PIPE, check=False)
    if scan.returncode != 0:
        fail(f"Scan ended with status {scan.returncode}")
    found = []
    for line in scan.stdout.splitlines():
        pair: dict[str, Any] = json.loads(line)
        found.append((as_bytes(pair["key"]), as_bytes(pair["value"])))
    return found


def as_bytes(shown: str | dict[str, str]) -> bytes:
    """The bytes of a JSON field: text, or {"b64": …} where they are not UTF-8."""
    return base64.b64decode(shown["b64"]) if isinstance(shown, dict) else shown.encode()


def differences(expected: Pairs, found: list[tuple[bytes, bytes]]) -> list[str]:
    """What is missing, wrong, too much or out of order."""
    problems = []
    present = dict(found)
    for key, value in expected.items():
        if key not in present:
            problems.append(f"missing: {key!r}")
        elif present[key] != value:
            problems.append(f"different: {key!r}: {present[key]!r} instead of {value!r}")
    problems += [f"too much: {key!r}" for key in present if key not in expected]
    keys = [key for key, _ in found]
    if keys != sorted(set(keys)):
        problems.append("the keys of Scan are not in order, each once")
    return problems


def fail(text: str) -> NoReturn:
    """End with a line."""
    print(f"load_text: {text}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    sys.exit(main())
