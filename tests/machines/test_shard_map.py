"""The map as a value: its encoding, its printed form, and what isn't a map."""

from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raftkv.machines.shard_map import ShardMap


def test_prints_as_the_query_line() -> None:
    config = ShardMap(1, (1,) * 10, {1: ("h:1", "h:2", "h:3")})
    assert str(config) == "{Num:1 Shards:[1 1 1 1 1 1 1 1 1 1] Groups:map[1:[h:1 h:2 h:3]]}"
    assert str(ShardMap.initial(10)) == "{Num:0 Shards:[0 0 0 0 0 0 0 0 0 0] Groups:map[]}"
    two = ShardMap(7, (1, 12), {1: ("a:1",), 12: ("b:2", "c:3")})
    assert str(two) == "{Num:7 Shards:[1 12] Groups:map[1:[a:1] 12:[b:2 c:3]]}"


@st.composite
def maps(draw: st.DrawFn) -> ShardMap:
    gids = sorted(draw(st.sets(st.integers(1, 2**31 - 1), max_size=5)))
    groups = {gid: tuple(draw(st.lists(st.text("ah:1é\x00", max_size=8), max_size=3))) for gid in gids}
    owners = draw(st.lists(st.sampled_from(gids or [0]), min_size=1, max_size=20))
    return ShardMap(draw(st.integers(0, 2**40)), tuple(owners), groups)


@given(maps())
def test_round_trip(config: ShardMap) -> None:
    decoded = ShardMap.decode(config.encode())
    assert decoded == config
    assert decoded.encode() == config.encode()
    assert hash(decoded) == hash(config)


def test_encoding_is_the_documented_one() -> None:
    config = ShardMap(3, (2, 5), {2: ("h:1",), 5: ("h:2", "h:3")})
    assert msgpack.unpackb(config.encode()) == [3, [2, 5], [[2, ["h:1"]], [5, ["h:2", "h:3"]]]]
    given_up = ShardMap(4, (0, 0), {}, 70)
    assert msgpack.unpackb(given_up.encode()) == [4, [0, 0], [], 70]
    assert ShardMap.decode(given_up.encode()) == given_up


@pytest.mark.parametrize(
    "unpacked",
    [
        None,
        7,
        [],
        [1, [0]],
        [-1, [0], []],
        [True, [0], []],
        [1, [], []],
        [1, [0] * 16385, []],
        [1, [1], []],
        [1, [0], [[1, ["h:1"]]]],
        [1, [2], [[1, ["h:1"]]]],
        [1, ["1"], [[1, ["h:1"]]]],
        [1, [[]], [[1, ["h:1"]]]],
        [1, [1], [[1, "h:1"]]],
        [1, [1], [[1, [b"h:1"]]]],
        [1, [1], [[1]]],
        [1, [1], {}],
        [1, [1], [[0, []], [1, []]]],
        [1, [1], [[2, []], [1, []]]],
        [1, [1], [[1, []], [1, []]]],
    ],
)
def test_what_is_not_a_map_is_refused(unpacked: object) -> None:
    with pytest.raises(ValueError, match="not an encoded shard map"):
        ShardMap.decode(msgpack.packb(unpacked))


@given(st.binary(max_size=64))
def test_any_bytes_decode_or_are_refused(encoded: bytes) -> None:
    try:
        ShardMap.decode(encoded)
    except ValueError as error:
        assert "not an encoded shard map" in str(error)


def test_owner_and_shards_of() -> None:
    config = ShardMap(1, (1, 2, 1), {1: ("h:1",), 2: ("h:2",)})
    assert [config.owner(shard) for shard in range(3)] == [1, 2, 1]
    assert config.shards_of(1) == [0, 2]
    assert config.shards_of(3) == []
    for shard in (-1, 3):
        with pytest.raises(IndexError):
            config.owner(shard)
