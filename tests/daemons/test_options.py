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
