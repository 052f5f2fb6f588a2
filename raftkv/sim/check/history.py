"""What clients did and saw: operations with their call and return times, and histories of them as JSON lines.

The vocabulary of everything that records or checks. It never judges an operation: it only refuses what
isn't a history. The format is described in docs/histories.md.

    history = History({"seed": 7})
    history.add(Operation.get("c1", b"k", Output.read(b"v", 3), call_ns=10, return_ns=20))
    history.write(path)
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

FORMAT: Final = 1
"""The version of the file format: `raftkv_history` in the header line."""

Element = int | bytes
"""What a list-append transaction appends: unique within its key."""


class HistoryError(Exception):
    """What was read is not a history; str() is one line that says where and why."""


class Kind(StrEnum):
    """What an operation asks for."""

    GET = "get"
    PUT = "put"
    APPEND = "append"
    DELETE = "delete"
    CAS = "cas"
    TXN = "txn"


class Status(StrEnum):
    """How an operation ended."""

    OK = "ok"  # it has its output; a mismatch is an output too
    FAIL = "fail"  # it certainly had no effect, and never will
    UNKNOWN = "unknown"  # it may have taken effect, or may still, or never


@dataclass(frozen=True, slots=True)
class Output:
    """What a register operation returned. Everything but the outcome itself is optional: None is not shown.

    `shows_value`: `value` was returned, None for an absent key. `existed` belongs to delete. `mismatch`:
    a cas or a conditional put was refused and changed nothing; `version` is then the present one, 0 for
    an absent key. For a read it is the version of the value, for a write the one that it made.
    """

    value: bytes | None = None
    shows_value: bool = False
    version: int | None = None
    existed: bool | None = None
    mismatch: bool = False

    @classmethod
    def read(cls, value: bytes | None, version: int | None = None) -> Output:
        """A get returned `value`; None: no such key (a version beside it means nothing and is dropped)."""
        return cls(value=value, shows_value=True, version=None if value is None else version)

    @classmethod
    def written(cls, version: int | None = None) -> Output:
        """A put, an append or a cas was done."""
        return cls(version=version)

    @classmethod
    def deleted(cls, existed: bool | None = None, version: int | None = None) -> Output:
        """A delete was done; `version` is the deletion's own revision, if it was shown."""
        return cls(existed=existed, version=version if existed else None)

    @classmethod
    def mismatched(cls, version: int | None = None, value: bytes | None = None) -> Output:
        """A cas or a conditional put was refused; `value` is what was there, None if it was not shown."""
        return cls(value=value, shows_value=value is not None, version=version, mismatch=True)


NOTHING: Final = Output()


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a transaction: it appended `element` to the list at `key`, or read that list.

    `elements` is what a read returned, () for an absent or empty list; None if its answer is unknown.
    """

    key: bytes
    element: Element | None = None
    elements: tuple[Element, ...] | None = None

    @property
    def is_append(self) -> bool:
        return self.element is not None

    @classmethod
    def append(cls, key: bytes, element: Element) -> Step:
        return cls(key, element=element)

    @classmethod
    def read(cls, key: bytes, elements: Iterable[Element] | None) -> Step:
        return cls(key, elements=None if elements is None else tuple(elements))


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation of one client. Times are of one monotonic clock for the whole history, in nanoseconds.

    `value` is what a put or a cas sets, or what an append appends; `expected` is what a cas compares with;
    `if_version` makes a put conditional (0: the key must be absent). `return_ns` is None when no answer
    came. A client calls nothing while an operation of its own is open: after an unknown outcome
    it goes on under a new client id.
    """

    client: str
    kind: Kind
    key: bytes
    call_ns: int
    return_ns: int | None
    status: Status
    value: bytes | None = None
    expected: bytes | None = None
    if_version: int | None = None
    output: Output = NOTHING
    steps: tuple[Step, ...] = ()

    def __post_init__(self) -> None:
        problem = _problem(self)
        if problem is not None:
            raise HistoryError(f"{self.kind} of client {self.client}: {problem}")

    @property
    def is_unknown(self) -> bool:
        return self.status is Status.UNKNOWN

    @classmethod
    def get(cls, client: str, key: bytes, output: Output, call_ns: int, return_ns: int) -> Operation:
        """A get that was answered. One that was not says nothing: don't record it, or with status UNKNOWN."""
        return cls(client, Kind.GET, key, call_ns, return_ns, Status.OK, output=output)

    @classmethod
    def write(
        cls,
        client: str,
        kind: Kind,
        key: bytes,
        value: bytes | None,
        output: Output | None,
        call_ns: int,
        return_ns: int | None,
        *,
        expected: bytes | None = None,
        if_version: int | None = None,
    ) -> Operation:
        """A put, append, delete or cas; `output` None: its outcome is unknown."""
        status = Status.UNKNOWN if output is None else Status.OK
        shown = NOTHING if output is None else output
        return cls(client, kind, key, call_ns, return_ns, status, value, expected, if_version, shown)

    @classmethod
    def txn(
        cls, client: str, steps: Iterable[Step], call_ns: int, return_ns: int | None, status: Status = Status.OK
    ) -> Operation:
        """A transaction: OK committed, FAIL aborted, UNKNOWN one or the other, perhaps later."""
        return cls(client, Kind.TXN, b"", call_ns, return_ns, status, steps=tuple(steps))


