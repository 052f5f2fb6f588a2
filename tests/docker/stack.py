"""A cluster of containers for the tests, of the files that users have, under a project name of its own.

Compose labels all that it creates with that name, and the image is labelled with it too; only what carries the label
is ever removed. The containers' own names are those of the README: whoever has them already keeps them, and the tests
fail. What Docker's build cache holds stays, as after any build.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from raftkv.machines.slots import shard_of

ROOT = Path(__file__).parents[2]
NAME = f"raftkv-test-{os.getpid()}"
LABEL = f"com.docker.compose.project={NAME}"
NETWORK = f"{NAME}_default"
COMPOSE = ["docker-compose"] if shutil.which("docker-compose") else ["docker", "compose"]
WITH_THIRD_GROUP = ("-f", "compose/compose.yaml", "-f", "compose/scale.yaml")
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith(("RAFTKV_", "COMPOSE_"))},
    "COMPOSE_PROJECT_NAME": NAME,
    "RAFTKV_IMAGE": NAME,
}
GROUPS: tuple[tuple[str, int | None], ...] = (
    ("controller", None),
    ("shardkv", 1),
    ("shardkv", 2),
    ("coordinator", None),
)
DAEMONS = [
    f"{group}-{replica}" for group in ("controller", "shardkv1", "shardkv2", "coordinator") for replica in range(3)
]
POLL_S = 0.05


def why_no_engine() -> str:
    """Why there can be no containers here; empty if there can."""
    for command in (["docker", "version"], [*COMPOSE, "version"]):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"no containers here: {error}"
        if done.returncode:
            return f"no containers here: `{' '.join(command)}`: {done.stderr.strip().splitlines()[-1]}"
    return ""


def run(*command: str, stdin: str = "", timeout_s: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the root, as a user would there."""
    return subprocess.run(
        command,
        cwd=ROOT,
        input=stdin,
        capture_output=True,
        text=True,
        env={**ENVIRONMENT, **environment},
        timeout=timeout_s,
        check=False,
    )


def out(*command: str, timeout_s: float = 120, **environment: str) -> str:
    """The same, for a command that must succeed: what it printed."""
    done = run(*command, timeout_s=timeout_s, **environment)
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout


def compose(*arguments: str, timeout_s: float = 280, **environment: str) -> str:
    return out(*COMPOSE, *arguments, timeout_s=timeout_s, **environment)


def base_image() -> str:
    return (ROOT / "Dockerfile").read_text(encoding="utf-8").split("ARG BASE_IMAGE=")[1].split()[0]


# ---- whose containers there are


def ours(label: str = LABEL) -> list[str]:
    """What there is that carries the label: containers, volumes, networks."""
    chosen = ["--filter", f"label={label}"]
    listings = (
        ["docker", "ps", "--all", "--format", "{{.Names}}", *chosen],
        ["docker", "volume", "ls", "--format", "{{.Name}}", *chosen],
        ["docker", "network", "ls", "--format", "{{.Name}}", *chosen],
    )
    return [line for listing in listings for line in out(*listing).splitlines()]


def fail_on_containers_of_others() -> None:
    """Fail if a container that isn't ours has a name that the compose files give."""
    files = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "compose").glob("*.yaml"))]
    names = {name for text in files for name in re.findall(r"container_name: ([\w-]+)", text)}
    listed = out("docker", "ps", "--all", "--format", '{{.Names}}\t{{.Label "com.docker.compose.project"}}')
    taken = [
        f"{name} (of the compose project {project})" if project else name
        for name, project in (line.split("\t") for line in listed.splitlines())
        if name in names and project != NAME
    ]
    if taken:
        pytest.fail(
            f"there are containers with the names that these tests need: {', '.join(taken)}; they are left as they "
            "are: remove them yourself, with `docker-compose -p PROJECT down` or `docker rm`, and come again",
            pytrace=False,
        )


def remove() -> None:
    """Containers, volumes and networks of the test, whichever of the compose files they are of."""
    CTL.end()
    compose(*WITH_THIRD_GROUP, "down", "-v", "--remove-orphans")


def remove_image() -> None:
    images = out("docker", "images", "--quiet", "--filter", f"label=raftkv.project={NAME}").split()
    if images:
        out("docker", "rmi", *dict.fromkeys(images))


def mend() -> None:
    """What a failed test has frozen, stopped or cut off is back."""
    listed = out("docker", "ps", "--filter", f"label={LABEL}", "--format", "{{.Names}} {{.State}}")
    rows = [line.split() for line in listed.splitlines()]
    paused = [name for name, state in rows if state == "paused"]
    if paused:
        out("docker", "unpause", *paused)
    if not set(DAEMONS) <= {name for name, _ in rows}:
        compose("up", "-d", "--remove-orphans")
    connected = out(
        "docker", "network", "inspect", "--format", "{{range .Containers}}{{.Name}} {{end}}", NETWORK
    ).split()
    for name in set(DAEMONS) - set(connected):
        out("docker", "network", "connect", NETWORK, name)


