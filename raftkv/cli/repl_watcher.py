"""What happens to the cluster while somebody sits in front of the prompt: configurations and leaders.

It has a client of its own, asks one controller with a long poll, and the leader of each group now and then; so it
knows, too, whether anybody answers. It never prints: whoever made it is told, in words, and says it when it may.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from raftkv.cli.health import Answer, ask
from raftkv.cli.results import count

if TYPE_CHECKING:
    from raftkv.cli.repl_known import Known
    from raftkv.cli.session import ControllersClient
    from raftkv.machines.shard_map import ShardMap

CLIENT_TIMEOUT_S = 3.0
"""So long nobody answers until the prompt says so."""
RETRY_S = 0.5
PAUSE_S = 0.05
"""Between two long polls, for a controller that answers at once, whatever it is asked."""
LOOK_S = 2.0
"""How often the leader of each group is asked whether it still is."""
LEADER_TIMEOUT_S = 1.5
SILENT_LOOKS = 2
"""After so many looks without a leader it is said: an election takes less."""
CONTROLLERS = 0
"""Stands for the controllers among the gids of groups."""


class Notice(NamedTuple):
    """One line for the user; about configuration `config_num`, if that isn't None."""

    text: str
    config_num: int | None = None


class Watcher:
    """Runs until it is cancelled. `connected` is None until it is known."""

    def __init__(
        self,
        client: ControllersClient,
        controllers: Sequence[str],
        known: Known,
        tell: Callable[[Notice], Awaitable[None]],
        changed: Callable[[], None],
    ) -> None:
        self.connected: bool | None = None
        self._client = client
        self._controllers = controllers
        self._known = known
        self._tell = tell
        self._changed = changed
        self._leaders: dict[int, str] = {}
        self._terms: dict[int, int] = {}
        self._silent_looks: dict[int, int] = {}

    async def run(self) -> None:
        """Watch; closes the client at the end."""
        from raftkv.client.tasks import gather_ordered

        try:
            await gather_ordered([self._follow_map(), self._follow_leaders()], 2)
        except Exception as error:  # a bug: the shell goes on without, and its user should know
            await self._tell(Notice(f"the cluster is not watched any more: {type(error).__name__}: {error}"))
        finally:
            await self._client.close()

    # ---- the map

    async def _follow_map(self) -> None:
        from raftkv.protocol.errors import RaftKVError

        while True:
            before = self._known.shard_map
            try:
                latest = await self._client.wait_beyond(before.num if before is not None else -1)
            except (RaftKVError, OSError):
                self._set_connected(False)
                await asyncio.sleep(RETRY_S)
                continue
            self._set_connected(True)
            before = self._known.shard_map  # a Query may have been faster
            if before is None:
                self._known.shard_map = latest
            elif latest.num > before.num:
                self._known.shard_map = latest
                await self._tell(Notice(describe_change(before, latest), latest.num))
            await asyncio.sleep(PAUSE_S)

    def _set_connected(self, connected: bool) -> None:
        if connected != self.connected:
            self.connected = connected
            self._changed()

    # ---- the leaders

    async def _follow_leaders(self) -> None:
        while True:
            if self._known.shard_map is not None and self.connected:
                groups = {CONTROLLERS: tuple(self._controllers), **self._known.shard_map.groups}
                for gid in self._leaders.keys() - groups.keys():
                    del self._leaders[gid]
                await asyncio.gather(*(self._look_at(gid, addresses) for gid, addresses in groups.items()))
            self._changed()  # a transaction may have lost its locks meanwhile, and the prompt says so
            await asyncio.sleep(LOOK_S)

    async def _look_at(self, gid: int, addresses: Sequence[str]) -> None:
        """Ask the leader; if it isn't any more, ask all."""
        known = self._leaders.get(gid, "")
        answers = await ask(self._client, [known], LEADER_TIMEOUT_S) if known in addresses else {}
        if not _leads(answers.get(known)):
            answers = await ask(self._client, addresses, LEADER_TIMEOUT_S)
        leader, term = leader_among(answers)
        if leader is None:
            self._silent_looks[gid] = self._silent_looks.get(gid, 0) + 1
            if self._silent_looks[gid] == SILENT_LOOKS and self.connected:
                await self._tell(Notice(f"{_name(gid)}: no leader answers"))
            return
        was_said = self._silent_looks.pop(gid, 0) >= SILENT_LOOKS
        if term < self._terms.get(gid, 0):
            return  # whoever says so was left behind
        self._leaders[gid], self._terms[gid] = leader, term
        if was_said or (known and known != leader):
            await self._tell(Notice(f"{_name(gid)}: {leader} leads now"))


def leader_among(answers: Mapping[str, Answer | None]) -> tuple[str | None, int]:
    """The address and term of the one that leads, by the highest term; (None, 0) if none does."""
    leading = [(int(answer["term"]), address) for address, answer in answers.items() if answer and _leads(answer)]
    if not leading:
        return None, 0
    term, address = max(leading)
    return address, term


def _leads(answer: Answer | None) -> bool:
    return answer is not None and answer.get("state") == "leader"


def _name(gid: int) -> str:
    return "the controllers" if gid == CONTROLLERS else f"group {gid}"


def describe_change(before: ShardMap, after: ShardMap) -> str:
    """What is different in the later configuration, in one line."""
    parts = []
    for verb, gids in (("joined", after.groups.keys() - before.groups), ("left", before.groups.keys() - after.groups)):
        if gids:
            parts.append(f"{'group' if len(gids) == 1 else 'groups'} {', '.join(map(str, sorted(gids)))} {verb}")
    moved = sum(old != new for old, new in zip(before.owners, after.owners, strict=False))
    if moved:
        parts.append(f"{count(moved, 'shard')} got another owner")
    return f"configuration {after.num}: {'; '.join(parts) or 'nothing differs'}"
