"""`--tls-cert`, `--tls-key` and `--tls-ca`: what every program makes of them.

Nothing of TLS is imported unless they are given.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from raftkv.cli.exit_codes import UsageError

if TYPE_CHECKING:
    import ssl

    from raftkv.protocol.tls import Tls

TLS_OPTIONS = {
    "--tls-cert": "PEM: the certificate to show; with these three every connection is mutual TLS",
    "--tls-key": "PEM: its private key",
    "--tls-ca": "PEM: the CA of everybody's certificates",
}


def client_ssl(cert: str | None, key: str | None, ca: str | None) -> ssl.SSLContext | None:
    """What a client dials with; None if no file is given. Raises UsageError."""
    files = _all_or_none(cert, key, ca)
    if files is None:
        return None
    from raftkv.protocol.tls import BadTls, client_context

    try:
        return client_context(*files)
    except BadTls as error:
        raise UsageError(str(error)) from None


def daemon_tls(cert: str | None, key: str | None, ca: str | None) -> Tls | None:
    """What a daemon listens and dials with; None if no file is given. Raises UsageError."""
    files = _all_or_none(cert, key, ca)
    if files is None:
        return None
    from raftkv.protocol.tls import BadTls, Tls

    try:
        return Tls.load(*files)
    except BadTls as error:
        raise UsageError(str(error)) from None


def _all_or_none(cert: str | None, key: str | None, ca: str | None) -> tuple[str, str, str] | None:
    """The three paths. Raises UsageError if some are missing."""
    if cert and key and ca:
        return cert, key, ca
    missing = [name for name, path in zip(TLS_OPTIONS, (cert, key, ca), strict=True) if not path]
    if len(missing) == len(TLS_OPTIONS):
        return None
    raise UsageError(f"{' and '.join(missing)} missing: --tls-cert, --tls-key and --tls-ca belong together")
