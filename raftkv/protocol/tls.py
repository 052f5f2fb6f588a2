"""TLS: contexts made of three files, and in words what is wrong with a handshake.

Mutual: each end shows a certificate and verifies the other's against one CA; whoever dials also compares the
certificate's subjectAltName with the host that it dialled. Must never ask for a passphrase, and never trust the
system's CAs.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from raftkv.protocol.errors import TlsRefused

OPTIONS = ("--tls-cert", "--tls-key", "--tls-ca")


class BadTls(ValueError):
    """The files can't be used; the text is one line for a person: which, and why."""


@dataclass(frozen=True, slots=True)
class Tls:
    """Both contexts of a process that is dialled and dials."""

    server: ssl.SSLContext
    client: ssl.SSLContext

    @classmethod
    def load(cls, cert: str, key: str, ca: str) -> Tls:
        """Raise BadTls."""
        return cls(server_context(cert, key, ca), client_context(cert, key, ca))


def server_context(cert: str, key: str, ca: str) -> ssl.SSLContext:
    """For `Server.listen`. The arguments are paths of PEM files; raise BadTls."""
    context = _context(ssl.PROTOCOL_TLS_SERVER, cert, key, ca)
    context.verify_mode = ssl.CERT_REQUIRED
    context.num_tickets = 0  # nobody resumes a session
    return context


def client_context(cert: str, key: str, ca: str) -> ssl.SSLContext:
    """For whoever dials, such as `RaftKV(…, ssl=…)`. The arguments are paths of PEM files; raise BadTls."""
    context = _context(ssl.PROTOCOL_TLS_CLIENT, cert, key, ca)
    context.hostname_checks_common_name = False
    return context


def _context(protocol: int, cert: str, key: str, ca: str) -> ssl.SSLContext:
    for option, path in zip(OPTIONS, (cert, key, ca), strict=True):
        try:
            with Path(path).open("rb") as file:
                file.read(1)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise BadTls(f"{option} {path}: {reason}") from None
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    is_encrypted = False

    def no_passphrase() -> str:
        nonlocal is_encrypted
        is_encrypted = True
        return ""

    try:
        context.load_cert_chain(cert, key, no_passphrase)
    except (ssl.SSLError, OSError) as error:
        reason = getattr(error, "reason", None) or str(error)
        if not _trusts(ssl.SSLContext(protocol), cert):
            raise BadTls(f"--tls-cert {cert}: there is no certificate in it (PEM)") from None
        if reason in _MISMATCHES:
            raise BadTls(f"--tls-key {key}: not the key of the certificate in --tls-cert {cert}") from None
        if is_encrypted:
            raise BadTls(f"--tls-key {key}: it is encrypted; a daemon can't ask for a passphrase") from None
        if reason in _WEAK:
            raise BadTls(f"--tls-cert {cert}: too weak for OpenSSL ({_words(reason)})") from None
        raise BadTls(f"--tls-key {key}: there is no private key in it (PEM)") from None
    if not _trusts(context, ca):
        raise BadTls(f"--tls-ca {ca}: there is no certificate in it (PEM)")
    return context


_MISMATCHES = ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED")
_WEAK = ("EE_KEY_TOO_SMALL", "CA_KEY_TOO_SMALL", "CA_MD_TOO_WEAK")


def _trusts(context: ssl.SSLContext, path: str) -> bool:
    """Have the context trust what is in the file; whether anything is."""
    try:
        context.load_verify_locations(path)
    except ssl.SSLError:
        return False
    return context.cert_store_stats()["x509"] > 0  # 0: revocation lists only


# What went wrong -------------------------------------------------------------------------------------

SPEAKS_TLS = "speaks TLS; give --tls-cert, --tls-key and --tls-ca"
"""What a plain client is told at a port of TLS."""
SPEAKS_NO_TLS = "does not speak TLS; leave the --tls- options out"
"""What a client of TLS finds at a plain port."""
CAME_WITHOUT_TLS = "does not speak TLS; it needs --tls-cert, --tls-key and --tls-ca"
"""What a server of TLS says of a plain client, in its log."""

_VERIFY_TEXTS = {
    **dict.fromkeys((7, 18, 19, 20, 21), "has a certificate that is not signed by the CA in --tls-ca"),
    9: "has a certificate that is not valid yet; look at the clocks of both machines",
    10: "has a certificate that has expired, or whose CA has; make a new one",
    26: "has a certificate whose extendedKeyUsage must name both serverAuth and clientAuth",
}
"""By the codes of OpenSSL (X509_V_ERR_…), as the predicate of a sentence about the other end."""

_ALERT_TEXTS = {
    "UNKNOWN_CA": "does not accept our certificate: not signed by the CA in its --tls-ca",
    "DECRYPT_ERROR": "does not accept our certificate: not signed by the CA in its --tls-ca",
    "CERTIFICATE_EXPIRED": "does not accept our certificate: expired, or its CA, or not valid yet",
    "CERTIFICATE_REQUIRED": "wants a certificate of ours; give --tls-cert and --tls-key",
    "BAD_CERTIFICATE": "does not accept our certificate: its subjectAltName must name the address that was dialled",
    "UNSUPPORTED_CERTIFICATE": "does not accept our certificate: extendedKeyUsage must name serverAuth and clientAuth",
    "PROTOCOL_VERSION": "speaks another version of TLS",
}
"""By the ends of OpenSSL's names for what the other end says (RFC 8446, 6.2)."""


def refusal(error: ssl.SSLError, host: str | None) -> TlsRefused:
    """Why the handshake with the other end failed; `host` is what was dialled, None where it was we who were."""
    reason = error.reason or ""
    if isinstance(error, ssl.SSLCertVerificationError):
        if error.verify_code in (62, 64):
            return TlsRefused(f"has a certificate that is not for {host}; its subjectAltName must name that host")
        text = _VERIFY_TEXTS.get(error.verify_code, f"has a certificate that is refused: {error.verify_message}")
        return TlsRefused(text)
    if "ALERT" in reason:
        for end, text in _ALERT_TEXTS.items():
            if reason.endswith(f"ALERT_{end}"):
                return TlsRefused(text)
        return TlsRefused(f"broke off the TLS handshake: {_words(reason.partition('ALERT_')[2] or reason)}")
    if reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return TlsRefused("came without a certificate; it must be given --tls-cert and --tls-key")
    if reason in ("UNSUPPORTED_PROTOCOL", "WRONG_SSL_VERSION", "NO_PROTOCOLS_AVAILABLE"):
        return TlsRefused("speaks another version of TLS")
    return TlsRefused(f"can't be understood over TLS: {_words(reason) or error}")


def _words(reason: str) -> str:
    return reason.replace("_", " ").lower()
