"""One Redis connection: its commands take effect in their order, its replies come in that order, and it is bounded.

Commands that came together run together: a run of reads is answered from one applied state, a run of writes goes to the
log one behind the other, a run of commands that read and write gathers by key. Before the next run begins, this one has
ended. So a pipeline takes effect in its order; only of such as INCR that is so for each key, not between keys. The
replies of what was done in a turn of the loop leave in one write.

What of a run was refused (its shard has moved, a transaction holds its key) goes the other way afterwards, through the
SDK, in order; unless a later one on the same key was done: then it is answered with the error.
"""

from __future__ import annotations

import asyncio
from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

from raftkv.daemons.redis import control, strings
from raftkv.daemons.redis.multi import NEVER_QUEUED, Multi
from raftkv.daemons.redis.parser import Parser, Request
from raftkv.daemons.redis.replies import (
    NIL_BYTES,
    OK,
    OK_BYTES,
    Refusal,
    can_go_elsewhere,
    encode,
    error_line,
    refusal_of,
)
from raftkv.daemons.redis.strings import View
from raftkv.daemons.redis.table import Kind, Spec, find, unknown
from raftkv.machines.results import OK as DONE
from raftkv.machines.slots import slot_of
from raftkv.protocol.addresses import format_address
from raftkv.protocol.errors import Busy, RaftKVError, from_result
from raftkv.protocol.limits import (
    CLOSE_TIMEOUT_S,
    VALUE_BYTES_MAX,
    WRITE_HIGH_WATER_BYTES,
    WRITE_LOW_WATER_BYTES,
)

if TYPE_CHECKING:
    from raftkv.daemons.redis.listener import RedisListener

RUN_MAX = 1_024
"""Commands that run together."""
RUN_BYTES_MAX = 4 * 1024 * 1024
RUN_WORDS_MAX = 4 * RUN_MAX
"""Of the writes in a run: some large MSETs are as much work for the log's entries as many SETs."""
QUEUE_MAX = 1_024
"""Commands that wait; with more of them the connection isn't read from."""


