"""The history file format: what goes in comes out, and what isn't a history is one line with its place."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raftkv.sim.check.history import History, HistoryError, Kind, Operation, Output, Status, Step

GOOD = {"client": 1, "op": "get", "key": "k", "out": {"value": "v"}, "call_ns": 1, "ret_ns": 2, "status": "ok"}
PUT = {"client": 1, "op": "put", "key": "k", "value": "v", "call_ns": 1, "ret_ns": 2, "status": "ok"}

byte_strings = st.binary(max_size=12) | st.text(max_size=6).map(lambda text: text.encode("utf-8"))
versions = st.none() | st.integers(1, 1 << 63)
times = st.tuples(st.integers(0, 1 << 60), st.integers(0, 1 << 60))


@st.composite
def operations(draw: st.DrawFn) -> Operation:
    call_ns, takes_ns = draw(times)
    end_ns = call_ns + takes_ns
    client = draw(st.text(max_size=4))
    kind = draw(st.sampled_from(list(Kind)))
    if kind is Kind.TXN:
        steps = draw(
            st.lists(
                st.builds(Step.append, byte_strings, st.integers() | byte_strings)
                | st.builds(Step.read, byte_strings, st.none() | st.lists(st.integers() | byte_strings, max_size=3))
            )
        )
        status = draw(st.sampled_from(list(Status)))
        return Operation.txn(client, steps, call_ns, end_ns, status)
    key = draw(byte_strings)
    if kind is Kind.GET:
        value = draw(st.none() | byte_strings)
        return Operation.get(client, key, Output.read(value, draw(versions)), call_ns, end_ns)
    value = None if kind is Kind.DELETE else draw(byte_strings)
    expected = draw(byte_strings) if kind is Kind.CAS else None
    if_version = draw(st.none() | st.integers(0, 9)) if kind is Kind.PUT else None
    output: Output | None = Output.written(draw(versions))
    if kind is Kind.DELETE:
        output = Output.deleted(draw(st.none() | st.booleans()), draw(versions))
    elif (kind is Kind.CAS or if_version is not None) and draw(st.booleans()):
        output = draw(st.sampled_from([Output.mismatched(0), Output.mismatched(), Output.mismatched(7, b"\xff")]))
    if draw(st.integers(0, 4)) == 0:
        output = None
    return Operation.write(client, kind, key, value, output, call_ns, end_ns, expected=expected, if_version=if_version)


@given(st.lists(operations(), max_size=5), st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5)))
@settings(max_examples=120, deadline=None)
def test_what_is_written_is_read(items: list[Operation], header: dict[str, Any]) -> None:
    header.pop("raftkv_history", None)
    history = History(header, items)
    lines = list(history.lines())
    assert all("\n" not in line for line in lines)
    assert History.parse(lines) == history
    assert History.parse([line.encode() + b"\n" for line in lines]) == history


def test_a_file(tmp_path: Path) -> None:
    history = History({"seed": 7})
    history.add(Operation.get("c", b"\xff", Output.read("ü\n".encode(), 3), 1, 2))
    path = tmp_path / "history.jsonl"
    history.write(path)
    assert History.read(path) == history
    assert len(path.read_bytes().splitlines()) == 2


def test_bytes_that_are_not_text_are_base64() -> None:
    history = History({}, [Operation.get("c", b"\xffk", Output.read(b"ok"), 1, 2)])
    item = json.loads(list(history.lines())[1])
    assert base64.b64decode(item["key"]["b64"]) == b"\xffk"
    assert item["out"] == {"value": "ok"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"op": "steal"}, "'op' or 'status': 'steal' is not a valid Kind"),
        ({"status": "maybe"}, "'op' or 'status': 'maybe' is not a valid Status"),
        ({"client": None}, "'client' must be a number or a string"),
        ({"key": 3}, "'key' must be a string or {\"b64\": …}"),
        ({"key": {"b64": "%%"}}, "'key' is not base64"),
        ({"key": "\ud800"}, "'key' has a lone surrogate"),
        ({"call_ns": "1"}, "'call_ns' must be a whole number"),
        ({"call_ns": True}, "'call_ns' must be a whole number"),
        ({"ret_ns": 0}, "it returns before its call"),
        ({"ret_ns": None}, "it is ok, but has no return time"),
        ({"out": [1]}, "'out' must be an object"),
        ({"out": {"value": "v", "mismatch": 1}}, "'mismatch' and 'existed' are true or false"),
        ({"out": {"value": "v", "mismatch": True}}, "a mismatch is for cas and conditional put"),
        ({"out": None}, "an output value is for get, which needs one"),
        ({"out": {"value": "v", "version": 0}}, "there is no version 0"),
        ({"out": {"value": "v", "existed": True}}, "existed is for delete"),
        ({"status": "fail"}, "it is fail, but has an output"),
        ({"value": "v"}, "a value is for put, append and cas"),
        ({"expected": "v"}, "an expected value is for cas"),
        ({"if_version": 1}, "if_version is a version or 0, for put"),
        ({"colour": "red"}, "unknown field 'colour'"),
        ({"op": "txn"}, "a txn needs 'steps'"),
        ({"op": "txn", "steps": [["append", "k", None]]}, "a step must be"),
        ({"op": "txn", "steps": [["r", "k", [True]]]}, "an element must be a string"),
        ({"op": "txn", "steps": 3}, "a txn needs 'steps'"),
    ],
)
def test_what_is_not_an_operation(change: dict[str, Any], says: str) -> None:
    lines = ['{"raftkv_history": 1}', json.dumps(GOOD), json.dumps({**GOOD, **change})]
    with pytest.raises(HistoryError, match=r"^some\.jsonl:3: ") as caught:
        History.parse(lines, "some.jsonl")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([], "h: the file is empty"),
        (["", "  "], "h: the file is empty"),
        (["{}"], "h:1: a history begins with a header line"),
        (["[]"], "h:1: a history begins with a header line"),
        (['{"raftkv_history": 2}'], "h:1: history format 2 is not known"),
        (["no json"], "h:1: not a line of JSON"),
        ([b"\xff\xfe"], "h:1: not a line of JSON"),
        (['{"raftkv_history": 1}', "3"], "h:2: an operation must be an object"),
        (['{"raftkv_history": 1}', "[" * 100_000], "h:2: not a line of JSON"),
    ],
)
def test_what_is_not_a_history(lines: list[str | bytes], says: str) -> None:
    with pytest.raises(HistoryError) as caught:
        History.parse(lines, "h")
    assert str(caught.value).startswith(says)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(HistoryError, match="No such file"):
        History.read(tmp_path / "none")
    with pytest.raises(HistoryError, match="directory"):
        History.read(tmp_path)


def test_blank_lines_and_numbered_clients() -> None:
    history = History.parse(['{"raftkv_history": 1, "seed": 3}', "", json.dumps(PUT), ""])
    assert history.header == {"seed": 3}
    assert history.operations[0].client == "1"


def test_the_absent_value_beside_a_mismatch_is_said_by_version_0() -> None:
    cas = {**PUT, "op": "cas", "expected": "e", "out": {"mismatch": True, "value": None, "version": 0}}
    (operation,) = History.parse(['{"raftkv_history": 1}', json.dumps(cas)]).operations
    assert operation.output == Output.mismatched(0)
