"""What a command answers: arrays that begin with a code, 0 for success, else a code of the error tree.

Only the codes in `FINAL_CODES` are recorded in the session as a request's final reply. Every other
refusal leaves its seq open: it speaks for its own attempt only.
"""

from __future__ import annotations

from typing import Any, Final

from raftkv.protocol import errors

Result = list[Any]

OK: Final = 0
WRONG_GROUP: Final = errors.WrongGroup.code
LOCKED: Final = errors.Locked.code
CONFLICT: Final = errors.Conflict.code
ABORTED: Final = errors.Aborted.code
BUSY: Final = errors.Busy.code
TOO_LARGE: Final = errors.TooLarge.code
BAD_REQUEST: Final = errors.BadRequest.code
EXPIRED: Final = errors.Expired.code
UNAVAILABLE: Final = errors.Unavailable.code
CAS_MISMATCH: Final = errors.CasMismatch.code
VERSION_MISMATCH: Final = errors.VersionMismatch.code
NO_SUCH_GROUP: Final = errors.NoSuchGroup.code
GROUP_EXISTS: Final = errors.GroupExists.code
BAD_SHARD: Final = errors.BadShard.code
LAST_GROUP: Final = errors.LastGroup.code
SUPERSEDED: Final = errors.Superseded.code
LIST_LOST: Final = errors.ListLost.code
NOT_HOLDER: Final = errors.NotHolder.code
DRAIN_OVER: Final = errors.DrainOver.code

FINAL_CODES: Final = frozenset((OK, CAS_MISMATCH, VERSION_MISMATCH))


def bad_request(reason: str) -> Result:
    return [BAD_REQUEST, reason]


def raise_if_refused(result: Result | None) -> None:
    """Raise the typed error that a refusal stands for."""
    if result is not None and result[0] != OK:
        raise errors.from_result(result)
