"""The README's tutorial on containers, carried out as it stands there, and cleaned up as it says."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator

import pytest

from tests.docker import stack

pytestmark = [pytest.mark.docker, pytest.mark.timeout(600)]

BYSTANDER = f"{stack.NAME}-bystander"


def steps() -> list[tuple[str, str]]:
    """The lines that begin with `$ `, each with what the README shows below it."""
    readme = (stack.ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.split("\n## Containers\n")[1].split("\n## ")[0]
    (tutorial,) = [block for block in re.findall(r"```\n(.*?)```", section, re.DOTALL) if block.startswith("$ ")]
    commands = re.split(r"^\$ ", tutorial, flags=re.MULTILINE)[1:]
    return [(command, shown) for command, _, shown in (text.partition("\n") for text in commands)]


def pattern(shown: str) -> str:
    """What the README shows; … stands for anything on a line."""
    return "[^\\n]*".join(map(re.escape, shown.split("…")))


@pytest.fixture
def nothing(engine: None) -> None:
    """What other tests have started is gone: the tutorial starts its own."""
    stack.remove()


def test_containers_of_others_are_left_alone(nothing: None) -> None:
    label = f"raftkv.test={stack.NAME}"
    stack.out("docker", "create", "--name", "ctl", "--label", label, stack.base_image(), "true")
    try:
        with pytest.raises(pytest.fail.Exception, match="names that these tests need: ctl; they are left"):
            stack.fail_on_containers_of_others()
        assert stack.ours(label) == ["ctl"]
    finally:
        stack.out("docker", "rm", "ctl")


@pytest.fixture
def bystander(nothing: None) -> Iterator[str]:
    """A volume that is called nearly like those of the cluster, and isn't the cluster's."""
    label = f"raftkv.project={stack.NAME}"
    stack.out("docker", "volume", "create", "--label", label, BYSTANDER)
    yield label
    stack.remove()  # what a tutorial that failed has left
    stack.out("docker", "volume", "rm", BYSTANDER)


def test_the_tutorial(bystander: str) -> None:
    assert len(steps()) >= 12
    for command, shown in steps():
        command = command.replace("docker-compose", " ".join(stack.COMPOSE))
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", command],
            cwd=stack.ROOT,
            env=stack.ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=580,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stdout[-1000:]}{done.stderr[-2000:]}"
        if " up " not in command and " down" not in command:
            assert re.fullmatch(pattern(shown), done.stdout), f"{command}: {done.stdout!r} instead of {shown!r}"
    assert stack.ours() == []
    assert stack.ours(bystander) == [BYSTANDER]
