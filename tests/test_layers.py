"""The architecture, checked on the source: layer order, purity, no stray tasks, no print outside cli/."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "raftkv"

LAYERS = ("raft", "protocol", "storage", "machines", "client", "daemons", "sim", "bench", "cli")
"""Lowest first: a layer imports from itself and from those before it only."""

NOT_IMPORTED_BY = {
    "client": {"storage"},  # a client is no server: it must stay quick to import
    "daemons": {"client"},
    "bench": {"storage", "daemons", "sim"},
}

ABOVE_CLIENT = ("daemons/redis/",)
"""A front door for other clients forwards what it can't serve through the SDK; nothing else of a daemon does."""

SANS_IO = ("raft", "machines")
FORBIDDEN_SANS_IO = {
    "asyncio", "socket", "selectors", "ssl", "threading", "multiprocessing", "concurrent", "subprocess",
    "os", "io", "pathlib", "tempfile", "shutil", "time", "datetime", "logging", "secrets", "uvloop", "rocksdict",
}  # fmt: skip
THREAD_MAKERS = {"Thread", "ThreadPoolExecutor", "Timer", "run_in_executor", "to_thread", "start_new_thread"}
THREADS_ALLOWED = {"storage/disk.py", "storage/rocks.py"}


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def layer_of(path: Path) -> str | None:
    """The layer that a module is in; None for raftkv/__init__.py and __main__.py."""
    relative = path.relative_to(ROOT)
    return relative.parts[0] if len(relative.parts) > 1 else None


def imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every module name that the code imports, with the line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            assert node.module is not None
            yield node.module, node.lineno
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def findings(path: Path) -> Iterator[str]:
    """What is wrong with one module."""
    name = path.relative_to(ROOT).as_posix()
    layer = layer_of(path)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if layer is not None:
        assert layer in LAYERS, f"{name}: a layer that design and test don't know"
        yield from wrong_imports(name, layer, tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            call = called(node.value)
            if call in ("create_task", "ensure_future"):
                yield f"{name}:{node.lineno}: nobody keeps the task of this {call}"
        if isinstance(node, ast.Call) and called(node) == "print" and layer != "cli":
            yield f"{name}:{node.lineno}: print outside cli/"
        if isinstance(node, ast.Call) and called(node) in THREAD_MAKERS and name not in THREADS_ALLOWED:
            yield f"{name}:{node.lineno}: threads are for storage/disk.py and storage/rocks.py"


def wrong_imports(name: str, layer: str, tree: ast.AST) -> Iterator[str]:
    """Imports that point upwards, or that the layer must not have."""
    for module, line in imported(tree):
        parts = module.split(".")
        if parts[0] == "raftkv" and len(parts) > 1 and parts[1] in LAYERS:
            forbidden = () if name.startswith(ABOVE_CLIENT) and parts[1] == "client" else NOT_IMPORTED_BY.get(layer, ())
            if LAYERS.index(parts[1]) > LAYERS.index(layer) or parts[1] in forbidden:
                yield f"{name}:{line}: {layer} imports {parts[1]}"
        elif layer in SANS_IO and parts[0] in FORBIDDEN_SANS_IO:
            yield f"{name}:{line}: {layer} is sans-I/O and imports {parts[0]}"


def called(node: ast.Call) -> str:
    """The last name of what is called."""
    function = node.func
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def test_the_source_keeps_to_the_architecture() -> None:
    problems = [problem for path in modules() for problem in findings(path)]
    assert problems == []


def test_every_module_says_what_it_is_for() -> None:
    silent = [
        path.relative_to(ROOT).as_posix()
        for path in modules()
        if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert silent == []


@pytest.mark.parametrize(
    ("name", "code", "finding"),
    [
        ("raft/x.py", "import asyncio", "raft is sans-I/O and imports asyncio"),
        ("machines/x.py", "from time import monotonic", "machines is sans-I/O and imports time"),
        ("raft/x.py", "from raftkv.storage import wal", "raft imports storage"),
        ("client/x.py", "from raftkv.daemons.replica import Replica", "client imports daemons"),
        ("client/x.py", "import raftkv.storage.wal", "client imports storage"),
        ("daemons/x.py", "import asyncio\nasyncio.create_task(f())", "nobody keeps the task of this create_task"),
        ("daemons/x.py", "loop.create_task(f())", "nobody keeps the task of this create_task"),
        ("daemons/x.py", "print('x')", "print outside cli/"),
        ("daemons/x.py", "threading.Thread(target=f)", "threads are for storage/disk.py"),
        ("daemons/x.py", "await asyncio.to_thread(f)", "threads are for storage/disk.py"),
    ],
)
def test_this_test_finds_what_it_looks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: str, finding: str
) -> None:
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    path = tmp_path / name
    path.parent.mkdir()
    path.write_text(code)
    assert [problem for problem in findings(path) if finding in problem]
