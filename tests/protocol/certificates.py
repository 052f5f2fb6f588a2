"""CAs and certificates for tests, made by openssl."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate")

HERE = "IP:127.0.0.1,DNS:localhost"
NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


class Files(NamedTuple):
    """Paths, in the order of --tls-cert, --tls-key and --tls-ca."""

    cert: str
    key: str
    ca: str

    @property
    def options(self) -> list[str]:
        return ["--tls-cert", self.cert, "--tls-key", self.key, "--tls-ca", self.ca]

    @property
    def environment(self) -> dict[str, str]:
        return {"RAFTKV_TLS_CERT": self.cert, "RAFTKV_TLS_KEY": self.key, "RAFTKV_TLS_CA": self.ca}


class Authority:
    """A CA in a folder of its own; all of them have the same name."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self.cert = folder / "ca.crt"
        self._key = folder / "ca.key"
        openssl("req", "-x509", *NEW_KEY, "-subj", "/CN=test CA", "-days", "2", "-keyout", self._key, "-out", self.cert)

    def issue(self, name: str, hosts: str = HERE, *, days: int = 2, extension: str = "") -> Files:
        """A certificate for those hosts; expired with -1 days. `extension` is one more, as openssl writes it."""
        key, request, cert = (self._folder / f"{name}.{suffix}" for suffix in ("key", "csr", "crt"))
        extensions = [word for text in (f"subjectAltName={hosts}", extension) if text for word in ("-addext", text)]
        openssl("req", "-new", *NEW_KEY, "-subj", f"/CN={name}", *extensions, "-keyout", key, "-out", request)
        openssl(
            "x509", "-req", "-in", request, "-CA", self.cert, "-CAkey", self._key, "-CAcreateserial",
            "-copy_extensions", "copy", "-days", str(days), "-out", cert,
        )  # fmt: skip
        return Files(str(cert), str(key), str(self.cert))


def openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)
