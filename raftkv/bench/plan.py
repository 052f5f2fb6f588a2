"""What is to be measured, as a value that every loading process gets, and what one second of it came to."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from raftkv.bench.histogram import Histogram
from raftkv.client.controllers import Controllers
from raftkv.client.kv import RaftKV

if TYPE_CHECKING:
    import ssl

KEY_PREFIX = b"bench:"
"""Of every key that is touched."""


class BadPlan(Exception):
    """It can't be carried out on this cluster; str() is one line for people."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The options of one measurement.

    `rate`: requests per second of all processes together, None for a closed loop. `conflict`: the share (0 to 1) of
    requests on the few common keys. `groups`: how many a request touches, in the scenarios that care. `batch`: keys of
    one batch. `tls`: the files of certificate, key and CA, if the cluster speaks TLS.
    """

    scenario: str
    controllers: tuple[str, ...]
    timeout_s: float
    clients: int
    processes: int
    duration_s: float
    warmup_s: float
    keys: int
    value_bytes: int
    conflict: float
    groups: int | None
    batch: int
    rate: float | None
    seed: int
    tls: tuple[str, str, str] | None = None

    def client(self) -> RaftKV:
        """A client of the store, to be closed by whoever asks for it."""
        return RaftKV(self.controllers, timeout_s=self.timeout_s, ssl=self._ssl())

    def admin(self) -> Controllers:
        """A client of the controllers, to be closed by whoever asks for it."""
        return Controllers(self.controllers, timeout_s=self.timeout_s, ssl=self._ssl())

    def _ssl(self) -> ssl.SSLContext | None:
        return None if self.tls is None else _context(*self.tls)

    @classmethod
    def decode(cls, encoded: dict[str, Any]) -> Plan:
        """What `asdict` made of one, and JSON of that."""
        tls = encoded["tls"]
        return cls(**{**encoded, "controllers": tuple(encoded["controllers"]), "tls": tls and tuple(tls)})

    def clients_of(self, process: int) -> range:
        """The numbers of the clients in one of the processes."""
        return range(process, self.clients, self.processes)


@cache
def _context(cert: str, key: str, ca: str) -> ssl.SSLContext:
    """One for all clients of a process."""
    from raftkv.protocol.tls import client_context

    return client_context(cert, key, ca)


@dataclass(slots=True)
class Tally:
    """What requests came to. `retries` are requests that the SDK sent again; `failed_attempts` are attempts of
    transactions that lost against others and began again. `latency` is that of successes only."""

    done: int = 0
    unknown: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    retries: int = 0
    failed_attempts: int = 0
    latency: Histogram = field(default_factory=Histogram)

    @property
    def requests(self) -> int:
        return self.done + self.unknown.total() + self.errors.total()

    def add(self, other: Tally) -> None:
        self.done += other.done
        self.unknown.update(other.unknown)
        self.errors.update(other.errors)
        self.retries += other.retries
        self.failed_attempts += other.failed_attempts
        self.latency.add(other.latency)

    def encode(self) -> list[Any]:
        """For JSON."""
        latency = self.latency.encode()
        return [self.done, dict(self.unknown), dict(self.errors), self.retries, self.failed_attempts, latency]

    @classmethod
    def decode(cls, encoded: list[Any]) -> Tally:
        """What `encode` was called on."""
        done, unknown, errors, retries, failed_attempts, latency = encoded
        return cls(done, Counter(unknown), Counter(errors), retries, failed_attempts, Histogram.decode(latency))


Series = dict[int, dict[str, Tally]]
"""By second of the measurement in which requests ended, then by kind of request."""


def add_series(into: Series, second: int, kinds: dict[str, Tally]) -> None:
    """Take in one second of one process."""
    here = into.setdefault(second, {})
    for kind, tally in kinds.items():
        here.setdefault(kind, Tally()).add(tally)
