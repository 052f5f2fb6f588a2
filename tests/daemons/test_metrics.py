"""One daemon's answers over its life: before it has started, while it serves, when it stops."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from http import HTTPStatus
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from raftkv.daemons.daemon import Daemon
from raftkv.daemons.meters import Meters
from raftkv.daemons.metrics import MetricsServer, _outcome
from raftkv.daemons.metrics_table import METRICS
from raftkv.daemons.options import DaemonOptions
from raftkv.protocol.errors import BY_CODE, NotLeader
from tests.system.cluster import free_port


def names(server: MetricsServer) -> list[str]:
    text = server._metrics("").body.decode()
    return [
        family.name + ("_total" if family.type == "counter" else "")
        for family in text_string_to_metric_families(text)
        if family.name.startswith("raftkv_")
    ]


def test_a_life(tmp_path: Path) -> None:
    async def run() -> None:
        address = f"127.0.0.1:{free_port()}"
        options = DaemonOptions("controller", 0, address, {0: address}, str(tmp_path / "d"))
        meters = Meters(time.perf_counter)
        engine = partial(meters.engine.engine, cache_bytes=1 << 20)
        daemon = Daemon(options, meters.disk, engine, pytest.fail, make_session=meters.requests.session)
        server = MetricsServer(daemon, meters)

        starting = b"[-]started failed: the data directory is being opened\n"
        assert server._readyz("")[:2] == (HTTPStatus.SERVICE_UNAVAILABLE, starting)
        assert server._livez("")[:2] == (HTTPStatus.OK, b"ok\n")
        assert names(server) == ["raftkv_build_info", "raftkv_ready"]

        await daemon.start()
        while server._readyz("").status != HTTPStatus.OK:
            await asyncio.sleep(0.01)
        assert names(server) == [metric.name for metric in METRICS if "controller" in metric.roles]
        assert server._readyz("verbose").body == b"[+]formed ok\n[+]leader ok\n[+]applied ok\nok\n"
        assert daemon.replica is not None

        daemon.store.wal._ended = True  # as a failed write leaves it, just before the process ends
        failed = b"[-]store failed: the log has failed\n"
        assert server._livez("")[:2] == (HTTPStatus.SERVICE_UNAVAILABLE, failed)
        daemon.store.wal._ended = False

        await daemon.stop()
        stopping = b"[-]started failed: it is stopping\n"
        assert server._readyz("")[:2] == (HTTPStatus.SERVICE_UNAVAILABLE, stopping)
        assert names(server) == ["raftkv_build_info", "raftkv_ready"]
        assert server._livez("")[:2] == (HTTPStatus.OK, b"ok\n")
        server.close()
        meters.disk.close()

    asyncio.run(run())


def test_errors_have_names_as_labels() -> None:
    assert _outcome(NotLeader.code) == "not_leader"
    outcomes = [_outcome(code) for code in BY_CODE]
    assert len(set(outcomes)) == len(outcomes)
    assert _outcome(9_999) == "other"


def test_names_are_as_prometheus_wants_them() -> None:
    """Counters end in _total and nothing else does; no name stands there twice."""
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric.name
        assert metric.name.startswith("raftkv_") and metric.help.endswith(".") and metric.roles