def _problem(operation: Operation) -> str | None:
    """Why this can't be an operation; None if it can."""
    kind, output = operation.kind, operation.output
    if operation.return_ns is not None and operation.return_ns < operation.call_ns:
        return "it returns before its call"
    if operation.status is Status.OK and operation.return_ns is None:
        return "it is ok, but has no return time"
    if (operation.value is not None) != (kind in (Kind.PUT, Kind.APPEND, Kind.CAS)):
        return "a value is for put, append and cas, which need one"
    if (operation.expected is not None) != (kind is Kind.CAS):
        return "an expected value is for cas, which needs one"
    if operation.if_version is not None and (kind is not Kind.PUT or operation.if_version < 0):
        return "if_version is a version or 0, for put"
    if bool(operation.steps) and kind is not Kind.TXN:
        return "steps are for txn"
    if operation.status is not Status.OK:
        return None if output == NOTHING else f"it is {operation.status}, but has an output"
    if output.shows_value != (kind is Kind.GET) and not output.mismatch:
        return "an output value is for get, which needs one, and for a mismatch"
    if output.mismatch and not (kind is Kind.CAS or operation.if_version is not None):
        return "a mismatch is for cas and conditional put"
    if output.mismatch and output.version == 0 and output.value is not None:
        return "version 0 is an absent key's, but there is a value"
    if output.existed is not None and kind is not Kind.DELETE:
        return "existed is for delete"
    if output.version is not None and output.version < (0 if output.mismatch else 1):
        return f"there is no version {output.version}"
    return None


@dataclass(slots=True)
class History:
    """Operations in any order, and a header: seed, scenario, faults, whatever helps to understand them."""

    header: dict[str, Any] = field(default_factory=dict)
    operations: list[Operation] = field(default_factory=list)

    def add(self, operation: Operation) -> None:
        self.operations.append(operation)

    def __len__(self) -> int:
        return len(self.operations)

    def write(self, path: str | Path) -> None:
        """Write the history as JSON lines. Raises OSError."""
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in self.lines())

    def lines(self) -> Iterator[str]:
        """The lines of the file, without line ends."""
        yield _dump({"raftkv_history": FORMAT, **self.header})
        for operation in self.operations:
            yield encode(operation)

    @classmethod
    def read(cls, path: str | Path) -> History:
        """Read a file. Raises HistoryError with file and line, also for what can't be opened."""
        try:
            with open(path, "rb") as file:
                return cls.parse(file, str(path))
        except OSError as error:
            raise HistoryError(f"{path}: {error.strerror or error}") from None

    @classmethod
    def parse(cls, lines: Iterable[bytes | str], name: str = "history") -> History:
        """The history in `lines`; `name` is for errors. Raises HistoryError."""
        history: History | None = None
        for number, line in enumerate(lines, 1):
            try:
                text = line.decode("utf-8") if isinstance(line, bytes) else line
                if not text.strip():
                    continue
                item = json.loads(text)
                if history is None:
                    history = cls(_header(item))
                else:
                    history.add(decode(item))
            except HistoryError as error:
                raise HistoryError(f"{name}:{number}: {error}") from None
            except (ValueError, RecursionError) as error:  # not UTF-8, not JSON
                raise HistoryError(f"{name}:{number}: not a line of JSON: {error}") from None
        if history is None:
            raise HistoryError(f"{name}: the file is empty; a history begins with a header line")
        return history


# ---- one operation as a line


def encode(operation: Operation) -> str:
    """The JSON line of one operation, without a line end. Raises nothing: every Operation has one."""
    item: dict[str, Any] = {"client": operation.client, "op": str(operation.kind)}
    if operation.kind is Kind.TXN:
        item["steps"] = [_encode_step(step) for step in operation.steps]
    else:
        item["key"] = _encode_bytes(operation.key)
    for name, data in (("value", operation.value), ("expected", operation.expected)):
        if data is not None:
            item[name] = _encode_bytes(data)
    if operation.if_version is not None:
        item["if_version"] = operation.if_version
    if operation.status is Status.OK and operation.kind is not Kind.TXN:
        item["out"] = _encode_output(operation.output)
    item.update(call_ns=operation.call_ns, ret_ns=operation.return_ns, status=str(operation.status))
    return _dump(item)


