"""A fake cluster in a thread of its own, for what doesn't run in its loop: programs, and the SDK without await."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from tests.client.fakes import FakeCluster


class Served:
    """A fake cluster in a thread of its own."""

    def __init__(self, cluster: FakeCluster | None = None) -> None:
        self.cluster = cluster or FakeCluster()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self.cluster.start(), self._loop).result(5)

    def do(self, action: Callable[[], object]) -> None:
        async def run() -> None:
            action()

        asyncio.run_coroutine_threadsafe(run(), self._loop).result(5)

    def restart_groups(self) -> None:
        async def start() -> None:
            for servers in self.cluster.groups.values():
                for server in servers:
                    await server.start()

        asyncio.run_coroutine_threadsafe(start(), self._loop).result(5)

    def stop(self) -> None:
        async def stop() -> None:
            self.cluster.stop()
            await asyncio.sleep(0.01)

        asyncio.run_coroutine_threadsafe(stop(), self._loop).result(5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
