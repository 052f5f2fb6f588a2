"""The cluster of compose/tls.yaml: all of it speaks TLS, the third group too, and nothing else does."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.docker import stack

FILES = ("compose.yaml", "tls.yaml", "scale.yaml", "scale-tls.yaml")
WITH_TLS = [word for name in FILES for word in ("-f", f"compose/{name}")]
NO_FILES = [word for name in ("CERT", "KEY", "CA") for word in ("-e", f"RAFTKV_TLS_{name}=")]


def services(name: str) -> set[str]:
    text = (stack.ROOT / "compose" / name).read_text(encoding="utf-8")
    return set(re.findall(r"^  ([a-z0-9-]+):", text.split("\nservices:\n")[1].split("\nvolumes:\n")[0], re.MULTILINE))


def test_no_service_is_forgotten() -> None:
    assert services("tls.yaml") == services("compose.yaml") | {"certificates"}
    assert services("scale-tls.yaml") == services("scale.yaml")


@pytest.fixture(scope="module")
def cluster(engine: None) -> Iterator[None]:
    stack.compose(*WITH_TLS, "up", "--build", "-d", timeout_s=580)
    yield
    stack.compose(*WITH_TLS, "down", "-v", "--remove-orphans")


@pytest.mark.docker
@pytest.mark.timeout(600)
def test_everything_speaks_tls(cluster: None) -> None:
    assert stack.ctl("join", "3:shardkv3-0:8000,shardkv3-1:8000,shardkv3-2:8000") == "OK\n"
    stack.wait_healthy()
    across = "begin\n" + "".join(f"put key{number} {number}\n" for number in range(9)) + "commit\n"
    assert stack.run("docker", "exec", "-i", "kv", "raftkv-kv", stdin=across).returncode == 0
    assert stack.kv("get", "key8") == "8\n"
    for container in ("controller-0", "shardkv3-2", "coordinator-1"):
        assert container.split("-")[1] in stack.out("docker", "exec", container, "raftkv", "health")
    plain = stack.run("docker", "exec", *NO_FILES, "kv", "raftkv-kv", "get", "key8")
    assert (plain.returncode, plain.stdout) == (1, "")
    assert "speaks TLS; give --tls-cert, --tls-key and --tls-ca" in plain.stderr
    assert stack.run("docker", "exec", "kv", "cat", "/tls/ca.key").returncode != 0
    stack.compose(*WITH_TLS, "down")
    stack.compose(*WITH_TLS, "up", "-d")
    assert stack.kv("get", "key8") == "8\n"
