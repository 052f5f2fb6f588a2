"""Several groups as machines that move shards among each other, without a network, a disk or a clock.

One machine stands for each group, since a group's replicas are equal. What its leader does is decided anew at every
step from the machine alone, as after any change of leaders: it may send any request that the state allows, as often
as it likes. Messages are lost, repeated, and delivered in any order, however late; what is proposed may be lost;
machines begin again from their rows at any moment. All clients' writes go to an *oracle* as well: one machine
that has every shard for ever. What a group answers must be what the oracle answers, and at the end the rows must be
the oracle's, row for row.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

from raftkv.machines import moves as op
from raftkv.machines.balance import rebalance
from raftkv.machines.exports import LIST_IDLE_MS
from raftkv.machines.kv import APPEND, CAS, DELETE, PUT, KvMachine
from raftkv.machines.results import EXPIRED, LIST_LOST, NOT_HOLDER, OK, SUPERSEDED, WRONG_GROUP
from raftkv.machines.rows import Incarnation, shard_prefix
from raftkv.machines.sessions import SESSION_LIFETIME_MS
from raftkv.machines.shard_map import ShardMap
from raftkv.machines.shard_states import ShardState
from raftkv.protocol.errors import ListLost
from tests.machines.support import Client, Replica, addresses_of, config_command, map_time_command, one_group

SHARDS = 4
GIDS = (1, 2, 3, 4)
KEYS = [b"%d" % number for number in range(24)]
LIFETIME_MS = 1_000


class Group(Replica[KvMachine]):
    """A group's machine, and what its leader has proposed and isn't applied yet: (command, who waits for it)."""

    def __init__(self, gid: int, lifetime_ms: int) -> None:
        super().__init__(KvMachine(gid, session_lifetime_ms=lifetime_ms, cache_weight=4))
        self.gid = gid
        self.lifetime_ms = lifetime_ms
        self.proposed: list[tuple[list[Any], Callable[[Any], None] | None]] = []

    def reload(self) -> None:
        self.machine = KvMachine(self.gid, session_lifetime_ms=self.lifetime_ms, cache_weight=4)
        self.machine.load(self.engine)


class Writer:
    """A client that repeats its write until it is answered."""

    def __init__(self, name: int) -> None:
        self.client = Client(name, shards=SHARDS)
        self.open: list[Any] | None = None

    def answered(self, command: list[Any], result: list[Any]) -> None:
        if self.open is command and result[0] != WRONG_GROUP:
            self.open = None


class World:
    """`expiries`: map time advances, and sessions expire; their rows are then not compared."""

    def __init__(self, seed: int, *, expiries: bool) -> None:
        self.rng = random.Random(seed)
        self.expiries = expiries
        lifetime_ms = LIFETIME_MS if expiries else SESSION_LIFETIME_MS
        self.groups = {gid: Group(gid, lifetime_ms) for gid in GIDS}
        self.oracle = Replica(KvMachine(99, session_lifetime_ms=10**12))
        self.oracle.run_one(config_command(one_group(99, SHARDS)))
        self.configs = [ShardMap.initial(SHARDS)]
        self.map_time_ms = 0
        self.writers = [Writer(number) for number in range(1, 5)]
        self.messages: list[Callable[[], None]] = []
        self.healed = False
        self.seen: Counter[str] = Counter()
        self.change_map({1, 2})

    # ---- steps

    def step(self) -> None:
        rng = self.rng
        group = self.groups[rng.choice(GIDS)]
        choice = rng.random()
        if choice < 0.02:
            self.change_map_somehow()
        elif choice < 0.06:
            self.follow_map(group)
        elif choice < 0.25:
            self.write(rng.choice(self.writers))
        elif choice < 0.50:
            self.migrate(group)
        elif choice < 0.75 and self.messages:
            self.deliver()
        elif choice < 0.76:
            group.reload()
        elif choice < 0.77:
            del group.proposed[rng.randrange(len(group.proposed) + 1) :]  # another leader
        elif choice < 0.78 and self.expiries:
            self.map_time_ms += rng.choice((10, 100, 300, LIST_IDLE_MS))
            self.propose(group, map_time_command(self.map_time_ms))
        else:
            self.apply(group)

    def calm_step(self) -> None:
        """Nothing is lost, and a leader does one thing at a time."""
        waiting = [group for group in self.groups.values() if group.proposed]
        if self.messages:
            self.deliver()
        elif waiting:
            self.apply(self.rng.choice(waiting))
        else:
            for group in self.groups.values():
                self.follow_map(group)
            self.migrate(self.groups[self.rng.choice(GIDS)])

    def deliver(self) -> None:
        rng = self.rng
        number = rng.randrange(len(self.messages))
        fate = rng.random()
        if self.healed or fate < 0.8:
            self.messages.pop(number)()
        elif fate < 0.9:
            self.messages[number]()  # and once more, later
        else:
            del self.messages[number]

    def propose(self, group: Group, command: list[Any], waiter: Callable[[Any], None] | None = None) -> None:
        group.proposed.append((command, waiter))

    def apply(self, group: Group) -> None:
        """Some of what is proposed, as one entry."""
        count = self.rng.randint(1, 4)
        batch, group.proposed = group.proposed[:count], group.proposed[count:]
        commands = [command for command, _ in batch]
        for (command, waiter), result in zip(batch, group.run(*commands), strict=True):
            if command[0] in (PUT, APPEND, DELETE, CAS):
                self.check_write(command, result)
            if waiter is not None:
                waiter(result)
        self.check_owners()

    # ---- the map

    def change_map_somehow(self) -> None:
        rng, latest = self.rng, self.configs[-1]
        gids = set(latest.groups)
        kind = rng.choice(("join", "leave", "move", "move"))
        if kind == "join" and len(gids) < len(GIDS):
            self.change_map(gids | {rng.choice([gid for gid in GIDS if gid not in gids])})
        elif kind == "leave" and len(gids) > 1:
            self.change_map(gids - {rng.choice(sorted(gids))})
        else:
            owners = list(latest.owners)
            owners[rng.randrange(SHARDS)] = rng.choice(sorted(gids))
            self.configs.append(ShardMap(latest.num + 1, tuple(owners), latest.groups))

    def change_map(self, gids: set[int]) -> None:
        latest = self.configs[-1]
        groups = {gid: tuple(addresses_of(gid)) for gid in sorted(gids)}
        self.configs.append(ShardMap(latest.num + 1, rebalance(latest.owners, gids), groups))

    def follow_map(self, group: Group) -> None:
        num = group.machine.config_num + 1
        if num < len(self.configs):
            self.propose(group, config_command(self.configs[num]))

    # ---- clients

    def write(self, writer: Writer) -> None:
        rng = self.rng
        if writer.open is None:
            key = rng.choice(KEYS)
            kind = rng.choice((PUT, PUT, APPEND, APPEND, DELETE, CAS))
            value = rng.randbytes(rng.choice((1, 3, 40)))
            arguments: dict[int, list[Any]] = {PUT: [value, None], APPEND: [value], DELETE: [], CAS: [b"", value]}
            args = arguments[kind]
            writer.client.stamp_ms = self.map_time_ms
            writer.open = writer.client.command(kind, key, *args)
        command = writer.open
        shard = command[1]
        serving = [group for group in self.groups.values() if group.machine.serves(shard)]
        group = rng.choice(serving) if serving and rng.random() < 0.7 else self.groups[rng.choice(GIDS)]
        self.messages.append(lambda: self.propose(group, command, lambda result: self.answer(writer, command, result)))

    def answer(self, writer: Writer, command: list[Any], result: list[Any]) -> None:
        self.messages.append(lambda: writer.answered(command, result))

    def check_write(self, command: list[Any], result: list[Any]) -> None:
        """Whatever a group carries out or remembers is what the oracle does and remembers."""
        if result[0] == WRONG_GROUP:
            return
        if result[0] == EXPIRED and self.expiries:
            self.seen["expired"] += 1
            return
        expected = self.oracle.run_one(command)
        assert result == expected or result[0] == expected[0] == EXPIRED, (command, result, expected)

    # ---- migration: what leaders do

    def migrate(self, group: Group) -> None:
        """One request or proposal that the group's state calls for."""
        rng, machine = self.rng, group.machine
        releases = machine.releases()
        if releases and rng.random() < 0.3:
            number, config_num, source_gid = rng.choice(releases)
            self.ask_log(
                source_gid,
                [op.EXPORT_RELEASE, number, group.gid, config_num],
                lambda result: self.propose(group, [op.IMPORT_RELEASED, number, config_num]),
            )
            return
        shards = sorted({*machine.importing(), *machine.awaited_shards()})
        if not shards:
            return
        number = rng.choice(shards)
        under_way = machine.import_of(number)
        if under_way is None:
            if machine.state(number) is ShardState.ABSENT:
                self.begin(group, number)
            return
        incarnation, progress = under_way
        import_id = [number, *incarnation, progress.list_id]
        source = self.groups[progress.source_gid]
        claim = (group.gid, *incarnation, progress.list_id)
        if progress.asked and rng.random() < 0.5:
            ask = [op.EXPORT_ASK, number, *claim, progress.since]
            self.ask_log(source.gid, ask, lambda result: self.asked(group, import_id, result))
        elif progress.asked or progress.passes:
            if not progress.asked and rng.random() < 0.3:
                self.propose(group, [op.IMPORT_ASK, *import_id])
                return
            chunk, since, cursor, asked = progress.chunks, progress.since, progress.cursor, progress.asked
            self.messages.append(lambda: self.changes(group, source, import_id, claim, chunk, since, cursor, asked))
        else:
            chunk, cursor = progress.chunks, progress.cursor
            self.messages.append(lambda: self.pull(group, source, import_id, claim, chunk, cursor))

    def ask_log(self, gid: int, command: list[Any], on_answer: Callable[[list[Any]], None]) -> None:
        """A request that goes through the other group's log, and comes back."""

        def deliver() -> None:
            self.propose(self.groups[gid], command, lambda result: self.messages.append(lambda: on_answer(result)))

        self.messages.append(deliver)

    def begin(self, group: Group, number: int) -> None:
        config_num = group.machine.owned_since(number)
        candidates = list(group.machine.past_owners(group.engine, number))
        source = self.rng.choice(candidates)
        attempt = self.rng.choice((1, 1, 2, 3))

        def listed(result: list[Any]) -> None:
            self.seen[f"list answered {result[0]}"] += 1
            if result[0] == OK:
                self.propose(group, [op.IMPORT_START, number, config_num, attempt, source, result[1]])
            elif result[0] == LIST_LOST and self.healed:
                again = [op.EXPORT_LIST, number, group.gid, config_num, result[1] + 1]
                self.ask_log(source, again, lambda result: listed_again(again[-1], result))

        def listed_again(attempt: int, result: list[Any]) -> None:
            if result[0] == OK:
                self.propose(group, [op.IMPORT_START, number, config_num, attempt, source, result[1]])

        self.ask_log(source, [op.EXPORT_LIST, number, group.gid, config_num, attempt], listed)

    def asked(self, group: Group, import_id: list[int], result: list[Any]) -> None:
        self.seen[f"ask answered {result[0]}"] += 1
        if result[0] == NOT_HOLDER:
            under_way = group.machine.import_of(import_id[0])
            bound = under_way is not None and [import_id[0], *under_way[0], under_way[1].list_id] == import_id
            assert not bound, "an ask goes to whoever gave the list, and that group keeps the shard until the release"
        if result[0] in (SUPERSEDED, LIST_LOST):
            self.propose(group, [op.IMPORT_DROP, *import_id])

    def pull(
        self,
        group: Group,
        source: Group,
        import_id: list[int],
        claim: tuple[int, int, int, int],
        chunk: int,
        cursor: bytes,
    ) -> None:
        try:
            rows, after = source.machine.pull(source.engine, import_id[0], claim, cursor)
        except ListLost:
            self.lost(group, import_id)
            return
        self.reply(group, [op.IMPORT_CHUNK, *import_id, chunk, rows, after, source.index])

    def changes(
        self,
        group: Group,
        source: Group,
        import_id: list[int],
        claim: tuple[int, int, int, int],
        chunk: int,
        since: int,
        cursor: bytes,
        asked: bool,
    ) -> None:
        try:
            (rows, after), final = source.machine.changed_rows(source.engine, import_id[0], claim, since, cursor)
        except ListLost:
            if not asked:  # who has asked is let go by the answer to the ask only
                self.lost(group, import_id)
            return
        if not asked or (final is not None and after is not None):
            self.reply(group, [op.IMPORT_CHUNK, *import_id, chunk, rows, after, source.index])
        elif final is not None:
            install = [op.IMPORT_INSTALL, *import_id, chunk, rows, *final]
            self.messages.append(lambda: self.propose(group, install, self.installed))

    def installed(self, result: list[Any]) -> None:
        self.seen["installed"] += result[1]

    def lost(self, group: Group, import_id: list[int]) -> None:
        self.seen["list lost"] += 1
        self.messages.append(lambda: self.propose(group, [op.IMPORT_DROP, *import_id]))

    def reply(self, group: Group, command: list[Any]) -> None:
        self.messages.append(lambda: self.propose(group, command))

    # ---- what must hold

    def check_owners(self) -> None:
        for number in range(SHARDS):
            serving = [gid for gid, group in self.groups.items() if group.machine.serves(number)]
            assert len(serving) <= 1, f"groups {serving} both serve shard {number}"

    def is_settled(self) -> bool:
        latest = self.configs[-1]
        return not any(group.proposed for group in self.groups.values()) and all(
            group.machine.config_num == latest.num
            and not group.machine.releases()
            and group.machine.shard_states() == [(number, ShardState.SERVING) for number in latest.shards_of(group.gid)]
            for group in self.groups.values()
        )

    def heal(self, steps_max: int) -> None:
        """Nothing is lost or changed any more: everything must come to rest."""
        self.healed = True
        for _ in range(steps_max):
            self.calm_step()
            if not self.messages and self.is_settled():
                return
        raise AssertionError(f"not settled: {[group.machine.shard_states() for group in self.groups.values()]}")

    def check_rows(self) -> None:
        """Every shard's rows are at its owner, and nothing of any shard is left anywhere else."""
        left = {gid: {key for key in group.engine.rows if key[:1] in b"sm"} for gid, group in self.groups.items()}
        for number in range(SHARDS):
            group = self.groups[self.configs[-1].owner(number)]
            incarnation = group.machine._shards.here[number].incarnation
            mine, its = rows_of(group, number, incarnation), rows_of(self.oracle, number, Incarnation(1, 0))
            if self.expiries:
                mine, its = ({k: v for k, v in rows.items() if k[:1] != b"c"} for rows in (mine, its))
            assert mine == its, f"shard {number}"
            for rows in (group, self.oracle):
                rows.machine.load(rows.engine)
            assert group.machine._shards.here[number].meta()[2:] == self.oracle.machine._shards.here[number].meta()[2:]
            prefix = shard_prefix(number, incarnation)
            left[group.gid] = {key for key in left[group.gid] if not key.startswith(prefix)}
            left[group.gid].remove(b"m" + number.to_bytes(2))
        assert not any(left.values()), left


def rows_of(replica: Replica[KvMachine], number: int, incarnation: Incarnation) -> dict[bytes, bytes]:
    """The shard's rows by suffix."""
    prefix = shard_prefix(number, incarnation)
    return {key[len(prefix) :]: row for key, row in replica.engine.rows.items() if key.startswith(prefix)}


def run_world(seed: int, steps: int = 600, *, expiries: bool = False) -> World:
    world = World(seed, expiries=expiries)
    for _ in range(steps):
        world.step()
    world.heal(6_000)
    world.check_rows()
    return world
