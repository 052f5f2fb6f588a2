"""HOST:PORT, and what isn't."""

from __future__ import annotations

import pytest

from raftkv.protocol.addresses import format_address, parse_address, parse_addresses
from raftkv.protocol.errors import BadRequest


def test_good_addresses() -> None:
    assert parse_address("localhost:7000") == ("localhost", 7000)
    assert parse_address("[::1]:1") == ("::1", 1)
    assert format_address(*parse_address("[::1]:65535")) == "[::1]:65535"
    assert parse_addresses(["a:1", " b:2 ", "a:1"]) == ("a:1", "b:2")


@pytest.mark.parametrize(
    "text",
    ["", ":", "host", "host:", ":7000", "host:0", "host:65536", "host:-1", "host:x", "host:7000000000",
     "host:٣", "::1:7000", "a b:1", "host:1\n", "host: 1", "[]:1"],
)  # fmt: skip
def test_bad_addresses(text: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_address(text)
    assert str(caught.value).isprintable()
