"""What storage can refuse or fail with. Each `str()` is one line for a human: what, where, what to do.

The tree:

    StorageError
    ├── DirectoryInUse        another process holds the data directory
    ├── DirectoryDamaged      a part of it is missing
    ├── NotADataDirectory     it holds something else
    ├── IdentityMismatch      it is not the directory of this daemon
    │   ├── OtherReplica        another role, gid or replica id
    │   ├── PeersChanged        another set of peers
    │   └── OtherCluster        another cluster id
    ├── FormatTooNew          written by a later version
    ├── Corruption            bytes known durable read back wrong: file and offset
    ├── StateLost             the log starts above the applied state
    ├── EngineUnreadable      the engine can't be opened
    ├── EngineFailed          the engine failed while in use
    ├── DiskFailed (OSError)  a system call failed, a full disk included
    ├── SnapshotDamaged       a received snapshot can't be used: ask for another
    └── WriteStall            the engine is behind and refuses writes for now

Nothing here is retried inside storage, and `DiskFailed` from the WAL ends the process: after a failed
fsync nobody knows what is on the disk.
"""

from __future__ import annotations

import errno
import os


class StorageError(Exception):
    """Root of the tree."""


class DirectoryInUse(StorageError):
    def __init__(self, path: str, holder: str = "") -> None:
        self.path = path
        by = f" by process {holder}" if holder else ""
        super().__init__(f"data directory {path} is in use{by}: stop that daemon or choose another --data-dir")


class DirectoryDamaged(StorageError):
    def __init__(self, path: str, reason: str) -> None:
        self.path = path
        self.reason = reason
        super().__init__(f"data directory {path}: {reason}; it can't be used, and the replica must be replaced")


class NotADataDirectory(StorageError):
    def __init__(self, path: str, name: str) -> None:
        self.path = path
        super().__init__(f"directory {path} holds {name!r} and is not a data directory: choose an empty --data-dir")


class IdentityMismatch(StorageError):
    """The directory belongs to somebody else; `found` is what it says, `expected` what was asked for."""

    def __init__(self, path: str, what: str, found: object, expected: object, advice: str) -> None:
        self.path = path
        self.found = found
        self.expected = expected
        super().__init__(f"data directory {path} belongs to {what} {found}, not {expected}: {advice}")


class OtherReplica(IdentityMismatch):
    def __init__(self, path: str, what: str, found: object, expected: object) -> None:
        super().__init__(path, what, found, expected, "check --data-dir and the replica's own address")


class PeersChanged(IdentityMismatch):
    def __init__(self, path: str, found: object, expected: object) -> None:
        super().__init__(path, "a group with replicas", found, expected, "start it with the --peers it was made with")


class OtherCluster(IdentityMismatch):
    def __init__(self, path: str, found: bytes, expected: bytes) -> None:
        super().__init__(
            path, "cluster", found.hex(), expected.hex(), "check --data-dir and the controllers' addresses"
        )


class FormatTooNew(StorageError):
    def __init__(self, path: str, found: int, supported: int) -> None:
        self.path = path
        super().__init__(
            f"{path} has format {found}, this version reads up to {supported}: start the version that wrote it"
        )


class Corruption(StorageError):
    """Data that is known to have been durable does not read back."""

    def __init__(self, path: str, offset: int, reason: str) -> None:
        self.path = path
        self.offset = offset
        self.reason = reason
        super().__init__(f"{path} is corrupt at byte {offset}: {reason}; the replica must be replaced")


class StateLost(StorageError):
    def __init__(self, path: str, start_index: int, applied_index: int) -> None:
        self.path = path
        super().__init__(
            f"data directory {path} lost state: the log starts after entry {start_index},"
            f" the engine ends at {applied_index}; the replica must be replaced"
        )


class EngineUnreadable(StorageError):
    def __init__(self, path: str, reason: str) -> None:
        self.path = path
        self.reason = reason
        super().__init__(f"engine {path} can't be opened: {reason}; the replica must be replaced")


class EngineFailed(StorageError):
    def __init__(self, path: str, reason: str) -> None:
        self.path = path
        self.reason = reason
        advice = "free some space" if "No space left" in reason else "check the disk"
        super().__init__(f"engine {path} failed: {reason}; {advice}, then start the daemon again")


class DiskFailed(StorageError, OSError):
    """A disk operation failed. `errno` is the system's."""

    def __init__(self, path: str, number: int, reason: str = "") -> None:
        self.path = path
        self.reason = reason or os.strerror(number)
        full = number in (errno.ENOSPC, errno.EDQUOT)
        advice = "free some space" if full else "check the disk and its permissions"
        super().__init__(
            number, f"disk operation on {path} failed: {self.reason}; {advice}, then start the daemon again"
        )

    def __str__(self) -> str:
        return str(self.args[1])

    @classmethod
    def of(cls, error: OSError, path: str) -> DiskFailed:
        """The same failure with a clear text; `path` is used where `error` names none."""
        if isinstance(error, cls):
            return error
        failed = cls(str(error.filename or path), error.errno or errno.EIO, error.strerror or str(error))
        failed.__cause__ = error
        return failed


class SnapshotDamaged(StorageError):
    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(f"received snapshot can't be used: {reason}")


class WriteStall(StorageError):
    def __init__(self, path: str) -> None:
        super().__init__(f"engine {path} is behind with its background work and takes no writes for now")
