"""The commands of `raftkv-kv` around a transaction: Begin, Commit, Abort, Lock, Txn.

What stands between Begin and Commit belongs to the session's transaction, also when that has been aborted meanwhile: a
line of it must never be carried out by itself. Only Commit and Abort end it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from raftkv.cli.command_table import Argument, Call, Command
from raftkv.cli.exit_codes import UsageError
from raftkv.cli.results import Done, Result
from raftkv.cli.words import show_word

if TYPE_CHECKING:
    from raftkv.cli.session import Session


async def begin(session: Session, call: Call) -> Result:
    """Open a transaction."""
    if session.one_shot:
        raise UsageError(
            "Begin: a transaction is several commands; type them in the shell, or give them on standard input"
        )
    session.refuse_inside(call)
    txn = session.kv(call.options).transaction()
    txn.timeout_s = session.timeout_s(call.options)
    await txn.begin()
    session.transaction = txn
    txid = txn.txid.hex()
    return Done({"txid": txid}, f"OK {txid}")


async def commit(session: Session, call: Call) -> Result:
    """Do all of it, or nothing; then it is over in any case."""
    _require_transaction(session, call)
    try:
        txn = session.transaction_of(call)
        assert txn is not None
        await txn.commit()
    except BaseException:
        if session.transaction is not None and session.broken is not None:
            await session.transaction.abort()
        raise
    finally:
        session.transaction = session.broken = None
    return Done({"txid": txn.txid.hex()})


async def abort(session: Session, call: Call) -> Result:
    """Forget it."""
    _require_transaction(session, call)
    await session.end_transaction()
    return Done()


async def lock(session: Session, call: Call) -> Result:
    """Keep everybody else from writing the keys."""
    _require_transaction(session, call)
    txn = session.transaction_of(call)
    assert txn is not None
    await txn.lock(*call.words)
    return Done()


async def txn(session: Session, call: Call) -> Result:
    """What became of a transaction; or see to it that something has."""
    word, text = call.words
    question = word.decode("utf-8", "replace").lower()
    if question not in ("status", "resolve"):
        raise UsageError(f"Txn {show_word(word)}: there are Txn status TXID and Txn resolve TXID")
    try:
        txid = bytes.fromhex(text.decode("ascii"))
    except ValueError:
        txid = b""
    if len(txid) != 16 or len(text) != 32:
        what = f"{show_word(text)} is not a TXID: 32 hexadecimal digits, as Begin prints them"
        raise UsageError(f"Txn {question}: {what}")
    client = session.kv(call.options)
    state = str(await (client.resolve_txn(txid) if question == "resolve" else client.txn_status(txid)))
    return Done({"txid": txid.hex(), "state": state}, state)


def _require_transaction(session: Session, call: Call) -> None:
    if not session.in_transaction:
        where = "; one-shot commands have none" if session.one_shot else "; Begin opens one"
        raise UsageError(f"{call.command.name}: no transaction is open{where}")


TRANSACTION_COMMANDS = (
    Command(
        "Begin",
        "open a transaction; Put, Get, Append and Delete up to Commit belong to it",
        begin,
        details="Prints OK TXID. Writes wait until Commit; Get shows them already. In the shell and in scripts.",
        examples=("Begin",),
    ),
    Command(
        "Commit",
        "do everything since Begin at one instant, or nothing",
        commit,
        details=(
            "Exit code 7: somebody else was first with a key that it used; nothing was written, run it again.\n"
            "Exit code 6: nobody could say; `Txn resolve TXID` settles it; it must not be run again before."
        ),
        examples=("Commit",),
        writes=True,
    ),
    Command(
        "Abort",
        "forget everything since Begin",
        abort,
        examples=("Abort",),
    ),
    Command(
        "Lock",
        "in a transaction: keep others from writing KEYs until it ends",
        lock,
        (Argument("KEY", many=True, completes="keys"),),
        details=(
            "Waits for whoever holds them; of two transactions that wait for each other the younger one is aborted.\n"
            "Others may still read them. The locks of a client that dies end by themselves within seconds."
        ),
        examples=("Lock account:1 account:2",),
    ),
    Command(
        "Txn",
        "print what became of a transaction: committed, aborted, pending, expired or unknown",
        txn,
        (Argument("status|resolve", choices=("status", "resolve")), Argument("TXID", completes="txids")),
        details=(
            "status only asks. pending: not decided yet. expired: so old that it may have been forgotten.\n"
            "unknown: no server has heard of it; it may be open still.\n"
            "resolve, after exit code 6: committed or aborted, from now on for ever. What nobody has committed is\n"
            "given up, also while its client is alive."
        ),
        examples=(
            "Txn status 0000000002faf080c2ce6f447ed4d57b",
            "Txn resolve 0000000002faf080c2ce6f447ed4d57b",
        ),
    ),
)