def decode(item: Any) -> Operation:
    """The operation in a parsed line. Raises HistoryError, without a place."""
    if not isinstance(item, dict):
        raise HistoryError("an operation must be an object")
    unknown = item.keys() - {
        "client", "op", "key", "value", "expected", "if_version", "out", "steps", "call_ns", "ret_ns", "status"
    }  # fmt: skip
    if unknown:
        raise HistoryError(f"unknown field {min(unknown)!r}")
    client = item.get("client")
    if isinstance(client, bool) or not isinstance(client, int | str):
        raise HistoryError("'client' must be a number or a string")
    try:
        kind, status = Kind(str(item.get("op"))), Status(str(item.get("status")))
    except ValueError as error:
        raise HistoryError(f"'op' or 'status': {error}") from None
    is_txn = kind is Kind.TXN
    return Operation(
        client=str(client),
        kind=kind,
        key=b"" if is_txn else _decode_bytes(item, "key"),
        call_ns=_decode_int(item, "call_ns"),
        return_ns=None if item.get("ret_ns") is None else _decode_int(item, "ret_ns"),
        status=status,
        value=_decode_bytes(item, "value") if "value" in item else None,
        expected=_decode_bytes(item, "expected") if "expected" in item else None,
        if_version=_decode_int(item, "if_version") if "if_version" in item else None,
        output=_decode_output(item.get("out")),
        steps=_decode_steps(item.get("steps")) if is_txn else (),
    )


def _encode_output(output: Output) -> dict[str, Any]:
    out: dict[str, Any] = {}
    if output.mismatch:
        out["mismatch"] = True
    if output.shows_value:
        out["value"] = None if output.value is None else _encode_bytes(output.value)
    if output.existed is not None:
        out["existed"] = output.existed
    if output.version is not None:
        out["version"] = output.version
    return out


def _decode_output(out: Any) -> Output:
    if out is None:
        return NOTHING
    if not isinstance(out, dict) or out.keys() - {"mismatch", "value", "existed", "version"}:
        raise HistoryError("'out' must be an object of value, version, existed, mismatch")
    value = None if out.get("value") is None else _decode_bytes(out, "value")
    mismatch, existed = out.get("mismatch", False), out.get("existed")
    if not isinstance(mismatch, bool) or not isinstance(existed, bool | None):
        raise HistoryError("'mismatch' and 'existed' are true or false")
    return Output(
        value=value,
        # null beside a mismatch is "not shown": that the key was absent is said by version 0.
        shows_value="value" in out and not (mismatch and value is None),
        version=None if out.get("version") is None else _decode_int(out, "version"),
        existed=existed,
        mismatch=mismatch,
    )


def _encode_step(step: Step) -> list[Any]:
    if step.element is not None:
        return ["append", _encode_bytes(step.key), _encode_element(step.element)]
    elements = None if step.elements is None else [_encode_element(element) for element in step.elements]
    return ["r", _encode_bytes(step.key), elements]


def _decode_steps(steps: Any) -> tuple[Step, ...]:
    if not isinstance(steps, list):
        raise HistoryError("a txn needs 'steps', an array")
    return tuple(_decode_step(step) for step in steps)


def _decode_step(step: Any) -> Step:
    match step:
        case ["append", key, element] if element is not None:
            return Step.append(_bytes_of(key, "a step's key"), _element_of(element))
        case ["r", key, None]:
            return Step.read(_bytes_of(key, "a step's key"), None)
        case ["r", key, [*elements]]:
            return Step.read(_bytes_of(key, "a step's key"), [_element_of(element) for element in elements])
    raise HistoryError('a step must be ["append", KEY, ELEMENT] or ["r", KEY, [ELEMENT, …] or null]')


def _encode_element(element: Element) -> Any:
    return element if isinstance(element, int) else _encode_bytes(element)


def _element_of(item: Any) -> Element:
    if isinstance(item, int) and not isinstance(item, bool):
        return item
    return _bytes_of(item, "an element")


def _encode_bytes(data: bytes) -> str | dict[str, str]:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return {"b64": base64.b64encode(data).decode("ascii")}


def _decode_bytes(item: Mapping[str, Any], name: str) -> bytes:
    return _bytes_of(item.get(name), f"{name!r}")


def _bytes_of(item: Any, what: str) -> bytes:
    if isinstance(item, str):
        try:
            return item.encode("utf-8")
        except UnicodeEncodeError:
            raise HistoryError(f"{what} has a lone surrogate; bytes that are no UTF-8 go as b64") from None
    if isinstance(item, dict) and item.keys() == {"b64"} and isinstance(item["b64"], str):
        try:
            return base64.b64decode(item["b64"], validate=True)
        except (binascii.Error, ValueError):
            raise HistoryError(f"{what} is not base64") from None
    raise HistoryError(f'{what} must be a string or {{"b64": …}}')


def _decode_int(item: Mapping[str, Any], name: str) -> int:
    number = item.get(name)
    if isinstance(number, bool) or not isinstance(number, int):
        raise HistoryError(f"{name!r} must be a whole number")
    return number


def _header(item: Any) -> dict[str, Any]:
    if not isinstance(item, dict) or "raftkv_history" not in item:
        raise HistoryError('a history begins with a header line: {"raftkv_history": 1, …}')
    if item["raftkv_history"] != FORMAT:
        raise HistoryError(f"history format {item['raftkv_history']!r} is not known here; this is {FORMAT}")
    return {name: value for name, value in item.items() if name != "raftkv_history"}


def _dump(item: Mapping[str, Any]) -> str:
    return json.dumps(item, ensure_ascii=False, separators=(",", ":"))
