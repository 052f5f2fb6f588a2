"""Options that can't be right are refused with a line that names them."""

from __future__ import annotations

from typing import Any

import pytest

from raftkv.daemons.options import BadOptions, DaemonOptions

GOOD: dict[str, Any] = {
    "role": "shardkv",
    "gid": 1,
    "replica": 0,
    "listen": "127.0.0.1:7000",
    "peers": {0: "127.0.0.1:7000", 1: "127.0.0.1:7001"},
    "controllers": ("127.0.0.1:6000",),
    "data_dir": "d",
}


def test_good_options() -> None:
    options = DaemonOptions(**GOOD)
    assert options.address == "127.0.0.1:7000"
    assert options.name == "replica 0 of group 1"
    assert DaemonOptions(**{**GOOD, "advertise": "host:1"}).address == "host:1"
    assert options.redis_address is None
    assert DaemonOptions(**{**GOOD, "redis_listen": "127.0.0.9:6379"}).redis_address == "127.0.0.9:6379"
    anywhere = {**GOOD, "redis_listen": "0.0.0.0:6379", "advertise": "host:1"}
    assert DaemonOptions(**anywhere).redis_address == "host:6379"
    assert DaemonOptions(**{**GOOD, "role": "controller", "gid": 0}).name == "controller 0"
    assert DaemonOptions(**{**GOOD, "role": "coordinator"}).name == "coordinator 0"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"replica": 3}, "--id 3"),
        ({"replica": -1}, "--id"),
        ({"gid": 0}, "--gid"),
        ({"listen": "nowhere"}, "--listen"),
        ({"listen": "h:0"}, "--listen"),
        ({"peers": {0: "a:1", 1: "a:1"}}, "--peers"),
        ({"peers": {0: "a:1", 1: "b"}}, "--peers"),
        ({"controllers": ()}, "--controllers"),
        ({"controllers": ("x",)}, "--controllers"),
        ({"advertise": "x"}, "--advertise"),
        ({"metrics_listen": "x"}, "--metrics-listen"),
        ({"metrics_listen": "127.0.0.1:7000"}, "--metrics-listen is the same address as --listen"),
        ({"redis_listen": "x"}, "--redis-listen"),
        ({"redis_listen": "127.0.0.1:7000"}, "--redis-listen is the same address"),
        ({"redis_listen": "127.0.0.1:1", "metrics_listen": "127.0.0.1:1"}, "--redis-listen is the same address"),
        ({"redis_mode": "sentinel"}, "--redis-mode"),
        ({"shards": 0}, "--shards"),
        ({"shards": 16_385}, "--shards"),
        ({"snapshot_bytes": 0}, "--snapshot-bytes"),
        ({"reads": "dirty"}, "--reads"),
        ({"data_dir": ""}, "--data-dir"),
        ({"role": "king"}, "king"),
        ({"role": "coordinator", "gid": 0}, "--gid"),
        ({"role": "coordinator", "controllers": ()}, "a coordinator needs --controllers"),
    ],
)
def test_bad_options(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(BadOptions) as refusal:
        DaemonOptions(**{**GOOD, **changes})
    assert named in str(refusal.value) and "\n" not in str(refusal.value)