# ---- clients


def kv(*words: str) -> str:
    """One command, as a user runs it in the container `kv`."""
    return out("docker", "exec", "kv", "raftkv-kv", *words)


def ctl(*words: str) -> str:
    return out("docker", "exec", "ctl", "raftkv-ctl", *words)


class Shell:
    """A client that is held open: a line in, a line out. `errors` goes where its standard error is to go."""

    def __init__(self, container: str, *command: str, errors: int = subprocess.PIPE) -> None:
        self.process = subprocess.Popen(
            ["docker", "exec", "-i", container, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )

    def say(self, *lines: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("".join(f"{line}\n" for line in lines))
        self.process.stdin.flush()

    def hear(self) -> str:
        """Its next line; empty if it has ended."""
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def ask(self, line: str) -> str:
        self.say(line)
        return self.hear().rstrip("\n")

    def end(self) -> tuple[int, str, str]:
        """Its exit status, and the rest of what it said."""
        said, errors = self.process.communicate(timeout=60)
        return self.process.returncode, said, errors or ""


class Ctl:
    """`raftkv-ctl` in the container `ctl`, held open, since its start costs more than what is asked of it."""

    def __init__(self) -> None:
        self._shell: Shell | None = None

    def ask(self, line: str) -> dict[str, Any] | None:
        """The JSON object that it answers; None if it failed."""
        for _ in range(2):  # the container may be another one than the last time
            if self._shell is None:
                command = "exec raftkv-ctl -o json --keep-going 2>&1"
                self._shell = Shell("ctl", "sh", "-c", command, errors=subprocess.DEVNULL)
            try:
                answer = self._shell.ask(line)
            except BrokenPipeError:
                answer = ""
            if answer.startswith("{"):
                found: dict[str, Any] = json.loads(answer)
                return found
            self.end()  # whatever else it has to say
            if answer:
                return None
        return None

    def end(self) -> None:
        shell, self._shell = self._shell, None
        if shell is not None:
            shell.process.kill()
            shell.process.communicate()


CTL = Ctl()


def status() -> dict[str, Any]:
    deadline_s = time.monotonic() + 60
    while (report := CTL.ask("status")) is None:
        assert time.monotonic() < deadline_s, "`raftkv-ctl status` fails"
        time.sleep(POLL_S)
    return report


def leader(role: str, gid: int | None, *, but: str = "") -> dict[str, Any]:
    """What Status says of the leader, and its container as `container`, which is another one than `but`."""
    deadline_s = time.monotonic() + 30
    while True:
        for replica in status()["replicas"]:
            container = replica["addr"].split(":")[0]
            if (replica["role"], replica["gid"], replica["state"]) == (role, gid, "leader") and container != but:
                return {**replica, "container": container}
        assert time.monotonic() < deadline_s, f"no leader of {role} {gid}"
        time.sleep(POLL_S)


def wait_healthy(timeout_s: float = 60) -> None:
    """Until Status finds nothing wrong."""
    deadline_s = time.monotonic() + timeout_s
    while not (report := status())["healthy"]:
        assert time.monotonic() < deadline_s, report["problems"]
        time.sleep(POLL_S)


def in_turn() -> Iterator[str]:
    """Each daemon's container once; of each group, its leader comes first if it is still to come."""
    for role, gid in GROUPS:
        prefix = f"{role}{gid or ''}-"
        left = {name for name in DAEMONS if name.startswith(prefix)}
        assert len(left) == 3
        while left:
            now = leader(role, gid)["container"]
            chosen = now if now in left else min(left)
            left.remove(chosen)
            yield chosen


def write_to_every_shard() -> None:
    """Returns when each of them has been written to."""
    puts = "".join(f"put {key} 1\n" for shard in range(10) for key in keys_of([shard], 1, "everywhere-"))
    done = run("docker", "exec", "-i", "-e", "RAFTKV_TIMEOUT=60", "kv", "raftkv-kv", stdin=puts)
    assert (done.returncode, done.stdout) == (0, "OK\n" * 10), done.stderr


def keys_of(shards: Sequence[int], count: int, prefix: str) -> list[str]:
    """Keys of these shards of ten."""
    numbers = (f"{prefix}{number}" for number in range(10_000))
    return [key for key in numbers if shard_of(key.encode(), 10) in shards][:count]


def keys_at(gid: int, count: int, prefix: str) -> list[str]:
    """Keys that the group serves."""
    return keys_of([row["shard"] for row in status()["shards"] if row["gid"] == gid], count, prefix)
