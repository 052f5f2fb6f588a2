"""The view in which the commands of one entry see each other's effects."""

from __future__ import annotations

import random

from raftkv.storage.engine import Overlay
from raftkv.storage.memory import MemoryEngine
from tests.storage.fake_disk import FakeDisk


def view(**content: str) -> Overlay:
    engine = MemoryEngine(FakeDisk(random.Random(1)), "e")
    engine.write({key.encode(): value.encode() for key, value in content.items()})
    return Overlay(engine)


def everything(overlay: Overlay) -> dict[bytes, bytes]:
    return dict(overlay.scan(b"", b"\xff"))


def test_an_untouched_view_is_the_engine() -> None:
    overlay = view(a="1", b="2")
    assert overlay.get(b"a") == b"1"
    assert overlay.get(b"x") is None
    assert everything(overlay) == {b"a": b"1", b"b": b"2"}
    assert overlay.changes == {} and overlay.range_deletes == []


def test_puts_and_deletes_show_at_once() -> None:
    overlay = view(a="1", b="2")
    overlay.put(b"a", b"9")
    overlay.delete(b"b")
    overlay.put(b"c", b"")
    assert [overlay.get(key) for key in (b"a", b"b", b"c")] == [b"9", None, b""]
    assert everything(overlay) == {b"a": b"9", b"c": b""}
    overlay.put(b"b", b"back")
    assert overlay.get(b"b") == b"back"
    assert overlay.changes == {b"a": b"9", b"b": b"back", b"c": b""}


def test_a_range_delete_takes_the_engine_and_the_changes_so_far() -> None:
    overlay = view(a="1", b="2", c="3")
    overlay.put(b"b5", b"x")
    overlay.delete_range(b"b", b"c")
    assert [overlay.get(key) for key in (b"a", b"b", b"b5", b"c")] == [b"1", None, None, b"3"]
    overlay.put(b"b7", b"later")
    assert everything(overlay) == {b"a": b"1", b"b7": b"later", b"c": b"3"}


def test_an_empty_range_deletes_nothing() -> None:
    overlay = view(a="1")
    overlay.delete_range(b"b", b"a")
    overlay.delete_range(b"a", b"a")
    assert everything(overlay) == {b"a": b"1"} and overlay.range_deletes == []


def test_the_ends_of_a_scan() -> None:
    overlay = view(a="1", c="3")
    overlay.put(b"b", b"2")
    assert [key for key, _ in overlay.scan(b"a", b"c")] == [b"a", b"b"]
    assert [key for key, _ in overlay.scan(b"a\x00", b"c\x00")] == [b"b", b"c"]
    assert list(overlay.scan(b"c", b"a")) == []


def test_a_scan_does_not_move_with_later_changes() -> None:
    overlay = view(a="1", b="2")
    overlay.put(b"c", b"3")
    scan = overlay.scan(b"", b"\xff")
    overlay.delete(b"c")
    overlay.delete_range(b"a", b"b")
    assert dict(scan) == {b"a": b"1", b"b": b"2", b"c": b"3"}