class RedisConnection(asyncio.Protocol):
    """Made by the listener for each client."""

    def __init__(self, listener: RedisListener) -> None:
        self.listener = listener
        self.id = listener.next_id()
        self.peername = ""
        self.name = b""
        self.library: dict[bytes, bytes] = {}
        self.resp3 = False
        self.is_readonly = False
        self.close_after_reply = False
        self._direct = listener.direct
        self._parser = Parser()
        self._held_bytes = 0
        self._transport: asyncio.Transport | None = None
        self._queue: deque[Request] = deque()
        self._out: list[bytes] = []
        self._out_bytes = 0
        self._is_pumping = False
        self._is_busy = False
        """A run is under way: whatever it waits for calls back."""
        self._is_paused = False
        self._is_reading = True
        self._has_ended = False
        """Nothing more comes in; what came is answered still."""
        self._results: list[Any] = []
        """Of the run, by position."""
        self._left = 0
        self._redo: list[int] = []
        self._on_written = self._written
        self._on_wrote = self._wrote
        self._on_readable = self._readable
        self._multi = Multi(self)

    # ---- what the loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        name = transport.get_extra_info("peername")
        if isinstance(name, tuple) and len(name) >= 2:
            self.peername = format_address(name[0], name[1])
        self._transport.set_write_buffer_limits(high=WRITE_HIGH_WATER_BYTES, low=WRITE_LOW_WATER_BYTES)
        refusal = self.listener.made(self)
        if refusal is not None:
            self._end(refusal)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._queue.clear()
        self._out.clear()
        self._multi.leave()
        self._hold(0)
        self.listener.lost(self)

    def eof_received(self) -> bool:
        self._has_ended = True
        return self._is_busy or bool(self._queue)

    def data_received(self, data: bytes) -> None:
        parser = self._parser
        if self._transport is None:
            return
        self._queue += parser.feed(data)
        if parser.held_bytes or self._held_bytes:
            self._hold(parser.held_bytes)
        if not self._is_busy:
            self._pump()
        else:
            self._steer_reading()

    def pause_writing(self) -> None:
        self._is_paused = True

    def resume_writing(self) -> None:
        self._is_paused = False
        self._pump()

    # ---- what the listener uses

    def close(self) -> None:
        """Send what there is, and close. Whatever is under way is answered to nobody."""
        transport = self._transport
        if transport is not None:
            self._flush()
            self._transport = None
            self._queue.clear()
            transport.close()
            asyncio.get_running_loop().call_later(CLOSE_TIMEOUT_S, transport.abort)

    def described(self) -> bytes:
        """A line of CLIENT LIST."""
        queued = len(self._multi.queued) if self._multi.is_open else -1
        library = self.library
        return b"id=%d addr=%b name=%b db=0 multi=%d watch=%d resp=%d lib-name=%b lib-ver=%b" % (
            self.id, self.peername.encode(), self.name, queued, len(self._multi.watched), 3 if self.resp3 else 2,
            library.get(b"LIB-NAME", b""), library.get(b"LIB-VER", b""),
        )  # fmt: skip

    def reset(self) -> None:
        """As after connecting."""
        self.name, self.resp3, self.is_readonly = b"", False, False
        self._multi.leave()

    # ---- the queue

    def _pump(self) -> None:
        """Carry out what is there, until something has to be waited for."""
        if self._is_pumping or self._transport is None:
            return
        self._is_pumping = True
        queue = self._queue
        while queue and not self._is_busy and not self.close_after_reply:
            if self._out_bytes > WRITE_HIGH_WATER_BYTES:
                self._flush()
            if self._is_paused:
                break  # it doesn't read: what it asks for isn't made either
            try:
                self._next(queue[0])
            except Refusal as refusal:
                self._refuse(refusal)
        self._is_pumping = False
        self._flush()
        if self._is_busy or self._is_paused:
            self._steer_reading()
        elif self.close_after_reply or (self._has_ended and not queue):
            self.close()
        elif self._parser.error is not None:
            self._end(f"ERR Protocol error: {self._parser.error}")
        else:
            self._steer_reading()

    def _next(self, args: Request) -> None:
        """Carry out the first of the queue, or begin to. Raise Refusal, and it is answered so."""
        spec = find(args[0])
        if spec is None:
            raise unknown(args)
        spec.check_arity(args)
        kind = spec.kind
        if self._multi.is_open and spec.name not in NEVER_QUEUED:
            self._multi.add(spec, args)
        elif kind is Kind.READ:
            self._begin_reads()
        elif kind in (Kind.WRITE, Kind.CHANGE, Kind.TRANSACTION):
            self._begin_changes(spec, args)
        elif kind is Kind.NOW:
            self.answer(control.now(self, spec.name, args))
        elif kind is Kind.WALK:
            self._walk(spec, args)
        else:
            self._multi.carry_out(spec.name, args)

    def answer(self, value: Any) -> None:
        """The reply to the first of the queue."""
        if self._queue:
            self._queue.popleft()
        self.listener.commands_processed += 1
        self._send(encode(value, self.resp3))

    def _refuse(self, refusal: Refusal) -> None:
        self._multi.is_spoilt = True
        self.answer(refusal)

    def _send(self, reply: bytes) -> None:
        self._out.append(reply)
        self._out_bytes += len(reply)

    def _flush(self) -> None:
        out = self._out
        if out and self._transport is not None:
            self._transport.write(out[0] if len(out) == 1 else b"".join(out))
        out.clear()
        self._out_bytes = 0

    def _steer_reading(self) -> None:
        """Read on unless there is enough to do."""
        wanted = not self._is_paused and len(self._queue) < QUEUE_MAX
        if wanted is not self._is_reading and self._transport is not None:
            self._is_reading = wanted
            if wanted:
                self._transport.resume_reading()
            else:
                self._transport.pause_reading()

    def _hold(self, held_bytes: int) -> None:
        """So much of a request has come in that isn't whole."""
        if not self.listener.hold(held_bytes - self._held_bytes):
            self.listener.hold(self._held_bytes - held_bytes)
            self._end("ERR too many bytes of unfinished requests are held for all clients together")
            return
        self._held_bytes = held_bytes

    def _end(self, text: str) -> None:
        """Say why, and close."""
        self._send(error_line(text))
        self.close()

    # ---- where a command belongs

    def check_place(self, keys: Request, *, is_read: bool = False) -> None:
        """In cluster mode: raise CROSSSLOT or MOVED, where they are due."""
        nodes = self.listener.nodes
        if nodes is None or not keys:
            return
        slot = slot_of(keys[0])
        if len(keys) > 1 and any(slot_of(key) != slot for key in keys):
            raise Refusal("CROSSSLOT Keys in request don't hash to the same slot")
        if self._direct.all_here(keys[:1]) or (is_read and self.is_readonly and self._direct.shard_here(keys[0]) >= 0):
            return
        redirection = nodes.redirection(slot)
        if redirection is not None:
            raise redirection

    # ---- reads

    def _begin_reads(self) -> None:
        """The reads at the head of the queue whose keys are here run together; one that isn't here goes elsewhere."""
        direct = self._direct
        leads = direct.leads
        count = 0
        if leads or self.is_readonly or self.listener.nodes is None:  # followers have the shards too
            for args in islice(self._queue, RUN_MAX):
                spec = find(args[0])
                if spec is None or spec.kind is not Kind.READ or not spec.has_arity(args):
                    break
                keys = args[1:2] if spec.last == 1 else spec.keys(args)
                if any(direct.shard_here(key) < 0 for key in keys):
                    break
                count += 1
        if count == 0:
            self._first_elsewhere()
        else:
            self._is_busy = True
            direct.when_readable(self._on_readable, count, follower_ok=not leads)

    def _readable(self, count: int, error: RaftKVError | None) -> None:
        self._is_busy = False
        if self._transport is None:
            return
        if error is None:
            self._answer_reads(count)
        elif isinstance(error, Busy):
            self._refuse(refusal_of(error))
        else:
            self._first_elsewhere()
        self._pump()

    def _answer_reads(self, count: int) -> None:
        """All of one state; fewer if the client doesn't read its replies, or one of the keys is locked."""
        direct, queue, resp3 = self._direct, self._queue, self.resp3
        try:
            direct.check_readable()
            for _ in range(count):
                args = queue[0]
                spec = _spec_of(args)
                try:
                    if spec.run is strings.get:
                        value = direct.value(args[1])
                        reply = NIL_BYTES[resp3] if value is None else b"$%d\r\n%b\r\n" % (len(value), value)
                    else:
                        keys = spec.keys(args)
                        self.check_place(keys, is_read=True)
                        reply = encode(spec.bound(args)(View(direct.load(keys))), resp3)
                except Refusal as refusal:
                    reply = error_line(str(refusal))
                queue.popleft()
                self.listener.commands_processed += 1
                self._send(reply)
                if self._out_bytes > WRITE_HIGH_WATER_BYTES:
                    return  # the rest when these are on their way
        except RaftKVError:
            self._first_elsewhere()

    # ---- writes

    def _begin_changes(self, spec: Spec, args: Request) -> None:
        """Raise Refusal if the first of the queue is wrong."""
        kind = spec.kind_of(args)
        if spec.step == 2:
            strings.pairs_of(args)
        if kind is Kind.WRITE:
            self._begin_writes()
            return
        keys = spec.keys(args)
        self.check_place(keys)
        direct = self._direct
        if not direct.all_here(keys):
            self._first_elsewhere()
        elif kind is Kind.CHANGE:
            self._begin_lanes()
        else:
            self._start(1)
            direct.transact(list(dict.fromkeys(keys)), spec.bound(args), self._on_written, 0)

    def _start(self, count: int) -> None:
        self._is_busy = True
        self._results = [None] * count
        self._left = count

    def _begin_writes(self) -> None:
        """The writes at the head of the queue, as they are, go to the log together, each as a command of its own."""
        direct = self._direct
        todo: list[tuple[int, Request]] = []
        words = size_bytes = 0
        for args in islice(self._queue, RUN_MAX if direct.leads else 0):
            shard = self._shard_to_write(args)
            if shard is None or size_bytes > RUN_BYTES_MAX or words > RUN_WORDS_MAX:
                break
            words += len(args)
            size_bytes += sum(map(len, args))
            todo.append((shard, args))
        if not todo:  # the first is too long, or others wait to write the key before it
            self._first_elsewhere()
            return
        self._start(len(todo))
        for number, (shard, args) in enumerate(todo):
            if shard < 0:
                direct.commit({}, strings.pairs_of(args), self._on_wrote, number)
            elif len(args) == 2:
                direct.delete(shard, args[1], self._on_wrote, number)
            else:
                direct.put(shard, args[1], args[2], None, self._on_wrote, number)

    def _shard_to_write(self, args: Request) -> int | None:
        """Where the words are written if they can simply be; -1 for an MSET, None if they can't."""
        spec = find(args[0])
        if spec is None or spec.kind is not Kind.WRITE or not spec.has_arity(args):
            return None
        if spec.step == 2:
            try:
                keys = list(strings.pairs_of(args))
                self.check_place(keys)
            except Refusal:
                return None
            return -1 if self._direct.all_here(keys) else None
        if spec.kind_of(args) is not Kind.WRITE:
            return None
        key = args[1]
        if len(args) > 2 and len(args[2]) > VALUE_BYTES_MAX:
            return None
        shard = self._direct.shard_here(key)
        return None if shard < 0 or self._direct.is_queued_for(shard, key) else shard

    def _begin_lanes(self) -> None:
        """The changes at the head of the queue run together: those of one key one after the other."""
        direct = self._direct
        todo: list[tuple[bytes, Any]] = []
        for args in islice(self._queue, RUN_MAX):
            spec = find(args[0])
            if spec is None or not spec.has_arity(args) or spec.kind_of(args) is not Kind.CHANGE:
                break
            if direct.shard_here(args[1]) < 0:
                break
            todo.append((args[1], spec.bound(args)))
        self._start(len(todo))
        for number, (key, run) in enumerate(todo):
            self.listener.lanes.add(key, run, self._on_written, number)

    def _wrote(self, number: int, result: Any) -> None:
        """A write of the log: its result array stands for the reply."""
        if type(result) is list:
            if result[0] != DONE:
                result = from_result(result)
            elif len(result) == 3:
                result = int(result[1])  # of a delete
            else:
                result = OK
        self._written(number, result)

    def _written(self, number: int, result: Any) -> None:
        self._results[number] = result
        self._left -= 1
        if self._left == 0 and self._transport is not None:
            self._redo = self._to_redo() if any(map(can_go_elsewhere, self._results)) else []
            self._redo_next()

    def _to_redo(self) -> list[int]:
        """The positions of what was refused, the last first, but for what was overtaken on the same key."""
        redo: list[int] = []
        done: set[bytes] = set()
        for number in range(len(self._results) - 1, -1, -1):
            args = self._queue[number]
            keys = _spec_of(args).keys(args)
            if not can_go_elsewhere(self._results[number]):
                done.update(keys)
            elif done.isdisjoint(keys):
                redo.append(number)
        return redo

    def _redo_next(self) -> None:
        """One after the other, the other way; then the whole run is answered."""
        while self._redo:
            number = self._redo.pop()
            try:
                self._go_elsewhere(self._queue[number], self._redone, number)
                return
            except Refusal as refusal:
                self._results[number] = refusal
        results, self._results = self._results, []
        for result in results:
            self._queue.popleft()
            if result is OK:
                self._send(OK_BYTES)
            else:
                reply = refusal_of(result) if isinstance(result, RaftKVError) else result
                self._send(encode(reply, self.resp3))
        self.listener.commands_processed += len(results)
        self._is_busy = False
        self._pump()

    def _redone(self, number: int, result: Any) -> None:
        if self._transport is not None:
            self._results[number] = result
            self._redo_next()

    # ---- elsewhere

    def _first_elsewhere(self) -> None:
        try:
            self._go_elsewhere(self._queue[0], self.arrived, None)
        except Refusal as refusal:
            self._refuse(refusal)

    def _go_elsewhere(self, args: Request, deliver: Any, token: Any) -> None:
        """Raise Refusal where somebody else has to be asked, or it is wrong."""
        spec = _spec_of(args)
        keys = spec.keys(args)
        self.check_place(keys, is_read=spec.kind is Kind.READ)
        for key in keys:
            strings.check_key(key)
        if spec.run is strings.set_:
            strings.check_value(args[2])
        self._is_busy = True
        self.listener.forward.execute(spec, args, deliver, token)

    @property
    def is_gone(self) -> bool:
        """Nobody waits for what is under way."""
        return self._transport is None

    def wait(self) -> None:
        """`arrived` will be called with the reply to the first of the queue."""
        self._is_busy = True

    def arrived(self, _: None, result: Any) -> None:
        self._is_busy = False
        if self._transport is None:
            return
        self.answer(refusal_of(result) if isinstance(result, RaftKVError) else result)
        self._pump()

    def _walk(self, spec: Spec, args: Request) -> None:
        listener = self.listener
        shards = None if listener.nodes is None else listener.shards_here()
        if spec.name == "scan":
            work: Any = listener.scanner.scan(args, shards)
        elif spec.name == "keys":
            work = listener.scanner.keys(args[1], shards)
        else:
            work = listener.scanner.count(shards)
        self.wait()
        listener.forward.start(work, self.arrived, None)


def _spec_of(args: Request) -> Spec:
    """Of a command that was found before."""
    spec = find(args[0])
    assert spec is not None
    return spec
