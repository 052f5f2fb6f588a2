"""Failpoints: nothing happens unless one was armed, and what the variable says is read exactly."""

from __future__ import annotations

import asyncio

import pytest

from raftkv.daemons.failpoints import NAMES, VARIABLE, Failpoints, from_environment


def passing(failpoints: Failpoints) -> list[str]:
    """The failpoints that hold somebody up."""

    async def main() -> list[str]:
        loop = asyncio.get_running_loop()
        slow = []
        for name in NAMES:
            began = loop.time()
            await failpoints.reach(name)
            done = loop.create_future()
            failpoints.pass_by(name, done.set_result, None)
            if not done.done():
                slow.append(name)
            await done
            assert (name in slow) == (loop.time() - began >= 0.04)
        return slow

    return asyncio.run(main())


def test_nothing_happens_unless_it_was_armed() -> None:
    failpoints = Failpoints()
    assert passing(failpoints) == []
    failpoints.arm("group got prepare", lambda: 0.02)
    assert passing(failpoints) == ["group got prepare"]
    failpoints.disarm("group got prepare")
    assert passing(failpoints) == []


def test_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    crashes: list[str] = []
    monkeypatch.delenv(VARIABLE, raising=False)
    assert passing(from_environment(crashes.append)) == []
    monkeypatch.setenv(VARIABLE, "coordinator answered=crash, group got decision=stall:0.02")
    assert passing(from_environment(crashes.append)) == ["group got decision"]
    assert crashes == ["failpoint: coordinator answered"] * 2


@pytest.mark.parametrize("text", ["x", "group got prepare", "group got prepare=burn", "nowhere=crash", "=crash",
                                  "group got prepare=stall:soon"])  # fmt: skip
def test_nonsense_in_the_variable(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(ValueError):
        from_environment(lambda text: None)
