"""Random worlds of several groups: at any time at most one serves a shard, and nothing is lost or left behind."""

from __future__ import annotations

from collections import Counter

import pytest

from raftkv.machines import exports
from raftkv.machines.kv import KvMachine
from tests.machines.migration_world import run_world

BOUNDS = [(1_000, 4_000, 1_000_000), (1, 2, 1_000_000), (3, 5, 5), (1, 2, 5)]
"""Rows of a page, keys looked at for a page, keys of a list: with small ones all has many pages, and lists get lost."""


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("expiries", [False, True])
def test_worlds(monkeypatch: pytest.MonkeyPatch, bounds: tuple[int, int, int], expiries: bool) -> None:
    run_some(monkeypatch, bounds, expiries, range(25))


@pytest.mark.long
@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("expiries", [False, True])
def test_many_worlds(monkeypatch: pytest.MonkeyPatch, bounds: tuple[int, int, int], expiries: bool) -> None:
    run_some(monkeypatch, bounds, expiries, range(1_000, 1_500))


def run_some(
    monkeypatch: pytest.MonkeyPatch, bounds: tuple[int, int, int], expiries: bool, seeds: range
) -> Counter[str]:
    for name, bound in zip(("PAGE_ROWS_MAX", "PAGE_EXAMINED_MAX", "LIST_ROWS_MAX"), bounds, strict=True):
        monkeypatch.setattr(exports, name, bound)
    seen: Counter[str] = Counter()
    for seed in seeds:
        try:
            seen += run_world(seed, 1_200, expiries=expiries).seen
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, {bounds}, expiries {expiries}: {error}") from error
    return seen


def test_worlds_reach_what_they_are_meant_to_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of every kind come up, and shards move by the hundred."""
    seen = run_some(monkeypatch, BOUNDS[3], True, range(100, 200))
    wanted = ["ask answered 0", "ask answered 27", "expired", "installed", "list lost"]
    wanted += [f"list answered {code}" for code in (0, 10, 27, 28, 29)]
    assert not [name for name in wanted if not seen[name]], seen
    assert seen["installed"] > 100


# ---- rules switched off: the worlds must notice


def violated(monkeypatch: pytest.MonkeyPatch, bounds: tuple[int, int, int] = BOUNDS[2]) -> bool:
    try:
        run_some(monkeypatch, bounds, False, range(200))
    except AssertionError:
        return True
    return False


def test_a_list_that_forgets_deletes_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    note = exports.Exports.note_changes

    def without_deletes(self: exports.Exports, view: object, index: int) -> None:
        changes = view.changes  # type: ignore[attr-defined]
        view.changes = {key: row for key, row in changes.items() if row is not None}  # type: ignore[attr-defined]
        note(self, view, index)  # type: ignore[arg-type]
        view.changes = {**changes, **view.changes}  # type: ignore[attr-defined]

    monkeypatch.setattr(exports.Exports, "note_changes", without_deletes)
    assert violated(monkeypatch)


def test_sessions_that_stay_behind_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    pull = KvMachine.pull

    def without_sessions(self: KvMachine, *args: object) -> object:
        rows, cursor = pull(self, *args)  # type: ignore[arg-type]
        return [row for row in rows if row[0][:1] != b"c"], cursor  # type: ignore[index]

    monkeypatch.setattr(KvMachine, "pull", without_sessions)
    assert violated(monkeypatch)


def test_an_ask_that_freezes_nothing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exports.Exports, "counters", lambda self, number: [0, 0, 0])
    assert violated(monkeypatch)
